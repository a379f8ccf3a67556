"""Prompters of one's own: whatever their types allow is asked in prediction and trained."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from test_network import make
from torch import Tensor

from desam_nnunet.cache.views import not_started
from desam_nnunet.networks.desam.prompters import (
    Choice,
    GridPrompter,
    PointPrompter,
    Prompter,
    SinglePrompter,
    WholeBoxPrompter,
)
from desam_nnunet.networks.frame import ABSENT_LOGIT
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import Geometry
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.desam import DeSAMTrainer


def centre(geometry: Geometry, device: torch.device) -> Tensor:
    height, width = geometry.scaled
    return torch.tensor([[[width / 2, height / 2]]], device=device)


@dataclass(frozen=True)
class ScoredCentre(PointPrompter):
    """One point, whose score decides."""

    threshold: float

    def points(self, geometry: Geometry, device: torch.device) -> Tensor:
        return centre(geometry, device)

    def choose(self, scores: Tensor) -> Choice:
        return Choice(scores[0] > self.threshold, torch.zeros_like(scores[0], dtype=torch.int64))


class CentrePoint(SinglePrompter):
    """One point, without scores."""

    def prompts(self, geometry: Geometry, batch: int, device: torch.device) -> Prompts:
        return Prompts(points=centre(geometry, device).expand(batch, -1, -1))


class Everything(ScoredCentre):
    def __init__(self) -> None:
        super().__init__(-1e9)


ALLOWED = [GridPrompter(2, -1e9), Everything(), CentrePoint(), WholeBoxPrompter()]


@pytest.mark.parametrize("prompter", ALLOWED, ids=lambda prompter: type(prompter).__name__)
@torch.no_grad()
def test_every_prompter_predicts_a_batch_tile_by_tile(prompter: Prompter) -> None:
    network, tiles = make(2, prompter), torch.randn(2, 1, 48, 64)
    logits = network(tiles)
    assert logits.shape == (2, 3, 48, 64)
    assert not (logits[:, 1:] == ABSENT_LOGIT).any()
    torch.testing.assert_close(logits, torch.cat([network(tile[None]) for tile in tiles]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_point_alone_gives_the_same_mask_with_and_without_its_score() -> None:
    tile = torch.randn(1, 1, 48, 64)
    scored, alone, absent = (make(2, prompter) for prompter in (Everything(), CentrePoint(), ScoredCentre(1e9)))
    for network in (alone, absent):
        network.load_state_dict(scored.state_dict())
    torch.testing.assert_close(scored(tile), alone(tile), rtol=0, atol=1e-4)
    assert absent(tile)[:, 1:].eq(ABSENT_LOGIT).all()


def trainer_with(prompter: Prompter) -> Any:
    """A trainer with a network, labels and a loss, and nothing else of a training."""
    trainer: Any = not_started(DeSAMTrainer, SimpleNamespace(batch_dice=True), SamSection("", "", 0, "unit", False))
    trainer.network, trainer.label_manager = make(2, prompter).train(), LabelManager(
        {"background": 0, "organ": 1, "other": 2}, None)
    trainer.is_ddp, trainer.enable_deep_supervision = False, False
    trainer.loss = trainer._build_loss()
    return trainer


@pytest.mark.parametrize("prompter", ALLOWED, ids=lambda prompter: type(prompter).__name__)
def test_every_prompter_trains_all_parameters_that_are_left_to_train(prompter: Prompter) -> None:
    """Scores where it reads them, and none where it does not: DDP without find_unused_parameters asks for it."""
    trainer = trainer_with(prompter)
    network, target = trainer.network, torch.zeros(2, 1, 48, 64)
    target[:, :, 10:20, 10:40], target[:, :, 30:40, 20:50] = 1, 2
    loss, logits = trainer.compute_loss(network.encode(torch.randn(2, 1, 48, 64)), target)
    assert logits.shape == (2, 3, 48, 64)
    loss.backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("prim.iou_head.") for name in trained) == isinstance(prompter, PointPrompter)
