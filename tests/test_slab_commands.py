"""The configuration ``2d_slab`` through nnU-Net's own commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import PLANS, Workspace, make_trainer, nnunet, tiny_sections

from desam_nnunet.cache.store import open_stores
from desam_nnunet.commands.__main__ import main
from desam_nnunet.networks.neighbours import Neighbours
from desam_nnunet.nnunet.model_folder import read_checkpoint
from desam_nnunet.sam.slabs import SLABS
from desam_nnunet.training.desam import DeSAMTrainer
from desam_nnunet.training.expand import expand

SLAB_PLANS = "SlabPlans"
DEPTH = 5


def write_plans(workspace: Workspace, name: str = SLAB_PLANS, **sam: object) -> None:
    """Plans with both configurations, as ``desam plan`` writes them."""
    plans = workspace.write_plans(name, **tiny_sections(**({"view_geometry": "case"} | sam)), pdmm={"width": 16})
    patch = plans["configurations"]["2d"]["patch_size"]
    plans["configurations"][SLABS] = {"inherits_from": "2d", "patch_size": [DEPTH, *patch], "batch_size": 2}
    (workspace.preprocessed / f"{name}.json").write_text(json.dumps(plans))


def model(workspace: Workspace, trainer: str, plans: str = SLAB_PLANS, configuration: str = SLABS) -> Path:
    return workspace.results / f"{trainer}__{plans}__{configuration}"


def train(configuration: str, trainer: str, *options: object, fold: object = 0, plans: str = SLAB_PLANS) -> str:
    return nnunet("nnUNetv2_train", 501, configuration, fold, "-tr", trainer, "-p", plans, "-device", "cpu",
                  *options).stdout


def predict(workspace: Workspace, out: Path, configuration: str, trainer: str = "PDMMTrainer") -> dict[str, np.ndarray]:
    nnunet("nnUNetv2_predict", "-i", workspace.unseen / "images", "-o", out, "-d", 501, "-c", configuration, "-f", 0,
           "-tr", trainer, "-p", SLAB_PLANS, "-device", "cpu", "-npp", 1, "-nps", 1, "--save_probabilities")
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(out.glob("*.nii.gz"))}


@pytest.fixture(scope="module")
def slabbed(workspace: Workspace) -> Workspace:
    """PDMM trained on tiles and on slabs, of one cache with two views."""
    write_plans(workspace, views=2)
    for configuration in ("2d", SLABS):
        train(configuration, "PDMMTrainer", "--npz")
    return workspace


@pytest.fixture(scope="module")
def predicted(slabbed: Workspace) -> dict[str, Path]:
    out = {configuration: slabbed.root / f"predicted_{configuration}" for configuration in ("2d", SLABS)}
    for configuration, folder in out.items():
        predict(slabbed, folder, configuration)
    return out


def test_both_configurations_share_one_cache(slabbed: Workspace) -> None:
    assert len([store for store in open_stores(slabbed.preprocessed) if store.recipe.views == 2
                and "by case" in store.recipe.augmentation]) == 1


def test_slices_learn_of_their_neighbours_and_mirror_in_their_plane(slabbed: Workspace) -> None:
    checkpoint = read_checkpoint(model(slabbed, "PDMMTrainer"), "0", "checkpoint_final.pth")
    assert checkpoint["network_weights"]["pdmm.neighbours.seg_layers.1.weight"].abs().max() > 0
    assert checkpoint["inference_allowed_mirroring_axes"] == (1, 2)


def test_predictions_have_the_images_shape_and_ensemble(
    slabbed: Workspace, predicted: dict[str, Path], tmp_path: Path
) -> None:
    nnunet("nnUNetv2_ensemble", "-i", *predicted.values(), "-o", tmp_path / "both", "-np", 1)
    for image in (slabbed.unseen / "images").glob("*_0000.nii.gz"):
        size = sitk.ReadImage(str(image)).GetSize()
        for folder in (*predicted.values(), tmp_path / "both"):
            assert sitk.ReadImage(str(folder / image.name.replace("_0000", ""))).GetSize() == size


@pytest.mark.slow
def test_the_better_configuration_is_found_and_exported(slabbed: Workspace, tmp_path: Path) -> None:
    nnunet("nnUNetv2_find_best_configuration", 501, "-c", "2d", SLABS, "-p", SLAB_PLANS, "-tr", "PDMMTrainer", "-f", 0,
           "-np", 1)
    information = json.loads((slabbed.results / "inference_information.json").read_text())
    assert len(information["considered_models"]) == 2
    nnunet("nnUNetv2_export_model_to_zip", "-d", 501, "-o", tmp_path / "model.zip", "-c", SLABS, "-f", 0, "-tr",
           "PDMMTrainer", "-p", SLAB_PLANS)
    assert (tmp_path / "model.zip").stat().st_size > 0


@pytest.mark.slow
def test_pretrained_weights_of_single_slices(slabbed: Workspace) -> None:
    checkpoint = model(slabbed, "PDMMTrainer", configuration="2d") / "fold_0" / "checkpoint_final.pth"
    out = train(SLABS, "PDMMTrainer", "-pretrained_weights", checkpoint, fold=1)
    assert "Loading pretrained weights" in out


def test_an_expanded_model_predicts_what_it_was_made_of(
    slabbed: Workspace, predicted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net adds up overlapping windows in float16, coarsely where a slab's outer slices hardly count."""
    flat = model(slabbed, "PDMMTrainer", configuration="2d")
    copy = tmp_path / "results" / slabbed.results.name / flat.name
    copy.parent.mkdir(parents=True)
    copy.symlink_to(flat)
    assert main(["weights", "expand", str(copy)]) == 0
    assert main(["weights", "expand", str(copy)]) == 1
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    for name in predict(slabbed, tmp_path / "out", SLABS):
        ours, theirs = (np.load(folder / name.replace("nii.gz", "npz"))["probabilities"]
                        for folder in (tmp_path / "out", predicted["2d"]))
        assert np.abs(ours - theirs).mean() < 0.01
        assert np.ptp(theirs[1]) > 0.02  # there is something to see


@pytest.mark.slow
def test_an_expanded_model_validates(slabbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = model(slabbed, "PDMMTrainer", configuration="2d")
    copy = tmp_path / "results" / slabbed.results.name / flat.name
    copy.parent.mkdir(parents=True)
    copy.symlink_to(flat)
    expand(copy)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    nnunet("nnUNetv2_train", 501, SLABS, 0, "-tr", "PDMMTrainer", "-p", SLAB_PLANS, "-device", "cpu", "--val")
    expanded = copy.with_name(copy.name + "_slab")
    assert (expanded / "fold_0" / "validation" / "summary.json").is_file()


def test_what_cannot_be_expanded(
    slabbed: Workspace, trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "expand", str(slabbed.root)]) == 1
    assert "has no fold with a checkpoint_final.pth" in capsys.readouterr().err
    copy = tmp_path / "SAMedTrainer__X__2d"
    copy.symlink_to(trained.model("DeSAMTrainer"))
    assert main(["weights", "expand", str(copy)]) == 1
    assert "the method samed sees one slice at a time" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["DeSAMTrainer", "DeSAMTrainerWholeBox"])
def test_online_training_on_slabs(slabbed: Workspace, trainer: str) -> None:
    """Slabs at the volume's end reach out of it; nnU-Net augments them in their planes."""
    write_plans(slabbed, "SlabOnline", features="online", augmentation="strong")
    train(SLABS, trainer, plans="SlabOnline")
    folder = model(slabbed, trainer, "SlabOnline") / "fold_0"
    assert (folder / "validation" / "summary.json").is_file()
    checkpoint = read_checkpoint(folder.parent, "0", "checkpoint_final.pth")
    assert checkpoint["inference_allowed_mirroring_axes"] == (1, 2)


def test_augmentation_of_slabs_is_that_of_slices(slabbed: Workspace) -> None:
    flat, deep = (make_trainer("DeSAMTrainer", slabbed, plans=slabbed.plans(SLAB_PLANS), configuration=configuration)
                  for configuration in ("2d", SLABS))
    rotation, _, window, axes = flat.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    of_slab = deep.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert of_slab[0] == rotation
    assert of_slab[1] is True
    assert list(of_slab[2]) == [DEPTH, *window]
    assert axes == (0, 1)
    assert of_slab[3] == deep.inference_allowed_mirroring_axes == (1, 2)


def test_gradients_reach_every_trained_weight(slabbed: Workspace) -> None:
    trainer = make_trainer("DeSAMTrainer", slabbed, plans=slabbed.plans(SLAB_PLANS), configuration=SLABS)
    trainer.initialize()
    network = trainer.network
    for module in network.modules():
        if isinstance(module, Neighbours):  # else the first convolution gets none in the first step
            torch.nn.init.normal_(module.seg_layers[1].weight)
    patch = trainer.configuration_manager.patch_size
    batch = {"data": torch.randn(2, 1, *patch), "target": torch.ones(2, 1, *patch), "keys": ["a", "b"]}
    loss, logits = trainer.compute_loss(*trainer._on_device(batch))
    assert logits.shape == (2 * DEPTH, 2, *patch[1:])
    loss.backward()
    assert not [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None]


@pytest.mark.parametrize("trainer", ["DeSAMTrainer", "DeSAMTrainerWholeBox", "PDMMTrainer"])
def test_regions_with_an_ignore_label_and_two_channels(slabbed: Workspace, trainer: str) -> None:
    """What is counted is what is labelled, slice by slice; what is ignored changes no loss."""
    dataset = slabbed.dataset_json() | {
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2],
        "channel_names": {"0": "T2", "1": "ADC"}}
    plans = slabbed.plans(SLAB_PLANS)
    plans["configurations"]["2d"]["sam"]["features"] = "online"
    for key in ("normalization_schemes", "use_mask_for_norm"):
        plans["configurations"]["2d"][key] = plans["configurations"]["2d"][key] * 2
    made = make_trainer(trainer, slabbed, plans=plans, configuration=SLABS, dataset_json=dataset)
    made.initialize()
    patch = made.configuration_manager.patch_size
    target = torch.zeros(2, 3, *patch, dtype=torch.int16)
    target[0, :2, 1:3, 20:50, 30:60] = 1  # both regions, in two slices of five
    target[:, 2, 2] = 1  # one of them ignored
    batch = {"data": torch.randn(2, 2, *patch), "target": target, "keys": ["a", "b"]}
    made.network.eval()
    with torch.no_grad():
        result = made.validation_step(batch)
        changed = batch | {"target": target.clone()}
        changed["target"][:, :2, 2] = 0
        again = made.validation_step(changed)
    assert (result["tp_hard"] + result["fn_hard"]).tolist() == [30 * 30] * 2
    if trainer != "DeSAMTrainer":  # whose points are drawn anew
        assert result["loss"] == pytest.approx(again["loss"], rel=1e-6)
    made.network.train()
    assert np.isfinite(made.train_step(batch)["loss"])


@pytest.mark.parametrize(("trainer", "configuration", "words"), [
    ("DeSAMTrainer", "3d_fullres", "is 3D, but SAM works on slices: use 2d or 2d_slab"),
    ("SAMedTrainer", SLABS, "the method samed sees one slice at a time: use 2d"),
    ("DBSAMTrainer", SLABS, "the method dbsam sees one slice at a time: use 2d"),
])
def test_what_sees_no_slabs_is_refused(slabbed: Workspace, trainer: str, configuration: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer(trainer, slabbed, plans=slabbed.plans(SLAB_PLANS), configuration=configuration)


def test_models_from_before_slabs_become_slabs(trained: Workspace, tmp_path: Path) -> None:
    """Their own plans know no such configuration: 5 slices of the tiles that they were trained on."""
    copy = tmp_path / trained.model("DeSAMTrainer").name
    copy.symlink_to(trained.model("DeSAMTrainer"))
    plans = json.loads((expand(copy) / "plans.json").read_text())["configurations"]
    assert plans[SLABS]["patch_size"] == [5, *plans["2d"]["patch_size"]]


def test_views_by_tile_are_no_slabs(slabbed: Workspace) -> None:
    write_plans(slabbed, "ByTile", views=2, view_geometry="tile")
    with pytest.raises(ValueError, match="sam.view_geometry is 'tile', so that neighbouring slices"):
        make_trainer("PDMMTrainer", slabbed, plans=slabbed.plans("ByTile"), configuration=SLABS)
    assert make_trainer("PDMMTrainer", slabbed, plans=slabbed.plans("ByTile")).sam.view_geometry == "tile"


def test_plans_without_slabs_say_what_they_have(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="is 3D, but SAM works on slices: use 2d"):
        make_trainer("DeSAMTrainer", workspace, plans=workspace.plans(PLANS), configuration="3d_fullres")
    assert DeSAMTrainer.method.slabs
