"""nnU-Net's own keys of a configuration, as far as this package reads them."""

from __future__ import annotations

from typing import Any


def check_stock_keys(configuration: dict[str, Any], name: str) -> None:
    """Refuses what nnU-Net's planner never writes, and would end in a traceback late.

    Raises:
        ValueError: Naming the key, its value and what it must be.
    """
    for key, (fits, expected) in _KEYS.items():
        if not fits(value := configuration.get(key)):
            raise ValueError(f"The plans' key {key} of the configuration '{name}' is {value!r}, but must be "
                             f"{expected}: restore it, or plan again with nnUNetv2_plan_experiment.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_patch(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) in (2, 3) and all(map(_is_count, value))
    return is_list and (len(value) == 2 or value[0] > 1)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(name, str) for name in value)


_KEYS = {
    "batch_size": (_is_count, "a whole number from 1 on"),
    "patch_size": (_is_patch, "a list of two whole numbers from 1 on, or of three, the first from 2 on"),
    "normalization_schemes": (_are_names, "a list with a name for each channel"),
}
