"""nnU-Net's model folders: where a model's is, what it was trained with, its network and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.system.files import damage_told, read_object

# What checkpoints hold beside tensors and plain Python values: numpy's numbers.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [np.dtype, type(np.dtype("float32")), type(np.dtype("float64")),
                       *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]  # 1.x, 2.x


def model_folder(plans: dict[str, Any], configuration: str, trainer: str) -> Path:
    """Where nnU-Net keeps the model of a trainer on these plans."""
    name = f"{trainer}__{plans['plans_name']}__{configuration}"
    return Path(nnUNet_results.require()) / plans["dataset_name"] / name


def trained_folds(model: Path) -> list[Path]:
    """The checkpoints of a model folder that also has the files that they need."""
    if not all((model / name).is_file() for name in ("plans.json", "dataset.json")):
        return []
    return sorted(model.glob("fold_*/checkpoint_*.pth"))


def read_description(folder: Path, plans: str = "plans") -> tuple[dict[str, Any], dict[str, Any]]:
    """The plans of that name and dataset.json, of a model folder or of a data set's."""
    first, second = (read_object(folder / f"{name}.json") for name in (plans, "dataset"))
    return first, second


def trained_plans(plans: dict[str, Any], configuration: str, trainer: str) -> dict[str, Any] | None:
    """The plans of the model that a training on `plans` goes on with; None where nothing is trained yet."""
    if not nnUNet_results.is_set():
        return None
    folder = model_folder(plans, configuration, trainer)
    return read_description(folder)[0] if trained_folds(folder) else None


def build_network(
    plans: dict[str, Any], dataset_json: dict[str, Any], configuration: str, trainer: str
) -> nn.Module:
    """The network that a trainer, found as nnU-Net finds it, builds for a model's plans; without trained weights."""
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, settings, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    return look_up(trainer).build_network_architecture(manager, settings, channels, heads, False)


def read_checkpoint(model: Path, fold: str, name: str) -> dict[str, Any]:
    """One fold's checkpoint, on the CPU, read without running code that it may hold.

    Args:
        model: nnU-Net's model folder, ``<trainer>__<plans>__<configuration>``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It can't be read.
    """
    path = model / f"fold_{fold}" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the model folder, -f and -chk of a trained fold.")
    what = f"{path} can't be read as a checkpoint of nnU-Net's"
    with damage_told(what), torch.serialization.safe_globals(_NUMBERS):
        return torch.load(path, map_location="cpu", weights_only=True)


def epoch_seconds(checkpoint: dict[str, Any]) -> float:
    """What all epochs together took, from nnU-Net's log in a checkpoint, which survives a resumed training."""
    log = checkpoint["logging"]
    times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    return sum(end - begin for begin, end in times)


def count_parameters(checkpoint: dict[str, Any]) -> int:
    """Of a checkpoint; nnU-Net's network lists the same tensor under several names."""
    weights = checkpoint["network_weights"].values()
    return sum({(value.data_ptr(), value.shape): value.numel() for value in weights}.values())
