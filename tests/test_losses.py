"""Targets per class, and the loss of the scores."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from desam_nnunet.sam.prompts import PointTargets
from desam_nnunet.training.losses import DiceCELoss, foreground_target, score_loss


def test_labels_become_one_mask_per_class() -> None:
    manager = LabelManager({"background": 0, "a": 1, "b": 2}, None)
    truth, labelled = foreground_target(torch.tensor([[[[0, 1], [2, 2]]]]), manager)
    assert truth[0].tolist() == [[[False, True], [False, False]], [[False, False], [True, True]]]
    assert labelled.all()


def test_the_ignore_label_is_no_class() -> None:
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    truth, labelled = foreground_target(torch.tensor([[[[0, 1, 2]]]]), manager)
    assert truth.tolist() == [[[[False, True, False]]]]
    assert labelled.tolist() == [[[True, True, False]]]


def test_regions_come_one_hot_with_ignore_last() -> None:
    manager = LabelManager({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    target = torch.tensor([[[[1, 1, 0]], [[0, 1, 0]], [[0, 0, 1]]]])
    truth, labelled = foreground_target(target, manager)
    assert truth.shape == (1, 2, 1, 3)
    assert labelled.tolist() == [[[True, True, False]]]


def test_score_loss_is_the_mean_error_of_valid_tiles() -> None:
    scores = torch.tensor([[0.75, 0.0], [9.0, 9.0]])
    targets = PointTargets(torch.tensor([[1.0, 0.5], [0.0, 0.0]]), torch.tensor([True, False]))
    assert score_loss(scores, targets).item() == 0.375  # (0.25 + 0.5) / 2


def test_score_loss_of_nothing_is_0() -> None:
    targets = PointTargets(torch.zeros(2, 1), torch.tensor([False, False]))
    assert score_loss(torch.ones(2, 1), targets).item() == 0


LABELS = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
WITH_REGIONS = LabelManager({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])


@pytest.mark.parametrize("background", [True, False])
def test_dice_and_cross_entropy_of_labels_are_the_published_formulas(background: bool) -> None:
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 4, (2, 1, 4, 5))
    kept = target[:, 0] != 3
    pixels, labels = logits.permute(0, 2, 3, 1)[kept], target[:, 0][kept]  # N 3, N
    entropy = torch.nn.functional.cross_entropy(pixels, labels)
    losses = []
    for channel in range(0 if background else 1, 3):
        p, t = pixels.softmax(1)[:, channel], (labels == channel).float()
        losses.append(1 - (2 * (p * t).sum() + 1e-5) / (p.square().sum() + t.square().sum() + 1e-5))
    expected = 0.2 * entropy + 0.8 * torch.stack(losses).mean()
    loss = DiceCELoss(LABELS, ce=0.2, dice=0.8, background=background)
    torch.testing.assert_close(loss(logits, target), expected)


def test_dice_and_cross_entropy_of_regions_are_sigmoids() -> None:
    logits, target = torch.randn(1, 2, 3, 4), torch.randint(0, 2, (1, 3, 3, 4))
    kept = target[0, 2] == 0
    found, wanted = logits[0, :, kept].sigmoid(), target[0, :2, kept].float()  # 2 N
    entropy = torch.nn.functional.binary_cross_entropy(found, wanted)
    overlap = (2 * (found * wanted).sum(1) + 1e-5) / (found.square().sum(1) + wanted.square().sum(1) + 1e-5)
    loss = DiceCELoss(WITH_REGIONS, ce=1.0, dice=1.0, background=False)
    torch.testing.assert_close(loss(logits, target), entropy + 1 - overlap.mean())


def test_a_batch_without_a_labelled_pixel_is_finite() -> None:
    loss = DiceCELoss(LABELS, ce=1.0, dice=1.0, background=True)
    assert torch.isfinite(loss(torch.randn(1, 3, 4, 4), torch.full((1, 1, 4, 4), 3)))
