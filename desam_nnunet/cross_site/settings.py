"""Keys of the plans' 2D configuration that all trainers of a study get, from the file after ``--settings``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from desam_nnunet.nnunet.names import CONFIGURATION
from desam_nnunet.settings.resolve import check_keys, given_section, resolve_plans
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.system.files import read_object
from desam_nnunet.training.registry import TRAINERS, method_of

_KEYS = ("batch_size", "patch_size")  # beside our sections


def read_settings(path: Path | None, plans: str, trainers: Sequence[str]) -> dict[str, Any]:
    """Empty where no file was given.

    Args:
        plans: As typed after ``-p``.
        trainers: Whose methods' sections may be given, beside those of this package's own.

    Raises:
        ValueError: Not an object of such keys, or there are plans as well.
    """
    if path is None:
        return {}
    if plans:
        raise ValueError(f"-p {plans} and --settings exclude each other: put the settings into these plans.")
    settings = read_object(path)
    if not settings:
        raise ValueError(f"{path} must hold an object with keys of the plans' 2D configuration, such as batch_size.")
    methods = [method_of(trainer) for trainer in dict.fromkeys([*TRAINERS, *trainers])]
    sections = {"sam": SamSection} | {method.name: method.section for method in methods if method is not None}
    for name, section in sections.items():
        check_keys(name, section, given_section(settings, name))
    if unknown := [key for key in settings if key not in sections and key not in _KEYS]:
        raise ValueError(f"{path} has the key '{unknown[0]}', which a study does not take: choose among "
                         f"{', '.join([*sections, *_KEYS])}.")
    if type(settings.get("batch_size")) is not int or settings["batch_size"] < 1:
        raise ValueError(f"{path} must give batch_size, a number from 1 on, so that all trainers have the same.")
    patch = settings.get("patch_size", [1, 1])
    if not isinstance(patch, list) or [type(side) for side in patch] != [int, int] or min(patch) < 1:
        raise ValueError(f"{path} has the patch_size {patch}, but it must be two numbers from 1 on, such as "
                         "[256, 256].")
    return settings


def check_settings(settings: dict[str, Any], trainers: Sequence[str]) -> None:
    """Whether plans with these settings hold for every trainer, and the weights are here, before data are planned."""
    window = settings.get("sam", {}).get("intensity") == "window"
    configuration = {"patch_size": [64, 64], "normalization_schemes": ["CTNormalization" if window else ""],
                     "architecture": {}}
    methods = {method.name: method for trainer in trainers if (method := method_of(trainer)) is not None}
    for method in methods.values():
        plans = {"plans_name": "", "label_manager": "LabelManager",
                 "configurations": {CONFIGURATION: copy.deepcopy(configuration | settings)}}
        resolve_plans(plans, CONFIGURATION, {"labels": {"background": 0, "organ": 1}}, method)
