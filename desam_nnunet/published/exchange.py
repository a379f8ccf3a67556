"""``desam weights import`` and ``export``: published checkpoints as model folders of nnU-Net's, and SAMed back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.encoders.base import State
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import SamViT
from desam_nnunet.encoders.state import check_state, read_weights
from desam_nnunet.encoders.weights import find_weights
from desam_nnunet.nnunet.datasets import read_preprocessed
from desam_nnunet.nnunet.model_folder import build_network, model_folder, read_checkpoint
from desam_nnunet.published.formats import IMAGE_ENCODER, Published, official_samed_names, read_published
from desam_nnunet.sam.slabs import SLABS
from desam_nnunet.settings.resolve import given_section, resolve_plans
from desam_nnunet.system.files import replacing
from desam_nnunet.training.registry import find_trainer

_SAMED = ("SAMedTrainer", "SAMedTrainerS")


class Imported(NamedTuple):
    """What has been written.

    Attributes:
        trainer: To name after ``-tr``.
        pretrained: File for ``-pretrained_weights``.
        model: Folder for prediction; None where the data set has other classes.
        preparation: In what the published image preparation differs.
    """

    trainer: str
    pretrained: Path
    model: Path | None
    preparation: str


def import_official(
    file: Path, dataset: str, plans_name: str, configuration: str, trainer: str | None, folder: Path | None
) -> Imported:
    """Writes a published checkpoint for ``-pretrained_weights`` and, where the classes fit, as a model folder.

    Args:
        file: A published DeSAM or SAMed checkpoint, a state dict by its official key names.
        dataset, plans_name, configuration: Give it geometry and labels.
        trainer: None for the one that the checkpoint was trained with, as far as it tells.
        folder: Where to write; nnU-Net's own place in ``nnUNet_results`` where None.

    Raises:
        ValueError: Not such a checkpoint, its image encoder is not the SAM file found here, or its shapes do not fit.
        FileExistsError: There is a model already.
    """
    published = read_published(file)
    trainer = trainer or published.trainers[0]
    if trainer not in published.trainers:
        raise ValueError(f"{file} is a checkpoint for {' or '.join(published.trainers)}, not for -tr {trainer}.")
    plans, dataset_json, base = read_preprocessed(dataset, plans_name)
    if configuration == SLABS:
        raise ValueError(f"-c {SLABS}: published checkpoints are of single slices. Import into 2d, then make that a "
                         "model of slabs with desam weights expand.")
    _fix_section(plans, configuration, published, file)
    method = find_trainer(trainer).method
    resolve_plans(plans, configuration, dataset_json, method, _encoder_of(published, file))
    sam = plans["configurations"][configuration]["sam"]
    _check_image_encoder(published.image_encoder, sam, file)
    folder = folder or model_folder(plans, configuration, trainer)
    if (folder / "plans.json").exists() or (folder / "pretrained_weights.pth").exists():
        raise FileExistsError(f"{folder} holds a model already: remove it or choose another folder with -o.")
    network = build_network(plans, dataset_json, configuration, trainer)
    has_same_outputs = _check_shapes(published.state, network.state_dict(), file)
    pretrained = folder / "pretrained_weights.pth"
    _save({"network_weights": published.state}, pretrained)
    if not has_same_outputs or (published.background and sam["regions"]):
        return Imported(trainer, pretrained, None, published.preparation)
    init_args = {"configuration": configuration, "plans": plans, "fold": "all", "dataset_json": dataset_json}
    _write_model(folder, published.state, trainer, init_args)
    shutil.copyfile(base / "dataset_fingerprint.json", folder / "dataset_fingerprint.json")
    return Imported(trainer, pretrained, folder, published.preparation)


def _fix_section(plans: dict[str, Any], configuration: str, published: Published, file: Path) -> None:
    """Writes into the plans what the checkpoint fixes of its method's section."""
    given = given_section(PlansManager(plans).get_configuration(configuration).configuration, published.method)
    for key, value in published.own.items():
        if given.get(key, value) != value:
            raise ValueError(f"{file} has {published.method}.{key} {value!r}, but the plans say {given[key]!r}: take "
                             "the key out of the plans.")
    plans["configurations"][configuration][published.method] = published.procedure | given | published.own


def _encoder_of(published: Published, file: Path) -> str:
    widths = {row.name: row.architecture.embed_dim for row in ENCODERS.values() if isinstance(row.architecture, SamViT)}
    for name, width in widths.items():
        if width == published.width:
            return name
    raise ValueError(f"{file} was trained on an encoder of width {published.width}, which is none of "
                     f"{', '.join(widths)}.")


def _check_image_encoder(theirs: State, sam: dict[str, Any], file: Path) -> None:
    encoder = sam["encoder"]
    if not theirs:
        print(f"{file} holds no image encoder: nothing to compare '{encoder}' with.")
        return
    path = find_weights(encoder, sam["identity"])
    if path is None:
        raise ValueError(f"{file} holds a trained image encoder, but '{encoder}' has random weights: name its file "
                         "as sam.encoder in the plans.")
    ours = {key: value for key, value in read_weights(path).items() if key.startswith(IMAGE_ENCODER)}
    check_state(theirs, {key: value.shape for key, value in ours.items()}, f"The image encoder in {file}")
    changed = [key for key, value in ours.items() if not torch.equal(value, theirs[key].to(value.dtype))]
    if changed:
        raise ValueError(f"The image encoder in {file} is not the one in {path}: {len(changed)} of {len(ours)} tensors "
                         f"differ, {changed[0]} first. Name the SAM file that it was trained on as sam.encoder in "
                         "the plans.")


def _check_shapes(state: State, ours: State, file: Path) -> bool:
    """Whether the outputs are this data set's too. Raises: ValueError: Something else does not fit the network."""
    expected = {key: value.shape for key, value in ours.items()}
    shared = {key: shape for key, shape in expected.items() if ".seg_layers." not in key}
    heads = {key: value.shape for key, value in state.items() if ".seg_layers." in key}
    check_state(state, shared | heads, str(file))
    return expected == {key: value.shape for key, value in state.items()}


def _write_model(folder: Path, state: State, trainer: str, init_args: dict[str, Any]) -> None:
    checkpoint = {
        "network_weights": state,
        "trainer_name": trainer,
        "init_args": init_args,
        "inference_allowed_mirroring_axes": None,  # no published prediction mirrors
    }
    _save(checkpoint, folder / "fold_all" / "checkpoint_final.pth")
    for name, key in (("dataset.json", "dataset_json"), ("plans.json", "plans")):
        (folder / name).write_text(json.dumps(init_args[key], indent=4))


def _save(content: dict[str, Any], path: Path) -> None:
    """Writes beside the file first, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(content, temporary)


def export_samed(model: Path, fold: str, checkpoint_name: str, file: Path) -> None:
    """Writes one fold's weights by the published key names: low-rank matrices, prompt encoder, mask decoder.

    The image encoder is not in it, as in the published files.

    Args:
        model: nnU-Net's model folder, ``<trainer>__<plans>__<configuration>``.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        FileExistsError: `file` exists.
        ValueError: The checkpoint is not a SAMed, has updates without a published name, or can't be read.
    """
    if file.exists():
        raise FileExistsError(f"{file} exists: remove it or choose another name.")
    checkpoint = read_checkpoint(model, fold, checkpoint_name)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), dict):
        raise ValueError(f"{model} has a checkpoint without network_weights: it is none of nnU-Net's.")
    trainer = checkpoint.get("trainer_name")
    if trainer not in _SAMED:
        raise ValueError(f"{model} is of {trainer}: only {' and '.join(_SAMED)} have a published format.")
    _save(official_samed_names(checkpoint["network_weights"]), file)
