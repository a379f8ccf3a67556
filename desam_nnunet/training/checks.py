"""What is looked at before training begins, so that bad data costs seconds and not a night."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.encoders.registry import brought_row
from desam_nnunet.nnunet.datasets import foreground_of
from desam_nnunet.nnunet.model_folder import read_description, trained_folds
from desam_nnunet.settings.resolve import SAM, as_trained
from desam_nnunet.settings.sections import Method

_GEOMETRY = ("data_identifier", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm",
             "resampling_fn_data", "resampling_fn_data_kwargs")
_OF_CT = ("mean", "std", "percentile_00_5", "percentile_99_5")  # what CTNormalization takes from the fingerprint
_DATASET = ("labels", "regions_class_order", "channel_names")
Label = int | tuple[int, ...]  # one label, or those of a region


def check_cases(dataset: nnUNetBaseDataset, num_channels: int) -> set[Label]:
    """Looks at every case's channels and at its middle slice; returns the labels and regions that occur.

    One slice is enough to see what normalisation spreads over a case; the trainer looks at every batch too.

    Raises:
        ValueError: Naming the case that has another number of channels, or NaN or infinity.
    """
    found: set[Label] = set()
    for case in dataset.identifiers:
        data, _, _, properties = dataset.load_case(case)
        if data.shape[0] != num_channels:
            raise ValueError(f"Case {case} has {data.shape[0]} channel(s), but dataset.json names {num_channels}: "
                             "repair the images or dataset.json and preprocess again.")
        if not np.isfinite(data[:, data.shape[1] // 2]).all():
            raise ValueError(f"Case {case} holds NaN or infinite values: repair or remove the image and preprocess "
                             "again.")
        found |= {label for label, places in properties["class_locations"].items() if len(places) > 0}
    return found


def missing_labels(found: set[Label], label_manager: LabelManager) -> list[Label]:
    """The foreground labels or regions that occur in none of the cases looked at.

    Raises:
        ValueError: Not a single one occurs.
    """
    keys: list[Label] = [tuple(map(int, label)) if isinstance(label, list | tuple) else int(label)
                         for label in foreground_of(label_manager)]
    missing = [label for label in keys if label not in found]
    if len(missing) == len(keys):
        raise ValueError(f"None of the labels {missing} occurs in any training case: check labelsTr and the labels in "
                         "dataset.json, and preprocess again.")
    return missing


def settings_of(
    plans: dict[str, Any], configuration_name: str, dataset_json: dict[str, Any], method: Method
) -> dict[str, Any]:
    """What must be equal wherever a model goes on: our sections, geometry, normalisation, labels and channels.

    Args:
        plans: With resolved sections; keys that are younger than they are count as what happened before.
        method: Whose section counts, beside ``sam``.
    """
    configuration = PlansManager(plans).get_configuration(configuration_name).configuration
    settings = {key: configuration.get(key) for key in _GEOMETRY}
    settings["transpose_forward"] = plans.get("transpose_forward")
    for channel, scheme in enumerate(configuration.get("normalization_schemes", ())):
        if scheme == "CTNormalization":
            known = plans["foreground_intensity_properties_per_channel"][str(channel)]
            settings |= {f"channel {channel}'s {key}": known[key] for key in _OF_CT}
    settings |= {f"dataset.json {key}": dataset_json.get(key) for key in _DATASET}
    for section in (SAM, method):
        settings |= {f"{section.name}.{key}": value for key, value in as_trained(configuration, section).items()}
    return settings


def check_same_settings(now: dict[str, Any], then: dict[str, Any], what: str) -> None:
    """Compares two results of :func:`settings_of`.

    The same weights file under another name is the same encoder where the file says how it is read: at another path,
    or under the names of this package's encoders, whose shapes differ. timm's models and imported rows bring their own
    architecture, so there equal identities are not enough: it must be the same one, or other maps of other images would
    be read from the same weights.

    Raises:
        ValueError: Naming the keys that differ, with both values.
    """
    if now["sam.identity"] == then.get("sam.identity"):
        with suppress(ValueError):  # nobody knows the name of then any more
            here, there = (brought_row(settings["sam.encoder"]) for settings in (now, then))
            if (here and here.architecture) == (there and there.architecture):
                then = then | {"sam.encoder": now["sam.encoder"]}
    differing = [f"{key} was {then.get(key)!r} and is {value!r} now" for key, value in now.items()
                 if then.get(key) != value]
    if differing:
        raise ValueError(f"{what} was trained with other settings: {'; '.join(differing)}. Restore these values, train "
                         "under another plans name (-p), or remove what was trained.")


def check_model_folder(model: Path, configuration_name: str, now: dict[str, Any], method: Method) -> None:
    """Refuses other settings in a model folder that has checkpoints: all folds share its JSON files.

    A fold's own checkpoint counts too: it stays until training has made another, and predicts by these files.
    `now` is :func:`settings_of` the fold that is to be trained.
    """
    if trained := trained_folds(model):
        plans, dataset_json = read_description(model)
        then = settings_of(plans, configuration_name, dataset_json, method)
        check_same_settings(now, then, f"{trained[0].parent.name} in {model}")
