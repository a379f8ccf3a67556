"""``desam plan`` on a data set that nnU-Net has planned, and on one that it has not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATASET, Workspace, nnunet
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from desam_nnunet.cli import main
from desam_nnunet.planning.memory import footprint
from desam_nnunet.planning.plan import Wishes, choose, read_facts
from desam_nnunet.planning.presets import preset_names, read_preset
from desam_nnunet.planning.speed import operations
from desam_nnunet.sam.variants import VARIANTS

CPU = torch.device("cpu")


def planned(workspace: Workspace, *arguments: str, name: str = "DeSAMPlans") -> dict[str, Any]:
    assert main(["plan", "-d", "501", "--encoder", "vit_tiny", "-device", "cpu", "-overwrite_plans_name", name,
                 *arguments]) == 0
    return workspace.plans(name)


def test_every_choice_is_in_the_plans_and_printed_with_its_reason(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = planned(workspace)
    configuration = plans["configurations"]["2d"]
    assert plans["plans_name"] == "DeSAMPlans"
    assert configuration["data_identifier"] == "nnUNetPlans_2d"
    assert configuration["architecture"] == workspace.plans("nnUNetPlans")["configurations"]["2d"]["architecture"]
    assert configuration["sam"]["encoder"] == "vit_tiny"
    out = capsys.readouterr().out
    for key in ("patch_size", "batch_size", "sam.image_size", "sam.features", "sam.views", "sam.epochs"):
        assert any(line.startswith(key) and len(line.split()) > 3 for line in out.splitlines())
    assert "nnUNetv2_train 501 2d 0 -tr DeSAMTrainer -p DeSAMPlans" in out


def test_what_was_planned_trains_beside_plain_nnunet(workspace: Workspace) -> None:
    plans = planned(workspace, name="TrainedPlans")
    sam = plans["configurations"]["2d"]["sam"]
    sam |= {"epochs": 1, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1, "views": 1, "image_size": 64}
    (workspace.preprocessed / "TrainedPlans.json").write_text(json.dumps(plans))
    nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "DeSAMTrainerWholeBox", "-p", "TrainedPlans", "-device", "cpu")
    assert (workspace.model("DeSAMTrainerWholeBox", "TrainedPlans") / "fold_0" / "checkpoint_final.pth").is_file()


def test_flags_go_before_the_preset_and_the_preset_before_the_planner(workspace: Workspace) -> None:
    configuration = planned(workspace, "--preset", "cpu", name="PresetPlans")["configurations"]["2d"]
    assert configuration["sam"]["encoder"] == "vit_tiny"
    assert configuration["sam"]["image_size"] == 512
    assert configuration["desam"]["grid"] == 5


def test_plans_of_the_same_name_are_kept_beside(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    planned(workspace, name="AgainPlans")
    path = workspace.preprocessed / "AgainPlans.json"
    mine = path.read_text() + "\n"
    path.write_text(mine)
    capsys.readouterr()
    planned(workspace, name="AgainPlans")
    assert (workspace.preprocessed / "AgainPlans.json.before").read_text() == mine
    assert "AgainPlans.json.before" in capsys.readouterr().out


def test_an_unplanned_data_set_is_planned_by_nnunet_first(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner needs a worker
    copy = workspace.root / "nnUNet_raw" / "Dataset502_Copy"
    shutil.copytree(workspace.root / "nnUNet_raw" / DATASET, copy)
    nnunet("desam", "plan", "-d", 502, "--encoder", "vit_tiny", "-device", "cpu")
    folder = workspace.root / "nnUNet_preprocessed" / "Dataset502_Copy"
    assert (folder / "nnUNetPlans.json").is_file()
    plans = json.loads((folder / "DeSAMPlans.json").read_text())
    assert plans["dataset_name"] == "Dataset502_Copy"
    assert "sam" in plans["configurations"]["2d"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--preset", "nothing"), "There is no preset 'nothing'; there are: cpu, laptop, paper"),
    (("--encoder", "vit_x"), "Unknown encoder 'vit_x'"),
    (("-gpu_memory_target", "0.1"), r"takes 0.\d GB, but 0.1 GB are there"),
    (("-overwrite_plans_name", "nnUNetPlans"), "can't be called nnUNetPlans"),
])
def test_bad_wishes_are_one_sentence(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    before = {path: path.read_bytes() for path in workspace.preprocessed.glob("*.json")}
    assert main(["plan", "-d", "501", "--encoder", "vit_tiny", "-device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert {path: path.read_bytes() for path in workspace.preprocessed.glob("*.json")} == before


def test_slices_are_what_preprocessing_makes(workspace: Workspace) -> None:
    fingerprint = json.loads((workspace.preprocessed / "dataset_fingerprint.json").read_text())
    facts = read_facts(workspace.plans("nnUNetPlans"), workspace.dataset_json(), fingerprint)
    folder = str(workspace.preprocessed / "nnUNetPlans_2d")
    dataset = infer_dataset_class(folder)(folder)
    shapes = sorted(tuple(dataset.load_case(case)[0].shape[1:]) for case in dataset.identifiers)
    assert sorted(facts.shapes) == shapes
    assert (facts.channels, facts.outputs) == (1, 1)


def test_presets_are_valid_sections(workspace: Workspace) -> None:
    fingerprint = json.loads((workspace.preprocessed / "dataset_fingerprint.json").read_text())
    facts = read_facts(workspace.plans("nnUNetPlans"), workspace.dataset_json(), fingerprint)
    assert preset_names() == ["cpu", "laptop", "paper", "vit_h_24gb"]
    for name in preset_names():
        preset = read_preset(name)
        configuration, lines = choose(facts, Wishes(memory_target=80, preset=name), preset, CPU, 1e12)
        assert configuration["sam"]["encoder"] == preset["sam"]["encoder"]
        assert any(line.reason == f"preset {name}" for line in lines)


def test_operations_of_vit_b() -> None:
    """0.97 TFLOP, as the benchmark counts them from the layers."""
    assert operations(VARIANTS["vit_b"], 1024) == pytest.approx(0.97e12, rel=0.06)


def test_more_of_anything_takes_more_memory() -> None:
    tiny = VARIANTS["vit_tiny"]
    small = footprint(tiny, 128, (96, 96), 1, half=False)
    for larger in (footprint(tiny, 256, (96, 96), 1, half=False), footprint(tiny, 128, (512, 512), 1, half=False),
                   footprint(tiny, 128, (96, 96), 30, half=False)):
        assert larger.training(2) > small.training(2)
    assert small.training(3) > small.training(2)
    assert footprint(tiny, 128, (96, 96), 1, half=True).training(2) < small.training(2)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size", "batch", "outputs", "patch"), [
    ("vit_tiny", 256, 8, 1, 160), ("vit_b", 256, 8, 8, 256), ("vit_b", 256, 8, 1, 1024), ("vit_b", 512, 4, 1, 320),
    ("vit_h", 512, 4, 1, 512),
])
def test_the_memory_model_is_within_a_fifth_of_the_measured_peak(
    variant: str, size: int, batch: int, outputs: int, patch: int
) -> None:
    script = Path(__file__).with_name("step_peak.py")
    words = [sys.executable, script, variant, size, batch, outputs, patch]
    measured = int(subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout)
    need = footprint(VARIANTS[variant], size, (patch, patch), outputs, half=False)
    assert need.training(batch) - need.weights == pytest.approx(measured, rel=0.2)
