"""Every family of encoders under every method that it can carry, through nnU-Net's own training and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from conftest import Workspace, tiny_sections
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training

from desam_nnunet.cache.store import open_stores

CPU = torch.device("cpu")
TIMM = ("vit_small_patch16_dinov3", "sam2_hiera_tiny", "convnext_tiny",
        pytest.param("repvit_m1_1", marks=pytest.mark.slow))
CHECKPOINT = "checkpoint_final.pth"


def plans_for(workspace: Workspace, encoder: str, **sam: Any) -> str:
    """Plans of seconds at the smallest input."""
    name = "".join(word.title() for word in encoder.replace("/", "_").split("_")) + "Plans"
    workspace.write_plans(name, **tiny_sections(encoder=encoder, image_size=64, iterations_per_epoch=2, **sam))
    return name


def train(plans: str, trainer: str, fold: int = 0, *, resume: bool = False) -> None:
    """As nnUNetv2_train does it."""
    run_training("501", "2d", fold, trainer, plans, continue_training=resume, device=CPU)


def predict(workspace: Workspace, plans: str, trainer: str, out: Path, folds: tuple[int, ...] = (0,)) -> list[Path]:
    """As nnUNetv2_predict does it, of the two unseen volumes."""
    predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(workspace.model(trainer, plans)), folds, CHECKPOINT)
    out.mkdir(exist_ok=True)
    predictor.predict_from_files_sequential(str(workspace.unseen / "images"), str(out), overwrite=True)
    return sorted(out.glob("*.nii.gz"))


def assert_segmented(workspace: Workspace, files: list[Path]) -> None:
    assert len(files) == 2
    for file in files:
        image = workspace.unseen / "images" / file.name.replace(".nii.gz", "_0000.nii.gz")
        assert sitk.ReadImage(str(file)).GetSize() == sitk.ReadImage(str(image)).GetSize()


@pytest.mark.parametrize("model", TIMM)
def test_desam_trains_and_predicts_on_a_backbone_of_timms(model: str, workspace: Workspace, tmp_path: Path) -> None:
    plans = plans_for(workspace, f"timm_random/{model}")
    train(plans, "DeSAMTrainer")
    assert_segmented(workspace, predict(workspace, plans, "DeSAMTrainer", tmp_path))
    weights = torch.load(workspace.model("DeSAMTrainer", plans) / "fold_0" / CHECKPOINT, weights_only=False)
    parts = {key.split(".")[0] for key in weights["network_weights"]}
    assert parts == {"prompt_encoder", "prim", "pdmm", "neck"}  # the encoder is in no checkpoint, its new neck is


@pytest.mark.slow
def test_desam_on_lite_medsam_caches_resumes_predicts_and_ensembles(workspace: Workspace, tmp_path: Path) -> None:
    plans = plans_for(workspace, "lite_medsam", epochs=2)
    for fold in (0, 1):
        train(plans, "DeSAMTrainer", fold)
    (store,) = (store for store in open_stores(workspace.preprocessed) if store.recipe.encoder == "lite_medsam")
    entries = {path: path.stat().st_mtime_ns for case in store.cases() for path in store.entries(case)}
    fold = workspace.model("DeSAMTrainer", plans) / "fold_0"
    (fold / CHECKPOINT).rename(fold / "checkpoint_latest.pth")
    train(plans, "DeSAMTrainer", resume=True)
    train(plans, "DeSAMTrainerWholeBox")
    assert {path: path.stat().st_mtime_ns for case in store.cases() for path in store.entries(case)} == entries
    assert_segmented(workspace, predict(workspace, plans, "DeSAMTrainer", tmp_path / "grid", (0, 1)))
    assert_segmented(workspace, predict(workspace, plans, "DeSAMTrainerWholeBox", tmp_path / "box"))


@pytest.mark.parametrize("encoder", [
    pytest.param("lite_medsam", marks=pytest.mark.slow), "timm_random/vit_small_patch16_dinov3"])
def test_samed_adapts_encoders_that_name_their_projections(
    encoder: str, workspace: Workspace, tmp_path: Path
) -> None:
    plans = plans_for(workspace, encoder)
    train(plans, "SAMedTrainer")
    assert_segmented(workspace, predict(workspace, plans, "SAMedTrainer", tmp_path))
    weights = torch.load(workspace.model("SAMedTrainer", plans) / "fold_0" / CHECKPOINT, weights_only=False)
    updates = [value for key, value in weights["network_weights"].items() if ".up.weight" in key]
    assert updates
    assert all(value.abs().max() > 0 for value in updates)  # they start at zero: every one was trained


@pytest.mark.parametrize("stride", [1, 2])
def test_masks_are_decoded_at_the_stride_that_the_plans_ask_for(
    stride: int, workspace: Workspace, tmp_path: Path
) -> None:
    sections = tiny_sections(image_size=64, iterations_per_epoch=2)
    workspace.write_plans(f"Stride{stride}Plans", **sections | {"desam": sections["desam"] | {"mask_stride": stride}})
    train(f"Stride{stride}Plans", "DeSAMTrainerWholeBox")
    assert_segmented(workspace, predict(workspace, f"Stride{stride}Plans", "DeSAMTrainerWholeBox", tmp_path))
