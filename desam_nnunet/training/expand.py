"""``desam weights expand``: a model of single slices as one of slabs, which predicts the same until it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from desam_nnunet.nnunet.model_folder import build_network, read_checkpoint, read_description
from desam_nnunet.sam.slabs import DEPTH, SLABS, depth_of
from desam_nnunet.system.files import replace_file, replacing
from desam_nnunet.training.base import axes_of_slab
from desam_nnunet.training.registry import find_trainer

_FINAL = "checkpoint_final.pth"
_BATCH_SIZE = 2  # where the plans are older than slabs
_FILES = ("dataset.json", "dataset_fingerprint.json")


def expand(model: Path) -> Path:
    """Writes the model folder of slabs beside a 2D one, with all of its trained folds; returns it.

    Args:
        model: nnU-Net's model folder, ``<trainer>__<plans>__2d``.

    Raises:
        FileNotFoundError: No fold of it has been trained to the end.
        FileExistsError: There is a model of slabs already.
        ValueError: Its method knows no slabs.
    """
    trainer, plans_name, configuration = [*model.name.split("__"), "", ""][:3]
    folds = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{_FINAL}"))
    if not folds:
        raise FileNotFoundError(f"{model} has no fold with a {_FINAL}: give the model folder of a 2D training, "
                                "<trainer>__<plans>__2d.")
    plans, dataset_json = read_description(model)
    method = find_trainer(trainer).method
    if not method.slabs:
        raise ValueError(f"{model} can't become a model of slabs: the method {method.name} sees one slice at a time.")
    target = model.with_name(f"{trainer}__{plans_name}__{SLABS}")
    if (target / "plans.json").exists():
        raise FileExistsError(f"{target} holds a model already: remove it or rename it.")
    plans["configurations"][SLABS] = _as_slabs(plans["configurations"], configuration)
    network = build_network(plans, dataset_json, SLABS, trainer)
    for fold in folds:
        _write(target / f"fold_{fold}" / _FINAL, read_checkpoint(model, fold, _FINAL), network, plans)
    for name in _FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, target / name)
    replace_file(target / "plans.json", [json.dumps(plans, indent=4).encode()])
    return target


def _as_slabs(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """The 2D configuration on slabs: of as many slices as the plans say, on the tiles that the model was trained on."""
    planned = configurations.get(SLABS, {})
    depth = depth_of(planned.get("patch_size", ())) if SLABS in configurations else DEPTH
    return {"inherits_from": name, "patch_size": [depth, *configurations[name]["patch_size"]],
            "batch_size": planned.get("batch_size", _BATCH_SIZE)}


def _write(path: Path, checkpoint: dict[str, Any], network: nn.Module, plans: dict[str, Any]) -> None:
    """The checkpoint with what slabs have more, and an optimiser that begins, since nnU-Net wants one to validate."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    slab = checkpoint | {
        "network_weights": network.state_dict() | checkpoint["network_weights"],
        "optimizer_state": torch.optim.Adam(trained).state_dict(),
        "init_args": checkpoint["init_args"] | {"configuration": SLABS, "plans": plans},
        "inference_allowed_mirroring_axes": axes_of_slab(checkpoint["inference_allowed_mirroring_axes"]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(slab, temporary)
