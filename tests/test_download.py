"""Downloads, against a server on this machine that resumes as the real one does."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from desam_nnunet.encoders import download as module
from desam_nnunet.encoders.download import download
from desam_nnunet.encoders.registry import VARIANTS

CONTENT = bytes(range(256)) * 5000


class Server(BaseHTTPRequestHandler):
    ranges: ClassVar[list[str | None]] = []
    content = CONTENT
    resumes = True
    promised: int | None = None  # bytes of the whole, where it is another number than there are

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        Server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and Server.resumes else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str((self.promised or len(self.content)) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    row = replace(VARIANTS["vit_b"], md5=hashlib.md5(CONTENT).hexdigest())
    monkeypatch.setitem(module.VARIANTS, "vit_b", row)
    monkeypatch.setattr(Server, "ranges", [])
    monkeypatch.setattr(module, "_TIMEOUT", None)  # however slow this machine is
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file.pth"
        server.shutdown()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def test_download_verifies_and_renames(url: str, folder: Path) -> None:
    path = download("vit_b", url=url)
    assert path == folder / "sam_vit_b_01ec64.pth"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_what_is_here_is_not_fetched_again(url: str) -> None:
    download("vit_b", url=url)
    download("vit_b", url=url)
    assert len(Server.ranges) == 1


def test_a_partial_download_continues(url: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder.mkdir()
    (folder / "sam_vit_b_01ec64.pth.part").write_bytes(CONTENT[:1000])
    assert download("vit_b", url=url).read_bytes() == CONTENT
    assert Server.ranges == ["bytes=1000-"]
    assert "1.28M/1.28M" in capfd.readouterr().err


def test_a_complete_partial_download_is_only_verified(url: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "sam_vit_b_01ec64.pth.part").write_bytes(CONTENT)
    assert download("vit_b", url=url).read_bytes() == CONTENT


def test_a_server_that_does_not_resume_starts_again(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "resumes", False)
    folder.mkdir()
    (folder / "sam_vit_b_01ec64.pth.part").write_bytes(b"something else")
    assert download("vit_b", url=url).read_bytes() == CONTENT


@pytest.mark.parametrize(("resumes", "content", "promised"), [
    (False, b"Please log in", 13), (True, CONTENT[:9000], 9999)])
def test_a_page_instead_of_the_file_and_a_cut_connection_lose_nothing(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool, content: bytes, promised: int
) -> None:
    monkeypatch.setattr(Server, "resumes", resumes)
    monkeypatch.setattr(Server, "content", content)
    monkeypatch.setattr(Server, "promised", promised)
    folder.mkdir()
    partial = folder / "sam_vit_b_01ec64.pth.part"
    partial.write_bytes(CONTENT[:5000])
    with pytest.raises(ConnectionError, match="could not be downloaded .* Run the command again to continue"):
        download("vit_b", url=url)
    here = partial.read_bytes()
    assert len(here) >= 5000
    assert here == CONTENT[:len(here)]


def test_another_file_is_refused_and_removed(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "content", b"an error page")
    with pytest.raises(ValueError, match="not the published file .* run the command again"):
        download("vit_b", url=url)
    assert not list(folder.iterdir())


def test_no_network(folder: Path) -> None:
    with pytest.raises(ConnectionError, match=f"could not be downloaded .*another machine and put it into {folder}"):
        download("vit_b", url="http://127.0.0.1:9/file.pth")


def test_unwritable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.raises(PermissionError, match=f"weights folder {folder} can't be written .*set DESAM_WEIGHTS"):
        download("vit_b")


@pytest.mark.parametrize("name", ["vit_tiny_random", "vit_x"])
def test_nothing_published(name: str) -> None:
    with pytest.raises(ValueError, match="No weights are published .*vit_b, vit_l, vit_h"):
        download(name)
