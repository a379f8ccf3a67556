"""nnU-Net's own commands, unmodified, on the phantom data set."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import PLANS, TRAINERS, Workspace, nnunet, tiny_sections

from desam_nnunet.encoders.registry import ENCODERS


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in sorted(folder.glob("*.nii.gz"))}


def assert_same_masks(one: Path, other: Path) -> None:
    ours, theirs = masks(one), masks(other)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, mask in ours.items():
        np.testing.assert_array_equal(mask, theirs[name])


def predict(workspace: Workspace, out: Path, trainer: str) -> Path:
    """The unseen site, predicted by an ensemble of the trained folds, with probabilities."""
    nnunet("nnUNetv2_predict", "-i", workspace.unseen / "images", "-o", out, "-d", 501, "-c", "2d", "-f",
           *TRAINERS[trainer], "-tr", trainer, "-p", PLANS, "-device", "cpu", "-npp", 1, "-nps", 1,
           "--save_probabilities")
    return out


@pytest.fixture(scope="module")
def predicted(trained: Workspace) -> Path:
    return predict(trained, trained.root / "predicted", "DeSAMTrainer")


def test_training_fills_nnunets_folders(trained: Workspace) -> None:
    for trainer, folds in TRAINERS.items():
        for fold in folds:
            folder = trained.model(trainer) / f"fold_{fold}"
            assert (folder / "checkpoint_final.pth").is_file()
            assert (folder / "progress.png").is_file()
            assert "foreground_mean" in json.loads((folder / "validation" / "summary.json").read_text())
            assert not list(folder.glob("*.tmp"))
            logs = [path.read_text() for path in folder.glob("training_log_*.txt")]  # and of tests that came back to it
            assert any("The encoder vit_tiny computes in" in log for log in logs)


def test_model_folder_holds_every_resolved_setting(trained: Workspace) -> None:
    configuration = json.loads((trained.model("DeSAMTrainer") / "plans.json").read_text())["configurations"]["2d"]
    assert configuration["sam"] == {
        "encoder": "vit_tiny", "identity": f"md5:{ENCODERS['vit_tiny'].md5}", "image_size": 128,
        "intensity": "percentile", "regions": False, "features": "cached", "views": 1, "augmentation": "nnunet",
        "view_geometry": "tile", "cache_dtype": "float16",
        "epochs": 1, "iterations_per_epoch": 3, "val_iterations_per_epoch": 1,
    }
    assert configuration["desam"] == {
        "grid": 3, "iou_threshold": 0.0, "lr": 1e-4, "mask_stride": 4, "grid_offset": 0.0, "through_input": False}
    assert configuration["architecture"]["network_class_name"].endswith("PlainConvUNet")


def test_checkpoint_holds_no_encoder(trained: Workspace) -> None:
    path = trained.model("DeSAMTrainer") / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    assert {key.split(".")[0] for key in checkpoint["network_weights"]} == {"prim", "pdmm", "prompt_encoder"}
    assert checkpoint["init_args"]["plans"]["configurations"]["2d"]["sam"]["encoder"] == "vit_tiny"
    assert checkpoint["inference_allowed_mirroring_axes"] is None  # views: 1 shows no mirrored tile


def test_prediction_of_an_unseen_site(trained: Workspace, predicted: Path) -> None:
    images = sorted((trained.unseen / "images").glob("*.nii.gz"))
    results = masks(predicted)
    assert len(results) == len(images) == 2
    for image, mask in zip(images, results.values(), strict=True):
        assert mask.shape == sitk.GetArrayFromImage(sitk.ReadImage(image)).shape
        assert set(np.unique(mask)) <= {0, 1}


@pytest.mark.slow
def test_prediction_from_the_model_folder(trained: Workspace, predicted: Path, tmp_path: Path) -> None:
    nnunet("nnUNetv2_predict_from_modelfolder", "-i", trained.unseen / "images", "-o", tmp_path, "-m",
           trained.model("DeSAMTrainer"), "-f", 0, 1, "-device", "cpu", "-npp", 1, "-nps", 1)
    assert_same_masks(tmp_path, predicted)


def test_zip_export_and_installation_elsewhere(
    trained: Workspace, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "model.zip"
    nnunet("nnUNetv2_export_model_to_zip", "-d", 501, "-o", archive, "-c", "2d", "-f", 0, 1, "-tr", "DeSAMTrainer",
           "-p", PLANS, "--exp_cv_preds")
    elsewhere = tmp_path / "results"
    monkeypatch.setenv("nnUNet_results", str(elsewhere))
    nnunet("nnUNetv2_install_pretrained_model_from_zip", archive)
    assert_same_masks(predict(trained, tmp_path / "out", "DeSAMTrainer"), predicted)


def test_best_configuration(trained: Workspace) -> None:
    nnunet("nnUNetv2_find_best_configuration", 501, "-c", "2d", "-p", PLANS, "-tr", *TRAINERS, "-f", 0, "-np", 1)
    information = json.loads((trained.results / "inference_information.json").read_text())
    assert len(information["considered_models"]) == 2


@pytest.mark.slow  # test_slab_commands ensembles by default
def test_ensemble(trained: Workspace, predicted: Path, tmp_path: Path) -> None:
    other = predict(trained, tmp_path / "whole_box", "DeSAMTrainerWholeBox")
    nnunet("nnUNetv2_ensemble", "-i", predicted, other, "-o", tmp_path / "both", "-np", 1)
    assert masks(tmp_path / "both").keys() == masks(predicted).keys()


@pytest.mark.slow
def test_validation_alone_repeats_itself(trained: Workspace, tmp_path: Path) -> None:
    validation = trained.model("DeSAMTrainer") / "fold_1" / "validation"
    before = masks(validation)
    nnunet("nnUNetv2_train", 501, "2d", 1, "-tr", "DeSAMTrainer", "-p", PLANS, "-device", "cpu", "--val", "--npz")
    for name, mask in masks(validation).items():
        np.testing.assert_array_equal(mask, before[name])


@pytest.mark.slow
def test_pretrained_weights_go_from_one_prompt_mode_to_the_other(trained: Workspace) -> None:
    trained.write_plans("FineTune", **tiny_sections())
    checkpoint = trained.model("DeSAMTrainer") / "fold_0" / "checkpoint_final.pth"
    result = nnunet("nnUNetv2_train", 501, "2d", "all", "-tr", "DeSAMTrainerWholeBox", "-p", "FineTune", "-device",
                    "cpu", "-pretrained_weights", checkpoint)
    assert "Loading pretrained weights" in result.stdout
    assert (trained.model("DeSAMTrainerWholeBox", "FineTune") / "fold_all" / "checkpoint_final.pth").is_file()


def test_killed_training_continues(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the second epoch's checkpoint is written and has not replaced the first one's."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # with nnU-Net's augmentation workers, as users have them
    workspace.write_plans("Killed", **tiny_sections(features="online", epochs=3, iterations_per_epoch=2))
    arguments = ["501", "2d", "0", "-tr", "DeSAMTrainer", "-p", "Killed", "-device", "cpu"]
    command = [sys.executable, Path(__file__).with_name("killing.py"), "2", r"^os\.rename .*/checkpoint_latest\.pth$",
               "nnUNetv2_train", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet, start_new_session=True) as process:
        assert process.wait() == -signal.SIGKILL
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, if any is left
    output = nnunet("nnUNetv2_train", *arguments, "--c").stdout
    assert re.findall(r"Epoch (\d+)\s*\n", output) == ["1", "2"]
    assert (workspace.model("DeSAMTrainer", "Killed") / "fold_0" / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["3d_fullres"], "is 3D, but SAM works on slices: use 2d", id="3d"),
        pytest.param(["2d", "-p", "nnUNetPlans"], r"No weights file sam_vit_b_01ec64.pth in", id="no weights"),
    ],
)
def test_bad_training_input(workspace: Workspace, arguments: list[str], message: str) -> None:
    add_3d_configuration(workspace)
    configuration, *rest = arguments
    result = nnunet("nnUNetv2_train", 501, configuration, 0, "-tr", "DeSAMTrainer", "-device", "cpu", *rest,
                    check=False)
    assert result.returncode != 0
    assert message in result.stderr


def add_3d_configuration(workspace: Workspace) -> None:
    path = workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    flat = plans["configurations"]["2d"]
    plans["configurations"]["3d_fullres"] = flat | {"patch_size": [16, 96, 96], "spacing": [3.0, *flat["spacing"]]}
    path.write_text(json.dumps(plans))
