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
    """Attributes: loss: A scalar with gradient. iou: Mean over the prompts, without."""

    loss: Tensor
    iou: Tensor


def judge_answers(answers: Answers, asked: Asked) -> Judged:
    """Args: answers: To `asked`. Prompts that ask for nothing do not count."""
    logits, wanted = answers.masks.float(), asked.masks.float()
    valid = asked.valid.float()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    found = logits.sigmoid()
    missed = wanted + found - 2 * wanted * found  # 1 minus the probability of the truth
    surprise = missed**_FOCUS * entropy
    focal = sum((surprise * part).sum((1, 2)) / part.sum((1, 2)).clamp(min=1) for part in (wanted, 1 - wanted))
    dice = 1 - (2 * (found * wanted).sum((1, 2)) + 1) / (found.sum((1, 2)) + wanted.sum((1, 2)) + 1)
    with torch.no_grad():
        iou = intersection_over_union(logits > 0, asked.masks)
    loss = _FOCAL * focal + dice + (answers.iou.float() - iou).square()
    count = valid.sum().clamp(min=1)
    return Judged((loss * valid).sum() / count, (iou * valid).sum() / count)


def judge_descriptions(told: list[Tensor], truth: Tensor) -> Tensor:
    """Mean over the encoder's outputs: cross-entropy of the border, smooth L1 of the rest.

    Args:
        told: (B, 9, s, s) each, see :meth:`~desam_nnunet.pretraining.network.Pretrained.describe`.
        truth: From :func:`~desam_nnunet.pretraining.regions.describe_regions`.
    """
    losses = [
        F.binary_cross_entropy_with_logits(output[:, 0].float(), truth[:, 0])
        + F.smooth_l1_loss(output[:, 1:].float(), truth[:, 1:], beta=0.1) * (truth.shape[1] - 1)
        for output in told
    ]
    return torch.stack(losses).mean()


def intersection_over_union(found: Tensor, wanted: Tensor) -> Tensor:
    """(N,) of masks (N, s, s), bool."""
    return (found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2)).clamp(min=1)
