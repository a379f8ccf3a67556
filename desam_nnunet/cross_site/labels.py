"""The classes of a study: names and values that are the same at every site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def labels_of(found: Mapping[str, list[int]], given: Iterable[str]) -> dict[str, int]:
    """nnU-Net's ``labels``, the background included.

    Args:
        found: Per site, of :func:`check_sites`.
        given: ``NAME=VALUE`` of each class, as typed; empty where values are to be taken as they occur.

    Raises:
        ValueError: Sites have other values than each other, and none were given; or a site has one that was not given.
    """
    chosen = given_labels(given or [f"label {value}={value}" for value in _common_values(found)])
    check_values(found, set(chosen.values()), "--labels")
    return chosen


def check_values(found: Mapping[str, list[int]], known: set[int], where: str) -> None:
    """Raises: ValueError: A site's references have a value that is not `known`; `where` is what should name it."""
    for site, values in found.items():
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"The references of {site} have the value {unknown[0]}, which {where} does not name: add "
                             "it, or relabel these references.")


def given_labels(given: Iterable[str]) -> dict[str, int]:
    """What was typed, checked by itself; the background comes first.

    Raises:
        ValueError: It is not ``NAME=VALUE``, or the values are not those from 1 on.
    """
    chosen = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value.isdigit() or int(value) == 0:
            raise ValueError(f"--labels {text} is not NAME=VALUE with a value above 0, such as prostate=1.")
        chosen[name] = int(value)
    ordered = sorted(chosen.items(), key=lambda item: item[1])
    if [value for _, value in ordered] != list(range(1, len(ordered) + 1)):
        raise ValueError(f"The labels are {', '.join(f'{name}={value}' for name, value in ordered)}, but nnU-Net needs "
                         f"consecutive values from 1 to {len(ordered)}: relabel the references.")
    return {"background": 0} | dict(ordered)


def _common_values(found: Mapping[str, list[int]]) -> list[int]:
    (first, values), *others = found.items()
    for site, theirs in others:
        if theirs != values:
            raise ValueError(
                f"The references of {first} have the values {_text(values)}, those of {site} {_text(theirs)}: say "
                "which class has which value with --labels, such as --labels prostate=1, and relabel what differs."
            )
    if not values:
        raise ValueError("All references are empty: there is nothing to segment.")
    return values


def _text(values: list[int]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"
