"""The two ways to score a volume, which give very different figures and are never mixed.

``volume`` scores all slices. ``published`` is what DeSAM's figures were computed with (Gao et al., MICCAI 2024, public
code): only slices with the organ, the last of them dropped, and predictions zeroed in a border of the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_BORDER = 50 / 256  # of height and width, on every side


class Protocol(NamedTuple):
    """One of them.

    Attributes:
        meaning: For the report.
        selects: Whether slices are selected, so that false findings on others are not defined, nor volumes without any.
        restrict: Of prediction and reference, masks of one class, what counts; and the axis of the slices.
    """

    name: str
    meaning: str
    selects: bool
    restrict: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def _everything(prediction: np.ndarray, reference: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    return prediction, reference


def _as_published(prediction: np.ndarray, reference: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    prediction, reference = (np.moveaxis(mask, axis, 0) for mask in (prediction, reference))
    kept = np.flatnonzero(reference.any((1, 2)))[:-1]
    seen, wanted = np.zeros_like(prediction), np.zeros_like(reference)
    wanted[kept] = reference[kept]
    top, left = (round(_BORDER * side) for side in reference.shape[1:])
    inside = np.s_[top : reference.shape[1] - top, left : reference.shape[2] - left]
    for z in kept:
        seen[z][inside] = prediction[z][inside]
    return np.moveaxis(seen, 0, axis), np.moveaxis(wanted, 0, axis)


PROTOCOLS = (
    Protocol("volume", "All slices of every volume.", False, _everything),
    Protocol(
        "published",
        "As DeSAM's published figures: only slices on which the reference has the class, the last of them dropped, "
        "and predictions emptied in a border of 50/256 of each side. False findings elsewhere do not count, and "
        "volumes of which nothing is left are not scored.",
        True,
        _as_published,
    ),
)


def slice_axis(spacing: Sequence[float]) -> int:
    """Along which a volume is cut into slices: the axis of the widest spacing, the first of equal ones."""
    return int(np.argmax(spacing))
