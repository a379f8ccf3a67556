"""Presets: JSON fragments of the plans' 2D configuration, in the folder ``plans``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from desam_nnunet._startup import shipped_folder

_FOLDER = Path(shipped_folder("plans"))


def preset_names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's ``description`` and its keys of the 2D configuration.

    Raises:
        ValueError: There is none of that name; the message lists those that there are.
    """
    if name not in preset_names():
        raise ValueError(f"There is no preset '{name}'; there are: {', '.join(preset_names())}.")
    return json.loads((_FOLDER / f"{name}.json").read_text())
