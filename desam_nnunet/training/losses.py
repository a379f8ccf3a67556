"""Targets per foreground class, and the loss of PRIM's scores. The mask loss is nnU-Net's own."""

from __future__ import annotations

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

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
