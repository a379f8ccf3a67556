"""What every pixel can be asked about the region that it lies in.

A promptable mask says something of the few objects that were asked for; this, ours, says something of every pixel of
every image, whatever its contrast: how far the region's centre of gravity is and where, how large, how long and which
way the region is, whether its border is here, and the mean and the deviation of its grey values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.pretraining.prompts import mask_labels
from desam_nnunet.pretraining.shapes import LABELS
from desam_nnunet.sam.tiles import MASK_STRIDE

CHANNELS = 9  # border; centre (y, x); size; extent (yy, xx, yx); grey mean and deviation
_EMPTY = 1e-6


def describe_regions(images: Tensor, labels: Tensor) -> Tensor:
    """(B, 9, S/4, S/4), of images (B, 1, S, S) and label maps (B, S, S). All about -1 to 1; the border 0 or 1."""
    coarse = mask_labels(labels)
    grey = F.avg_pool2d(images, MASK_STRIDE)[:, 0] / 255
    side = coarse.shape[-1]
    line = (torch.arange(side, device=labels.device) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    one = torch.ones_like(grey)
    y, x = y * one, x * one  # B s s
    quantities = torch.stack([one, y, x, y * y, x * x, y * x, grey, grey * grey], dim=1).flatten(2)  # B 8 s·s
    index = coarse.flatten(1)[:, None].expand_as(quantities)
    sums = quantities.new_zeros(len(labels), quantities.shape[1], LABELS).scatter_add_(2, index, quantities)
    count = sums[:, :1]
    means = sums / count.clamp(min=1)
    (my, mx, myy, mxx, myx, level, level2) = means[:, 1:].unbind(1)
    var_y, var_x, var_level = ((square - mean * mean).clamp(min=_EMPTY)
                               for square, mean in ((myy, my), (mxx, mx), (level2, level)))
    size = (count[:, 0] / side**2 + _EMPTY).sqrt()
    slant = (myx - my * mx) / (var_y * var_x).sqrt()
    tables = torch.stack([my, mx, size, var_y.sqrt(), var_x.sqrt(), slant, level, var_level.sqrt()], dim=1)  # B 8 N
    quantity = tables.gather(2, index).unflatten(2, (side, side))
    centre = quantity[:, :2] - torch.stack([y, x], dim=1)
    return torch.cat([_border(coarse)[:, None], centre, quantity[:, 2:]], dim=1)


def judge_descriptions(preds: list[Tensor], ref: Tensor) -> Tensor:
    """Mean over the encoder's outputs: cross-entropy of the border, smooth L1 of the rest.

    Args:
        preds: (B, 9, s, s) each, see :meth:`~desam_nnunet.pretraining.network.Pretrained.describe`.
        ref: From :func:`describe_regions`.
    """
    return torch.stack([
        F.binary_cross_entropy_with_logits(pred[:, 0].float(), ref[:, 0])
        + F.smooth_l1_loss(pred[:, 1:].float(), ref[:, 1:], beta=0.1) * (ref.shape[1] - 1)
        for pred in preds
    ]).mean()


def _border(coarse: Tensor) -> Tensor:
    """(B, s, s), 1 where a neighbour, of four, has another label."""
    around = F.pad(coarse[:, None].float(), (1, 1, 1, 1), mode="replicate")[:, 0]
    neighbours = (around[:, :-2, 1:-1], around[:, 2:, 1:-1], around[:, 1:-1, :-2], around[:, 1:-1, 2:])
    return (torch.stack(neighbours) != coarse).any(0).float()
