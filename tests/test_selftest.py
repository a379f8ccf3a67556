"""``desam doctor --self-test``: on the CPU it passes, and what is disturbed on purpose does not."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from desam_nnunet.commands.__main__ import main
from desam_nnunet.encoders.attention import ExactAttention
from desam_nnunet.selftest import run
from desam_nnunet.selftest.attention import check_attention, compare_attention, plain_attention
from desam_nnunet.selftest.rows import Row, relative_error
from desam_nnunet.selftest.run import run_checks, table_line, verdict
from desam_nnunet.selftest.trainers import cache_row, check_trainer, network_rows, steps_row, volume_row
from desam_nnunet.selftest.workspace import make_trainer, tiles, workspace
from desam_nnunet.training.frozen import cached_loaders
from desam_nnunet.training.registry import TRAINERS

CPU = torch.device("cpu")


def failed(rows: list[Row]) -> list[str]:
    assert rows
    return [table_line(row) for row in rows if not row.passed]


def test_attention_passes_on_the_cpu() -> None:
    assert failed(list(check_attention(CPU))) == []


@pytest.mark.parametrize("name", ["DeSAMTrainer", pytest.param("DBSAMTrainer", marks=pytest.mark.slow)])
def test_a_trainer_passes_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", "/mine")
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert failed(list(check_trainer(name, CPU))) == []
    assert (os.getenv("nnUNet_results"), os.getenv("nnUNet_raw")) == ("/mine", None)  # noqa: SIM112 - nnU-Net's names


@pytest.mark.slow
def test_the_whole_command_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--self-test", "-device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "checks passed on cpu." in out
    assert "!!" not in out
    for what in ("encoder mobile_sam", "PDMMTrainer, a volume", "SAMedTrainerS, two training steps", "speed of vit_b"):
        assert what in out


def test_attention_that_is_off_fails() -> None:
    plain = plain_attention(8, 32)
    ours = ExactAttention(copy.deepcopy(plain), 0)
    with torch.no_grad():
        ours.rel_pos_h.copy_(ours.rel_pos_h.roll(1, 0))
    assert not compare_attention(ours, plain, CPU, torch.float32).passed
    assert not compare_attention(ours, plain, CPU, torch.bfloat16).passed


@pytest.fixture(scope="module")
def trainer() -> Iterator[Any]:
    with workspace():
        yield make_trainer(TRAINERS["PDMMTrainer"], CPU)


def test_a_network_that_is_off_fails(trainer: Any) -> None:
    disturbed = copy.deepcopy(trainer.bare_network)
    with torch.no_grad():
        disturbed.encoder.network.blocks[0].mlp.lin1.weight.neg_()
    assert all(row.passed for row in network_rows("same", copy.deepcopy(disturbed), copy.deepcopy(disturbed)))
    assert not all(row.passed for row in network_rows("off", disturbed, copy.deepcopy(trainer.bare_network)))


def test_a_volume_that_is_off_fails(trainer: Any) -> None:
    disturbed = copy.deepcopy(trainer.bare_network)
    with torch.no_grad():
        disturbed.pdmm.seg_layers.weight.neg_()
    assert volume_row("same", trainer, copy.deepcopy(trainer.bare_network)).passed
    assert not volume_row("off", trainer, disturbed).passed


def test_steps_that_train_nothing_or_go_nowhere_fail(trainer: Any) -> None:
    assert steps_row("right", trainer, tiles()).passed
    group = trainer.optimizer.param_groups[0]
    group["lr"], rate = 0.0, group["lr"]
    row = steps_row("still", trainer, tiles())
    assert (row.passed, "NOTHING was trained" in row.result) == (False, True)
    group["lr"] = rate
    lost = tiles()
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *given: (compute(*given)[0] * float("nan"), None)
    try:
        assert "none in" in steps_row("lost", trainer, lost).result
    finally:
        trainer.compute_loss = compute


def test_a_batch_that_arrives_changed_fails(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, other = cached_loaders(trainer)
    batch = next(loader)
    assert cache_row("right", trainer, batch).passed
    monkeypatch.setattr(trainer, "inputs_of", lambda batch: batch["features"].map(lambda x: x.float() + 1))
    assert not cache_row("wrong", trainer, batch).passed
    loader.close()
    other.close()


def broken(device: torch.device) -> Iterator[Row]:
    yield Row("attention, first", "right")
    raise RuntimeError("CUDA error: an illegal memory access\nand much more")


def test_an_error_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.backends.cudnn.allow_tf32
    checks = {"attention": broken, "later": lambda device: iter([Row("later", "right")])}
    rows = list(run_checks(CPU, checks))
    assert [row.passed for row in rows] == [True, False, True]
    assert rows[1].result == "RuntimeError: CUDA error: an illegal memory access"
    assert torch.backends.cudnn.allow_tf32 == before
    assert verdict(rows, CPU).startswith("1 of 3 checks FAILED on cpu")
    assert "TORCH_CUDNN_SDPA_DEPRIORITIZED=1" in verdict(rows, torch.device("cuda"))
    monkeypatch.setattr(run, "CHECKS", checks)
    assert main(["doctor", "--self-test", "-device", "cpu"]) == 1
    assert "!!  attention" in capsys.readouterr().out


def test_a_device_alone_is_no_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-device", "cpu"]) == 1
    assert "add --self-test" in capsys.readouterr().err


def test_what_is_not_finite_is_infinitely_off() -> None:
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative_error(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
