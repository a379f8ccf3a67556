"""Augmented versions of a tile: the trainer's own transforms, with draws that depend on case, tile and view alone."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from desam_nnunet.augmentation.slabs import changes_image_only
from desam_nnunet.cache.store import Tile
from desam_nnunet.cache.tiles import crop
from desam_nnunet.settings.sections import SamSection


class Augmentation:
    """How a trainer augments its patches, asked through nnU-Net's two hooks for it: makes views of tiles.

    Args:
        by_case: Whether all tiles of a case are turned, scaled and mirrored alike in a view.

    Attributes:
        name: Everything that changes a view: the transforms with their parameters, versions, the larger window, and
            whether geometry is drawn by case.
        mirror_axes: Those that the views are mirrored along; prediction may mirror them too.
    """

    def __init__(self, trainer: nnUNetTrainer, *, by_case: bool) -> None:
        configuration = trainer.configuration_manager
        rotation, dummy_2d, initial, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.mirror_axes = mirror_axes
        self._by_case = by_case
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
        self.name = (f"{hashlib.sha256(parameters.encode()).hexdigest()[:16]}, {versions}, window {self._window}"
                     f"{', geometry by case' if self._by_case else ''}")

    def __call__(self, data: Any, seg: Any, tile: Tile, case: str, number: int, view: int) -> tuple[np.ndarray, ...]:
        """View `view` of tile `number`: image (C, H, W) and labels (H, W), the same whenever it is asked for.

        Args:
            data, seg: The preprocessed case, (C, slices, rows, columns).
        """
        around = Tile(tile.slice, tile.top - self._margin[0], tile.left - self._margin[1])
        image = torch.tensor(crop(data, around, self._window, 0), dtype=torch.float32)  # copied: some work in place
        labels = torch.tensor(crop(seg, around, self._window, -1), dtype=torch.int16)
        sample = {"image": image, "segmentation": labels}
        if self._by_case:
            for place, transform in enumerate(self._transforms.transforms):
                drawn_for = f"{case} {number}" if changes_image_only(transform) else case
                with _seeded(f"{drawn_for}, view {view}, transform {place}"):
                    sample = transform(**sample)
        else:
            with _seeded(f"{case} {number} {view}"):
                sample = self._transforms(**sample)
        return sample["image"].numpy(), sample["segmentation"][0].numpy()


def not_started(
    trainer_class: type[nnUNetTrainer], configuration: ConfigurationManager, sam: SamSection
) -> nnUNetTrainer:
    """A trainer that knows its settings and no more: enough to ask how it augments, and nothing on disk."""
    trainer: Any = object.__new__(trainer_class)
    trainer.configuration_manager, trainer.sam = configuration, sam
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
