"""The tiles of a preprocessed case: the windows that nnU-Net's predictor will show the network.

Source: nnunetv2 2.8, ``nnUNetPredictor``: the volume is padded to the patch size, and each slice is covered by
windows half a patch apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from desam_nnunet.cache.store import Tile

STEP = 0.5  # nnU-Net's, in tiles
_SUFFIXES = (".b2nd", "_seg.b2nd", ".npz")  # of images and labels, in nnU-Net's two formats


def tiles_of(shape: Sequence[int], patch_size: Sequence[int]) -> tuple[Tile, ...]:
    """The tiles of a case of so many slices, rows and columns, slice by slice."""
    tops, lefts = _starts(shape, patch_size)
    return tuple(Tile(index, top, left) for index in range(int(shape[0])) for top in tops for left in lefts)


def count_tiles(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """How many :func:`tiles_of` gives."""
    tops, lefts = _starts(shape, patch_size)
    return int(shape[0]) * len(tops) * len(lefts)


def _starts(shape: Sequence[int], patch_size: Sequence[int]) -> list[list[int]]:
    """First rows and first columns of the tiles of a slice; below zero where a tile is larger."""
    plane = list(map(int, shape[1:]))
    missing = [max(0, patch - side) for patch, side in zip(patch_size, plane, strict=True)]
    padded = tuple(side + more for side, more in zip(plane, missing, strict=True))
    steps = compute_steps_for_sliding_window(padded, tuple(patch_size), STEP)
    return [[begin - more // 2 for begin in begins] for begins, more in zip(steps, missing, strict=True)]


def crop(volume: Any, tile: Tile, patch_size: Sequence[int], fill: int) -> np.ndarray:
    """The window (C, H, W) of a volume (C, slices, rows, columns), `fill` where it reaches out of it."""
    bounds = [[tile.slice, tile.slice + 1]]
    bounds += [[begin, begin + side] for begin, side in zip(tile[1:], patch_size, strict=True)]
    return crop_and_pad_nd(volume, bounds, fill)[:, 0]


def content_of(folder: Path, case: str) -> str:
    """Names the preprocessed images and labels of a case: SHA-256 over their files.

    Raises:
        FileNotFoundError: The case is not preprocessed.
    """
    files = [path for path in (folder / f"{case}{suffix}" for suffix in _SUFFIXES) if path.is_file()]
    if not files:
        raise FileNotFoundError(f"The case {case} is not in {folder}: run nnUNetv2_preprocess.")
    stats = {path: path.stat() for path in files}
    lines = [f"{path.name} {_hash_file(path, stat.st_size, stat.st_mtime_ns)}\n" for path, stat in stats.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def _hash_file(path: Path, size: int, modified: int) -> str:
    """Remembered while size and time of the file stay the same."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
