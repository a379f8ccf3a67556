"""What a data set's labels mean to training and scoring."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager


def foreground_of(label_manager: LabelManager) -> list[Any]:
    """The regions, each a label or several, where the data set trains regions; else the labels. No background."""
    return label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
