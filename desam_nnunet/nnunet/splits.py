"""nnU-Net's split of a data set into folds, ``splits_final.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_splits(path: Path) -> list[dict[str, list[str]]]:
    """The cases that each fold trains on (``train``) and holds out (``val``).

    Raises:
        ValueError: The file holds something else.
    """
    try:
        splits = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON: remove it, and nnU-Net splits anew.") from error
    if not isinstance(splits, list) or not all(map(_is_fold, splits)):
        raise ValueError(f"{path} holds no list of folds with cases called train and val: remove it, and nnU-Net "
                         "splits anew.")
    return splits


def _is_fold(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(part), list) and all(isinstance(case, str) for case in value[part])
        for part in ("train", "val"))
