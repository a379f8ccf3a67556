"""Keys of the plans' 2D configuration that several trainers get alike, from a file."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from desam_nnunet.encoders.weights import absolute_encoder
from desam_nnunet.nnunet.names import CONFIGURATION
from desam_nnunet.settings.resolve import check_keys, given_section, resolve_plans
from desam_nnunet.settings.sections import Method, SamSection
from desam_nnunet.settings.stock import LONGEST, MOST_TILES, is_number
from desam_nnunet.system.files import read_object

_KEYS = ("batch_size", "patch_size")  # beside our sections


def read_settings(path: Path, methods: Iterable[Method]) -> dict[str, Any]:
    """What a file gives.

    Args:
        methods: Whose sections it may have.

    Raises:
        ValueError: Not an object of such keys, or no batch size.
    """
    settings = read_object(path)
    if not settings:
        raise ValueError(f"{path} must hold an object with keys of the plans' 2D configuration, such as batch_size.")
    sections = {"sam": SamSection} | {method.name: method.section for method in methods}
    for name, section in sections.items():
        check_keys(name, section, given_section(settings, name))
    if unknown := [key for key in settings if key not in sections and key not in _KEYS]:
        raise ValueError(f"{path} has the key {unknown[0]!r}, which a study does not take: choose among "
                         f"{', '.join([*sections, *_KEYS])}.")
    if not is_number(settings.get("batch_size"), MOST_TILES):
        raise ValueError(f"{path} must give batch_size, a number from 1 to {MOST_TILES}, so that all trainers have the "
                         "same.")
    patch = settings.get("patch_size", [1, 1])
    if not isinstance(patch, list) or len(patch) != 2 or not all(map(is_number, patch)):
        raise ValueError(f"{path} has the patch_size {patch}, but it must be two numbers from 1 to {LONGEST}, such as "
                         "[256, 256].")
    if "encoder" in settings.get("sam", {}):
        settings["sam"]["encoder"] = absolute_encoder(settings["sam"]["encoder"])
    return settings


def check_settings(settings: dict[str, Any], methods: Iterable[Method]) -> None:
    """Whether plans with these settings hold for every method, and the weights are here, before data are planned.

    Raises:
        FileNotFoundError, ValueError: They don't.
    """
    window = settings.get("sam", {}).get("intensity") == "window"
    configuration = {"patch_size": [64, 64], "normalization_schemes": ["CTNormalization" if window else ""],
                     "architecture": {}}
    for method in methods:
        plans = {"plans_name": "", "label_manager": "LabelManager",
                 "configurations": {CONFIGURATION: copy.deepcopy(configuration | settings)}}
        resolve_plans(plans, CONFIGURATION, {"labels": {"background": 0, "organ": 1}}, method)
