"""nnU-Net's own keys of plans, fingerprint and data set, as far as this package reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard

from nnunetv2.utilities.label_handling.label_handling import get_labelmanager_class_from_plans

from desam_nnunet.nnunet.description import check_labels

_Keys = dict[str, tuple[Callable[[Any], bool], str]]
MOST_TILES, LONGEST = 10_000, 65_536
_PLAN = "plan again with nnUNetv2_plan_experiment"
_FINGERPRINT = "make it again with nnUNetv2_extract_fingerprint --clean"
_AXES = 3


def check_stock_plans(plans: Mapping[str, Any], *names: str) -> None:
    """Refuses plans of another structure than nnU-Net's, on which its own classes end in a traceback.

    Args:
        names: Configurations that nnU-Net is to make something of.

    Raises:
        ValueError: Naming the key, its value and what it must be.
    """
    _refuse("The plans' key {}", plans, {"configurations": (_is_filled, "an object with the configurations")})
    for name, row in plans["configurations"].items():
        if not isinstance(row, dict):
            raise ValueError(f"The plans' configuration {name!r} is {_short(row)}, but must be an object: {_PLAN}.")
    check_lines(plans["configurations"], names)
    if "label_manager" in plans:
        _refuse("The plans' key {}", plans, {
            "label_manager": (lambda value: _is_name(value) and isinstance(
                get_labelmanager_class_from_plans(dict(plans)), type), "a class of nnU-Net's, such as LabelManager")})


def check_lines(configurations: dict[str, dict[str, Any]], names: Iterable[str]) -> None:
    """Refuses configurations that, with all from which they inherit, nnU-Net makes nothing of.

    Raises:
        ValueError: Naming the first.
    """
    for name in names:
        _check_line(configurations, name)


def _check_line(configurations: dict[str, dict[str, Any]], name: str) -> None:
    line: list[str] = []
    while name in configurations and name not in line:
        _refuse("The plans' configuration '{}'", configurations, {
            name: (_is_configuration, "an object with an architecture or the name that it inherits_from")})
        line.append(name)
        name = configurations[name].get("inherits_from", "")
    if name and line:
        raise ValueError(f"The plans' configuration '{line[-1]}' has inherits_from {name!r}, but must name another one "
                         f"of the plans that does not inherit from it: {_PLAN}.")
    if name:
        raise ValueError(f"The plans have no configuration {name!r}, but {_short(list(configurations))}: {_PLAN}.")


def check_stock_keys(configuration: Mapping[str, Any], name: str) -> None:
    """Refuses what nnU-Net's planner never writes in a configuration, and would end in a traceback late.

    Raises:
        ValueError: Naming the key, its value and what it must be.
    """
    _refuse(f"The plans' key {{}} of the configuration '{name}'", configuration, _TRAINED)


def check_planned(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], name: str, fingerprint: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
) -> None:
    """Refuses what our planner can't read of nnU-Net's files, beside what training can't.

    Raises:
        ValueError: Naming the key, its value and what it must be.
    """
    _refuse("The plans' key {}", plans, {"transpose_forward": (_is_order, "a list of the axes 0, 1 and 2")})
    _refuse(f"The plans' key {{}} of the configuration '{name}'", configuration, _TRAINED | _PLANNED)
    _refuse("The fingerprint's key {}", fingerprint, {
        "shapes_after_crop": (partial(_are_triples, fits=is_number),
                              f"a list of three numbers of voxels for each case, each from 1 to {LONGEST}"),
        "spacings": (partial(_are_triples, fits=_is_length),
                     "a list of three numbers of mm for each case, each from 1e-6 to 1e6")}, _FINGERPRINT)
    if len(fingerprint["spacings"]) != len(fingerprint["shapes_after_crop"]):
        raise ValueError(f"The fingerprint has {len(fingerprint['shapes_after_crop'])} shapes and "
                         f"{len(fingerprint['spacings'])} spacings: {_FINGERPRINT}.")
    channels = "modality" if "modality" in dataset_json else "channel_names"  # nnU-Net reads both
    check_labels(dataset_json)
    _refuse("The key {} of dataset.json", dataset_json, {
        channels: (_is_filled, "an object with a name for each channel")}, "mend it in nnUNet_raw and preprocess again")


def _refuse(what: str, content: Mapping[str, Any], keys: _Keys, remedy: str = f"restore it, or {_PLAN}") -> None:
    for key, (fits, expected) in keys.items():
        if not fits(value := content.get(key)):
            raise ValueError(f"{what.format(key)} is {_short(value)}, but must be {expected}: {remedy}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."


def is_number(value: Any, most: int = LONGEST) -> bool:
    """Whether it is a whole number from 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_length(value: Any) -> bool:
    """Millimetres from voxel to voxel, of microscopes and of satellites too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-6 <= value <= 1e6


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_list(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple) and len(value) > 0


def _is_filled(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0


def _is_patch(value: Any) -> bool:
    is_list = _is_list(value) and len(value) in (2, _AXES) and all(map(is_number, value))
    return is_list and (len(value) == 2 or value[0] > 1)


def _are_names(value: Any) -> bool:
    return _is_list(value) and all(isinstance(name, str) for name in value)


def _are_triples(value: Any, fits: Callable[[Any], bool]) -> bool:
    return _is_list(value) and all(_is_list(row) and len(row) == _AXES and all(map(fits, row)) for row in value)


def _is_order(value: Any) -> bool:
    return _is_list(value) and all(type(axis) is int for axis in value) and sorted(value) == list(range(_AXES))


def _is_configuration(value: dict[str, Any]) -> bool:
    if value.keys().isdisjoint({"architecture", "inherits_from", "UNet_class_name"}):
        return False
    return _is_name(value.get("inherits_from", "2d")) and isinstance(value.get("architecture", {}), dict)


def _has_strides(value: Any) -> bool:
    """An architecture whose strides, of rows and columns, say what its network divides them by."""
    given = value.get("arch_kwargs") if isinstance(value, dict) else None
    strides = given.get("strides") if isinstance(given, dict) else None
    return _is_list(strides) and all(map(_is_stride, strides))


def _is_stride(value: Any) -> bool:
    return is_number(value) or (_is_list(value) and len(value) == 2 and all(map(is_number, value)))


_TRAINED: _Keys = {
    "batch_size": (lambda value: is_number(value, MOST_TILES),
                   f"a whole number from 1 to {MOST_TILES} (more tiles than any memory holds)"),
    "patch_size": (_is_patch, f"a list of two whole numbers from 1 to {LONGEST} (longer than any slice), or of three, "
                              "the first from 2 on"),
    "normalization_schemes": (_are_names, "a list with a name for each channel"),
}
_PLANNED: _Keys = {
    "spacing": (lambda value: _is_list(value) and len(value) == 2 and all(map(_is_length, value)),
                "two numbers of mm, each from 1e-6 to 1e6"),
    "architecture": (_has_strides, "an object whose arch_kwargs give the strides of rows and columns"),
    "data_identifier": (_is_name, "a name"),
    "resampling_fn_probabilities": (_is_name, "a name"),
    "resampling_fn_probabilities_kwargs": (lambda value: isinstance(value, dict), "an object"),
}
