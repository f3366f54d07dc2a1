import importlib
import subprocess
import sys

import modcompile

_EXPORTED = {
    "LayerwiseQuantizeForCausalLM",
    "ModcompileError",
    "RoutedForCausalLM",
    "__version__",
    "load_with_routers",
    "set_router_mode",
}


def test_exports_these_names_and_no_others() -> None:
    assert set(modcompile.__all__) == _EXPORTED
    assert {name for name in dir(modcompile) if name in _EXPORTED} == _EXPORTED
    for name in _EXPORTED:
        assert getattr(modcompile, name) is not None


def test_every_exported_name_is_that_of_its_module() -> None:
    homes = {
        "LayerwiseQuantizeForCausalLM": "layerwise",
        "ModcompileError": "errors",
        "RoutedForCausalLM": "modeling",
        "__version__": "version",
        "load_with_routers": "artifacts",
        "set_router_mode": "modeling",
    }
    for name, home in homes.items():
        assert getattr(modcompile, name) is getattr(importlib.import_module(f"modcompile.{home}"), name)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(modcompile, "load_without_routers")


def test_import_loads_no_command() -> None:
    """`python -m modcompile.rewrite` would warn of a module that is loaded before it runs."""
    script = (
        "import sys, modcompile; modcompile.load_with_routers; "
        "print([name for name in ('rewrite', 'train', 'evaluate', 'generate') if f'modcompile.{name}' in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
