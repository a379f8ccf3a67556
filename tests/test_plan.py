"""``desam plan`` on a data set that nnU-Net has planned, and on one that it has not."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DATASET, Workspace, make_trainer, nnunet
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.commands.__main__ import main
from desam_nnunet.encoders.base import FeatureSpec
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import SamViT
from desam_nnunet.encoders.weights import find_row
from desam_nnunet.planning import fit, plan
from desam_nnunet.planning.choices import Choice
from desam_nnunet.planning.facts import Facts, read_facts
from desam_nnunet.planning.fit import Machine
from desam_nnunet.planning.footprint import footprint
from desam_nnunet.planning.plan import choose
from desam_nnunet.planning.presets import preset_names
from desam_nnunet.planning.request import Request
from desam_nnunet.training.base import SamTrainer
from desam_nnunet.training.dbsam import DBSAMTrainer
from desam_nnunet.training.desam import DeSAMTrainer
from desam_nnunet.training.pdmm import PDMMTrainer
from desam_nnunet.training.registry import TRAINERS
from desam_nnunet.training.samed import SAMedTrainer

UNHOARDED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # glibc gives memory back that tensors have given back
CT = Facts(((100, 512, 512),) * 60, (128, 128), 1, 1, ("CTNormalization",))
CARDIAC = Facts(((10, 128, 128),) * 100, (32, 32), 1, 3, ("ZScoreNormalization",))


def machine(memory: float = 80, disk: float = 1000, device: str = "cpu") -> Machine:
    """Args: memory, disk: In GB."""
    return Machine(Choice(1e9 * memory, "given"), 1e9 * disk, torch.device(device))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of all encoders, empty: the planner looks at names alone."""
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path))
    for row in ENCODERS.values():
        (tmp_path / (row.file or "none")).touch()


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
    assert configuration["resampling_fn_probabilities"] == "resample_torch_fornnunet"
    assert configuration["architecture"] == workspace.plans("nnUNetPlans")["configurations"]["2d"]["architecture"]
    assert configuration["sam"]["encoder"] == "vit_tiny"
    assert (configuration["sam"]["views"], configuration["sam"]["view_geometry"]) == (4, "case")  # slabs may share them
    assert configuration["sam"]["augmentation"] == "strong"
    assert configuration["desam"] == {"mask_stride": 4, "grid_offset": 0.0, "through_input": False}
    patch = configuration["patch_size"]
    assert plans["configurations"]["2d_slab"] == {"inherits_from": "2d", "patch_size": [5, *patch], "batch_size": 2}
    slab = make_trainer("DeSAMTrainer", workspace, plans=plans, configuration="2d_slab")
    assert slab.depth == 5
    assert slab.sam == make_trainer("DeSAMTrainer", workspace, plans=workspace.plans("DeSAMPlans")).sam
    out = capsys.readouterr().out
    for key in ("patch_size", "batch_size", "sam.image_size", "sam.features", "sam.views", "sam.augmentation",
                "sam.epochs", "2d_slab"):
        assert any(line.startswith(key) and len(line.split()) > 3 for line in out.splitlines())
    assert "nnUNetv2_train 501 2d 0 -tr DeSAMTrainer -p DeSAMPlans -device cpu\n" in out
    assert "nnUNetv2_predict -i images/ -o out/ -d 501 -c 2d -f 0 -tr DeSAMTrainer -p DeSAMPlans -device cpu" in out


@pytest.mark.parametrize(("trainer", "method", "name", "own"), [
    ("SAMedTrainerS", "samed", "SAMedPlans", {"lr_after_step": True}),
    ("DBSAMTrainerBoxes", "dbsam", "DBSAMPlans", {"mask_tokens": 4}),
])
def test_other_methods_get_their_own_section_and_name(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], trainer: str, method: str, name: str,
    own: dict[str, Any],
) -> None:
    """The section holds the keys that older models lack, so that these plans mean the same wherever they go."""
    assert main(["plan", "-d", "501", "--encoder", "vit_tiny", "-device", "cpu", "--trainer", trainer]) == 0
    out = capsys.readouterr().out
    configuration = workspace.plans(name)["configurations"]["2d"]
    assert configuration[method] == own
    assert not {"desam", "samed", "dbsam"} - {method} & configuration.keys()
    assert "2d_slab" not in workspace.plans(name)["configurations"]  # these see one slice at a time
    assert configuration["sam"]["features"] == "online"
    assert f"nnUNetv2_train 501 2d 0 -tr {trainer} -p {name}" in out
    assert re.search(rf"^{method}.checkpointing +false +what a step keeps fits", out, re.M)
    make_trainer(trainer, workspace, plans=workspace.plans(name))  # the sections are valid


@pytest.mark.slow
def test_what_was_planned_trains_beside_plain_nnunet(workspace: Workspace) -> None:
    plans = planned(workspace, name="TrainedPlans")
    sam = plans["configurations"]["2d"]["sam"]
    sam |= {"epochs": 1, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1, "views": 1, "image_size": 64}
    sam["augmentation"] = "nnunet"  # of which one view is
    (workspace.preprocessed / "TrainedPlans.json").write_text(json.dumps(plans))
    nnunet("nnUNetv2_train", 501, "2d", 0, "-tr", "DeSAMTrainerWholeBox", "-p", "TrainedPlans", "-device", "cpu")
    given = plans | {"continue_training": False}
    plain = nnUNetTrainer(given, "2d", 0, workspace.dataset_json(), torch.device("cpu"))
    plain.initialize()
    with torch.no_grad():  # in training mode, where InstanceNorm refuses a bottleneck of one pixel
        plain.network.train()(torch.randn(1, 1, *plans["configurations"]["2d"]["patch_size"]))
    assert (workspace.model("DeSAMTrainerWholeBox", "TrainedPlans") / "fold_0" / "checkpoint_final.pth").is_file()


def test_flags_go_before_the_preset_and_the_preset_before_the_planner(workspace: Workspace) -> None:
    configuration = planned(workspace, "--preset", "cpu", name="PresetPlans")["configurations"]["2d"]
    assert configuration["sam"]["encoder"] == "vit_tiny"
    assert configuration["sam"]["image_size"] == 256  # not the preset's 512, which is for ViT-B
    assert configuration["desam"]["grid"] == 5


def test_plans_of_the_same_name_are_kept_beside(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    planned(workspace, name="AgainPlans")
    path = workspace.preprocessed / "AgainPlans.json"
    versions = [path.read_text() + end for end in ("\n", "\n\n")]
    for version in versions:
        path.write_text(version)
        planned(workspace, name="AgainPlans")
    assert [path.with_name(f"AgainPlans.json.before{n}").read_text() for n in (1, 2)] == versions
    assert "AgainPlans.json.before2" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "{", '{"configurations": []}', '{"configurations": {"2d": null}}'])
def test_what_is_no_plans_of_ours_is_never_replaced(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = workspace.preprocessed / "OddPlans.json"
    path.write_text(content)
    assert main(["plan", "-d", "501", "--encoder", "vit_tiny", "-device", "cpu", "-tr", "PDMMTrainer",
                 "-overwrite_plans_name", "OddPlans"]) == 1
    assert "OddPlans.json" in capsys.readouterr().err
    assert path.read_text() == content
    path.unlink()


@pytest.mark.slow
def test_an_unplanned_data_set_is_planned_by_nnunet_first(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = workspace.root / "nnUNet_raw" / "Dataset502_Copy"
    shutil.copytree(workspace.root / "nnUNet_raw" / DATASET, copy)
    command = ("desam", "plan", "-d", 502, "--encoder", "vit_tiny", "-device", "cpu")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    refused = nnunet(*command, check=False)
    assert refused.returncode == 1
    assert "nnUNet_n_proc_DA is 0: set it to 1" in refused.stderr
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    result = nnunet(*command)
    folder = workspace.root / "nnUNet_preprocessed" / "Dataset502_Copy"
    assert (folder / "nnUNetPlans.json").is_file()
    plans = json.loads((folder / "DeSAMPlans.json").read_text())
    assert plans["dataset_name"] == "Dataset502_Copy"
    assert "sam" in plans["configurations"]["2d"]
    assert "    nnUNetv2_preprocess -d 502 -plans_name DeSAMPlans -c 2d\n" in result.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (("--trainer", "SAMTrainer"), r"finds no trainer 'SAMTrainer' .*choose DeSAMTrainer, .*DBSAMTrainerBoxes, or list"),
    (("--trainer", "SAMedTrainer", "--preset", "paper"), "'paper' is for the method desam, but SAMedTrainer trains"),
    (("--preset", "nothing"), "There is no preset 'nothing'; there are: cpu, laptop, paper"),
    (("--encoder", "vit_x"), "Unknown encoder 'vit_x'"),
    (("--trainer", "PDMMTrainer", "-gpu_memory_target", "0.02"), r"takes 0.1 GB, but 0.0 GB are there"),
    (("-gpu_memory_target", "nan"), "-gpu_memory_target is nan, but must be above 0 and at most 1000000 GB"),
    (("-disk_target", "-1"), "-disk_target is -1.0, but must be above 0"),
    (("-overwrite_plans_name", "nnUNetPlans"), "nnUNetPlans.json is not desam plan's to write: choose another name"),
    (("--trainer", "PDMMTrainer", "-device", "mps", "-gpu_memory_target", "0.02"), "takes 0.1 GB, but 0.0 GB are"),
    (("-device", "cuda"), "no cuda device here: say what it will have with -gpu_memory_target, or add -device cpu"),
])
def test_bad_wishes_are_one_sentence(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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


def test_transposed_and_resampled_shapes() -> None:
    """Slices lie along the last axis; the planes are resampled to 1 mm, the slices stay."""
    plans = PLANS_OF_AN_UNET | {"transpose_forward": [2, 0, 1]}
    assert PlansManager(plans).get_configuration("2d").spacing == [1.0, 1.0]
    fingerprint = {"shapes_after_crop": [[40, 60, 7], [20, 30, 9]], "spacings": [[0.5, 1.0, 5.0], [2.0, 1.0, 4.0]]}
    facts = read_facts(plans, {"labels": {"background": 0, "a": 1, "b": 2}, "channel_names": {"0": "CT"}}, fingerprint)
    assert facts.shapes == ((7, 20, 60), (9, 40, 30))
    assert facts.divisor == (8, 4)
    assert facts.outputs == 2


PLANS_OF_AN_UNET: dict[str, Any] = {
    "configurations": {"2d": {
        "batch_size": 8, "patch_size": [64, 64], "spacing": [1.0, 1.0], "normalization_schemes": ["CTNormalization"],
        "architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2], [2, 2], [2, 1]]}}, "data_identifier": "plans_2d",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape", "resampling_fn_probabilities_kwargs": {}}},
    "transpose_forward": [0, 1, 2],
}
FINGERPRINT = {"shapes_after_crop": [[7, 60, 40]], "spacings": [[5.0, 1.0, 1.0]]}
ORGAN = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "CT"}}
NO_VALUES: list[Any] = [None, 3, "x", [], {}, [None], {"a": None}]


@pytest.mark.parametrize("key", sorted(PLANS_OF_AN_UNET["configurations"]["2d"]))
def test_plans_that_nnunet_never_writes_are_refused_by_the_planner(key: str) -> None:
    kept = {"batch_size": [3], "data_identifier": ["x"], "resampling_fn_probabilities": ["x"],
            "resampling_fn_probabilities_kwargs": [{}, {"a": None}]}
    for value in NO_VALUES:
        plans = copy.deepcopy(PLANS_OF_AN_UNET)
        plans["configurations"]["2d"][key] = value
        if value in kept.get(key, []):
            assert read_facts(plans, ORGAN, FINGERPRINT).channels == 1
            continue
        if key == "architecture" and not isinstance(value, dict):
            continue  # test_config has it
        with pytest.raises(ValueError, match=f"key {key} of the configuration '2d' is .*, but must be"):
            read_facts(plans, ORGAN, FINGERPRINT)


@pytest.mark.parametrize(("which", "key"), [
    ("plans", "transpose_forward"), ("fingerprint", "shapes_after_crop"), ("fingerprint", "spacings"),
    ("dataset", "labels"), ("dataset", "channel_names")])
def test_fingerprint_and_data_set_that_nnunet_never_writes_are_refused(which: str, key: str) -> None:
    for value in NO_VALUES[:-1]:
        plans, dataset, fingerprint = ({**row} for row in (PLANS_OF_AN_UNET, ORGAN, FINGERPRINT))
        {"plans": plans, "dataset": dataset, "fingerprint": fingerprint}[which][key] = value
        with pytest.raises(ValueError, match=rf"key {key}( of dataset.json)? is .*, but must be|makes no classes"):
            read_facts(plans, dataset, fingerprint)
    older = {"labels": ORGAN["labels"], "modality": {"0": "CT"}}  # nnU-Net reads both
    assert read_facts(PLANS_OF_AN_UNET, older, FINGERPRINT).channels == 1
    with pytest.raises(ValueError, match="The fingerprint has 1 shapes and 2 spacings"):
        read_facts(PLANS_OF_AN_UNET, ORGAN, FINGERPRINT | {"spacings": [[5.0, 1.0, 1.0]] * 2})


@pytest.mark.parametrize(("fingerprint", "message"), [
    ({"shapes_after_crop": [[1e300, 60, 40]]}, "shapes_after_crop is .* from 1 to 65536"),
    ({"shapes_after_crop": [[7, 60, 0.5]]}, "shapes_after_crop is .* from 1 to 65536"),
    ({"spacings": [[1e-300, 1.0, 1.0]]}, "spacings is .* from 1e-6 to 1e6"),
    ({"spacings": [[5.0, 1e6, 1.0]]}, "would be 60000000 x 40 at the planned spacing"),
])
def test_volumes_that_nobody_has_are_refused(fingerprint: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_facts(PLANS_OF_AN_UNET, ORGAN, FINGERPRINT | fingerprint)


@pytest.mark.parametrize("name", ["../esc", "a/b", "", ".x", "\x1b[31m", "x" * 101, "a b"])
def test_plans_have_a_name_that_is_one(workspace: Workspace, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = sorted(workspace.root.rglob("*.json"))
    assert main(["plan", "-d", "501", "--encoder", "vit_tiny", f"-overwrite_plans_name={name or ' '}"]) == 1
    said = capsys.readouterr().err
    assert "is no name of plans" in said
    assert said.strip().isprintable()
    assert sorted(workspace.root.rglob("*.json")) == before


def test_a_misspelt_section_of_nnunets_plans_is_refused_by_the_planner(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = workspace.plans("nnUNetPlans")
    plans["configurations"]["2d"]["desam_settings"] = {"lr": 1.0}
    path = workspace.preprocessed / "nnUNetPlans.json"
    before = path.read_bytes()
    path.write_text(json.dumps(plans))
    try:
        assert main(["plan", "-d", "501", "--encoder", "vit_tiny", "-overwrite_plans_name", "Misspelt"]) == 1
    finally:
        path.write_bytes(before)
    assert "has a key 'desam_settings', which nothing reads" in capsys.readouterr().err
    assert not (workspace.preprocessed / "Misspelt.json").exists()


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_sections_and_go_before_the_planner(name: str) -> None:
    request = Request(preset=name)
    configuration, _, lines = choose(CARDIAC, request, machine())
    for key, value in request.fragment["sam"].items():
        assert configuration["sam"][key] == value
    assert any(line.reason.startswith(f"preset {name}") for line in lines)


def test_there_are_five_presets() -> None:
    assert preset_names() == ["cpu", "laptop", "paper", "quick", "vit_h_24gb"]


@pytest.mark.parametrize(("target", "disk", "more"), [(None, 2, 3), (5.0, 4, 1)])
def test_a_store_is_free_disk_for_its_own_encoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: float | None, disk: float, more: float
) -> None:
    """In GB: 4 are free, and a store takes 6, with which only a cache of the same encoder can go on."""
    store = SimpleNamespace(recipe=SimpleNamespace(encoder="vit_tiny"), size=lambda: 6 * 10**9)
    monkeypatch.setattr(plan, "open_stores", lambda folder: [store])
    monkeypatch.setattr(plan, "usable_bytes", lambda folder: 4 * 10**9)
    found = plan._machine(tmp_path, Request(disk_target=target), torch.device("cpu"))
    assert found.disk == disk * 1e9
    assert found.stored == {"vit_tiny": more * 1e9}
    full = replace(machine(disk=0), stored={"vit_tiny": 1e12})
    assert choose(CARDIAC, Request(encoder="vit_tiny"), full)[0]["sam"]["features"] == "cached"
    assert choose(CARDIAC, Request(encoder="vit_tiny_random"), full)[0]["sam"]["features"] == "online"


def test_a_trial_is_named_as_one(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-d", "501", "--encoder", "vit_tiny", "-device", "cpu", "-tr", "PDMMTrainer", "--quick"]) == 0
    sam = workspace.plans("PDMMPlansQuick")["configurations"]["2d"]["sam"]
    assert (sam["views"], sam["epochs"] * sam["iterations_per_epoch"]) == (1, 400)
    assert "nnUNetv2_train 501 2d 0 -tr PDMMTrainer -p PDMMPlansQuick -device cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "-d", "501", "--quick", "--preset", "cpu"])


def test_flags_and_what_is_there_go_before_a_preset() -> None:
    configuration, _, lines = choose(CT, Request(preset="paper"), machine(disk=1))
    assert configuration["sam"]["features"] == "online"
    configuration, _, lines = choose(CT, Request(preset="paper"), machine(memory=6))
    (batch,) = (line for line in lines if line.key == "batch_size")
    assert configuration["batch_size"] < 8
    assert batch.reason == "what fits into the memory; preset paper asks for 8"
    assert choose(CT, Request(preset="paper", encoder="vit_b"), machine())[0]["sam"]["encoder"] == "vit_b"


@pytest.mark.parametrize(("facts", "memory", "disk", "encoder", "patch", "image_size", "features"), [
    (CT, 80, 1000, "vit_h", [512, 512], 1024, "cached"),
    (CT, 6, 100, "vit_l", [512, 512], 1024, "cached"),  # ViT-H fits with four tiles, but its cache does not
    (CT, 6, 70, "vit_b", [512, 512], 1024, "cached"),
    (CT, 80, 1, "vit_b", [512, 512], 1024, "online"),
    (CARDIAC, 6, 100, "vit_h", [128, 128], 512, "cached"),
])
def test_a_gpu_gets_the_largest_encoder_that_memory_and_disk_hold(
    weights: None, facts: Facts, memory: float, disk: float, encoder: str, patch: list[int], image_size: int,
    features: str,
) -> None:
    configuration, *_ = choose(facts, Request(), machine(memory, disk, "cuda"))
    sam = configuration["sam"]
    assert (sam["encoder"], configuration["patch_size"], sam["image_size"], sam["features"]) == (
        encoder, patch, image_size, features)
    assert configuration["batch_size"] >= 4


def test_few_tiles_do_not_mean_a_small_encoder(weights: None) -> None:
    """Their batch is small for want of tiles, not of memory."""
    few = Facts(((10, 128, 128),) * 4, (32, 32), 1, 3, ("ZScoreNormalization",))
    configuration, *_ = choose(few, Request(), machine(6, 100, "cuda"))
    assert (configuration["batch_size"], configuration["sam"]["encoder"]) == (2, "vit_h")


@pytest.mark.parametrize(("trainer", "memory", "image_size", "checkpointing"), [
    (SAMedTrainer, 40, 512, False), (SAMedTrainer, 2, 512, True),
    pytest.param(DBSAMTrainer, 80, 1024, False, marks=pytest.mark.slow), (DBSAMTrainer, 24, 1024, True),
])
def test_blocks_are_computed_again_before_the_input_shrinks(
    weights: None, trainer: type[SamTrainer], memory: float, image_size: int, checkpointing: bool
) -> None:
    configuration, _, lines = choose(CT, Request(trainer=trainer), machine(memory, 1000, "cuda"))
    sam, own = configuration["sam"], configuration[trainer.method.name]
    assert (sam["encoder"], sam["image_size"], sam["features"]) == ("vit_b", image_size, "online")
    assert own.get("checkpointing", False) == checkpointing
    said = {line.key: line.value for line in lines}
    assert said[f"{trainer.method.name}.checkpointing"] == str(checkpointing).lower()
    assert next(line.reason for line in lines if line.key == "sam.encoder") == "the published one"


def test_a_smaller_input_gets_a_smaller_patch(weights: None) -> None:
    """Masks would else be coarser than 2.5 pixels of the tile."""
    configuration, *_ = choose(CT, Request(encoder="vit_b", trainer=PDMMTrainer), machine(0.7, 1000, "cuda"))
    assert configuration["sam"]["image_size"] < 1024
    assert 256 < max(configuration["patch_size"]) <= 2.5 * configuration["sam"]["image_size"] / 4


class OfMultiple(SamViT):
    """SAM's smallest encoder, as if it took multiples of 112 pixels only."""

    def spec(self, image_size: int) -> FeatureSpec:
        spec = super().spec(image_size)
        return replace(spec, image=replace(spec.image, multiple=112))


@pytest.fixture
def of_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = OfMultiple(**vars(ENCODERS["vit_tiny"].architecture))
    row = replace(ENCODERS["vit_tiny_random"], name="of_multiple", architecture=architecture, image_size=600)
    monkeypatch.setitem(ENCODERS, "of_multiple", row)


@pytest.mark.parametrize(("preset", "memory", "image_size", "reason"), [
    (None, 80, 560, "the encoder's own size"), (None, 0.2, 336, "what fits into the memory"),
    ("cpu", 80, 448, "preset cpu, as a multiple of 112"),
])
def test_only_sizes_that_the_encoder_takes_are_planned(
    of_multiple: None, preset: str | None, memory: float, image_size: int, reason: str
) -> None:
    request = Request(encoder="of_multiple", preset=preset)
    configuration, _, lines = choose(CARDIAC, request, machine(memory))
    assert configuration["sam"]["image_size"] == image_size
    assert next(line.reason for line in lines if line.key == "sam.image_size").endswith(reason)


@pytest.mark.parametrize(("here", "encoder", "reason"), [
    (("lite_medsam", "vit_b", "vit_tiny"), "lite_medsam", "on a CPU: a medical SAM"),
    (("vit_b", "vit_tiny"), "vit_b", "pip install 'desam-nnunet[lite-medsam]'"),
    (("vit_tiny",), "vit_tiny", "comes with this package; better is a medical SAM: pip install"),
])
def test_on_a_cpu_the_first_of_a_few_that_is_here(
    monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...], encoder: str, reason: str
) -> None:
    monkeypatch.setattr(fit, "is_here", lambda name: name in here)
    configuration, _, lines = choose(CARDIAC, Request(trainer=PDMMTrainer), machine(8, 100))
    assert configuration["sam"]["encoder"] == encoder
    assert reason in next(line.reason for line in lines if line.key == "sam.encoder")
    trained_through, _, lines = choose(CARDIAC, Request(trainer=SAMedTrainer), machine(40, 100))
    assert trained_through["sam"]["encoder"] == ("vit_b" if "vit_b" in here else here[0])
    missing = "desam weights get vit_b" in next(line.reason for line in lines if line.key == "sam.encoder")
    assert missing == ("vit_b" not in here)


def test_five_channels_of_few_large_slices_on_a_cpu() -> None:
    facts = Facts(((2, 1024, 1024),) * 2, (256, 256), 5, 1, ("ZScoreNormalization",) * 5)
    configuration, *_ = choose(facts, Request(encoder="vit_b"), machine(8, 100))
    assert configuration["patch_size"] == [512, 512]


def test_operations_of_vit_b() -> None:
    """0.97 TFLOP, as the benchmark counts them from the layers."""
    assert ENCODERS["vit_b"].architecture.operations(1024) == pytest.approx(0.97e12, rel=0.06)


def test_a_gpu_without_sams_weights_gets_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "is_here", lambda name: name in ("lite_medsam", "vit_tiny"))
    configuration, _, lines = choose(CARDIAC, Request(trainer=PDMMTrainer), machine(8, 100, "cuda"))
    assert configuration["sam"]["encoder"] == "lite_medsam"
    assert "desam weights get vit_b" in next(line.reason for line in lines if line.key == "sam.encoder")


def test_a_gpu_gives_nine_tenths_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(plan, "free_memory", lambda device: 10e9)
    assert plan._memory(Request(), torch.device("cuda")) == Choice(9e9, "nine tenths of what is free on a GPU")


def test_more_of_anything_takes_more_memory() -> None:
    need = partial(footprint, DeSAMTrainer, ENCODERS["vit_tiny"].architecture, half=False)
    small = need(128, (96, 96), 1)
    for larger in (need(256, (96, 96), 1), need(128, (512, 512), 1), need(128, (96, 96), 30)):
        assert larger.training(2) > small.training(2)
    assert small.training(3) > small.training(2)
    assert need(128, (96, 96), 1, half=True).training(8) < small.training(8)


@pytest.mark.parametrize("trainer", [SAMedTrainer, pytest.param(DBSAMTrainer, marks=pytest.mark.slow)])
def test_computing_blocks_again_takes_less_memory(trainer: type[SamTrainer]) -> None:
    kept, recomputed = (
        footprint(trainer, ENCODERS["vit_tiny"].architecture, 128, (96, 96), 1, half=False, checkpointing=again)
        for again in (False, True))
    assert recomputed.training(2) < kept.training(2)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "encoder", "size", "batch", "outputs", "patch", "depth", "checkpointing"), [
    ("DeSAMTrainer", "vit_tiny", 256, 8, 1, 160, 1, False), ("DeSAMTrainer", "vit_b", 256, 8, 8, 256, 1, False),
    ("DeSAMTrainer", "vit_b", 256, 8, 1, 1024, 1, False), ("DeSAMTrainer", "vit_b", 512, 4, 1, 320, 1, False),
    ("DeSAMTrainer", "vit_h", 512, 4, 1, 512, 1, False),
    ("DeSAMTrainer", "timm_random/convnext_tiny", 256, 8, 1, 256, 1, False),
    ("DeSAMTrainer", "vit_tiny", 256, 2, 1, 160, 5, False), ("PDMMTrainer", "lite_medsam", 256, 2, 1, 160, 5, False),
    ("SAMedTrainer", "vit_tiny", 256, 8, 1, 160, 1, False), ("SAMedTrainer", "vit_b", 512, 2, 8, 320, 1, False),
    ("SAMedTrainer", "vit_b", 512, 2, 8, 320, 1, True), ("SAMedTrainer", "lite_medsam", 128, 4, 1, 128, 1, False),
    ("DBSAMTrainer", "vit_tiny", 256, 8, 1, 160, 1, False), ("DBSAMTrainer", "vit_b", 256, 2, 1, 256, 1, False),
    ("DBSAMTrainer", "vit_tiny", 256, 8, 1, 160, 1, True), ("DBSAMTrainer", "vit_b", 256, 2, 1, 256, 1, True),
])
def test_the_memory_model_is_within_a_fifth_of_the_measured_peak(
    trainer: str, encoder: str, size: int, batch: int, outputs: int, patch: int, depth: int, checkpointing: bool
) -> None:
    script = Path(__file__).with_name("step_peak.py")
    words = [sys.executable, script, trainer, encoder, size, batch, outputs, patch, depth,
             *["checkpointing"] * checkpointing]
    measured = int(subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True,
                                  env=os.environ | UNHOARDED).stdout)
    need = footprint(TRAINERS[trainer], find_row(encoder).architecture, size, (patch, patch), outputs, half=False,
                     checkpointing=checkpointing, depth=depth)
    assert need.training(batch) - need.weights == pytest.approx(measured, rel=0.2)
