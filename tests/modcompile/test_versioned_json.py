import json
from pathlib import Path

import pytest

from modcompile.errors import ArtifactError
from modcompile.version import __version__
from modcompile.versioned_json import parse_versioned, read_versioned, versioned


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(versioned(3, {"layers": [1, 2]})), encoding="utf-8")
    expected = {"format_version": 3, "modcompile_version": __version__, "layers": [1, 2]}
    assert read_versioned(path, 3, again="train again") == expected


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"format_version"', "{}", '{"version": 3}'])
def test_names_the_file_of_other_text(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"^a\.json is damaged \(.+\); train again$"):
        parse_versioned(text, Path("a.json"), 3, again="train again")


@pytest.mark.parametrize("found", [2, 4, "3", None])
def test_names_the_version_of_another(found: object) -> None:
    says = rf"^a\.json has format {found}, this modcompile .* reads format 3; train again, or use the version that"
    with pytest.raises(ArtifactError, match=says):
        parse_versioned(json.dumps({"format_version": found}), Path("a.json"), 3, again="train again")


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_names_a_file_that_is_missing_or_no_text(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.json is damaged \(.+\); train again"):
        read_versioned(path, 3, again="train again")
