"""Fetches SAM's published weights: with progress, resumable, verified, renamed only when complete."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import requests
from tqdm import tqdm

from desam_nnunet.encoders.registry import VARIANTS, Variant
from desam_nnunet.encoders.weights import download_folder, file_md5

_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


def download(name: str, *, url: str | None = None) -> Path:
    """Brings a variant's published file into the download folder; a verified one that is there stays.

    A partial download is kept as ``<file>.part`` and continued by the next call.

    Args:
        url: Another source of the same file, a mirror for instance.

    Raises:
        ValueError: No weights are published for `name`, or what arrived is not the published file.
        OSError: The folder can't be written, or there is no way to the server; the message says what to do.
    """
    variant = VARIANTS.get(name)
    if variant is not None and variant.packaged:
        raise ValueError(f"'{name}' needs no download: its weights come with this package.")
    if variant is None or not variant.file:
        published = ", ".join(row.name for row in VARIANTS.values() if row.file and not row.packaged)
        raise ValueError(f"No weights are published for '{name}': choose from {published}.")
    target = _writable_folder() / variant.file
    if target.is_file() and file_md5(target) == variant.md5:
        return target
    partial = target.with_name(target.name + ".part")
    try:
        _fetch(url or variant.url, partial)
    except requests.RequestException as error:
        raise ConnectionError(
            f"{variant.file} could not be downloaded from {url or variant.url} ({type(error).__name__}). Run the "
            f"command again to continue, or fetch the file on another machine and put it into {target.parent}."
        ) from error
    _verify(partial, variant)
    partial.replace(target)
    return target


def _writable_folder() -> Path:
    folder = download_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise PermissionError(
            f"The weights folder {folder} can't be written ({error.strerror}): set DESAM_WEIGHTS to a folder that "
            "can."
        ) from error


def _fetch(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # everything is here already; the hash decides
        response.raise_for_status()
        length = int(response.headers.get("Content-Length", 0))
        if response.status_code != requests.codes.partial_content:
            if length < start:
                raise requests.ConnectionError("the answer is shorter than what is here: not the file")
            start = 0  # the server does not resume: begin again
        total = start + length
        with (
            open(partial, "ab" if start else "wb") as stream,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=partial.stem) as progress,
        ):
            for chunk in response.iter_content(_CHUNK):
                stream.write(chunk)
                progress.update(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
            if length and stream.tell() < total:
                raise requests.ConnectionError("the connection was cut")


def _verify(partial: Path, variant: Variant) -> None:
    md5 = file_md5(partial)
    if md5 != variant.md5:
        partial.unlink()
        raise ValueError(
            f"What arrived for {variant.name} is not the published file (MD5 {md5}, expected {variant.md5}) and was "
            "removed: run the command again."
        )
