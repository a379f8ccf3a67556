"""Objects of generated label maps that are asked for, by a point or a box.

After Kirillov et al., Segment Anything, ICCV 2023, appendix A (training algorithm): a point uniformly in the object,
or its box with sides moved by a tenth of its own length, at most 20 pixels of 1024.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from desam_nnunet.pretraining.randomness import Randomness
from desam_nnunet.pretraining.shapes import AIR, LABELS
from desam_nnunet.sam.prompts import Prompts, extent, random_place
from desam_nnunet.sam.tiles import MASK_STRIDE

_SMALLEST = 12  # pixels of a mask: what is smaller is not asked for
_JITTER = 0.1
_LARGEST_JITTER = 20 / 1024


class Asked(NamedTuple):
    """Attributes:
        prompts: (B·N, ...), image by image.
        masks: (B·N, s, s) bool at the mask's resolution, a quarter of the image's.
        valid: (B·N,), False where an image has nothing to ask for.
    """

    prompts: Prompts
    masks: Tensor
    valid: Tensor


def mask_labels(labels: Tensor) -> Tensor:
    """Label maps (B, S, S) at the masks' resolution (B, S/4, S/4): of four by four pixels one next to the middle."""
    return labels[:, MASK_STRIDE // 2:: MASK_STRIDE, MASK_STRIDE // 2:: MASK_STRIDE]


def ask_points(random: Randomness, coarse: Tensor, number: int) -> Asked:
    """`number` points in each image, each in a label drawn uniformly from those of some size.

    Args:
        coarse: From :func:`mask_labels`.
    """
    masks, valid = _choose(random, coarse, number)
    index, side = random_place(masks, random.generator), masks.shape[-1]
    pixels = torch.stack([index % side, index // side], dim=-1)[:, None] * MASK_STRIDE + MASK_STRIDE // 2
    return Asked(Prompts(points=pixels + random.uniform(-0.5, 0.5, *pixels.shape)), masks, valid)


def ask_boxes(random: Randomness, coarse: Tensor, number: int) -> Asked:
    """`number` boxes in each image, each around a label drawn as for points."""
    masks, valid = _choose(random, coarse, number)
    side = masks.shape[-1]
    (left, right), (top, bottom) = (extent(masks.any(axis)).T for axis in (1, 2))
    boxes = torch.stack([left, top, right, bottom], dim=1) * MASK_STRIDE
    lengths = torch.stack([right - left, bottom - top] * 2, dim=1) * MASK_STRIDE
    deviation = (_JITTER * lengths).clamp(max=_LARGEST_JITTER * side * MASK_STRIDE)
    boxes = (boxes + deviation * random.uniform(-1, 1, *boxes.shape)).clamp(0, side * MASK_STRIDE)
    return Asked(Prompts(boxes=boxes), masks, valid)


def _choose(random: Randomness, coarse: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Masks (B·N, s, s) of labels drawn from those that are large enough and not air; and whether there was one."""
    counts = torch.zeros(len(coarse), LABELS, device=coarse.device)
    pixels = coarse.flatten(1)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels, dtype=torch.float32))
    possible = counts >= _SMALLEST
    possible[:, AIR] = False
    rank = torch.where(possible[:, None], random.uniform(0, 1, len(coarse), number, LABELS), -1.0)
    chosen = rank.argmax(2)  # B N
    masks = coarse[:, None] == chosen[:, :, None, None]
    return masks.flatten(0, 1), possible.any(1).repeat_interleave(number)
