"""PDMM alone on frozen features: the network, and the trainer through nnU-Net's commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from conftest import SIZE, Workspace, nnunet, tiny_sam, tiny_sections
from torch.nn import functional as F

from desam_nnunet.encoders.base import FeatureSpec
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.networks.desam.pdmm_alone import PDMMAlone
from desam_nnunet.networks.desam.pdmm_section import PdmmSection
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import TileToImage


def make(outputs: int = 3, **section: int) -> PDMMAlone:
    loaded = tiny_sam()
    to_image = TileToImage(loaded.encoder.spec.image, SIZE, "unit")
    return PDMMAlone(Outline(loaded, to_image, 1, outputs, True, PdmmSection(**section))).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [4, 2, 1])
def test_masks_have_the_stride_that_was_asked_for_and_every_weight_learns(stride: int) -> None:
    network = make(width=32, mask_stride=stride).train()
    tile = torch.rand(2, 1, 48, 64)
    masks, scores = network(network.encode(tile), Prompts())
    assert masks.shape == (2, 2, SIZE // stride, SIZE // stride)
    assert scores is None
    network.tile_logits(masks, network.geometry(tile))[:, 1:].square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    silent = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert all(".se.fc." in name for name in silent)  # with one hidden channel a ReLU may be off


@torch.no_grad()
def test_an_encoder_without_a_neck_of_its_own_gets_one() -> None:
    loaded = load_encoder("timm_random/convnext_tiny", 64)
    to_image = TileToImage(loaded.encoder.spec.image, 64, "unit")
    network = PDMMAlone(Outline(loaded, to_image, 1, 3, True, PdmmSection(width=16))).eval()
    assert network(torch.rand(2, 1, 40, 64)).shape == (2, 3, 40, 64)


@torch.no_grad()
def test_at_the_necks_own_width_it_is_pdmm_of_the_neck_and_nothing_else() -> None:
    spec: FeatureSpec = tiny_sam().encoder.spec
    network = make(width=spec.neck.channels)
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"pdmm"}
    tile = torch.rand(1, 1, 64, 64)
    features = network.encode(tile)
    masks = network.pdmm(features.neck, network.pdmm.context(features.levels))
    logits = network(tile)
    assert logits[:, :1].eq(0).all()
    assert torch.equal(logits, network.tile_logits(masks, network.geometry(tile)))


@torch.no_grad()
def test_a_narrow_one_reads_the_neck_through_one_convolution() -> None:
    network = make(width=16)
    features = network.encode(torch.rand(1, 1, 64, 64))
    narrowed = F.conv2d(features.neck, network.narrowed.weight)
    masks, _ = network(features, Prompts())
    assert torch.equal(masks, network.pdmm(narrowed, network.pdmm.context(features.levels)))


@pytest.mark.parametrize(("key", "value"), [("width", 15), ("width", 1025), ("lr", 0.0), ("mask_stride", 3)])
def test_values_that_mean_nothing_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"The plans' key pdmm.{key} is {value}"):
        PdmmSection(**{key: value})  # type: ignore[arg-type]


@pytest.mark.slow  # test_slab_commands trains and predicts it by default, test_extend a method of a user's
def test_planned_cached_trained_and_predicted(workspace: Workspace, tmp_path: Path) -> None:
    planned = nnunet("desam", "plan", "-d", 501, "--trainer", "PDMMTrainer", "--encoder", "vit_tiny", "-device",
                     "cpu").stdout
    assert "nnUNetv2_train 501 2d 0 -tr PDMMTrainer -p PDMMPlans" in planned
    workspace.write_plans("PdmmTinyPlans", sam=tiny_sections()["sam"], pdmm={"width": 16})
    nnunet("desam", "cache", "-d", 501, "-p", "PdmmTinyPlans", "-tr", "PDMMTrainer", "-device", "cpu")
    nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "PDMMTrainer", "-p", "PdmmTinyPlans", "-device", "cpu")
    model = workspace.model("PDMMTrainer", "PdmmTinyPlans")
    log = next((model / "fold_0").glob("training_log*.txt")).read_text()
    assert "to encode" not in log  # desam cache had done it
    out = tmp_path / "out"
    nnunet("nnUNetv2_predict", "-i", workspace.unseen / "images", "-o", out, "-d", 501, "-c", "2d", "-f", 0, "-tr",
           "PDMMTrainer", "-p", "PdmmTinyPlans", "-device", "cpu", "-npp", 1, "-nps", 1)
    files = sorted(out.glob("*.nii.gz"))
    assert len(files) == 2
    for file in files:
        image = workspace.unseen / "images" / file.name.replace(".nii", "_0000.nii")
        assert sitk.ReadImage(file).GetSize() == sitk.ReadImage(image).GetSize()
