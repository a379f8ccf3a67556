"""Targets per foreground class, the loss of PRIM's scores, and the mask loss that SAMed and DB-SAM publish.

DeSAM's mask loss is nnU-Net's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.sam.prompts import PointTargets


def foreground_target(target: Tensor, label_manager: LabelManager) -> tuple[Tensor, Tensor]:
    """nnU-Net's target as one mask per foreground class or region, and where it is labelled.

    Args:
        target: (B, 1, H, W) labels, or (B, regions, H, W) one-hot with the ignore label last.

    Returns:
        (B, K, H, W) bool and (B, H, W) bool, the latter False on the ignore label.
    """
    ignore = label_manager.has_ignore_label
    if label_manager.has_regions:
        target = target.bool()
        labelled = ~target[:, -1] if ignore else torch.ones_like(target[:, 0])
        return (target[:, :-1] if ignore else target), labelled
    labels = torch.as_tensor(label_manager.foreground_labels, device=target.device)
    labelled = target[:, 0] != label_manager.ignore_label if ignore else torch.ones_like(target[:, 0], dtype=torch.bool)
    return target == labels[:, None, None], labelled


def score_loss(scores: Tensor, targets: PointTargets) -> Tensor:
    """L1 between PRIM's raw scores (B, K) and what the drawn points lie in (DeSAM, section 2.4).

    Tiles without a labelled pixel do not count; 0 where none counts.
    """
    error = (scores.float() - targets.inside).abs().mean(1)
    return (error * targets.valid).sum() / targets.valid.sum().clamp(min=1)


@dataclass
class DiceCELoss:
    """Cross-entropy plus soft Dice with squared denominators, over the whole batch.

    Labels exclude each other (softmax); regions do not (sigmoid). Nothing is counted on the ignore label.

    Attributes:
        ce, dice: Weights of the two.
        background: Whether the Dice of labels is a mean over the background as well.
        ddp: Whether the batch of the Dice is that of all processes together, as nnU-Net's batch Dice.
    """

    label_manager: LabelManager
    ce: float
    dice: float
    background: bool
    ddp: bool = False

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of logits (B, classes with background, or regions, H, W) and nnU-Net's target of that height and width."""
        logits = logits.float()
        truth, labelled = foreground_target(target, self.label_manager)
        weight = labelled[:, None].float()  # B 1 H W
        if self.label_manager.has_regions:
            wanted = truth.float()
            entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1, keepdim=True)
            found = logits.sigmoid()
        else:
            wanted = torch.cat([~truth.any(1, keepdim=True), truth], dim=1).float()
            entropy = -(logits.log_softmax(1) * wanted).sum(1, keepdim=True)
            found = logits.softmax(1)
            if not self.background:
                found, wanted = found[:, 1:], wanted[:, 1:]
        entropy = (entropy * weight).sum() / weight.sum().clamp(min=1)
        return self.ce * entropy + self.dice * (1 - soft_dice(found * weight, wanted * weight, ddp=self.ddp).mean())


def soft_dice(found: Tensor, wanted: Tensor, *, ddp: bool = False, smooth: float = 1e-5) -> Tensor:
    """Of each channel over batch and pixels, (C,), squares in the denominator. Args: found, wanted: (B, C, H, W)."""
    axes = (0, 2, 3)
    sums = torch.stack([2 * (found * wanted).sum(axes), found.square().sum(axes) + wanted.square().sum(axes)])
    overlap, total = AllGatherGrad.apply(sums).sum(0) if ddp else sums
    return (overlap + smooth) / (total + smooth)
