"""Training in two processes: gloo on the CPU, DistributedDataParallel as nnU-Net wraps the network."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TRAINED, Workspace, make_trainer, tiny_sections
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from desam_nnunet.cache.store import Store, open_stores
from desam_nnunet.training.losses import DiceCELoss

LABELS = LabelManager({"background": 0, "a": 1, "b": 2}, None)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def join(rank: int, meeting: Path) -> None:
    """The group of two processes that meet at a file; each waits for the other however long it takes."""
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=2, timeout=timedelta(days=1))


def copy_state(trainer: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.bare_network.state_dict().items()}


def train_all(rank: int, workspace: Workspace, out: Path) -> None:
    """Every trainer; the processes' start costs more than the training."""
    torch.set_num_threads(1)
    trainers = {name: make_trainer(name, workspace) for name in TRAINED}
    for trainer in trainers.values():
        trainer.initialize()  # before the group is up: with one, nnU-Net takes a CUDA device for granted
    join(rank, out / "meeting")
    for name, trainer in trainers.items():
        torch.save(train(rank, trainer), out / f"{name}{rank}.pth")
    dist.destroy_process_group()


def dice_of_both(rank: int, out: Path) -> None:
    """The loss of a batch of four, two in each process, and its gradient as DDP averages it."""
    join(rank, out / "meeting")
    logits, target = four_tiles()
    mine = slice(2 * rank, 2 * rank + 2)
    loss = DiceCELoss(LABELS, ce=0.0, dice=1.0, background=True, ddp=True)(logits[mine], target[mine])
    (gradient,) = torch.autograd.grad(loss, logits)
    dist.all_reduce(gradient)
    torch.save({"loss": loss.detach(), "gradient": gradient / 2}, out / f"{rank}.pth")
    dist.destroy_process_group()


def four_tiles() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 8, 8, generator=generator).requires_grad_()
    return logits, torch.randint(0, 3, (4, 1, 8, 8), generator=generator)


def test_dice_is_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(dice_of_both, (tmp_path,), nprocs=2)
    logits, target = four_tiles()
    loss = DiceCELoss(LABELS, ce=0.0, dice=1.0, background=True)(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach())
        torch.testing.assert_close(found["gradient"], gradient)


def train(rank: int, trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Two steps on other data in each process; the second step's loss is NaN in process 1 alone."""
    trainer.network = DistributedDataParallel(trainer.network)
    torch.manual_seed(rank)
    batch = {"data": torch.randn(1, 1, 96, 96), "target": torch.zeros(1, 1, 96, 96), "keys": ["case"]}
    batch["target"][..., 20:50, 30:60] = 1
    before = copy_state(trainer)
    trainer.train_step(batch)
    first = copy_state(trainer)
    if rank == 1:
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *given: (compute(*given)[0] * float("nan"), None)
    trainer.train_step(batch)
    return {"before": before, "first": first, "second": trainer.bare_network.state_dict()}


@pytest.fixture(scope="module")
def states(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("states")
    mp.spawn(train_all, (workspace, out), nprocs=2)
    return out


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_stay_equal(states: Path, name: str) -> None:
    one, other = (torch.load(states / f"{name}{rank}.pth", weights_only=True) for rank in range(2))
    for state in (one, other):  # BatchNorm's statistics are shared on CUDA alone, where nnU-Net converts it
        for step, values in state.items():
            state[step] = {key: value for key, value in values.items() if not key.endswith(_STATISTICS)}
    for step in ("before", "first", "second"):
        for key, value in one[step].items():
            torch.testing.assert_close(other[step][key], value, rtol=0, atol=0)
    for key, value in one["first"].items():  # a gradient that is not finite anywhere is skipped everywhere
        torch.testing.assert_close(one["second"][key], value, rtol=0, atol=0)
    changed = {key.split(".")[0] for key, value in one["first"].items() if not torch.equal(value, one["before"][key])}
    assert changed == TRAINED[name]


def train_cached(rank: int, workspace: Workspace, out: Path) -> None:
    """Builds the cache together, then takes one step on what each process draws for itself."""
    torch.set_num_threads(1)
    np.random.seed(0)
    trainer = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans("SharedPlans"))
    trainer.initialize()
    join(rank, out / "meeting")
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer.batch_size, trainer.oversample_foreground_percent = 1, float(rank)  # as nnU-Net splits a batch of two
    written: list[str] = []
    write = Store.write
    Store.write = lambda store, case, *rest: written.append(str(case)) or write(store, case, *rest)  # type: ignore
    trainer.on_train_start()
    training, validation = trainer.dataloader_train, trainer.dataloader_val
    batch = next(training)
    foreground = [bool(next(training)["target"].any()) for _ in range(20)]
    drawn = torch.rand(9)
    trainer.train_step(batch)
    cases = [str(case) for case in (*training.cases, *validation.cases)]
    torch.save({"state": copy_state(trainer), "cases": cases, "written": written,
                "size": len(batch["target"]), "foreground": foreground, "drawn": drawn}, out / f"{rank}.pth")
    training.close()
    validation.close()
    dist.destroy_process_group()


def test_two_processes_share_a_cache_and_draw_for_themselves(workspace: Workspace, tmp_path: Path) -> None:
    workspace.write_plans("SharedPlans", **tiny_sections(image_size=96))
    mp.spawn(train_cached, (workspace, tmp_path), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    (store,) = (store for store in open_stores(workspace.preprocessed) if store.recipe.image_size == 96)
    assert sorted(one["cases"]) == sorted(other["cases"]) == store.cases()
    assert len(store.cases()) == 5
    assert [set(one["written"]), set(other["written"])] == [set(store.cases()[::2]), set(store.cases()[1::2])]
    assert one["size"] == other["size"] == 1
    assert all(other["foreground"])
    assert not all(one["foreground"])  # the phantom's volumes end in slices without the organ
    assert not torch.equal(one["drawn"], other["drawn"])  # of which points are made
    for key, value in one["state"].items():
        torch.testing.assert_close(other["state"][key], value, rtol=0, atol=0)


def validate(rank: int, workspace: Workspace, out: Path) -> None:
    """As ``--val`` does: in a process whose network has not run yet."""
    torch.set_num_threads(1)
    trainer = make_trainer("DeSAMTrainerWholeBox", workspace)
    trainer.initialize()
    join(rank, out / "meeting")
    trainer.network = network = DistributedDataParallel(trainer.network)
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer.perform_actual_validation()
    assert trainer.network is network
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_without_a_case_keeps_nobody_waiting(workspace: Workspace, tmp_path: Path) -> None:
    """The fold has one case."""
    mp.spawn(validate, (workspace, tmp_path), nprocs=2)
    (summary,) = workspace.model("DeSAMTrainerWholeBox").glob("fold_0/validation/summary.json")
    assert len(json.loads(summary.read_text())["metric_per_case"]) == 1


def test_a_batch_that_gpus_cannot_share_evenly_is_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("DeSAMTrainer", workspace)
    size = trainer.configuration_manager.batch_size
    monkeypatch.setattr(trainer, "is_ddp", True)
    monkeypatch.setattr(dist, "get_world_size", lambda: size + 1)
    with pytest.raises(ValueError, match=rf"A batch of {size} tiles can't be shared evenly by {size + 1} GPUs: set"):
        trainer.initialize()
