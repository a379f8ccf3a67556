"""Finds, verifies and loads the weights of encoders.

Where a named encoder's file is looked for, in this order (after the package of the index that brings it, if one does):

1. the folder in the environment variable ``DESAM_WEIGHTS``,
2. ``$XDG_CACHE_HOME/desam_nnunet`` (``~/.cache/desam_nnunet``); ``desam weights get`` writes to the first of these two,
3. torch.hub's ``checkpoints`` folder, where other SAM software leaves its downloads.

An encoder given as a path is taken from there; where that path does not exist (a model that moved to another machine),
a file of the same name is looked for in the same folders.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import hub

from desam_nnunet.encoders.base import Architecture, LoadedEncoder, State
from desam_nnunet.encoders.random_weights import RANDOM_IDENTITY
from desam_nnunet.encoders.registry import ENCODERS, OURS, EncoderRow, row_by_name
from desam_nnunet.encoders.state import check_state, read_weights


def search_folders() -> list[Path]:
    """The folders in which weights are looked for, in order, whether they exist or not; downloads go to the first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "desam_nnunet"
    folders = [Path(os.environ.get("DESAM_WEIGHTS") or cache).expanduser(), cache, Path(hub.get_dir(), "checkpoints")]
    return list(dict.fromkeys(folders))


def find_weights(encoder: str, identity: str | None = None) -> Path | None:
    """The weights file of `encoder`, a name or a path; None for random weights.

    Args:
        identity: Of several files the one with this identity is taken, if there is one; else the first.

    Raises:
        FileNotFoundError: It is nowhere; the message says where it was looked for and what to do.
        ValueError: `encoder` is neither a known name nor looks like a path.
    """
    row = row_by_name(encoder)
    if row is not None and (row.is_random or (row.distribution == OURS and identity == RANDOM_IDENTITY)):
        return None  # before vit_tiny had weights it meant random ones, and models of that time go on
    path = Path(row.file if row else encoder).expanduser()
    if row is None and path.suffix == "" and path.parent == Path() and not path.is_file():
        raise ValueError(f"Unknown encoder '{encoder}': give one of {', '.join(ENCODERS)}, timm/<a model of timm's>, "
                         "or the path of a weights file.")
    places = [folder / path.name for folder in search_folders()]
    if row is None or path.is_absolute():
        places.insert(0, path)
    elif row.distribution:
        places = _in_distribution(row) + places
    present = [place for place in places if place.is_file()]
    if not present:
        remedy = row.remedy if row else "put the file into one of these folders"
        searched = ", ".join(str(place.parent) for place in places)
        raise FileNotFoundError(f"No weights file {path.name} in {searched}: {remedy}.")
    if not identity:
        return present[0]
    return next((place for place in present if identity == f"md5:{file_hash(place)}"), present[0])


def absolute_encoder(encoder: str) -> str:
    """An encoder's name, of a file with its path, wherever training will be started from."""
    path = Path(encoder).expanduser()
    return str(path.resolve()) if row_by_name(encoder) is None and path.is_file() else encoder


def is_here(encoder: str) -> bool:
    """Whether the weights of an encoder are on this machine."""
    try:
        find_weights(encoder)
    except FileNotFoundError:
        return False
    return True


def identify(encoder: str, expected: str | None = None) -> str:
    """Names the weights of `encoder` beyond doubt: ``md5:<hash of the file>`` or the random generator and seed.

    Args:
        expected: Of several files the one with this identity is looked at, if there is one.

    Raises:
        FileNotFoundError, ValueError: As :func:`find_weights`; or a published file's hash is not the known one.
    """
    path, row = find_weights(encoder, expected), row_by_name(encoder)
    if path is None:
        assert row is not None
        return row.random_identity
    identity = f"md5:{file_hash(path)}"
    if row is not None and identity != expected and (wrong := wrong_hash(path, row)):
        name, digest, published = wrong
        raise ValueError(
            f"{path} is not the published {row.name} file: its {name.upper()} is {digest}, expected {published}. It "
            f"is truncated or another file: remove it and {row.remedy}, or give its path as the encoder if it holds "
            "your own weights.")
    return identity


def find_row(encoder: str) -> EncoderRow:
    """The row of an encoder by name, or of that which its file is shaped like; errors as of :func:`find_weights`."""
    if row := row_by_name(encoder):
        return row
    path = find_weights(encoder)
    assert path is not None  # only a name can be without a file
    return _row_of_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _row_of_file(path: Path, _modified: int) -> EncoderRow:
    return row_of_state(read_weights(path), path)


def load_encoder(encoder: str, image_size: int, expected_identity: str | None = None) -> LoadedEncoder:
    """Loads an encoder, a name or a file shaped like one, for one input size; position tables are interpolated.

    Args:
        expected_identity: What the model was trained with; another identity is refused.

    Raises:
        FileNotFoundError: No weights found.
        ValueError: Not a file of a known encoder, wrong keys or shapes, a known file with another hash, another
            identity, or a size that the encoder does not take.
    """
    identity = identify(encoder, expected_identity)
    if expected_identity is not None:
        check_identity(encoder, identity, expected_identity)
    path, row = find_weights(encoder, identity), row_by_name(encoder)
    if path is None:
        assert row is not None
        row.architecture.check_image_size(image_size)
        return row.architecture.load(row.architecture.random_state(), image_size, identity)._replace(trained=False)
    state = read_weights(path)
    architecture = _architecture_of(state, row, path)
    architecture.check_image_size(image_size)
    used = {key: value.float() if value.is_floating_point() else value  # also half precision's
            for key, value in state.items() if not architecture.unused(key)}
    return architecture.load(used, image_size, identity)


def _architecture_of(state: State, row: EncoderRow | None, path: Path) -> Architecture:
    """What a file holds; a ValueError where that is another encoder than its name says."""
    if row is not None and row.name not in ENCODERS:
        check_architecture(state, row, path)
        return row.architecture
    shaped = row_of_state(state, path)
    if row is not None and shaped.architecture != row.architecture:
        raise ValueError(f"{path} holds {shaped.name} weights, but the encoder is '{row.name}'.")
    return shaped.architecture


def describe_file(path: Path) -> str:
    """What a weights file holds, and whether it is a published one."""
    row = row_of_state(read_weights(path), path)
    what = "not one of the published files"
    if (row.md5 or row.sha256) and not wrong_hash(path, row):
        what = f"{row.name} of this package" if row.distribution == OURS else f"the published {row.name}"
    return f"{path}: {row.name}, MD5 {file_hash(path)}, {what}"


def wrong_hash(path: Path, row: EncoderRow) -> tuple[str, str, str] | None:
    """A hash that a file has and the one published under the row's name has not: its name, the file's, the expected."""
    for name, expected in (("md5", row.md5), ("sha256", row.sha256)):
        if expected and (digest := file_hash(path, name)) != expected:
            return name, digest, expected
    return None


def check_identity(encoder: str, found: str, expected: str) -> None:
    """Refuses other weights than the expected ones, with a ValueError."""
    if found != expected:
        remedy = f"put that weights file into {search_folders()[0]}"
        if not expected.startswith("md5:"):
            remedy = "these random weights are not made by this version of desam_nnunet; train again"
        raise ValueError(f"The encoder '{encoder}' found here is {found}, but the plans were trained or made with "
                         f"{expected}: {remedy}.")


def row_of_state(state: State, path: Path | str) -> EncoderRow:
    """The first row whose keys and shapes `state` has, all of them; a ValueError says where the nearest differs."""
    nearest = max(ENCODERS.values(), key=lambda row: _likeness(state, row.architecture))
    if _likeness(state, nearest.architecture) < 0.5:
        raise ValueError(f"{path} is not a SAM file: it has no image encoder of a known size ({', '.join(ENCODERS)}).")
    check_architecture(state, nearest, path)
    return nearest


def check_architecture(state: State, row: EncoderRow, path: Path | str) -> None:
    """Refuses keys, shapes or values that are not those of the row's encoder, with a ValueError."""
    used = {key: value for key, value in state.items() if not row.architecture.unused(key)}
    check_state(used, _shapes(row.architecture), f"{path} as {row.name}")
    rest = {key: value for key, value in state.items()  # tables of whole numbers may be there
            if key not in used and (value.is_floating_point() or value.is_complex())}
    check_state(rest, {key: value.shape for key, value in rest.items()}, f"{path} as {row.name}")


@lru_cache(maxsize=16)
def _shapes(architecture: Architecture) -> dict[str, torch.Size]:
    return architecture.shapes()


def _likeness(state: State, architecture: Architecture) -> float:
    """The share of the architecture's encoder weights that `state` has in their shapes."""
    shapes = {key: shape for key, shape in _shapes(architecture).items() if key.startswith("image_encoder.")}
    return sum(key in state and state[key].shape == shape for key, shape in shapes.items()) / len(shapes)


def file_hash(path: Path, name: str = "md5") -> str:
    """The hash of a file by one of hashlib's names, MD5 as of SAM's files; remembered while the file is unchanged."""
    stat = path.stat()
    return _hash_file(name, str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)
def _hash_file(name: str, path: str, size: int, modified: int) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _in_distribution(row: EncoderRow) -> list[Path]:
    """Where the installed package that brings the row's file has it, without importing that package."""
    if row.distribution == OURS:
        return [Path(__file__).with_name(row.file)]
    try:
        brought = files(row.distribution) or []
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in brought if file.name == row.file]
