"""The classes of a study: names and values that are the same at every site."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

Classes = dict[str, tuple[int, ...]]


def labels_of(occurring: Mapping[str, list[int]], given: Iterable[str]) -> dict[str, int]:
    """nnU-Net's ``labels``, the background included.

    Args:
        occurring: Values of each site, of :func:`~desam_nnunet.nnunet.sites.check_sites`.
        given: ``NAME=VALUE`` of each class, as typed; empty where values are to be taken as they occur.

    Raises:
        ValueError: Sites have other values than each other, and none were given; or a site has one that was not given.
    """
    labels = given_labels(given or [f"label {value}={value}" for value in _common_values(occurring)])
    check_values(occurring, set(labels.values()), "--labels")
    return labels


def check_values(occurring: Mapping[str, list[int]], known: Container[int | None], where: str) -> None:
    """Looks for values that are not `known`; `where` is what should name them.

    Raises:
        ValueError: A site's references have one.
    """
    for site, values in occurring.items():
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"The references of {site} have the value {unknown[0]}, which {where} does not name: add "
                             "it, or relabel these references.")


def given_labels(given: Iterable[str]) -> dict[str, int]:
    """What was typed, checked by itself; the background comes first.

    Raises:
        ValueError: It is not ``NAME=VALUE``, or the values are not those from 1 on.
    """
    labels = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value.isdigit() or int(value) == 0:
            raise ValueError(f"--labels {text} is not NAME=VALUE with a value above 0, such as prostate=1.")
        labels[name] = int(value)
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    if list(ordered.values()) != list(range(1, len(ordered) + 1)):
        raise ValueError(f"The labels are {', '.join(f'{name}={value}' for name, value in ordered.items())}, but "
                         f"nnU-Net needs consecutive values from 1 to {len(ordered)}: relabel the references.")
    return {"background": 0} | ordered


def _common_values(occurring: Mapping[str, list[int]]) -> list[int]:
    (first, values), *others = occurring.items()
    for site, theirs in others:
        if theirs != values:
            here, there = ("{" + ", ".join(map(str, each)) + "}" for each in (values, theirs))
            raise ValueError(
                f"The references of {first} have the values {here}, those of {site} {there}: say which class has which "
                "value with --labels, such as --labels prostate=1, and relabel what differs.")
    if not values:
        raise ValueError("All references are empty: there is nothing to segment.")
    return values


def classes_of(dataset_json: Mapping[str, Any]) -> tuple[Classes, int | None]:
    """The label values of each class or region, and the value of voxels to ignore."""
    classes: Classes = {}
    ignored = None
    for name, values in dataset_json["labels"].items():
        if name == "ignore":
            ignored = int(values)
        elif name != "background":
            classes[name] = tuple(map(int, values)) if isinstance(values, list | tuple) else (int(values),)
    return classes, ignored
