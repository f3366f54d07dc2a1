import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.peer_models import installed_version


def test_version_is_that_of_the_other_environment(tmp_path: Path) -> None:
    assert installed_version(Path(sys.executable), "numpy") == version("numpy")
    assert installed_version(Path(sys.executable), "no-such-package") is None
    assert installed_version(tmp_path / "bin" / "python", "numpy") is None
