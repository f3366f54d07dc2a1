"""What an installation holds, and that it comes with everything it imports."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import modcompile

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Where a package lies in the tree, and where in an installation.
PACKAGES = {"modcompile": "modcompile", "passes": "modcompile/passes", "export": "modcompile/export"}


def _tree() -> set[str]:
    """The files that an installation is to have."""
    files = {f"{PACKAGES[name]}/{path.name}" for name in PACKAGES for path in (ROOT / name).glob("*.py")}
    return files | {"modcompile/py.typed"}


def _run(code: str, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, in which building may leave what it likes."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _build(source: Path, kind: str, folder: Path) -> Path:
    """The unpacked wheel of `kind` (wheel or editable)."""
    done = _run(f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})", cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_wheel_holds_the_tree(source: Path, tmp_path: Path) -> None:
    site = _build(source, "wheel", tmp_path)
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {file for file in files if ".dist-info/" not in file} == _tree()
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in files)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installation_imports_from_another_folder(source: Path, tmp_path: Path, kind: str) -> None:
    site = _build(source, kind, tmp_path)
    # With -S and this order, no installation of this checkout itself comes first.
    paths = [str(site), *(path for path in sys.path if path != str(ROOT))]
    code = f"""
import site, sys; sys.path = {paths!r}; site.addsitedir({str(site)!r})
import modcompile, modcompile.passes, modcompile.export
for module in (modcompile, modcompile.passes, modcompile.export): print(module.__file__)
"""
    done = _run(code, "-S", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = [Path(line).resolve() for line in done.stdout.splitlines()]
    folders = [site / name for name in PACKAGES.values()] if kind == "wheel" else [source / name for name in PACKAGES]
    assert files == [folder / "__init__.py" for folder in folders]


@pytest.mark.parametrize("name", ["passes", "export"])
def test_folder_is_no_package_of_its_own(name: str) -> None:
    done = _run(f"import {name}", cwd=ROOT)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith(f"ImportError: import this package as modcompile.{name}")


def test_every_imported_package_is_a_dependency() -> None:
    distributions = packages_distributions()
    imported = set()
    for path in (path for name in PACKAGES for path in (ROOT / name).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                imported.add(node.module.partition(".")[0])
    external = imported - set(sys.stdlib_module_names) - {"modcompile"}
    declared = {canonicalize_name(Requirement(line).name) for line in (*PROJECT["dependencies"], *EXTRAS["cpu"])}
    assert {canonicalize_name(distributions[name][0]) for name in external} <= declared


def test_constraints_pin_what_the_tests_run_with() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {specifier.operator for pin in pins for specifier in pin.specifier} == {"=="}
    pinned = {canonicalize_name(pin.name): specifier.version for pin in pins for specifier in pin.specifier}
    for line in (*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["test"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    assert pinned[canonicalize_name("torch")] == "2.13.0"


def test_version_is_the_project_s() -> None:
    assert modcompile.__version__ == PROJECT["version"]
