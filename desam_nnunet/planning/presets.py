"""Presets: JSON fragments of the plans' 2D configuration, in the folder ``plans``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def presets_folder() -> Path:
    """Where the presets lie: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "plans"
    return inside if inside.is_dir() else package.parent / "plans"


def preset_names() -> list[str]:
    return sorted(path.stem for path in presets_folder().glob("*.json"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's ``description`` and its keys of the 2D configuration.

    Raises:
        ValueError: There is none of that name; the message lists those that there are.
    """
    if name not in preset_names():
        raise ValueError(f"There is no preset '{name}'; there are: {', '.join(preset_names())}.")
    return json.loads((presets_folder() / f"{name}.json").read_text())
