"""One small phantom data set, preprocessed and trained once by nnU-Net's own commands, for all tests."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode

import phantom
from desam_nnunet.encoders.base import Encoder, LoadedEncoder
from desam_nnunet.encoders.weights import load_encoder

DATASET = "Dataset501_Phantom"
PLANS = "TinyPlans"
TRAINERS = {"DeSAMTrainer": (0, 1), "DeSAMTrainerWholeBox": (0,)}  # and folds, trained once for all tests
_SAMED = {"updates", "prompt_encoder", "decoder"}
_DBSAM = {"stems", "level_embedding", "channel_attention", "exchanges", "fusion", "norm", "neck", "decoder"}
TRAINED = {  # every trainer, and the parts of its network that a training step changes
    "DeSAMTrainer": {"prim", "pdmm"},
    "DeSAMTrainerWholeBox": {"prim", "pdmm"},
    "SAMedTrainer": _SAMED,
    "SAMedTrainerS": _SAMED | {"decoder_updates"},
    "DBSAMTrainer": _DBSAM,
    "DBSAMTrainerBoxes": _DBSAM,
}
SIZE = 128  # of SAM's input, in the tests of networks
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def tiny_sam() -> LoadedEncoder:
    """Computes in float32, also where the CPU has bfloat16: for tests of exactness."""
    loaded = load_encoder("vit_tiny", SIZE)
    loaded.encoder.dtype = torch.float32
    return loaded


def checksum(encoder: Encoder) -> str:
    """SHA-256 over every weight's name and bytes: equal before and after training, or it was not frozen."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Operations(TorchDispatchMode):
    """Attributes: names: Of PyTorch's operations, in order. Numbers of Python's become a tensor by ``lift_fresh``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Workspace(NamedTuple):
    """nnU-Net's three folders with the phantom data set, and two volumes of an unseen site."""

    root: Path

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / DATASET

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results" / DATASET

    @property
    def unseen(self) -> Path:
        return self.root / "unseen" / "SiteB"

    def plans(self, name: str = PLANS) -> dict[str, Any]:
        return json.loads((self.preprocessed / f"{name}.json").read_text())

    def dataset_json(self) -> dict[str, Any]:
        return json.loads((self.preprocessed / "dataset.json").read_text())

    def model(self, trainer: str, plans: str = PLANS) -> Path:
        return self.results / f"{trainer}__{plans}__2d"

    def write_plans(self, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
        """A copy of nnU-Net's plans with sections of ours in its 2D configuration."""
        plans = json.loads((self.preprocessed / "nnUNetPlans.json").read_text())
        plans["plans_name"] = name
        plans["configurations"]["2d"] |= {"batch_size": 2} | sections
        (self.preprocessed / f"{name}.json").write_text(json.dumps(plans))
        return plans


def environment(root: Path) -> dict[str, str]:
    folders = {name: str(root / name) for name in FOLDERS}
    return folders | {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "DESAM_WEIGHTS": str(root / "weights")}


def nnunet(command: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs one of nnU-Net's own commands, or `desam`, from the tested environment."""
    program = Path(sys.executable).with_name(command)
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def run_script(script: Path, *words: object) -> int:
    """An example's exit status, run in this process: importing what it needs takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *map(str, words)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def tiny_sections(**sam: Any) -> dict[str, dict[str, Any]]:
    """Seconds of training: the tiny encoder at 128; at threshold 0 some tiles pass and some do not."""
    short = {"encoder": "vit_tiny", "image_size": 128, "epochs": 1, "iterations_per_epoch": 3,
             "val_iterations_per_epoch": 1}
    return {"sam": short | sam, "desam": {"grid": 3, "iou_threshold": 0.0}}


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of pytest's processes to need it makes for all. Nobody may change it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / f"{name}.lock"):
        original = folder / f"original_{name}"
        if not original.is_dir():
            making = Path(tempfile.mkdtemp(dir=folder))
            make(making)
            making.rename(original)
    return original


@contextmanager
def folders_of(root: Path) -> Iterator[None]:
    """nnU-Net's three folders below `root`, in this block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(root).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(root: Path) -> None:
        for name in (*FOLDERS, "weights"):
            (root / name).mkdir()
        phantom.write_dataset(root / "nnUNet_raw", cases=5)
        phantom.write_unseen(root / "unseen", sites=("SiteB",), cases=2)
        with folders_of(root):
            nnunet("nnUNetv2_plan_and_preprocess", "-d", 501, "-c", "2d", "-np", 1, "-npfp", 1)
        Workspace(root).write_plans(PLANS, **tiny_sections())

    return made_once(tmp_path_factory, "nnunet", make)


@pytest.fixture(scope="session")
def workspace(preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    root = tmp_path_factory.mktemp("workspace")
    shutil.copytree(preprocessed, root, dirs_exist_ok=True)
    with folders_of(root), pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")  # planning needs a worker; training this little is faster without
        yield Workspace(root)


@pytest.fixture(scope="session")
def trained(workspace: Workspace, preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two folds of one trainer and one of the other, with the probabilities that ensembling needs."""

    def make(root: Path) -> None:
        shutil.copytree(preprocessed, root, dirs_exist_ok=True)
        with folders_of(root), pytest.MonkeyPatch.context() as patch:
            patch.setenv("nnUNet_n_proc_DA", "0")
            for trainer, folds in TRAINERS.items():
                for fold in folds:
                    nnunet("nnUNetv2_train", 501, "2d", fold, "-tr", trainer, "-p", PLANS, "-device", "cpu", "--npz")

    shutil.copytree(made_once(tmp_path_factory, "trained", make), workspace.root, dirs_exist_ok=True)
    return workspace


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def make_trainer(name: str, workspace: Workspace, *, plans: dict[str, Any] | None = None,
                 dataset_json: dict[str, Any] | None = None, configuration: str = "2d",
                 fold: int | str = 0) -> Any:
    """A trainer as nnUNetv2_train makes it, in this process and on the CPU."""
    from desam_nnunet.training.registry import TRAINERS as BY_NAME

    plans = (plans or workspace.plans()) | {"continue_training": False}
    return BY_NAME[name](plans, configuration, fold, dataset_json or workspace.dataset_json(),
                         torch.device("cpu"))


