"""The tiles of a preprocessed case: the windows that nnU-Net's predictor will show the network, and views of them.

Source: nnunetv2 2.8, ``nnUNetPredictor``: the volume is padded to the patch size, and each slice is covered by
windows half a patch apart. A view is an augmented version of a tile, by the trainer's own transforms, with draws that
depend on the tile alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from desam_nnunet.cache.store import Tile

STEP = 0.5  # nnU-Net's, in tiles
_SUFFIXES = (".b2nd", "_seg.b2nd", ".npz")  # of images and labels, in nnU-Net's two formats


def tiles_of(shape: Sequence[int], patch_size: Sequence[int]) -> tuple[Tile, ...]:
    """The tiles of a case of so many slices, rows and columns, slice by slice."""
    slices, *plane = map(int, shape)
    missing = [max(0, patch - side) for patch, side in zip(patch_size, plane, strict=True)]
    padded = tuple(side + more for side, more in zip(plane, missing, strict=True))
    tops, lefts = compute_steps_for_sliding_window(padded, tuple(patch_size), STEP)
    return tuple(
        Tile(index, top - missing[0] // 2, left - missing[1] // 2)
        for index in range(slices) for top in tops for left in lefts
    )


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


class Augmentation:
    """How a trainer augments its patches, asked through nnU-Net's two hooks for it: makes views of tiles.

    Attributes:
        name: Everything that changes a view: the transforms with their parameters, versions and the larger window.
        mirror_axes: Those that the views are mirrored along; prediction may mirror them too.
    """

    def __init__(self, trainer: nnUNetTrainer) -> None:
        configuration = trainer.configuration_manager
        rotation, dummy_2d, initial, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.mirror_axes = mirror_axes
        self._transforms = trainer.get_training_transforms(
            configuration.patch_size, rotation, None, mirror_axes, dummy_2d,
            use_mask_for_norm=configuration.use_mask_for_norm)
        for transform in self._transforms.transforms:
            inner = getattr(transform, "transform", transform)
            if hasattr(inner, "benchmark"):  # the blur's: two ways, chosen by timing, whose last bits differ
                inner.benchmark = False
        self._window = tuple(int(side) for side in initial)
        self._margin = [large // 2 - small // 2
                        for large, small in zip(self._window, configuration.patch_size, strict=True)]
        versions = ", ".join(f"{library} {version(library)}" for library in ("nnunetv2", "batchgeneratorsv2"))
        parameters = re.sub(r" at 0x[0-9a-f]+", "", f"{self._transforms!r} {configuration.use_mask_for_norm}")
        self.name = f"{hashlib.sha256(parameters.encode()).hexdigest()[:16]}, {versions}, window {self._window}"

    def __call__(self, data: Any, seg: Any, tile: Tile, case: str, number: int, view: int) -> tuple[np.ndarray, ...]:
        """View `view` of tile `number`: image (C, H, W) and labels (H, W), the same whenever it is asked for.

        Args:
            data, seg: The preprocessed case, (C, slices, rows, columns).
        """
        around = Tile(tile.slice, tile.top - self._margin[0], tile.left - self._margin[1])
        image = torch.tensor(crop(data, around, self._window, 0), dtype=torch.float32)  # copied: some work in place
        labels = torch.tensor(crop(seg, around, self._window, -1), dtype=torch.int16)
        with _seeded(f"{case} {number} {view}"):
            sample = self._transforms(image=image, segmentation=labels)
        return sample["image"].numpy(), sample["segmentation"][0].numpy()


def not_started(trainer_class: type[nnUNetTrainer], configuration: ConfigurationManager) -> nnUNetTrainer:
    """A trainer that knows its configuration and no more: enough to ask how it augments, and nothing on disk."""
    trainer = object.__new__(trainer_class)
    trainer.configuration_manager = configuration
    trainer.print_to_log_file = lambda *_args, **_options: None
    return trainer


@contextlib.contextmanager
def _seeded(name: str) -> Iterator[None]:
    """numpy's and PyTorch's generators of the CPU start from `name`, and afterwards go on where they were."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs as well
        try:
            yield
        finally:
            np.random.set_state(state)
