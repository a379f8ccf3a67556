"""Fetches published weights: with progress, resumable, verified, renamed only when complete."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import requests
import timm
from safetensors.torch import save_file

from desam_nnunet.encoders.registry import ENCODERS, TIMM, row_by_name
from desam_nnunet.encoders.timm_backbone import TimmBackbone
from desam_nnunet.encoders.weights import search_folders, wrong_hash
from desam_nnunet.system.files import replacing
from desam_nnunet.system.progress import progress

_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


def download(name: str, *, url: str | None = None) -> Path:
    """Brings an encoder's published file into the download folder; a verified one that is there stays.

    A partial download is kept as ``<file>.part`` and continued by the next call.

    Args:
        url: Another source of the same file, a mirror for instance.

    Raises:
        ValueError: No weights are published for `name`, or what arrived is not the published file.
        OSError: The folder can't be written, or there is no way to the server; the message says what to do.
    """
    row = row_by_name(name)
    if row is not None and row.distribution:
        raise ValueError(f"'{name}' needs no download: its weights come with the package {row.distribution}; where "
                         f"they are missing, {row.remedy}.")
    if row is None or not (row.url or isinstance(row.architecture, TimmBackbone)) or row.is_random:
        published = ", ".join(row.name for row in ENCODERS.values() if row.url)
        raise ValueError(f"No weights are published for '{name}': choose from {published}, or {TIMM}<a model of "
                         "timm's>.")
    target = _writable_folder() / row.file
    if isinstance(row.architecture, TimmBackbone):
        return target if target.is_file() else _fetch_from_timm(row.architecture, target)
    if target.is_file() and not wrong_hash(target, row):
        return target
    partial = target.with_name(target.name + ".part")
    try:
        _fetch(url or row.url, partial)
    except requests.RequestException as error:
        raise ConnectionError(
            f"{row.file} could not be downloaded from {url or row.url} ({type(error).__name__}). Run the "
            f"command again to continue, or fetch the file on another machine and put it into {target.parent}."
        ) from error
    if wrong := wrong_hash(partial, row):
        partial.unlink()
        name, digest, expected = wrong
        raise ValueError(
            f"What arrived for {row.name} is not the published file ({name.upper().replace('SHA', 'SHA-')} {digest}, "
            f"expected {expected}) and was removed: run the command again.")
    partial.replace(target)
    return target


def _fetch_from_timm(backbone: TimmBackbone, target: Path) -> Path:
    """What timm downloads for a model, its classifier left out, as one file."""
    try:
        model = timm.create_model(backbone.model, pretrained=True, num_classes=0)
    except Exception as error:  # of whatever hub it asks
        raise ConnectionError(f"timm could not bring the weights of {backbone.model} ({type(error).__name__}). Run the "
                              f"command again, or save their state dict on another machine as {target}.") from error
    with replacing(target) as temporary:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    return target


def _writable_folder() -> Path:
    folder = search_folders()[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise PermissionError(f"The weights folder {folder} can't be written ({error.strerror}): set DESAM_WEIGHTS to "
                              "a folder that can.") from error


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
            progress(None, partial.stem, "bytes", total, initial=start, unit_scale=True) as done,
        ):
            for chunk in response.iter_content(_CHUNK):
                stream.write(chunk)
                done.update(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
            if length and stream.tell() < total:
                raise requests.ConnectionError("the connection was cut")
