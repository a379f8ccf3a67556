"""The promptable objective, and the one about regions.

Source: Kirillov et al., Segment Anything, ICCV 2023, appendix A: focal loss, Dice loss and the squared error of the
predicted IoU. There the focal loss is a mean over all pixels, 20 times the Dice loss. From random weights that ends in
empty masks (none of 400 steps left them), so here it is a mean over the object plus a mean over the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.pretraining.network import Answers
from desam_nnunet.pretraining.prompts import Asked

_FOCAL = 2.0
_FOCUS = 2.0


class Judged(NamedTuple):
    """What a batch of answers is worth: a scalar with gradient, and the mean IoU over the prompts, without."""

    loss: Tensor
    iou: Tensor


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


def judge_descriptions(preds: list[Tensor], ref: Tensor) -> Tensor:
    """Mean over the encoder's outputs: cross-entropy of the border, smooth L1 of the rest.

    Args:
        preds: (B, 9, s, s) each, see :meth:`~desam_nnunet.pretraining.network.Pretrained.describe`.
        ref: From :func:`~desam_nnunet.pretraining.regions.describe_regions`.
    """
    return torch.stack([
        F.binary_cross_entropy_with_logits(pred[:, 0].float(), ref[:, 0])
        + F.smooth_l1_loss(pred[:, 1:].float(), ref[:, 1:], beta=0.1) * (ref.shape[1] - 1)
        for pred in preds
    ]).mean()


def intersection_over_union(pred: Tensor, ref: Tensor) -> Tensor:
    """(N,) of masks (N, s, s), bool."""
    return (pred & ref).sum((1, 2)) / (pred | ref).sum((1, 2)).clamp(min=1)
