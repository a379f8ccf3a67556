"""`desam weights import`: a checkpoint with the published names becomes a model that nnU-Net predicts with."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SIZE, Workspace, nnunet, tiny_sections
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from desam_nnunet.commands.__main__ import main
from desam_nnunet.encoders.registry import ENCODERS, EncoderRow
from desam_nnunet.encoders.sam_vit import IMAGE, SamViT, build_sam
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.networks.desam.network import build_desam
from desam_nnunet.networks.desam.pdmm import SRB
from desam_nnunet.networks.desam.prompters import GridPrompter
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.tiles import TileToImage

# Our keys under the published names, the way back from published/formats.py, written out by hand.
PUBLISHED = (
    (r"^prim\.(transformer|iou_token|mask_tokens)\.", r"mask_decoder.\1."),
    (r"^prim\.iou_head\.layers\.(\d)\.", r"mask_decoder.iou_prediction_head.layers.\1."),
    (r"^prim\.iou_head\.seg_layers\.", "mask_decoder.iou_prediction_head.layers.2."),
    (r"^pdmm\.seg_layers\.", "mask_decoder.pimm.seg_outputs.1."),
    (r"^pdmm\.fusion\.", "mask_decoder.pimm.mask_embedding_fusion."),
    (r"^pdmm\.ups\.(\d)\.up\.", r"mask_decoder.pimm.conv_blocks_localization.\1.transp_conv.conv."),
    (r"^pdmm\.ups\.(\d)\.block\.", r"mask_decoder.pimm.conv_blocks_localization.\1.res_block."),
    (r"^pdmm\.contexts\.(\d)\.ups\.(\d)\.0\.", r"mask_decoder.pimm.conv_blocks_context.\1.residual_block.\2.0.conv."),
    (r"^pdmm\.contexts\.(\d)\.ups\.(\d)\.1\.", r"mask_decoder.pimm.conv_blocks_context.\1.residual_block.\2.1."),
    (r"^pdmm\.contexts\.(\d)\.block_init\.", r"mask_decoder.pimm.conv_blocks_context.\1.block_init."),
    (r"\.conv([12])\.weight$", r".conv\1.conv.weight"),
    (r"\.shortcut\.weight$", ".conv3.conv.weight"),
)


class Published(NamedTuple):
    sam_file: Path
    checkpoint: Path
    state: dict[str, Tensor]  # ours


@pytest.fixture(scope="module")
def published(workspace: Workspace) -> Published:
    """A SAM file of the tiny shapes and a DeSAM trained on it, under the published names; random numbers."""
    tiny = ENCODERS["vit_tiny"].architecture
    assert isinstance(tiny, SamViT)
    made = publish(tiny, workspace.root / "weights")
    workspace.write_plans("Import", **tiny_sections(encoder=str(made.sam_file)))
    return made


def publish(size: SamViT, folder: Path) -> Published:
    """Writes both files. As in published ones, blocks that keep their width hold a shortcut that nothing uses."""
    sam_file, checkpoint = folder / "sam_of_tiny_shapes.pth", folder / "desam_published.pth"
    torch.manual_seed(3)
    sam = build_sam(size).state_dict()
    torch.save(sam, sam_file)
    to_image = TileToImage(IMAGE, SIZE, "percentile")
    network = build_desam(Outline(load_encoder(str(sam_file), SIZE), to_image, 1, 2, True, None), GridPrompter(3, 0.0))
    torch.nn.init.constant_(network.prim.iou_head.seg_layers.bias, 5.0)  # every point passes: masks to look at
    state = {key: value.clone() for key, value in network.state_dict().items()}
    official = {key: value for key, value in sam.items() if not key.startswith("mask_decoder.iou")}
    official |= {rename(key): pad_iou(key, value) for key, value in state.items()}
    for name, block in network.named_modules():
        if isinstance(block, SRB) and block.shortcut is None:
            width = block.conv2.out_channels
            official[rename(f"{name}.shortcut.weight")] = torch.full((width, width, 1, 1), 7.0)
    torch.save(official, checkpoint)
    return Published(sam_file, checkpoint, state)


def rename(key: str) -> str:
    for pattern, name in PUBLISHED:
        key = re.sub(pattern, name, key)
    return key


def pad_iou(key: str, value: Tensor) -> Tensor:
    """Published files have SAM's four outputs, of which the first is used."""
    return torch.cat([value, torch.full((3, *value.shape[1:]), 7.0)]) if "iou_head.seg_layers" in key else value


def run_import(checkpoint: Path, *arguments: str) -> int:
    return main(["weights", "import", str(checkpoint), "-d", "501", "-p", "Import", *arguments])


def test_model_folder_predicts_at_once(
    workspace: Workspace, published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_import(published.checkpoint) == 0
    output = capsys.readouterr().out
    assert "published image preparation differs" in output
    model = workspace.model("DeSAMTrainer", "Import")
    assert str(model) in output
    image = next((workspace.unseen / "images").glob("*.nii.gz"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / image.name).write_bytes(image.read_bytes())
    nnunet("nnUNetv2_predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "-d", 501, "-c", "2d", "-f", "all",
           "-tr", "DeSAMTrainer", "-p", "Import", "-device", "cpu", "-npp", 0, "-nps", 0)
    assert sitk.GetArrayFromImage(sitk.ReadImage(next((tmp_path / "out").glob("*.nii.gz")))).any()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",))
    assert predictor.allowed_mirroring_axes is None
    for key, value in predictor.network.state_dict().items():
        torch.testing.assert_close(value, published.state[key], rtol=0, atol=0)


def section_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "plans.json").read_text())["configurations"]["2d"]["desam"]


def test_predicts_as_published_unless_the_plans_say_otherwise(
    workspace: Workspace, published: Published, tmp_path: Path
) -> None:
    """Points from the tile's edge, and masks through the input; grid and threshold where the plans leave them open."""
    assert run_import(published.checkpoint, "-o", str(tmp_path / "model")) == 0
    section = section_of(tmp_path / "model")
    assert (section["grid_offset"], section["through_input"], section["mask_stride"]) == (0.0, True, 4)
    assert (section["grid"], section["iou_threshold"]) == (3, 0.0)  # as these plans say
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "model"), ("all",))
    assert predictor.network.prompter == GridPrompter(3, 0.0, 0.0)
    assert predictor.network.through_input
    sections = tiny_sections(encoder=str(published.sam_file))
    workspace.write_plans("Own", sam=sections["sam"], desam={"through_input": False, "grid_offset": -0.5})
    assert run_import(published.checkpoint, "-p", "Own", "-o", str(tmp_path / "own")) == 0
    section = section_of(tmp_path / "own")
    assert (section["grid_offset"], section["through_input"]) == (-0.5, False)
    assert (section["grid"], section["iou_threshold"]) == (9, 0.5)


@pytest.mark.parametrize(("width", "level"), [(128, 0), (64, 1), (32, 2)])
def test_an_encoder_as_wide_as_a_level_leaves_an_unused_shortcut(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, level: int
) -> None:
    """Published files have the shortcut ``conv3`` of every block, also of one that keeps its width."""
    size = SamViT(width, 4, 4, (0, 1, 2, 3), window=8, prompt_dim=128, tables=256)
    monkeypatch.setitem(ENCODERS, "narrow", EncoderRow("narrow", size, 256, "narrow.pth"))
    made = publish(size, tmp_path)
    unused = f"mask_decoder.pimm.conv_blocks_context.{level}.block_init.conv3.conv.weight"
    assert torch.load(made.checkpoint, weights_only=True)[unused].shape == (width, width, 1, 1)
    workspace.write_plans("Narrow", **tiny_sections(encoder=str(made.sam_file)))
    assert run_import(made.checkpoint, "-p", "Narrow", "-o", str(tmp_path / "model")) == 0
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "model"), ("all",))
    state = predictor.network.state_dict()
    assert state.keys() == made.state.keys()
    assert all(torch.equal(state[key], value) for key, value in made.state.items())


@pytest.mark.slow
def test_pretrained_weights_file_starts_a_training(workspace: Workspace, published: Published, tmp_path: Path) -> None:
    assert run_import(published.checkpoint, "-o", str(tmp_path / "model")) == 0
    file = tmp_path / "model" / "pretrained_weights.pth"
    result = nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "DeSAMTrainer", "-p", "Import", "-device", "cpu",
                    "-pretrained_weights", file)
    assert "Loading pretrained weights" in result.stdout


def test_a_model_that_is_there_is_kept(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    assert run_import(published.checkpoint, "-o", str(folder)) == 0
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    before = set(folder.rglob("*"))
    assert run_import(published.checkpoint, "-o", str(folder)) == 1
    assert "holds a model already: remove it or choose another folder" in capsys.readouterr().err
    assert set(folder.rglob("*")) == before
    assert not any(path.stat().st_mtime for path in before)


def test_another_image_encoder_is_refused(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(published.checkpoint, weights_only=True)
    state["image_encoder.neck.1.bias"] += np.float32(0.1)
    torch.save(state, tmp_path / "tuned.pth")
    assert run_import(tmp_path / "tuned.pth", "-o", str(tmp_path / "model")) == 1
    message = capsys.readouterr().err
    assert "is not the one in" in message
    assert "1 of " in message
    assert "image_encoder.neck.1.bias" in message
    assert not (tmp_path / "model").exists()


def test_an_inherited_section_is_kept(workspace: Workspace, published: Published, tmp_path: Path) -> None:
    plans = workspace.write_plans("Child", **tiny_sections(encoder=str(published.sam_file), epochs=7))
    plans["configurations"]["2d_child"] = {"inherits_from": "2d"}
    (workspace.preprocessed / "Child.json").write_text(json.dumps(plans))
    assert main(["weights", "import", str(published.checkpoint), "-d", "501", "-p", "Child", "-c", "2d_child", "-o",
                 str(tmp_path / "model")]) == 0
    written = json.loads((tmp_path / "model" / "plans.json").read_text())["configurations"]["2d_child"]
    assert written["sam"]["encoder"] == str(published.sam_file)
    assert written["sam"]["epochs"] == 7


def test_several_classes_give_a_start_but_no_model(
    workspace: Workspace, published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace.preprocessed / "dataset.json"
    original = path.read_text()
    path.write_text(original.replace('"organ": 1', '"organ": 1, "other": 2'))
    try:
        assert run_import(published.checkpoint, "-o", str(tmp_path / "model")) == 0
    finally:
        path.write_text(original)
    assert "fine-tune first" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["pretrained_weights.pth"]


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("mask_decoder.pimm", "is not a published DeSAM or SAMed checkpoint"),
        ("mask_decoder.pimm.mask_embedding_fusion", "pdmm.fusion.conv1.weight is missing"),
        ("mask_decoder.pimm.conv_blocks_context", "pdmm.contexts.0.block_init.conv1.weight is missing"),
    ],
)
def test_incomplete_files_are_refused(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str], drop: str, message: str
) -> None:
    state = torch.load(published.checkpoint, weights_only=True)
    torch.save({key: value for key, value in state.items() if not key.startswith(drop)}, tmp_path / "part.pth")
    assert run_import(tmp_path / "part.pth", "-o", str(tmp_path / "model")) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_unknown_plans(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "import", str(published.checkpoint), "-d", "501", "-p", "Nothing"]) == 1
    assert "Nothing.json does not exist: make these plans with desam plan, or name others" in capsys.readouterr().err
