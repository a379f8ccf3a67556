"""A data set's ``dataset.json``: whether nnU-Net can make something of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from desam_nnunet.system.files import told

_REMEDY = "mend dataset.json in nnUNet_raw, and preprocess again where that was done"


def check_labels(description: Mapping[str, Any]) -> None:
    """Refuses labels and regions of which nnU-Net makes no classes.

    Raises:
        ValueError: Saying what nnU-Net says.
    """
    labels = description.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"The key labels of dataset.json is {_short(labels)}, but must be an object with the labels' "
                         f"names: {_REMEDY}.")
    try:
        manager = LabelManager(labels, description.get("regions_class_order"))
        classes = manager.num_segmentation_heads - (not manager.has_regions)
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        said = told(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"nnU-Net makes no classes of the labels {_short(labels)} of dataset.json ({said}): "
                         f"{_REMEDY}.") from error
    if classes < 1:
        raise ValueError(f"The labels {_short(labels)} of dataset.json hold no class beside the background: {_REMEDY}.")


def check_description(description: Mapping[str, Any], where: str) -> None:
    """Refuses a raw data set's ``dataset.json`` that nnU-Net can't read; `where` is its path.

    Raises:
        ValueError: Naming the key, its value and what it must be.
    """
    channels = "modality" if "modality" in description and "channel_names" not in description else "channel_names"
    checks = {channels: (lambda value: isinstance(value, dict) and value, "an object with a name for each channel"),
              "file_ending": (lambda value: isinstance(value, str) and value.startswith("."), "such as '.nii.gz'")}
    if "dataset" in description:
        checks["dataset"] = (_are_files, "an object with images and label of each case")
    for key, (fits, expected) in checks.items():
        if not fits(value := description.get(key)):
            raise ValueError(f"The key {key} of {where} is {_short(value)}, but must be {expected}: {_REMEDY}.")
    check_labels(description)


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(row, dict) and isinstance(row.get("label"), str) and isinstance(row.get("images"), list)
        and all(isinstance(image, str) for image in row["images"]) for row in value.values())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."
