"""``desam weights expand``: a model of single slices as one of slabs, which predicts the same until it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from desam_nnunet.nnunet.model_folder import build_network, read_checkpoint, read_description
from desam_nnunet.sam.slabs import SLABS
from desam_nnunet.system.files import replace_file, replacing
from desam_nnunet.training.base import axes_of_slab
from desam_nnunet.training.registry import find_trainer

_FINAL = "checkpoint_final.pth"
_FILES = ("dataset.json", "dataset_fingerprint.json")


def expand(model: Path) -> Path:
    """Writes the model folder of slabs beside a 2D one, with all of its trained folds; returns it.

    Args:
        model: nnU-Net's model folder, ``<trainer>__<plans>__2d``.

    Raises:
        FileNotFoundError: No fold of it has been trained to the end.
        FileExistsError: There is a model of slabs already.
        ValueError: Its method knows no slabs, or its plans have no configuration for them.
    """
    trainer, plans_name, configuration = [*model.name.split("__"), "", ""][:3]
    folds = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{_FINAL}"))
    if not folds:
        raise FileNotFoundError(f"{model} has no fold with a {_FINAL}: give the model folder of a 2D training, "
                                "<trainer>__<plans>__2d.")
    plans, dataset_json = read_description(model)
    method = find_trainer(trainer).method
    known = plans["configurations"]
    if not method.slabs or SLABS not in known or configuration not in known:
        lacks = f"its plans have no configuration '{SLABS}' (desam plan writes it)" if method.slabs else (
            f"the method {method.name} sees one slice at a time")
        raise ValueError(f"{model} can't become a model of slabs: {lacks}.")
    target = model.with_name(f"{trainer}__{plans_name}__{SLABS}")
    if (target / "plans.json").exists():
        raise FileExistsError(f"{target} holds a model already: remove it or rename it.")
    known[SLABS] |= {name: known[configuration][name] for name in ("sam", method.name)}
    fresh = build_network(plans, dataset_json, SLABS, trainer).state_dict()
    for fold in folds:
        _write(target / f"fold_{fold}" / _FINAL, read_checkpoint(model, fold, _FINAL), fresh, plans)
    for name in _FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, target / name)
    replace_file(target / "plans.json", [json.dumps(plans, indent=4).encode()])
    return target


def _write(path: Path, checkpoint: dict[str, Any], fresh: dict[str, Any], plans: dict[str, Any]) -> None:
    """The checkpoint with what slabs have more, as prediction needs it; what resuming needs is not taken along."""
    slab = {
        "network_weights": fresh | checkpoint["network_weights"],
        "trainer_name": checkpoint["trainer_name"],
        "init_args": checkpoint["init_args"] | {"configuration": SLABS, "plans": plans},
        "inference_allowed_mirroring_axes": axes_of_slab(checkpoint["inference_allowed_mirroring_axes"]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(slab, temporary)
