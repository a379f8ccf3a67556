"""A data set that nnU-Net has planned and preprocessed, as its files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name


class Preprocessed(NamedTuple):
    """Attributes: plans, dataset_json: As read. folder: The data set's in ``nnUNet_preprocessed``."""

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    folder: Path


def dataset_folder(dataset: str) -> Path:
    """The folder of a data set, given by name or number, in ``nnUNet_preprocessed``."""
    return Path(nnUNet_preprocessed.require()) / maybe_convert_to_dataset_name(dataset)


def read_preprocessed(dataset: str, plans: str) -> Preprocessed:
    """Args: dataset: Name or number. plans: Name.

    Raises:
        FileNotFoundError: It is not planned.
    """
    folder = dataset_folder(dataset)
    run = f"run nnUNetv2_plan_and_preprocess for {folder.name} first"
    for name, remedy in (("dataset", run), ("dataset_fingerprint", run),
                         (plans, "make these plans with desam plan, or name others with -p")):
        if not (path := folder / f"{name}.json").is_file():
            raise FileNotFoundError(f"{path} does not exist: {remedy}.")
    plans_json, dataset_json = (json.loads((folder / f"{name}.json").read_text()) for name in (plans, "dataset"))
    return Preprocessed(plans_json, dataset_json, folder)
