import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import datasets
import huggingface_hub
import pytest

from modcompile.errors import DataError
from modcompile.text_sources import load_named_dataset, load_text_dataset, read_text_file


class HubThatRefuses(BaseHTTPRequestHandler):
    """Answers as the hub does for a data set that is not there, closed, or broken: by its name."""

    def do_GET(self) -> None:
        if "gated" in self.path:
            status, code = 403, "GatedRepo"
        elif "broken" in self.path:
            status, code = 400, ""
        else:
            status, code = 404, "RepoNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing on stderr."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tests run with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), HubThatRefuses) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()
        thread.join()


def test_text_file_has_one_row_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.TXT"
    file.write_bytes("first line\r\nnaïve\n\nlast, without a break".encode())
    assert list(load_text_dataset(str(file))["text"]) == ["first line\n", "naïve\n", "\n", "last, without a break"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n'),
        ("a.json", '[{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]'),
    ],
)
def test_json_file_has_one_row_a_record(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    dataset = load_text_dataset(str(file))
    assert dataset.to_dict() == {"id": [1, 2], "text": ["one", "two"]}


def test_file_name_is_no_pattern(tmp_path: Path) -> None:
    file = tmp_path / "part[1]*.txt"
    file.write_text("mine\n")
    (tmp_path / "part1.txt").write_text("another\n")
    assert list(load_text_dataset(str(file))["text"]) == ["mine\n"]


def test_reading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data" / "a.txt"
    file.parent.mkdir()
    file.write_text("one\n")
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    dataset = load_text_dataset(str(file))
    assert dataset.cache_files == []
    assert list(file.parent.iterdir()) == [file]
    assert not cache.exists()


def test_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for content in ("one\n", "two\n"):
        file.write_text(content)
        assert list(load_text_dataset(str(file))["text"]) == [content]


def test_small_file_shows_no_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    shown_before = not datasets.are_progress_bars_disabled()
    load_text_dataset(str(file))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert datasets.are_progress_bars_disabled() != shown_before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n", r"a\.csv is not of a type that can be read: \.txt, \.json, \.jsonl"),
        ("a", b"text\n", "is not of a type that can be read"),
        ("a.txt", None, r"a\.txt does not exist"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"\n\n", r"can't read .*a\.jsonl"),
        ("a.txt", "naïve".encode("latin-1"), r"can't read .*a\.txt: it is not UTF-8"),
        ("a.jsonl", '{"text": "naïve"}'.encode("latin-1"), r"can't read .*a\.jsonl: .*UTF-?8"),
        ("a.json", b'[{"text": "cut', r"can't read .*a\.json"),
    ],
)
def test_rejects_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_text_dataset(str(file))
    assert "\n" not in str(raised.value)


def test_rejects_a_folder_as_file(tmp_path: Path) -> None:
    folder = tmp_path / "a.txt"
    folder.mkdir()
    with pytest.raises(DataError, match=r"a\.txt is not a file"):
        load_text_dataset(str(folder))


def test_reads_a_local_folder_with_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one.jsonl").write_text('{"text": "one"}\n')
    (folder / "two.jsonl").write_text('{"text": "two"}\n')
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: one.jsonl\n"
        "- config_name: second\n  data_files: two.jsonl\n---\n"
    )
    assert list(load_named_dataset(str(folder), "second")["train"]["text"]) == ["two"]
    with pytest.raises(DataError, match=r"can't load the data set .*third.*first.*second") as unknown:
        load_named_dataset(str(folder), "third")
    with pytest.raises(DataError, match=r"can't load the data set .*first.*second") as missing:
        load_named_dataset(str(folder))
    assert "\n" not in str(unknown.value) + str(missing.value)


def test_rejects_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't load the data set"):
        load_named_dataset(str(tmp_path))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "the hub has no data set 'nobody/nothing'"),
        ("somebody/gated", "the data set 'somebody/gated' is gated"),
        ("somebody/broken", "the hub did not give the data set 'somebody/broken': .*400"),
    ],
)
def test_says_what_the_hub_answers(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_named_dataset(name)


@pytest.mark.usefixtures("online")
def test_rejects_a_name_no_data_set_can_have() -> None:
    with pytest.raises(DataError, match="neither a folder nor a name"):
        load_named_dataset("no/such/folder")


@pytest.mark.usefixtures("online")
def test_hub_out_of_reach_fails_at_the_first_try(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:  # bound, but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(DataError, match="the hub can't be reached for the data set 'somebody/something'"):
            load_named_dataset("somebody/something")
    assert "Retrying" not in capfd.readouterr().err


def test_offline_mode_looks_into_the_cache_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"can't load the data set 'somebody/something': .*[Oo]ffline"):
        load_named_dataset("somebody/something")


def test_documents_of_a_text_file_are_its_blocks(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff\n first\nstill first\r\n \t\n\nsecond — ok\n".encode())
    assert read_text_file(str(file)) == ["first\nstill first", "second — ok"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.txt does not exist"),
        (b"", r"a\.txt is empty"),
        (b" \n\n\t\n", r"a\.txt holds only blank lines"),
        (b"\xff\xfe", r"can't read .*a\.txt: it is not UTF-8"),
    ],
)
def test_rejects_text_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text_file(str(file))
