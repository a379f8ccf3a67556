"""Targets per class, and the loss of the scores."""

from __future__ import annotations

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from desam_nnunet.sam.prompts import PointTargets
from desam_nnunet.training.losses import foreground_target, score_loss


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
