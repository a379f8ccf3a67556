"""What nnU-Net's users do around training and prediction, with our trainers in the place of its own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DATASET, PLANS, Workspace, nnunet, tiny_sections
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from test_commands import assert_same_masks, masks, predict

pytestmark = pytest.mark.slow


def predict_with(workspace: Workspace, out: Path, *options: object, fold: int = 0) -> Path:
    nnunet("nnUNetv2_predict", "-i", workspace.unseen / "images", "-o", out, "-d", 501, "-c", "2d", "-f", fold,
           "-tr", "DeSAMTrainer", "-p", PLANS, "-device", "cpu", "-npp", 1, "-nps", 1, *options)
    return out


@pytest.fixture(scope="module")
def single(trained: Workspace) -> Path:
    return predict_with(trained, trained.root / "single")


def test_parts_together_are_the_whole(trained: Workspace, single: Path, tmp_path: Path) -> None:
    for part in (0, 1):
        predict_with(trained, tmp_path, "-num_parts", 2, "-part_id", part)
        assert len(masks(tmp_path)) == part + 1
    assert_same_masks(tmp_path, single)


def test_prediction_continues_where_it_was(trained: Workspace, single: Path, tmp_path: Path) -> None:
    first, _ = sorted(single.glob("*.nii.gz"))
    shutil.copyfile(first, tmp_path / first.name)
    os.utime(tmp_path / first.name, (0, 0))
    predict_with(trained, tmp_path, "--continue_prediction")
    assert (tmp_path / first.name).stat().st_mtime == 0
    assert_same_masks(tmp_path, single)


def test_best_checkpoint_and_no_mirroring(trained: Workspace, single: Path, tmp_path: Path) -> None:
    predict_with(trained, tmp_path, "-chk", "checkpoint_best.pth", "--disable_tta")
    assert masks(tmp_path).keys() == masks(single).keys()


def test_postprocessing(trained: Workspace, tmp_path: Path) -> None:
    nnunet("nnUNetv2_find_best_configuration", 501, "-c", "2d", "-p", PLANS, "-tr", "DeSAMTrainer", "-f", 0, 1,
           "-np", 1)
    information = json.loads((trained.results / "inference_information.json").read_text())
    postprocessing = information["best_model_or_ensemble"]["postprocessing_file"]
    predicted = predict(trained, tmp_path / "in", "DeSAMTrainer")
    nnunet("nnUNetv2_apply_postprocessing", "-i", predicted, "-o", tmp_path / "out", "-pp_pkl_file", postprocessing,
           "-plans_json", information["best_model_or_ensemble"]["some_plans_file"], "-np", 1)
    assert masks(tmp_path / "out").keys() == masks(predicted).keys()


def test_best_of_our_trainer_and_nnunets_own_on_the_same_plans(workspace: Workspace) -> None:
    """Five folds of both, and their ensemble."""
    plans = workspace.write_plans("BothPlans", **tiny_sections(image_size=64, iterations_per_epoch=1))
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [
        4 for _ in plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"]]
    (workspace.preprocessed / "BothPlans.json").write_text(json.dumps(plans))
    for fold in range(5):
        for trainer in ("DeSAMTrainer", "nnUNetTrainer_1epoch"):
            nnunet("nnUNetv2_train", 501, "2d", fold, "-tr", trainer, "-p", "BothPlans", "-device", "cpu", "--npz")
    nnunet("nnUNetv2_find_best_configuration", 501, "-c", "2d", "-p", "BothPlans", "-tr", "DeSAMTrainer",
           "nnUNetTrainer_1epoch", "-np", 1)
    results = json.loads((workspace.results / "inference_information.json").read_text())["all_results"]
    assert len(results) == 3  # the two, and both together


def test_plans_move_to_another_data_set(trained: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner needs a worker
    other = "Dataset503_Moved"
    shutil.copytree(trained.root / "nnUNet_raw" / DATASET, trained.root / "nnUNet_raw" / other)
    nnunet("nnUNetv2_extract_fingerprint", "-d", 503, "-np", 1)
    nnunet("nnUNetv2_plan_experiment", "-d", 503)  # copies dataset.json to where nnU-Net's preprocessing looks for it
    nnunet("nnUNetv2_move_plans_between_datasets", "-s", 501, "-t", 503, "-sp", PLANS, "-tp", "MovedPlans")
    nnunet("nnUNetv2_preprocess", "-d", 503, "-plans_name", "MovedPlans", "-c", "2d", "-np", 1)
    nnunet("nnUNetv2_train", 503, "2d", 0, "-tr", "DeSAMTrainer", "-p", "MovedPlans", "-device", "cpu")
    model = trained.root / "nnUNet_results" / other / "DeSAMTrainer__MovedPlans__2d"
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()


def test_residual_encoder_plans(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner needs a worker
    nnunet("nnUNetv2_plan_experiment", "-d", 501, "-pl", "nnUNetPlannerResEncM")
    path = workspace.preprocessed / "nnUNetResEncUNetMPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d"] |= tiny_sections(image_size=64) | {"batch_size": 2}
    path.write_text(json.dumps(plans))
    nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "DeSAMTrainer", "-p", path.stem, "-device", "cpu")
    assert (workspace.model("DeSAMTrainer", path.stem) / "fold_0" / "checkpoint_final.pth").is_file()


def test_the_python_interface_gives_what_the_command_gives(trained: Workspace, single: Path) -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(trained.model("DeSAMTrainer")), use_folds=(0,))
    for name, mask in masks(single).items():
        path = trained.unseen / "images" / name.replace(".nii.gz", "_0000.nii.gz")
        image, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(path)])
        assert image.shape[1:] == sitk.GetArrayFromImage(sitk.ReadImage(path)).shape
        np.testing.assert_array_equal(predictor.predict_single_npy_array(image, properties), mask)
