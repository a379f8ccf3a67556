"""Online augmentation of slabs as of their slices one by one."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform


def slice_by_slice(stock: ComposeTransforms) -> ComposeTransforms:
    """nnU-Net's training transforms for a slab: each slice's intensities by themselves, and nothing of what is missing.

    nnU-Net turns and scales a slab's slices as channels of one image, and then blurs the whole in three dimensions;
    here that and all that changes intensities see channels too. Slices that a slab lacks, where it reaches out of its
    volume, are blank afterwards: which these are must be known before the label -1 of what lies outside is replaced.
    """
    transforms = list(stock.transforms)
    back = next(i for i, transform in enumerate(transforms) if isinstance(transform, Convert2DTo3DTransform))
    to_slab = transforms.pop(back)
    while changes_image_only(transforms[back]):
        back += 1
    transforms.insert(back, to_slab)
    place = next(i for i, transform in enumerate(transforms) if isinstance(transform, RemoveLabelTansform))
    return ComposeTransforms([*transforms[:place], BlankGaps(), *transforms[place:]])


def changes_image_only(transform: BasicTransform) -> bool:
    """Whether a transform, drawn with a probability or always, leaves labels and their places as they are."""
    return isinstance(getattr(transform, "transform", transform), ImageOnlyTransform)


class BlankGaps(BasicTransform):
    """Makes slices of an image (C, D, H, W) zero that have the label -1 everywhere."""

    def get_parameters(self, **data: Any) -> dict[str, Any]:
        return {"gaps": (data["segmentation"] == -1).all(0).flatten(1).all(1)}

    def _apply_to_image(self, img: Any, *, gaps: Any) -> Any:
        return img.masked_fill(gaps[:, None, None], 0)

    def _apply_to_segmentation(self, segmentation: Any, **_params: Any) -> Any:
        return segmentation
