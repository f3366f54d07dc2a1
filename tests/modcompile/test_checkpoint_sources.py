import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

from modcompile.checkpoint_sources import fetch_checkpoint, find_checkpoint
from modcompile.errors import CheckpointError
from tests.local_hub import LocalHub, local_hub


def test_finds_a_folder_by_any_spelling_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home" / "my-model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for spelling in (str(folder), "./my-model", "my-model", "my-model/", "~/my-model", "../home/my-model"):
        source = find_checkpoint(spelling)
        assert (source.kind, source.location, source.name, str(source)) == (
            "folder",
            str(folder),
            "my-model",
            str(folder),
        )


def test_finds_a_gguf_file_that_is_a_link_to_another_name(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    (tmp_path / "Tiny.Q4_1.gguf").symlink_to("blob")
    source = find_checkpoint(str(tmp_path / "Tiny.Q4_1.gguf"))
    assert (source.kind, source.location, source.gguf_file, source.name) == (
        "gguf",
        str(tmp_path),
        "Tiny.Q4_1.gguf",
        "Tiny.Q4_1",
    )


@pytest.mark.parametrize("model", ["./missing", "/missing/model", "~/missing/model", "missing.gguf", "../../missing"])
def test_refuses_a_path_that_does_not_exist(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing.* does not exist; give a folder"):
        find_checkpoint(model)


def test_refuses_the_home_of_a_user_that_does_not_exist() -> None:
    with pytest.raises(CheckpointError, match="home directory"):
        find_checkpoint("~nobody-of-this-name/model")


def test_refuses_a_weights_file_in_place_of_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match=r"is a file, but no \.gguf file; give the folder"):
        find_checkpoint(str(file))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package that can't be imported."""
    folder = tmp_path / "site" / "llm_of_the_tests"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('this package was imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


@pytest.mark.parametrize("model", ["llm_of_the_tests", "llm-of-the-tests"])
def test_finds_the_gguf_file_of_a_package_without_importing_it(package: Path, model: str) -> None:
    (package / "data").mkdir()
    (package / "data" / "Tiny.gguf").touch()
    source = find_checkpoint(model)
    assert (source.kind, source.location, source.gguf_file) == ("package", str(package / "data"), "Tiny.gguf")
    assert source.name == "llm_of_the_tests"


@pytest.mark.parametrize(("files", "found"), [([], "no .gguf file"), (["a.gguf", "b.gguf"], "2 .gguf files, a.gguf")])
def test_refuses_a_package_without_exactly_one_gguf_file(package: Path, files: list[str], found: str) -> None:
    for name in files:
        (package / name).touch()
    with pytest.raises(CheckpointError, match=f"package llm_of_the_tests ships {found}"):
        find_checkpoint("llm_of_the_tests")


def test_a_path_goes_before_a_package(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "Tiny.gguf").touch()
    (tmp_path / "llm_of_the_tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("llm_of_the_tests").kind == "folder"


@pytest.mark.parametrize(
    ("model", "name"),
    # __future__ is a module and __main__ runs the tests: neither is a package.
    [("org/a-model.v1", "a-model.v1"), ("a-model", "a-model"), ("__future__", "__future__"), ("__main__", "__main__")],
)
def test_takes_another_name_for_a_hub_id(model: str, name: str) -> None:
    source = find_checkpoint(model)
    assert (source.kind, source.location, source.name) == ("hub", model, name)


@pytest.mark.parametrize("model", ["", "org/name/file", "two words", "org/", "-"])
def test_refuses_what_no_hub_can_have(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a path that exists, nor an installed package, nor a hub id"):
        find_checkpoint(model)


def _use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    constants = huggingface_hub.constants
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Clients before 1.0 have a copy.
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub that has the model org/tiny."""
    folder = tmp_path / "hub" / "org" / "tiny"
    (folder / "onnx").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.safetensors", "README.md"):
        (folder / name).write_text(f"this is {name}")
    with local_hub(tmp_path / "hub") as hub:
        _use_hub(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def test_fetches_what_a_model_needs_and_no_pickles(hub: LocalHub) -> None:
    folder = fetch_checkpoint(find_checkpoint("org/tiny"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "config.json").read_text() == "this is config.json"
    assert sorted(hub.served) == ["config.json", "model.safetensors"]


def test_takes_what_it_fetched_before_when_the_hub_is_gone(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_checkpoint(find_checkpoint("org/tiny"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    _use_hub(monkeypatch, f"http://127.0.0.1:{port}", tmp_path / "cache")
    assert fetch_checkpoint(find_checkpoint("org/tiny")) == folder


def test_says_that_the_hub_has_no_such_model(hub: LocalHub) -> None:
    with pytest.raises(CheckpointError, match=r"org/other is neither a path.* the hub has no such model"):
        fetch_checkpoint(find_checkpoint("org/other"))


def test_says_that_the_hub_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    _use_hub(monkeypatch, f"http://127.0.0.1:{port}", tmp_path)
    with pytest.raises(CheckpointError, match=r"org/tiny is neither a path.* can't be fetched from the hub") as caught:
        fetch_checkpoint(find_checkpoint("org/tiny"))
    assert "\n" not in str(caught.value)


def test_gives_up_on_a_hub_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # It accepts connections and sends nothing.
        _use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        with pytest.raises(CheckpointError, match=r"can't be fetched from the hub .*timed out"):
            fetch_checkpoint(find_checkpoint("org/tiny"))
