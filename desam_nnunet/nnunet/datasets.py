"""A data set that nnU-Net has planned and preprocessed, as its files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from desam_nnunet.nnunet.model_folder import read_description


class Preprocessed(NamedTuple):
    """Plans and dataset.json as read, and the data set's folder in ``nnUNet_preprocessed``."""

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    folder: Path


def dataset_folder(dataset: str) -> Path:
    """The folder of a data set, given by name or number, in ``nnUNet_preprocessed``."""
    return Path(nnUNet_preprocessed.require()) / maybe_convert_to_dataset_name(dataset)


def read_preprocessed(dataset: str, plans: str) -> Preprocessed:
    """What the files of a data set say, given by name or number, and of the plans of that name.

    Raises:
        FileNotFoundError: It is not planned.
        ValueError: The plans are none.
    """
    folder = dataset_folder(dataset)
    run = f"run nnUNetv2_plan_and_preprocess for {folder.name} first"
    for name, remedy in (("dataset", run), ("dataset_fingerprint", run),
                         (plans, "make these plans with desam plan, or name others with -p")):
        if not (path := folder / f"{name}.json").is_file():
            raise FileNotFoundError(f"{path} does not exist: {remedy}.")
    content, dataset_json = read_description(folder, plans)
    for key in ("plans_name", "dataset_name"):
        if not isinstance(content.get(key), str) or not content[key]:
            raise ValueError(f"The key {key} of {folder / plans}.json is {content.get(key)!r}, but must be a name: "
                             "restore it, or make these plans again.")
    return Preprocessed(content, dataset_json, folder)


def open_cases(folder: Path) -> nnUNetBaseDataset:
    """The preprocessed cases in a folder, in whichever of nnU-Net's formats.

    Raises:
        FileNotFoundError: There are none.
    """
    try:
        return infer_dataset_class(str(folder))(str(folder))
    except (AssertionError, KeyError, OSError) as error:
        raise FileNotFoundError(f"{folder} holds no preprocessed cases, or others' files beside them.") from error


def foreground_of(label_manager: LabelManager) -> list[Any]:
    """The regions, each a label or several, where the data set trains regions; else the labels. No background."""
    return label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
