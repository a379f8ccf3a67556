"""``desam weights import``: a published DeSAM checkpoint as a model folder of nnU-Net's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.config import resolve_plans
from desam_nnunet.networks.official import IMAGE_ENCODER, is_official, rename_official
from desam_nnunet.preprocessed import read_preprocessed
from desam_nnunet.sam.variants import VARIANTS, Variant
from desam_nnunet.sam.weights import State, check_state, find_weights, read_sam_file
from desam_nnunet.training import desam as trainers

PREPARATION = """The published image preparation differs from nnU-Net's, which this model folder uses:
  published: percentiles 0.5 / 99.5 of the volume to 0-255 (zeros stay 0); here: of each tile, after nnU-Net's
             normalisation, by the plans' rule
  published: every slice squeezed to 256 x 256 and enlarged to 1024 x 1024; here: resampled to the plans'
             spacing, cut into tiles, aspect kept, padded
  published: no mirroring at prediction; here: the same
  published: small islands and holes cleaned before a mask is chosen; here: nnU-Net's postprocessing
Expect scores to differ from published ones; fine-tune with -pretrained_weights where they matter."""


class Target(NamedTuple):
    """Where a checkpoint goes: the data set and plans that give it geometry and labels."""

    dataset: str
    plans: str
    configuration: str
    trainer: str


class Imported(NamedTuple):
    """Attributes: pretrained: File for -pretrained_weights. model: Folder for prediction; None with several classes."""

    pretrained: Path
    model: Path | None


def import_official(file: Path, target: Target, folder: Path | None = None) -> Imported:
    """Writes a published checkpoint as a file for ``-pretrained_weights`` and, for one class, as a model folder.

    Args:
        file: A published DeSAM checkpoint, a model state dict by its official key names.
        folder: Where to write; nnU-Net's own place in ``nnUNet_results`` where None.

    Raises:
        ValueError: Not such a checkpoint, its image encoder is not the SAM file found here, or its shapes do not
            fit.
        FileExistsError: There is a model already.
    """
    official = read_sam_file(file)
    if not is_official(official):
        raise ValueError(f"{file} is not a published DeSAM checkpoint: it has no key mask_decoder.pimm.")
    state = rename_official(official)
    plans, dataset_json, base = read_preprocessed(target.dataset, target.plans)
    resolve_plans(
        plans, target.configuration, dataset_json, "desam", default_encoder=_variant_of(state, file).name)
    _check_image_encoder(official, plans["configurations"][target.configuration]["sam"], file)
    folder = folder or _results_folder(plans, target)
    if (folder / "plans.json").exists() or (folder / "pretrained_weights.pth").exists():
        raise FileExistsError(f"{folder} holds a model already: remove it or choose another folder with -o.")
    complete = _check_network(state, plans, dataset_json, target, file)
    pretrained = folder / "pretrained_weights.pth"
    _save({"network_weights": state}, pretrained)
    if not complete:
        return Imported(pretrained, None)
    _write_model(folder, state, plans, dataset_json, target)
    shutil.copyfile(base / "dataset_fingerprint.json", folder / "dataset_fingerprint.json")
    return Imported(pretrained, folder)


def _variant_of(state: State, file: Path) -> Variant:
    key = "pdmm.contexts.0.block_init.conv1.weight"
    if key not in state:
        raise ValueError(f"{file}: {key} is missing.")
    width = state[key].shape[1]
    for variant in VARIANTS.values():
        if variant.embed_dim == width:
            return variant
    raise ValueError(f"{file} was trained on an encoder of width {width}, which is none of {', '.join(VARIANTS)}.")


def _check_image_encoder(official: State, sam: dict[str, Any], file: Path) -> None:
    encoder = sam["encoder"]
    theirs = {key: value for key, value in official.items() if key.startswith(IMAGE_ENCODER)}
    path = find_weights(encoder, sam["identity"])
    if not theirs:
        print(f"{file} holds no image encoder: nothing to compare '{encoder}' with.")
        return
    if path is None:
        raise ValueError(f"{file} holds a trained image encoder, but '{encoder}' has random weights: name its file "
                         "as sam.encoder in the plans.")
    ours = {key: value for key, value in read_sam_file(path).items() if key.startswith(IMAGE_ENCODER)}
    check_state(theirs, {key: value.shape for key, value in ours.items()}, f"The image encoder in {file}")
    changed = [key for key, value in ours.items() if not torch.equal(value, theirs[key].to(value.dtype))]
    if changed:
        raise ValueError(f"The image encoder in {file} is not the one in {path}: {len(changed)} of {len(ours)} tensors "
                         f"differ, {changed[0]} first. Name the SAM file that it was trained on as sam.encoder in "
                         "the plans.")


def _check_network(
    state: State, plans: dict[str, Any], dataset_json: dict[str, Any], target: Target, file: Path
) -> bool:
    """Whether the state is a whole model of this data set: it is for one class, all else must fit."""
    manager = PlansManager(plans)
    configuration = manager.get_configuration(target.configuration)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    trainer = getattr(trainers, target.trainer)
    network = trainer.build_network_architecture(manager, configuration, channels, heads, False)
    expected = {key: value.shape for key, value in network.state_dict().items()}
    shared = {key: shape for key, shape in expected.items() if ".seg_layers." not in key}
    check_state({key: value for key, value in state.items() if ".seg_layers." not in key}, shared, str(file))
    return all(expected[key] == value.shape for key, value in state.items())


def _results_folder(plans: dict[str, Any], target: Target) -> Path:
    name = f"{target.trainer}__{plans['plans_name']}__{target.configuration}"
    return Path(nnUNet_results.require()) / plans["dataset_name"] / name


def _write_model(
    folder: Path, state: State, plans: dict[str, Any], dataset_json: dict[str, Any], target: Target
) -> None:
    checkpoint = {
        "network_weights": state,
        "trainer_name": target.trainer,
        "init_args": {"configuration": target.configuration, "plans": plans, "fold": "all",
                      "dataset_json": dataset_json},
        "inference_allowed_mirroring_axes": None,  # published training does not mirror
    }
    _save(checkpoint, folder / "fold_all" / "checkpoint_final.pth")
    (folder / "dataset.json").write_text(json.dumps(dataset_json, indent=4))
    (folder / "plans.json").write_text(json.dumps(plans, indent=4))


def _save(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(content, temporary)
    temporary.replace(path)
