"""What the planner's choices rest on: the data set, as nnU-Net's plans and fingerprint know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cache.tiles import count_tiles
from desam_nnunet.nnunet.names import CONFIGURATION
from desam_nnunet.settings.stock import LONGEST, check_planned


@dataclass(frozen=True)
class Facts:
    """A data set in numbers.

    Attributes:
        shapes: Slices, rows and columns of each case at the planned spacing.
        divisor: What nnU-Net's own network divides rows and columns by.
        outputs: Foreground classes or regions.
        schemes: nnU-Net's normalisation of each channel.
    """

    shapes: tuple[tuple[int, int, int], ...]
    divisor: tuple[int, int]
    channels: int
    outputs: int
    schemes: tuple[str, ...]

    @property
    def planes(self) -> list[tuple[int, int]]:
        return [shape[1:] for shape in self.shapes]

    def tiles(self, patch_size: tuple[int, int]) -> int:
        return sum(count_tiles(shape, patch_size) for shape in self.shapes)


def read_facts(plans: dict[str, Any], dataset_json: dict[str, Any], fingerprint: dict[str, Any]) -> Facts:
    """What the choices rest on, from nnU-Net's plans and fingerprint.

    Raises:
        ValueError: They are not as nnU-Net writes them.
    """
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    check_planned(plans, configuration.configuration, CONFIGURATION, fingerprint, dataset_json)
    order = plans["transpose_forward"]
    shapes = []
    for shape, spacing in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True):
        slices, *plane = (shape[axis] for axis in order)
        rows, columns = compute_new_shape(plane, [spacing[axis] for axis in order[1:]], configuration.spacing)
        if max(rows, columns) > LONGEST:
            raise ValueError(f"A case of the fingerprint, {shape} voxels at {spacing} mm, would be {int(rows)} x "
                             f"{int(columns)} at the planned spacing, {list(configuration.spacing)} mm: no more than "
                             f"{LONGEST} are read. Is its spacing right?")
        shapes.append((int(slices), int(rows), int(columns)))
    rows, columns = _divisor(configuration.network_arch_init_kwargs["strides"])
    labels = manager.get_label_manager(dataset_json)
    return Facts(
        tuple(shapes), (rows, columns), determine_num_input_channels(manager, configuration, dataset_json),
        labels.num_segmentation_heads - (not labels.has_regions), tuple(configuration.normalization_schemes))


def _divisor(strides: list[Any]) -> list[int]:
    """What nnU-Net's own network divides rows and columns by, from the strides of its stages."""
    return np.prod([np.broadcast_to(stride, 2) for stride in strides], axis=0).tolist()


def check_patch(configuration: dict[str, Any], trainer: str) -> None:
    """Refuses a patch that nnU-Net's network, which `trainer` trains, can't halve as often as it does.

    Args:
        configuration: Of the plans, as JSON.

    Raises:
        ValueError: It is no multiple.
    """
    steps = _divisor(configuration["architecture"]["arch_kwargs"]["strides"])
    patch = configuration["patch_size"]
    if any(length % step for length, step in zip(patch, steps, strict=True)):
        raise ValueError(f"patch_size is {patch}, but {trainer}'s network needs multiples of {steps} here: begin "
                         "another study with such a one, or without nnU-Net's trainers.")
