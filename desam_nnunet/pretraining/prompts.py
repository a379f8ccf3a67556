"""The promptable objective: objects of generated label maps are asked for by a point or a box, and answers judged.

After Kirillov et al., Segment Anything, ICCV 2023, appendix A: a point uniformly in the object, or its box with sides
moved by a tenth of its own length, at most 20 pixels of 1024; focal loss, Dice loss and the squared error of the
predicted IoU. There the focal loss is a mean over all pixels, 20 times the Dice loss. From random weights that ends in
empty masks (none of 400 steps left them), so here it is a mean over the object plus a mean over the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.augmentation.randomness import Randomness
from desam_nnunet.pretraining.shapes import AIR, LABELS
from desam_nnunet.sam.prompts import Prompts, extent, random_place
from desam_nnunet.sam.tiles import MASK_STRIDE

_SMALLEST = 12  # pixels of a mask: what is smaller is not asked for
_JITTER = 0.1
_LARGEST_JITTER = 20 / 1024
_FOCAL = 2.0
_FOCUS = 2.0


class Asked(NamedTuple):
    """N prompts of each image, and the masks that they ask for, a quarter of the image's side; some may not be valid,
    where an image has nothing to ask for."""

    prompts: Prompts
    masks: Tensor  # B·N s s, bool
    valid: Tensor  # B·N


class Answers(NamedTuple):
    """Masks for N prompts, a quarter of the image's side, and what SAM thinks of them."""

    masks: Tensor  # N s s, logits
    iou: Tensor  # N


class Judged(NamedTuple):
    """What a batch of answers is worth: a scalar with gradient, and the mean IoU over the prompts, without."""

    loss: Tensor
    iou: Tensor


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


def judge_answers(answers: Answers, asked: Asked) -> Judged:
    """Loss and IoU of the answers to `asked`. Prompts that ask for nothing do not count."""
    logits, ref, valid = answers.masks.float(), asked.masks.float(), asked.valid.float()
    entropy = F.binary_cross_entropy_with_logits(logits, ref, reduction="none")
    pred = logits.sigmoid()
    missed = ref + pred - 2 * ref * pred  # 1 minus the probability of the truth
    surprise = missed**_FOCUS * entropy
    focal = sum((surprise * part).sum((1, 2)) / part.sum((1, 2)).clamp(min=1) for part in (ref, 1 - ref))
    dice = 1 - (2 * (pred * ref).sum((1, 2)) + 1) / (pred.sum((1, 2)) + ref.sum((1, 2)) + 1)
    with torch.no_grad():
        iou = intersection_over_union(logits > 0, asked.masks)
    loss = _FOCAL * focal + dice + (answers.iou.float() - iou).square()
    count = valid.sum().clamp(min=1)
    return Judged((loss * valid).sum() / count, (iou * valid).sum() / count)


def intersection_over_union(pred: Tensor, ref: Tensor) -> Tensor:
    """(N,) of masks (N, s, s), bool."""
    return (pred & ref).sum((1, 2)) / (pred | ref).sum((1, 2)).clamp(min=1)


def _choose(random: Randomness, coarse: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Masks (B·N, s, s) of labels drawn from those that are large enough and not air; and whether there was one."""
    pixels = coarse.flatten(1)
    counts = pixels.new_zeros(len(coarse), LABELS).scatter_add_(1, pixels, torch.ones_like(pixels))
    possible = counts >= _SMALLEST
    possible[:, AIR] = False
    rank = torch.where(possible[:, None], random.uniform(0, 1, len(coarse), number, LABELS), -1.0)
    chosen = rank.argmax(2)  # B N
    masks = coarse[:, None] == chosen[:, :, None, None]
    return masks.flatten(0, 1), possible.any(1).repeat_interleave(number)
