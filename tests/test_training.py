"""The trainers inside nnU-Net, in this process: frozen encoder, guards, resuming, bad data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import TRAINED, Workspace, checksum, make_trainer, nnunet, tiny_sections
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.networks.desam.section import DESAM
from desam_nnunet.training.checks import check_same_settings, settings_of
from desam_nnunet.training.desam import DeSAMTrainer


def make_batch(trainer: Any, *, channels: int = 1, labels: int = 1) -> dict[str, Any]:
    """Two tiles as nnU-Net's loader gives them: the first with foreground, the second without."""
    size = trainer.configuration_manager.patch_size
    target = torch.zeros(2, labels, *size, dtype=torch.int16)
    target[0, :, 20:50, 30:60] = 1
    return {"data": torch.randn(2, channels, *size), "target": target, "keys": ["one", "two"]}


@pytest.fixture
def fresh(workspace: Workspace) -> Any:
    trainer = make_trainer("DeSAMTrainer", workspace)
    trainer.initialize()
    return trainer


@pytest.mark.parametrize("name", TRAINED)
def test_training_leaves_the_encoder_as_it_was(workspace: Workspace, name: str) -> None:
    trainer = make_trainer(name, workspace)
    trainer.initialize()
    before = checksum(load_encoder("vit_tiny", 128).encoder)
    assert checksum(trainer.network.encoder) == before
    trainer.network.train()
    weights = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    for _ in range(2):
        assert np.isfinite(trainer.train_step(make_batch(trainer))["loss"])
    assert checksum(trainer.network.encoder) == before
    changed = {key.split(".")[0] for key, value in trainer.network.state_dict().items()
               if not torch.equal(value, weights[key])}
    assert changed == TRAINED[name]


@pytest.mark.parametrize(("name", "steps"), [
    ("DeSAMTrainer", 15), ("DeSAMTrainerWholeBox", 15), ("SAMedTrainer", 45),
    pytest.param("SAMedTrainerS", 60, marks=pytest.mark.slow),
    pytest.param("DBSAMTrainer", 30, marks=pytest.mark.slow),
])
def test_a_tile_is_learned(workspace: Workspace, name: str, steps: int) -> None:
    plans = workspace.plans()
    plans["configurations"]["2d"] |= {"desam": {"lr": 2e-3}, "samed": {"lr": 2e-3, "warmup": 3}, "dbsam": {"lr": 1e-3}}
    plans["configurations"]["2d"]["sam"]["epochs"] = 50
    trainer = make_trainer(name, workspace, plans=plans)
    trainer.initialize()
    trainer.network.train()
    batch = make_batch(trainer)
    batch["data"][batch["target"] == 1] += 3
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(steps)]
    assert losses[-1] < 0.7 * losses[0]
    trainer.network.eval()
    with torch.no_grad():
        result = trainer.validation_step(batch)
    tp, fp, fn = (result[key] for key in ("tp_hard", "fp_hard", "fn_hard"))
    assert tp.shape == (1,)
    assert tp + fn == 30 * 30
    assert tp > fp


def test_validation_never_runs_the_grid(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.network, "scores", None)
    with torch.no_grad():
        fresh.validation_step(make_batch(fresh))


def test_adam_with_polynomial_decay(fresh: Any) -> None:
    assert isinstance(fresh.optimizer, torch.optim.Adam)
    assert fresh.optimizer.param_groups[0]["lr"] == 1e-4
    assert fresh.optimizer.param_groups[0]["weight_decay"] == 0
    fresh.lr_scheduler.max_steps = 50
    fresh.lr_scheduler.step(25)
    assert fresh.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.5**0.9)


@pytest.mark.parametrize("name", TRAINED)
def test_regions_with_an_ignore_label(workspace: Workspace, name: str) -> None:
    dataset = workspace.dataset_json() | {
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    trainer = make_trainer(name, workspace, dataset_json=dataset)
    trainer.initialize()
    trainer.network.eval()
    batch = make_batch(trainer, labels=3)
    batch["target"][:, 2] = 0
    batch["target"][0, 2, :40] = 1  # ignored: half of the region
    with torch.no_grad():
        result = trainer.validation_step(batch)
    boxes = name == "DBSAMTrainerBoxes"  # one of the two regions is drawn
    assert (result["tp_hard"] + result["fn_hard"]).tolist() == [10 * 30] * (1 if boxes else 2)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert boxes or trainer.network(batch["data"]).shape[1] == 2


def test_the_ignore_label_changes_no_gradient(workspace: Workspace) -> None:
    dataset = workspace.dataset_json() | {"labels": {"background": 0, "organ": 1, "ignore": 2}}
    trainer = make_trainer("DeSAMTrainerWholeBox", workspace, dataset_json=dataset)
    trainer.initialize()
    batch = make_batch(trainer)
    batch["target"][:, :, 40:] = 2
    loss, logits = trainer.compute_loss(*trainer._on_device(batch))
    gradient = torch.autograd.grad(loss, logits)[0]
    assert gradient[:, :, :40].abs().sum() > 0
    assert gradient[:, :, 40:].eq(0).all()


def test_several_classes(workspace: Workspace) -> None:
    dataset = workspace.dataset_json() | {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}
    trainer = make_trainer("DeSAMTrainer", workspace, dataset_json=dataset)
    trainer.initialize()
    batch = make_batch(trainer)
    batch["target"][0, :, 30:40] *= 3
    assert np.isfinite(trainer.train_step(batch)["loss"])
    with torch.no_grad():
        result = trainer.validation_step(batch)
        assert trainer.network.eval()(batch["data"]).shape[1] == 4
    assert (result["tp_hard"] + result["fn_hard"]).tolist() == [20 * 30, 0, 10 * 30]


def test_a_loss_that_is_not_finite_changes_nothing_and_stops_when_it_persists(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("desam_nnunet.training.base._MAX_SKIPPED", 3)
    before = {key: value.clone() for key, value in fresh.network.state_dict().items()}
    original = fresh.compute_loss
    monkeypatch.setattr(fresh, "compute_loss", lambda *batch: (original(*batch)[0] * float("nan"), None))
    outputs = [fresh.train_step(make_batch(fresh)) for _ in range(2)]
    assert all(torch.equal(value, before[key]) for key, value in fresh.network.state_dict().items())
    fresh.on_train_epoch_end([*outputs, {"loss": np.float32(2)}])
    assert fresh.logger.get_value("train_losses", step=-1) == 2
    with pytest.raises(RuntimeError, match="not finite in 3 iterations in a row: lower the learning rate"):
        fresh.train_step(make_batch(fresh))


def test_nan_in_a_batch_names_the_cases(fresh: Any) -> None:
    batch = make_batch(fresh)
    batch["data"][1, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="from the cases one, two holds NaN"):
        fresh.train_step(batch)


def test_a_failed_write_keeps_the_last_checkpoint(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    fresh.save_checkpoint(str(path))
    before = path.read_bytes()

    def killed(_: Any, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        fresh.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_resumed_weights_and_optimiser_are_those_saved(workspace: Workspace, fresh: Any, tmp_path: Path) -> None:
    fresh.train_step(make_batch(fresh))
    fresh.logger.log("ema_fg_dice", 0.5, 0)
    path = tmp_path / "checkpoint_latest.pth"
    fresh.save_checkpoint(str(path))
    resumed = make_trainer("DeSAMTrainer", workspace)
    resumed.load_checkpoint(str(path))
    batch = make_batch(fresh)
    for trainer in (fresh, resumed):
        torch.manual_seed(1)
        trainer.train_step(batch)
    for key, value in fresh.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[key], value, rtol=0, atol=1e-6)


def test_resuming_with_other_plans_is_refused(workspace: Workspace, fresh: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    fresh.save_checkpoint(str(path))
    plans = workspace.plans()
    plans["configurations"]["2d"]["sam"]["image_size"] = 192
    other = make_trainer("DeSAMTrainer", workspace, plans=plans)
    with pytest.raises(ValueError, match=r"other settings: sam.image_size was 128 and is 192 now. Restore"):
        other.load_checkpoint(str(path))


def test_resuming_with_another_patch_is_refused_and_the_encoders_path_is_not_looked_at() -> None:
    def settings(encoder: str, identity: str, patch: int, **dataset: Any) -> dict[str, Any]:
        configuration = {"architecture": {}, "patch_size": [patch] * 2,
                         "sam": {"encoder": encoder, "identity": identity}}
        return settings_of({"configurations": {"2d": configuration}}, "2d", dataset, DESAM)

    now = settings("/here/b.pth", "md5:1", 96)
    check_same_settings(now, settings("/there/b.pth", "md5:1", 96), "fold_0")
    with pytest.raises(ValueError, match=r"patch_size was \[160, 160\] and is \[96, 96\] now"):
        check_same_settings(now, settings("/there/b.pth", "md5:1", 160), "fold_0")
    with pytest.raises(ValueError, match=r"sam.encoder was .*; sam.identity was 'md5:2' and is 'md5:1' now"):
        check_same_settings(now, settings("/there/b.pth", "md5:2", 96), "fold_0")
    with pytest.raises(ValueError, match=r"dataset.json labels was {'background': 0} and is None now"):
        check_same_settings(now, settings("/here/b.pth", "md5:1", 96, labels={"background": 0}), "fold_0")


def test_the_same_weights_under_another_name_are_the_same_encoder_only_if_they_are_read_alike() -> None:
    """timm's models may share a file, but each says which maps are read of which images."""
    def check(now: str, then: str) -> None:
        check_same_settings({"sam.encoder": now, "sam.identity": "md5:1"},
                            {"sam.encoder": then, "sam.identity": "md5:1"}, "fold_0")

    check("medsam.pth", "vit_b")
    check("vit_tiny", "vit_tiny_random")
    check("timm/test_vit", "timm/test_vit")
    for then in ("timm/test_vit2", "vit_b", "copy.safetensors", "timm/gone", "no_such_module:ROW"):
        with pytest.raises(ValueError, match=f"other settings: sam.encoder was '{then}' and is 'timm/test_vit' now"):
            check("timm/test_vit", then)


def test_other_intensities_of_ct_are_other_settings() -> None:
    def settings(scheme: str, mean: float) -> dict[str, Any]:
        known = {"mean": mean, "std": 1.0, "percentile_00_5": -5.0, "percentile_99_5": 9.0, "median": mean}
        configuration = {"architecture": {}, "normalization_schemes": ["ZScoreNormalization", scheme],
                         "sam": {"encoder": "vit_b", "identity": "md5:1"}}
        plans = {"configurations": {"2d": configuration},
                 "foreground_intensity_properties_per_channel": {"0": known | {"std": mean}, "1": known}}
        return settings_of(plans, "2d", {}, DESAM)

    check_same_settings(settings("ZScoreNormalization", 1.0), settings("ZScoreNormalization", 2.0), "fold_0")
    with pytest.raises(ValueError, match=r"other settings: channel 1's mean was 2.0 and is 1.0 now. Restore"):
        check_same_settings(settings("CTNormalization", 1.0), settings("CTNormalization", 2.0), "fold_0")


@pytest.mark.parametrize("fold", [0, 1])
def test_a_fold_with_other_settings_is_kept_out_of_the_model_folder(workspace: Workspace, fold: int) -> None:
    """Another one, and the same one, whose checkpoint would predict by the other's settings."""
    model = workspace.model("DeSAMTrainer", f"Mixed{fold}")
    first = make_trainer("DeSAMTrainer", workspace, plans=workspace.write_plans(f"Mixed{fold}", **tiny_sections()))
    cut_off = model / "fold_0" / "checkpoint_latest.pth.1234.tmp"
    cut_off.parent.mkdir(parents=True, exist_ok=True)
    cut_off.touch()
    first.on_train_start()
    assert not cut_off.exists()
    first.on_train_end()
    assert (model / "fold_0" / "checkpoint_final.pth").exists()
    before = (model / "plans.json").read_bytes()
    other = workspace.write_plans(f"Mixed{fold}", **tiny_sections(epochs=9))
    trainer = make_trainer("DeSAMTrainer", workspace, plans=other, fold=fold)
    with pytest.raises(ValueError, match=r"fold_0 in .* with other settings: sam.epochs was 1 and is 9 now"):
        trainer.on_train_start()
    assert (model / "plans.json").read_bytes() == before


def test_vit_b_checkpoint_is_small_and_holds_no_encoder(workspace: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "vit_b_random.pth"
    torch.save(ENCODERS["vit_b"].architecture.random_state(), file)
    plans = workspace.write_plans("ViTB", **tiny_sections(encoder=str(file)))
    trainer = make_trainer("DeSAMTrainer", workspace, plans=plans)
    trainer.initialize()
    before = checksum(load_encoder(str(file), 128).encoder)
    assert checksum(trainer.network.encoder) == before
    trainer.train_step(make_batch(trainer))
    assert checksum(trainer.network.encoder) == before
    path = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    assert {key.split(".")[0] for key in checkpoint["network_weights"]} == {"prim", "pdmm", "prompt_encoder"}
    assert checkpoint["optimizer_state"]["state"]
    assert path.stat().st_size < 150e6
    # PRIM started from the file's own decoder; one step of Adam at 1e-4 moves a weight by no more than that.
    saved = torch.load(file, weights_only=True)["mask_decoder.mask_tokens.weight"]
    assert (checkpoint["network_weights"]["prim.mask_tokens.weight"] - saved).abs().max() <= 1.01e-4


@pytest.fixture
def damaged(workspace: Workspace) -> Any:
    """Changes a preprocessed case for one test."""
    folder = workspace.preprocessed / "nnUNetPlans_2d"
    backup = workspace.root / "backup"
    shutil.copytree(folder, backup)

    def change(case: str, edit: Any) -> None:
        path = folder / f"{case}.b2nd"
        data = edit(blosc2.open(urlpath=str(path), mode="r")[:])
        path.unlink()
        blosc2.asarray(np.ascontiguousarray(data), urlpath=str(path))

    yield change
    shutil.rmtree(folder)
    backup.rename(folder)


def spoil(data: np.ndarray) -> np.ndarray:
    data[0, data.shape[1] // 2, 3, 4] = np.nan
    return data


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(spoil, "Case SiteA_001 holds NaN or infinite values", id="nan"),
        pytest.param(lambda data: np.concatenate([data, data]), r"Case SiteA_001 has 2 channel\(s\), .* names 1",
                     id="channels"),
    ],
)
def test_bad_cases_stop_before_training(workspace: Workspace, damaged: Any, edit: Any, message: str) -> None:
    damaged("SiteA_001", edit)
    with pytest.raises(ValueError, match=message):
        make_trainer("DeSAMTrainer", workspace).on_train_start()


def test_labels_in_no_case(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    def start(**labels: int) -> None:
        plans = workspace.write_plans("Labels", **tiny_sections())
        dataset = workspace.dataset_json() | {"labels": {"background": 0} | labels}
        make_trainer("DeSAMTrainer", workspace, plans=plans, dataset_json=dataset).on_train_start()

    with pytest.raises(ValueError, match=r"None of the labels \[2, 3\] occurs in any training case: check labelsTr"):
        start(other=2, third=3)
    start(organ=1, second=2)
    assert "WARNING: the labels [2] occur in no training case of this fold" in capsys.readouterr().out


def test_a_volume_smaller_than_one_patch(trained: Workspace, tmp_path: Path) -> None:
    source = next((trained.unseen / "images").glob("*.nii.gz"))
    image = sitk.ReadImage(source)
    (tmp_path / "in").mkdir()
    sitk.WriteImage(image[40:70, 50:75, :3], tmp_path / "in" / "small_0000.nii.gz")
    nnunet("nnUNetv2_predict_from_modelfolder", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m",
           trained.model("DeSAMTrainer"), "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1)
    assert sitk.ReadImage(tmp_path / "out" / "small.nii.gz").GetSize() == (30, 25, 3)


def test_nan_at_prediction_is_named(trained: Workspace) -> None:
    """Given as an array: the NIfTI reader puts 0 where a file holds NaN, other readers do not."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(trained.model("DeSAMTrainer")), (0,))
    image = np.random.default_rng(0).normal(size=(1, 2, 96, 96)).astype(np.float32)
    image[0, 1, 60, 60] = np.nan
    with pytest.raises(ValueError, match="The image holds NaN or infinite values after preprocessing"):
        predictor.predict_single_npy_array(image, {"spacing": [3.6, 1.25, 1.25]})


def test_an_image_with_fewer_channels_than_planned(workspace: Workspace, tmp_path: Path) -> None:
    """One with more never gets here: nnU-Net's own preprocessing has no normalisation for it and stops."""
    plans = workspace.plans()
    plans["configurations"]["2d"] |= {"normalization_schemes": ["ZScoreNormalization"] * 2,
                                      "use_mask_for_norm": [False] * 2}
    dataset = workspace.dataset_json() | {"channel_names": {"0": "T2", "1": "ADC"}}
    trainer = make_trainer("DeSAMTrainer", workspace, plans=plans, dataset_json=dataset)
    trainer.initialize()
    (tmp_path / "fold_0").mkdir()
    trainer.save_checkpoint(str(tmp_path / "fold_0" / "checkpoint_final.pth"))
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", dataset)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    result = nnunet("nnUNetv2_predict_from_modelfolder", "-i", workspace.unseen / "images", "-o", tmp_path / "out",
                    "-m", tmp_path, "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1, check=False)
    assert result.returncode != 0
    assert "The image has 1 channel(s), but the model was planned for 2" in result.stderr


def test_a_model_with_another_encoder_is_refused(trained: Workspace, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained.model("DeSAMTrainer"), model)
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["2d"]["sam"]["identity"] = "md5:0123"
    (model / "plans.json").write_text(json.dumps(plans))
    result = nnunet("nnUNetv2_predict_from_modelfolder", "-i", trained.unseen / "images", "-o", tmp_path / "out",
                    "-m", model, "-f", 0, "-device", "cpu", check=False)
    assert result.returncode != 0
    assert "trained or made with md5:0123" in result.stderr




def test_a_device_that_is_not_here_leaves_no_folder(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    workspace.write_plans("NoDevice", **tiny_sections())
    plans = workspace.plans("NoDevice") | {"continue_training": False}
    with pytest.raises(ValueError, match="PyTorch finds no cuda device here: add -device cpu"):
        DeSAMTrainer(plans, "2d", 0, workspace.dataset_json())  # nnU-Net's default device
    assert not workspace.model("DeSAMTrainer", "NoDevice").exists()
