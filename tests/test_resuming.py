"""A training that was stopped and resumed ends where an uninterrupted one ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace, tiny_sections

from desam_nnunet.training.desam import DeSAMTrainer


class StoppedError(Exception):
    """As a user's Ctrl-C, after the first epoch."""


class SeededTrainer(DeSAMTrainer):
    """Draws batches and points from seeds of epoch and iteration."""

    stop = False

    def get_dataloaders(self) -> tuple[Any, Any]:
        return tuple(self._seeded(loader) for loader in super().get_dataloaders())  # type: ignore[return-value]

    def _seeded(self, loader: Any) -> Iterator[Any]:
        drawn = 0
        while True:
            seed = 1000 * self.current_epoch + drawn % self.num_iterations_per_epoch
            np.random.seed(seed)
            torch.manual_seed(seed)
            drawn += 1
            yield next(loader)

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        if self.stop:
            raise StoppedError


def train(workspace: Workspace, plans: str, seed: int, *, stop: bool = False, resume: bool = False) -> SeededTrainer:
    torch.manual_seed(seed)
    given = workspace.plans(plans) | {"continue_training": resume}
    trainer = SeededTrainer(given, "2d", 0, workspace.dataset_json(), torch.device("cpu"))
    trainer.stop = stop
    if resume:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    trainer.run_training()
    return trainer


@pytest.mark.parametrize("features", ["cached", pytest.param("online", marks=pytest.mark.slow)])
def test_resumed_training_equals_uninterrupted_training(workspace: Workspace, features: str) -> None:
    name = f"Resumed_{features}"
    workspace.write_plans(name, **tiny_sections(features=features, epochs=2, iterations_per_epoch=2))
    whole = train(workspace, name, 0).bare_network.state_dict()
    with pytest.raises(StoppedError):
        train(workspace, name, 0, stop=True)
    resumed = train(workspace, name, 99, resume=True)
    assert resumed.current_epoch == 2
    for key, value in resumed.bare_network.state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-6)
