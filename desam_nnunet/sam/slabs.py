"""Slabs: neighbouring slices that nnU-Net shows together, and the batch of slices that encoders and masks see."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

SLABS = "2d_slab"  # the name of the configuration in the plans
DEPTH = 5  # slices of a slab where nothing else is said: one and the two on either side that it sees


def depth_of(patch_size: Sequence[int]) -> int:
    """Slices of a patch: those of a slab [D, H, W], 1 of a tile [H, W]."""
    return int(patch_size[0]) if len(patch_size) == 3 else 1


def slices_of(slabs: Tensor) -> Tensor:
    """Slices (B·D, C, H, W) of slabs (B, C, D, H, W), those of one slab in a row; tiles stay as they are."""
    return slabs.transpose(1, 2).flatten(0, 1) if slabs.dim() == 5 else slabs


def slabs_of(slices: Tensor, depth: int) -> Tensor:
    """Slabs (B, C, D, H, W) of slices (B·D, C, H, W)."""
    return slices.unflatten(0, (-1, depth)).transpose(1, 2)
