"""Sections of the plans that nothing would read: misspelt ones, and ours at another level than a configuration's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from desam_nnunet.nnunet.trainer_files import is_mentioned
from desam_nnunet.settings.sections import SECTIONS, Method, SamSection

_CONFIGURES = {"architecture", "inherits_from", "UNet_class_name", "patch_size"}  # what only configurations have
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_CLOSE = 0.65  # difflib's measure, of 1: one letter wrong, missing or too many of three, or two in another order


def refuse_unread_sections(plans: dict[str, Any], configuration: dict[str, Any], name: str, method: Method) -> None:
    """Refuses what looks like a section of ours and is none, since training would silently run on defaults.

    Args:
        plans: As they stand in the file.
        configuration: The one that is trained, called `name`, with all that it inherits.

    Raises:
        ValueError: Naming the key, and what it is close to or where it belongs.
    """
    ours = (*SECTIONS, method.name)
    rows = [key for key, row in plans["configurations"].items() if row.keys().isdisjoint(_CONFIGURES)]
    for place, keys in (("at the top level", plans), ("among the configurations", rows)):
        for key in _like(keys, ours):
            raise ValueError(f"The plans' key {key!r} stands {place}, where nothing reads it: sections stand in a "
                             f"configuration, such as configurations → {name} → {_closest(key, ours)}.")
    for key in _like((key for key in configuration if key not in ours), ours):
        raise ValueError(f"The plans' configuration '{name}' has a key {key!r}, which nothing reads. If "
                         f"'{_closest(key, ours)}' is meant, call it so; else remove it.")
    settings = {row.name: section for section, kind in (("sam", SamSection), (method.name, method.section))
                for row in fields(kind)}
    for key in configuration:
        if key in settings and key not in ours and not is_mentioned(key):
            raise ValueError(f"The plans' key {key!r} stands in the configuration '{name}', where nothing reads it: it "
                             f"belongs in its section '{settings[key]}'.")
    for outer, inner in configuration.items():
        found = next(_sections_in(inner, ours), "") if outer not in ours else ""
        if found and not is_mentioned(outer):
            raise ValueError(f"The plans' key {found!r} stands in {outer!r} of the configuration '{name}', where "
                             "nothing reads it: it belongs beside that, in the configuration itself.")


def _sections_in(value: Any, ours: Iterable[str]) -> Iterator[str]:
    """Names of sections, at whatever depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ours:
                yield key
            yield from _sections_in(inner, ours)


def _like(keys: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Those that are or look like a section's name, and that no trainer of somebody else's mentions."""
    return [key for key in keys if _closest(key, ours) and (key in ours or not is_mentioned(key))]


def _closest(key: str, ours: Iterable[str]) -> str:
    name, words = key.strip().lower(), [word.lower() for word in _WORD.findall(key)]
    with_more = (own for own in ours if name.startswith(f"{own}_") or name.endswith(f"_{own}"))
    return (next(iter(get_close_matches(name, ours, 1, _CLOSE)), "") or next(with_more, "")
            or next((own for own in ours if own in words), ""))
