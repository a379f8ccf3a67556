"""What a pretraining run leaves in its folder beside the weights, and what it goes on from."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch

from desam_nnunet.system.files import TEMPORARY, damage_told, replace_file, replacing

WEIGHTS, SETTINGS, CURVE, STATE = "weights.safetensors", "settings.json", "curve.csv", "state.pt"


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Whether a run with this recipe, generator and device can begin or go on in a folder.

    Raises:
        ValueError: It holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, but a run needs a folder: give another name.")
    if not folder.is_dir() or all(path.name.endswith(TEMPORARY) for path in folder.iterdir()):
        return
    try:
        before = json.loads((folder / SETTINGS).read_text())
        before |= dict(before["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds other things than a pretraining run: give a new folder.") from error
    now = settings["recipe"] | {key: settings[key] for key in ("generator", "device")}
    if differs := [f"{key} {before.get(key)!r}, not {value!r}" for key, value in now.items()
                   if before.get(key) != value]:
        raise ValueError(f"{folder} holds a run with {', '.join(differs)}: give its settings, or another folder.")


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    replace_file(folder / SETTINGS, [(json.dumps(settings, indent=2) + "\n").encode()])


def read_curve(folder: Path) -> list[dict[str, Any]]:
    path = folder / CURVE
    return list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []


def write_curve(folder: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        (folder / CURVE).unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    replace_file(folder / CURVE, [text.getvalue().encode()])


def read_state(folder: Path) -> dict[str, Any] | None:
    """Where the run goes on, None at its beginning.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    with damage_told(f"{path} can't be read", ": remove it, and the run begins anew"):
        return torch.load(path, map_location="cpu", weights_only=True)  # the optimiser wants its counters there


def write_state(folder: Path, state: dict[str, Any]) -> None:
    with replacing(folder / STATE) as temporary:
        torch.save(state, temporary)
