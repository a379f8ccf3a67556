"""Slices that a slab lacks, where it reaches out of its volume."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform


def with_gaps_blank(stock: ComposeTransforms) -> ComposeTransforms:
    """nnU-Net's training transforms, after which slices that are missing are blank, whatever was done to them.

    Where slices are missing must be known before the label -1 of what lies outside is replaced.
    """
    transforms = list(stock.transforms)
    place = next(i for i, transform in enumerate(transforms) if isinstance(transform, RemoveLabelTansform))
    return ComposeTransforms([*transforms[:place], BlankGaps(), *transforms[place:]])


class BlankGaps(BasicTransform):
    """Makes slices of an image (C, D, H, W) zero that have the label -1 everywhere."""

    def get_parameters(self, **data: Any) -> dict[str, Any]:
        return {"gaps": (data["segmentation"] == -1).all(0).flatten(1).all(1)}

    def _apply_to_image(self, img: Any, *, gaps: Any) -> Any:
        return img.masked_fill(gaps[:, None, None], 0)

    def _apply_to_segmentation(self, segmentation: Any, **_params: Any) -> Any:
        return segmentation
