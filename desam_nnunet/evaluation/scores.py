"""Scores of a folder of segmentations against its references, one row per case, class and protocol.

The two protocols give very different figures and are never mixed. ``volume`` scores all slices. ``published`` is what
DeSAM's figures were computed with (Gao et al., MICCAI 2024, public code): only slices with the organ, the last of them
dropped, and predictions zeroed in a border of the slice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from desam_nnunet.evaluation.metrics import METRICS, case_metrics
from desam_nnunet.nnunet.labels import Classes
from desam_nnunet.system.files import replace_file

Row = dict[str, Any]
COLUMNS = ("case", "class", "protocol", "outcome", *(metric.key for metric in METRICS))
MISSING, FOUND, NOT_FOUND, FALSE_ALARM, ABSENT = "missing", "found", "not found", "false alarm", "absent"
_BORDER = 50 / 256  # of height and width, on every side


class Protocol(NamedTuple):
    """A way to score a volume."""

    name: str
    meaning: str  # for the report
    selects: bool  # slices: false findings on others are not defined then, nor volumes without any

    def restrict(self, prediction: np.ndarray, reference: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """What counts of prediction and reference, masks of one class that is cut into slices along `axis`."""
        if not self.selects:
            return prediction, reference
        planes = np.moveaxis(reference, axis, 0)
        kept = np.flatnonzero(planes.any((1, 2)))[:-1]
        scored, inside = np.zeros_like(planes), np.zeros_like(planes)
        scored[kept] = True
        top, left = (round(_BORDER * side) for side in planes.shape[1:])
        inside[kept, top:planes.shape[1] - top, left:planes.shape[2] - left] = True
        return prediction & np.moveaxis(inside, 0, axis), reference & np.moveaxis(scored, 0, axis)


PROTOCOLS = (
    Protocol("volume", "All slices of every volume.", False),
    Protocol(
        "published",
        "As DeSAM's published figures: only slices on which the reference has the class, the last of them dropped, "
        "and predictions emptied in a border of 50/256 of each side. False findings elsewhere do not count, and "
        "volumes of which nothing is left are not scored.",
        True,
    ),
)


def slice_axis(spacing: Sequence[float]) -> int:
    """Along which a volume is cut into slices: the axis of the widest spacing, the first of equal ones."""
    return int(np.argmax(spacing))


def score_cases(
    predictions: Mapping[str, Path], references: Mapping[str, Path], classes: Classes, ignored: int | None,
    tolerance: float,
) -> list[Row]:
    """Rows of every case that has a reference, by case: one for each class and protocol.

    Args:
        predictions: A case without one, or whose file does not exist, is a failure: the worst value of every metric.
        ignored: Voxels of this value in the reference count nowhere.
        tolerance: Of the surface Dice, in mm.

    Raises:
        ValueError: Prediction and reference do not have the same size and spacing.
    """
    return [{"case": case} | row for case, reference in sorted(references.items())
            for row in _score_case(predictions.get(case), reference, classes, ignored, tolerance)]


def write_rows(path: Path, rows: list[Row]) -> None:
    """As JSON; a metric that is not defined is null."""
    replace_file(path, [json.dumps(without_nan(rows), indent=1).encode()])


def without_nan(rows: list[Row]) -> list[Row]:
    """Rows, and rows in them, with None where a value is not a number."""
    return [{key: without_nan([value])[0] if isinstance(value, dict) else None if value != value else value
             for key, value in row.items()} for row in rows]


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` wrote."""
    rows = json.loads(path.read_text())
    return [{key: float("nan") if value is None else value for key, value in row.items()} for row in rows]


def chosen_cases(rows: list[Row]) -> list[tuple[str, str, float]]:
    """Best, median and worst case by mean Dice over classes, all slices counted; of two best and worst, of one it."""
    dices: dict[str, list[float]] = {}
    for row in rows:
        if row["protocol"] == "volume":
            dices.setdefault(row["case"], []).append(row["dice"])
    ranked = sorted(((float(np.mean(dice)), case) for case, dice in dices.items()), reverse=True)
    words = {len(ranked) // 2: "median", len(ranked) - 1: "worst", 0: "best" if len(ranked) > 1 else "only case"}
    return [(words[place], ranked[place][1], ranked[place][0]) for place in sorted(words)]


def _score_case(
    prediction: Path | None, reference: Path, classes: Classes, ignored: int | None, tolerance: float
) -> Iterator[Row]:
    image = sitk.ReadImage(reference)
    spacing = image.GetSpacing()[::-1]
    axis = slice_axis(spacing)
    is_missing = prediction is None or not prediction.is_file()
    for name, pred, ref in class_masks(prediction, reference, image, classes, ignored):
        for protocol in PROTOCOLS:
            scored, remaining = protocol.restrict(pred, ref, axis)
            if protocol.selects and not remaining.any():
                continue
            shown = None if is_missing else scored
            metrics = case_metrics(shown, remaining, spacing, tolerance=tolerance, axis=axis)
            if protocol.selects:
                metrics["false_ml"] = float("nan")
            yield {"class": name, "protocol": protocol.name, "outcome": _outcome(shown, remaining)} | metrics


def class_masks(
    prediction: Path | None, reference: Path, image: sitk.Image, classes: Classes, ignored: int | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, prediction and reference of each class, as masks of what counts; a prediction that is missing is empty.

    Args:
        image: The reference, as it was read.

    Raises:
        ValueError: Prediction and reference do not have the same size and spacing.
    """
    labels = sitk.GetArrayFromImage(image)
    predicted = np.zeros_like(labels)
    if prediction is not None and prediction.is_file():
        predicted = _array_like(prediction, image, reference)
    counts = np.ones(labels.shape, bool) if ignored is None else labels != ignored
    for name, values in classes.items():
        yield name, np.isin(predicted, values) & counts, np.isin(labels, values) & counts


def _array_like(path: Path, like: sitk.Image, reference: Path) -> np.ndarray:
    image = sitk.ReadImage(path)
    if image.GetSize() != like.GetSize() or not np.allclose(image.GetSpacing(), like.GetSpacing(), atol=1e-3):
        raise ValueError(
            f"{path} has size {image.GetSize()} and spacing {image.GetSpacing()}, but its reference {reference} "
            f"{like.GetSize()} and {like.GetSpacing()}: they are not the same volume."
        )
    return sitk.GetArrayFromImage(image)


def _outcome(prediction: np.ndarray | None, reference: np.ndarray) -> str:
    if prediction is None:
        return MISSING
    if reference.any():
        return FOUND if prediction.any() else NOT_FOUND
    return FALSE_ALARM if prediction.any() else ABSENT
