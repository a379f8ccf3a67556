"""DB-SAM with boxes from the reference: training and evaluation, apart from nnU-Net's predictor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import Workspace, make_trainer, nnunet, tiny_sections
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from desam_nnunet.commands.__main__ import main
from desam_nnunet.evaluation.boxes import Case, segment_volume, window_around
from desam_nnunet.networks.frame import ABSENT_LOGIT

PLANS = "BoxesPlans"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainer(workspace: Workspace) -> Any:
    workspace.write_plans(PLANS, **tiny_sections())
    trainer = make_trainer("DBSAMTrainerBoxes", workspace, plans=workspace.plans(PLANS))
    trainer.initialize()
    return trainer


@pytest.fixture(scope="module")
def model(workspace: Workspace, trainer: Any) -> Path:
    """A model folder as training leaves it."""
    folder = workspace.model("DBSAMTrainerBoxes", PLANS)
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    shutil.copyfile(workspace.preprocessed / "dataset.json", folder / "dataset.json")
    return folder


def test_each_tile_shows_one_object_and_a_tile_without_is_not_counted(trainer: Any) -> None:
    target = torch.zeros(2, 1, 96, 96, dtype=torch.int16)
    target[0, 0, 20:40, 30:60] = 1
    batch = {"data": torch.randn(2, 1, 96, 96), "target": target, "keys": ["a", "b"]}
    (tiles, boxes), wanted = trainer._on_device(batch)
    assert tiles.shape == (2, 1, 96, 96)
    scale = 128 / 96
    assert (boxes[0] / scale - torch.tensor([30.0, 20.0, 60.0, 40.0])).abs().max() <= 2.5 / scale
    assert torch.equal(wanted[0, 0], target[0, 0] == 1)
    assert wanted[:, 1].flatten(1).all(1).tolist() == [False, True]
    loss, logits = trainer.compute_loss((tiles, boxes), wanted)
    assert logits.shape == (2, 1, 96, 96)
    alone, _ = trainer.compute_loss((tiles[:1], boxes[:1]), wanted[:1])
    assert torch.isfinite(loss)
    assert torch.isfinite(alone)
    assert trainer.oversample_foreground_percent == 1


def test_the_tile_without_foreground_changes_no_gradient(trainer: Any) -> None:
    trainer.network.eval()  # BatchNorm and dropout see the other tile
    target = torch.zeros(1, 2, 96, 96, dtype=torch.bool)
    target[0, 1] = True
    loss, _ = trainer.compute_loss((torch.randn(1, 1, 96, 96), torch.tensor([[0.0, 0.0, 128.0, 128.0]])), target)
    loss.backward()
    gradients = [parameter.grad for parameter in trainer.network.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.eq(0).all() for gradient in gradients)
    trainer.network.zero_grad()
    trainer.network.train()


def test_without_a_box_the_model_refuses_and_names_the_command(trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"can't segment without them: evaluate it with `desam boxes`"):
        trainer.network(torch.randn(1, 1, 96, 96))


class Painter:
    """Instead of a network: paints each box."""

    def geometry(self, tiles: Tensor) -> Any:
        return None

    def encode(self, tiles: Tensor) -> Tensor:
        return tiles[:, :1]

    def decode(self, neck: Tensor, prompts: Any) -> Tensor:
        masks = torch.full_like(neck, -5.0)
        for mask, (left, top, right, bottom) in zip(masks, prompts.boxes.round().int().tolist(), strict=True):
            mask[0, top:bottom, left:right] = 5
        return masks

    def tile_logits(self, masks: Tensor, _: Any) -> Tensor:
        return masks


@pytest.mark.parametrize("regions", [False, True])
def test_every_class_of_every_slice_gets_its_own_box(monkeypatch: pytest.MonkeyPatch, regions: bool) -> None:
    reference = np.zeros((1, 3, 20, 20), np.int8)
    reference[0, 1, 2:6, 3:9] = 1
    reference[0, 1, 10:14, 12:18] = 2
    reference[0, 2, 5:7, 5:7] = 2
    labels = LabelManager({"background": 0, "a": [1, 2], "b": 2}, [1, 2]) if regions else LabelManager(
        {"background": 0, "a": 1, "b": 2}, None)

    def exact(target: Tensor, *_: Any) -> Any:
        from desam_nnunet.sam.prompts import Prompts

        boxes = [[m.any(0).nonzero().min(), m.any(1).nonzero().min(), m.any(0).nonzero().max() + 1,
                  m.any(1).nonzero().max() + 1] for m in target[:, 0]]
        return Prompts(boxes=torch.tensor(boxes)), target[:, 0]

    monkeypatch.setattr("desam_nnunet.evaluation.boxes.sample_boxes", exact)
    case = Case("c", np.zeros((1, 3, 20, 20)), reference, {})
    logits = segment_volume(Painter(), case, labels, (8, 24), CPU)  # type: ignore[arg-type]
    assert logits.shape == (2 if regions else 3, 3, 20, 20)
    foreground = logits if regions else logits[1:]
    assert regions or logits[0].eq(0).all()
    assert foreground[:, 0].eq(ABSENT_LOGIT).all()
    assert foreground[0, 2].eq(ABSENT_LOGIT).all() != regions
    assert torch.equal(foreground[1] > 0, torch.from_numpy(reference[0] == 2))
    if not regions:
        assert torch.equal(logits.argmax(0), torch.from_numpy(reference[0]).long())


@pytest.mark.parametrize(("size", "patch", "occupied", "window"), [
    ((20, 20), (8, 8), ((9, 11), (0, 2)), (6, 0, 8, 8)),  # in the middle, as far as the slice goes
    ((20, 20), (8, 8), ((2, 18), (17, 20)), (2, 12, 16, 8)),  # larger than the patch
    ((20, 20), (24, 32), ((3, 4), (3, 4)), (-2, -6, 24, 32)),  # padded as nnU-Net's predictor pads
])
def test_an_object_is_seen_in_a_window_of_the_patch(
    size: tuple[int, int], patch: tuple[int, int], occupied: Any, window: tuple[int, ...]
) -> None:
    mask = np.zeros(size, bool)
    mask[slice(*occupied[0]), slice(*occupied[1])] = True
    found = window_around(mask, patch)
    assert found == window
    crop, plane = found.crop(mask[None])[0], torch.zeros(size)
    assert crop.shape == window[2:]
    found.paste(torch.from_numpy(crop).float(), plane)
    assert torch.equal(plane.bool(), torch.from_numpy(mask))


def test_unseen_volumes_are_scored_and_the_figures_labelled(
    workspace: Workspace, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["-i", str(workspace.unseen / "images"), "-l", str(workspace.unseen / "labels"), "-o", str(out)]
    assert main(["boxes", str(model), *given, "-device", "cpu"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    note = json.loads((out / "prompts.json").read_text())["note"]
    assert "not comparable with automatic segmentation" in note
    assert f"Mean Dice with boxes: {summary['foreground_mean']['Dice']:.4f}" in capsys.readouterr().out
    for path in out.glob("*.nii.gz"):
        image, label = (sitk.ReadImage(workspace.unseen / kind / name) for kind, name in (
            ("images", path.name.replace(".nii", "_0000.nii")), ("labels", path.name)))
        written = sitk.ReadImage(path)
        assert written.GetSize() == image.GetSize()
        truth, found = sitk.GetArrayFromImage(label), sitk.GetArrayFromImage(written)
        assert not found[~truth.any((1, 2))].any()  # a slice without a box stays empty


def test_wrong_input_is_one_sentence_and_writes_nothing(
    workspace: Workspace, model: Path, trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images, labels = tmp_path / "out", workspace.unseen / "images", workspace.unseen / "labels"
    (tmp_path / "none").mkdir()
    for folder, i, l, message in (  # noqa: E741 - the flags' names
        (tmp_path, images, labels, "does not exist: give the model folder"),
        (trained.model("DeSAMTrainer"), images, labels, "is not of DBSAMTrainerBoxes: segment with nnUNetv2_predict"),
        (model, images, tmp_path / "none", "every case needs its reference"),
        (model, tmp_path / "none", labels, "holds no images that end in _0000.nii.gz"),
        (model, labels, labels, "holds no images that end in _0000.nii.gz"),  # named as references are
        (model, tmp_path / "nowhere", labels, "give the folder of images with -i"),
    ):
        assert main(["boxes", str(folder), "-i", str(i), "-l", str(l), "-o", str(out), "-device", "cpu"]) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()
    before = {path: path.read_bytes() for path in labels.iterdir()}
    assert main(["boxes", str(model), "-i", str(images), "-l", str(labels), "-o", str(labels), "-device", "cpu"]) == 1
    assert "exists: give another folder with -o" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in labels.iterdir()} == before


def test_a_reference_of_another_shape_is_named(
    workspace: Workspace, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace.unseen / "labels", tmp_path / "labels")
    path = sorted((tmp_path / "labels").iterdir())[0]
    sitk.WriteImage(sitk.ReadImage(path)[:, :, 1:], path)
    given = ["-i", str(workspace.unseen / "images"), "-l", str(path.parent), "-o", str(tmp_path / "out")]
    assert main(["boxes", str(model), *given, "-device", "cpu"]) == 1
    assert f"Case {path.name.removesuffix('.nii.gz')}: Shape mismatch" in capsys.readouterr().err


@pytest.mark.slow
def test_trains_through_nnunets_command_and_validates_with_boxes(workspace: Workspace, trainer: Any) -> None:
    nnunet("nnUNetv2_train", 501, "2d", 1, "-tr", "DBSAMTrainerBoxes", "-p", PLANS, "-device", "cpu")
    fold = workspace.model("DBSAMTrainerBoxes", PLANS) / "fold_1"
    assert "foreground_mean" in json.loads((fold / "validation_with_boxes" / "summary.json").read_text())
    assert not (fold / "validation").exists()
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert "Mean Dice with boxes" in log
    refused = nnunet("nnUNetv2_predict", "-i", workspace.unseen / "images", "-o", workspace.root / "no", "-d", 501,
                     "-c", "2d", "-f", 1, "-tr", "DBSAMTrainerBoxes", "-p", PLANS, "-device", "cpu", "-npp", 1, "-nps",
                     1, check=False)
    assert refused.returncode != 0
    assert "evaluate it with `desam boxes`" in refused.stderr
