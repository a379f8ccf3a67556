"""A training that was stopped and resumed ends where an uninterrupted one ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace, tiny_sections

from desam_nnunet.training.base import SamTrainer
from desam_nnunet.training.registry import TRAINERS


class StoppedError(Exception):
    """As a user's Ctrl-C, after the first epoch."""


class Seeded(SamTrainer):
    """Draws batches, points and dropout from seeds of epoch and iteration; put in front of a trainer."""

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


def train(
    workspace: Workspace, name: str, plans: str, seed: int, *, stop: bool = False, resume: bool = False
) -> Seeded:
    torch.manual_seed(seed)
    given = workspace.plans(plans) | {"continue_training": resume}
    kind: type[Seeded] = type(f"Seeded{name}", (Seeded, TRAINERS[name]), {})
    trainer = kind(given, "2d", 0, workspace.dataset_json(), torch.device("cpu"))
    trainer.stop = stop
    if resume:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    trainer.run_training()
    return trainer


@pytest.mark.parametrize(("name", "features"), [
    ("DeSAMTrainer", "cached"), pytest.param("DeSAMTrainer", "online", marks=pytest.mark.slow),
    *(pytest.param(name, "online", marks=pytest.mark.slow) for name in TRAINERS if not name.startswith("DeSAM")),
])
def test_resumed_training_equals_uninterrupted_training(workspace: Workspace, name: str, features: str) -> None:
    plans = f"Resumed_{features}"
    workspace.write_plans(plans, **tiny_sections(features=features, epochs=2, iterations_per_epoch=2))
    whole = train(workspace, name, plans, 0).bare_network.state_dict()
    with pytest.raises(StoppedError):
        train(workspace, name, plans, 0, stop=True)
    resumed = train(workspace, name, plans, 99, resume=True)
    assert resumed.current_epoch == 2
    for key, value in resumed.bare_network.state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-6)
