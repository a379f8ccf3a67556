"""The examples of docs/extend.md, through the commands that a user types; no file of the package knows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from conftest import SIZE, Workspace, nnunet, tiny_sam, tiny_sections
from test_network import with_scores

import phantom
from desam_nnunet._startup import VARIABLE
from desam_nnunet.encoders.base import FeatureSpec, ImageSpec, Level
from desam_nnunet.encoders.registry import ENCODERS, EncoderRow
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.networks.frame import ABSENT_LOGIT, FrozenSamNetwork, Outline
from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.training.frozen import identity_of_maps

EXTEND = Path(__file__).parents[1] / "examples" / "extend"
EXAMPLES = sorted(EXTEND.rglob("*.py"))


@pytest.fixture(autouse=True)
def doors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user opens them: a folder of trainers, and one that Python imports from."""
    for variable, folder in ((VARIABLE, EXTEND / "trainers"), ("PYTHONPATH", EXTEND)):
        monkeypatch.setenv(variable, os.pathsep.join(filter(None, [str(folder), os.environ.get(variable, "")])))
    monkeypatch.syspath_prepend(str(EXTEND))


def train_and_predict(workspace: Workspace, trainer: str, plans: str, out: Path) -> list[Path]:
    nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", trainer, "-p", plans, "-device", "cpu")
    nnunet("nnUNetv2_predict", "-i", workspace.unseen / "images", "-o", out, "-d", 501, "-c", "2d", "-f", 0, "-tr",
           trainer, "-p", plans, "-device", "cpu", "-npp", 1, "-nps", 1)
    return sorted(out.glob("*.nii.gz"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_60_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60


def test_an_encoder_of_ones_own_trains_and_predicts(workspace: Workspace, tmp_path: Path) -> None:
    workspace.write_plans("ResNetPlans", **tiny_sections(encoder="resnet_encoder:RESNET", image_size=64))
    assert len(train_and_predict(workspace, "DeSAMTrainer", "ResNetPlans", tmp_path / "out")) == 2
    plans = workspace.model("DeSAMTrainer", "ResNetPlans") / "plans.json"
    assert "random:RandomState:1:seed0:resnet_encoder:RESNET" in plans.read_text()


def test_an_encoder_that_cannot_be_imported_is_refused_before_anything_runs(workspace: Workspace) -> None:
    workspace.write_plans("LostPlans", **tiny_sections(encoder="lost_encoder:RESNET"))
    result = nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "DeSAMTrainer", "-p", "LostPlans", "-device", "cpu",
                    check=False)
    assert "The encoder 'lost_encoder:RESNET' can't be imported" in result.stderr


def test_a_method_of_ones_own_is_planned_cached_trained_and_predicted(workspace: Workspace, tmp_path: Path) -> None:
    planned = nnunet("desam", "plan", "-d", 501, "--trainer", "LinearProbeTrainer", "--encoder", "vit_tiny", "-device",
                     "cpu").stdout
    assert "nnUNetv2_train 501 2d 0 -tr LinearProbeTrainer -p LinearProbePlans" in planned
    sections = tiny_sections(image_size=64)
    workspace.write_plans("ProbePlans", sam=sections["sam"], linear_probe={"lr": 1e-3})
    nnunet("desam", "cache", "-d", 501, "-p", "ProbePlans", "-tr", "LinearProbeTrainer", "-device", "cpu")
    files = train_and_predict(workspace, "LinearProbeTrainer", "ProbePlans", tmp_path / "out")
    assert len(files) == 2
    model = workspace.model("LinearProbeTrainer", "ProbePlans")
    log = next((model / "fold_0").glob("training_log*.txt")).read_text()
    assert "to encode" not in log  # desam cache had done it
    weights = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert {key.split(".")[0] for key in weights} == {"probe"}
    assert all(sitk.ReadImage(str(file)).GetSize() == sitk.ReadImage(
        str(workspace.unseen / "images" / file.name.replace(".nii", "_0000.nii"))).GetSize() for file in files)


@torch.no_grad()
def test_the_probe_reads_raw_maps_of_encoders_without_a_neck_too() -> None:
    loaded = load_encoder("timm_random/convnext_tiny", 64)
    trainer = look_up("LinearProbeTrainer")
    to_image = TileToImage(loaded.encoder.spec.image, 64, "unit")
    network = trainer.build_network(Outline(loaded, to_image, 1, 3, True, trainer.method.section())).eval()
    assert network(torch.rand(2, 1, 40, 64)).shape == (2, 3, 40, 64)
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"probe"}


def test_a_key_that_the_methods_section_does_not_have_is_refused(workspace: Workspace) -> None:
    workspace.write_plans("ProbeWrongPlans", **tiny_sections(), linear_probe={"grid": 3})
    result = nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "LinearProbeTrainer", "-p", "ProbeWrongPlans", "-device",
                    "cpu", check=False)
    assert "The plans' section 'linear_probe' has an unknown key 'grid'. Valid keys: lr (float)." in result.stderr


def test_the_doctor_and_a_study_know_a_trainer_of_ones_own(workspace: Workspace, tmp_path: Path) -> None:
    assert "LinearProbeTrainer      method linear_probe" in nnunet("desam", "doctor").stdout
    phantom.write_unseen(tmp_path / "sites", sites=("SiteA", "SiteB"), cases=2)
    described = nnunet("desam", "cross-site", tmp_path / "sites", "-o", tmp_path / "study", "-tr", "LinearProbeTrainer",
                       "-f", "all", "-device", "cpu", "--dry-run").stdout
    assert "--trainer LinearProbeTrainer" in described


def test_another_prompt_rule_asks_for_two_points() -> None:
    """Two points must speak for a class: never more is present than with one."""
    ours, theirs = (look_up(name).prompter for name in ("DeSAMTrainer", "DeSAMTrainerTwoWitnesses"))
    section = look_up("DeSAMTrainer").method.section(iou_threshold=0.5)
    scores = torch.tensor([[0.9, 0.9], [0.1, 0.8], [0.2, 0.1]])  # 3 points, 2 classes
    assert ours(section).choose(scores).present.tolist() == [True, True]
    chosen = theirs(section).choose(scores)
    assert chosen.present.tolist() == [False, True]
    assert chosen.prompt[1] == 1


@torch.no_grad()
def test_another_prompt_rule_predicts_through_the_network() -> None:
    """The mask of the second best point, and only where two points say so."""
    trainer = look_up("DeSAMTrainerTwoWitnesses")
    section = trainer.method.section(grid=2, iou_threshold=0.5)
    to_image = TileToImage(ENCODERS["vit_tiny"].architecture.spec(SIZE).image, SIZE, "unit")
    network = trainer.build_network(Outline(tiny_sam(), to_image, 1, 3, True, section)).eval()
    with_scores(network, [[0.6, 0.9], [0.2, 0.1], [0.9, 0.2], [0.1, 0.3]])  # 4 points, 2 classes
    tile = torch.rand(1, 1, 64, 64)
    logits, geometry = network(tile), network.geometry(tile)
    point = network.prompter.points(geometry, tile.device)[:1]
    masks, _ = network(network.encode(tile), Prompts(points=point))
    torch.testing.assert_close(logits[:, 1], network.tile_logits(masks, geometry)[:, 1])
    assert logits[:, 2].eq(ABSENT_LOGIT).all()


def test_the_doctor_passes_by_what_is_no_trainer_and_no_usable_backbone(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bases.py").write_text(
        "from desam_nnunet.training.frozen import FrozenSamTrainer\n\n\nclass MyBase(FrozenSamTrainer):\n    pass\n")
    (tmp_path / "vit_small_patch14_dinov2.safetensors").write_bytes(b"not read")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path), os.environ[VARIABLE]]))
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path))
    said = nnunet("desam", "doctor", check=False).stdout
    assert "LinearProbeTrainer" in said
    assert "MyBase" not in said


def test_what_else_changes_features_is_part_of_the_store() -> None:
    """Two encoders that share their weights, or a method with images of its own, must not share a store."""
    network = outline_of("vit_tiny")
    assert identity_of_maps("vit_tiny", network) == ""
    assert identity_of_maps("resnet_encoder:RESNET", network) != ""
    network.to_image = TileToImage(ImageSpec(16), 64, "unit")
    assert identity_of_maps("vit_tiny", network) != ""
    mine = EncoderRow("mine:A", ENCODERS["vit_tiny_random"].architecture, 256)
    assert mine.random_identity != ENCODERS["vit_tiny_random"].random_identity


def outline_of(encoder: str) -> FrozenSamNetwork:
    loaded = load_encoder(encoder, 64)
    to_image = TileToImage(loaded.encoder.spec.image, 64, "unit")
    return FrozenSamNetwork(encoder=loaded.encoder, to_image=to_image, num_channels=1, background=True)


def test_an_encoder_with_a_stride_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="a map at a stride of 14 pixels"):
        FeatureSpec((Level(8, 14),) * 3, Level(8, 14), ImageSpec(14))
