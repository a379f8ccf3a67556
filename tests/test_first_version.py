"""Models, predictions and stores of the first version, made before encoders and methods got rooms of their own.

They predict the same, go on, and their stores are found without a rebuild. The weights were rounded to few values, so
that the files are small; DeSAM's IoU head is as it starts.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import FOLDERS
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from desam_nnunet.cache.build import Share
from desam_nnunet.cache.store import open_stores
from desam_nnunet.nnunet.model_folder import read_description
from desam_nnunet.training.frozen import builder_of
from desam_nnunet.training.registry import TRAINERS

FILES = Path(__file__).with_name("first_version")
DATASET = "Dataset501_Discs"
CHECKPOINT = "checkpoint_final.pth"
CPU = torch.device("cpu")
THEN = ("DeSAMTrainer", "DeSAMTrainerWholeBox", "SAMedTrainer", "SAMedTrainerS", "DBSAMTrainer", "DBSAMTrainerBoxes")
BEFORE = {"desam": {"mask_stride": 4, "grid_offset": -0.5, "through_input": False}, "samed": {"lr_after_step": False},
          "dbsam": {"mask_tokens": 1}}  # what younger keys mean in these models


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data set with its stores, in nnU-Net's folders."""
    root = tmp_path_factory.mktemp("first_version")
    unpack("data", root)
    (root / "nnUNet_results").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in FOLDERS:
            patch.setenv(name, str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("nnUNet_def_n_proc", "1")
        patch.setenv("DESAM_WEIGHTS", str(root / "weights"))
        yield root


def unpack(name: str, folder: Path) -> None:
    with tarfile.open(FILES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")


def model_of(trainer: str, root: Path) -> Path:
    """The trainer's model folder, where nnU-Net keeps it."""
    folder = root / "nnUNet_results" / DATASET
    folder.mkdir(exist_ok=True)
    if not list(folder.glob(f"{trainer}__*")):
        unpack(trainer, folder)
    (model,) = folder.glob(f"{trainer}__*")
    return model


def in_float32(network: Any) -> Any:
    """Also where the CPU has bfloat16: the models were trained without."""
    network.encoder.dtype = torch.float32
    return network


@pytest.mark.parametrize("name", THEN)
def test_logits_and_labels_are_as_they_were(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name, root)
    predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), [0], CHECKPOINT)
    network = in_float32(predictor.network.eval())
    patch = predictor.configuration_manager.patch_size
    tile = torch.from_numpy(np.random.RandomState(0).normal(0, 1, (1, 1, *patch)).astype(np.float32)).cumsum(-1) / 5
    boxes = [torch.tensor([[20.0, 20.0, 90.0, 100.0]]) * (network.to_image.image_size / 128)]
    with torch.inference_mode():
        logits = network(tile, *(boxes if name == "DBSAMTrainerBoxes" else []))
    expected = np.load(model / "logits.npz")["logits"]
    # The largest is 46, where float32 goes in steps of 4e-6: the number of threads alone changes three of them.
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5, rtol=1e-6)
    if name == "DBSAMTrainerBoxes":
        return  # nnU-Net's predictor has no boxes
    image = sitk.ReadImage(str(root / "unseen" / "case9_0000.nii.gz"))
    volume = sitk.GetArrayFromImage(image)[None].astype(np.float32)
    properties = {"spacing": list(image.GetSpacing())[::-1], "sitk_stuff": {
        "spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}}
    labels = predictor.predict_single_npy_array(volume, properties)
    before = sitk.GetArrayFromImage(sitk.ReadImage(str(model / "predicted" / "case9.nii.gz")))
    assert (labels == before).all()
    assert set(np.unique(before)) == {0, 1, 2}


@pytest.mark.parametrize("name", THEN)
def test_training_goes_on_with_what_was_meant_before_keys_existed(name: str, root: Path) -> None:
    model = model_of(name, root)
    plans, dataset_json = read_description(model)
    trainer = TRAINERS[name](plans | {"continue_training": True}, "2d", 0, dataset_json, CPU)
    trainer.initialize()
    in_float32(trainer.bare_network)
    trainer.load_checkpoint(str(model / "fold_0" / CHECKPOINT))
    assert trainer.current_epoch == 3
    assert {key: getattr(trainer.own, key) for key in BEFORE[trainer.method.name]} == BEFORE[trainer.method.name]
    assert trainer.sam.augmentation == "nnunet"
    stores = {path: path.stat().st_mtime_ns for path in root.glob("nnUNet_preprocessed/*/desam_cache/*/case0/*")}
    trainer.on_train_start()
    state = trainer.optimizer.state_dict()["state"]
    steps = {int(row["step"]) for row in state.values()}
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert np.isfinite(losses["loss"])
    state = trainer.optimizer.state_dict()["state"]
    assert {int(row["step"]) for row in state.values()} == {step + 1 for step in steps}
    trainer.on_train_end()
    assert stores == {path: path.stat().st_mtime_ns for path in stores}


def test_the_store_is_found_whole(root: Path) -> None:
    model = model_of("DeSAMTrainer", root)
    plans, dataset_json = read_description(model)
    trainer = TRAINERS["DeSAMTrainer"](plans | {"continue_training": True}, "2d", 0, dataset_json, CPU)
    trainer.initialize()
    network = in_float32(trainer.bare_network)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder)
    builder = builder_of(trainer, dataset, trainer.sam, network, CPU)
    stores = open_stores(Path(trainer.preprocessed_dataset_folder_base))
    assert builder.store.folder in [store.folder for store in stores if store.recipe == builder.store.recipe]
    assert builder.plan(Share()).todo == {}
