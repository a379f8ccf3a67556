"""Scores of a folder of segmentations against its references, one row per case, class and protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from desam_nnunet.evaluation.metrics import METRICS, case_metrics
from desam_nnunet.evaluation.protocols import PROTOCOLS, slice_axis
from desam_nnunet.system.files import replace_file

Classes = dict[str, tuple[int, ...]]
Row = dict[str, Any]
COLUMNS = ("case", "class", "protocol", "outcome", *(metric.key for metric in METRICS))
MISSING, FOUND, NOT_FOUND, FALSE_ALARM, ABSENT = "missing", "found", "not found", "false alarm", "absent"


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


def score_case(
    prediction: Path | None, reference: Path, classes: Classes, ignored: int | None, tolerance: float
) -> Iterator[Row]:
    """A row for each class and protocol.

    Args:
        prediction: None, or a file that does not exist, counts as a failure: the worst value of every metric.
        ignored: Voxels of this value in the reference count nowhere.
        tolerance: Of the surface Dice, in mm.

    Raises:
        ValueError: Prediction and reference do not have the same size and spacing.
    """
    truth = sitk.ReadImage(reference)
    spacing = truth.GetSpacing()[::-1]
    wanted = sitk.GetArrayFromImage(truth)
    axis = slice_axis(spacing)
    seen = None if prediction is None or not prediction.is_file() else _array_like(prediction, truth, reference)
    counts = np.ones(wanted.shape, bool) if ignored is None else wanted != ignored
    for name, values in classes.items():
        mask = np.isin(wanted, values) & counts
        found = None if seen is None else np.isin(seen, values) & counts
        for protocol in PROTOCOLS:
            seen_of, left = protocol.restrict(np.zeros_like(mask) if found is None else found, mask, axis)
            if protocol.selects and not left.any():
                continue
            shown = None if found is None else seen_of
            metrics = case_metrics(shown, left, spacing, tolerance=tolerance, axis=axis)
            if protocol.selects:
                metrics["false_ml"] = float("nan")
            yield {"class": name, "protocol": protocol.name, "outcome": _outcome(shown, left)} | metrics


def score_cases(
    predictions: Mapping[str, Path], references: Mapping[str, Path], classes: Classes, ignored: int | None,
    tolerance: float,
) -> list[Row]:
    """Rows of every case that has a reference, by case.

    Args:
        predictions: File of each case; a case without one counts as a failure.
    """
    rows = []
    for case, reference in sorted(references.items()):
        found = score_case(predictions.get(case), reference, classes, ignored, tolerance)
        rows += [{"case": case} | row for row in found]
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """As JSON; a metric that is not defined is null."""
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    replace_file(path, [json.dumps(plain, indent=1).encode()])


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` wrote."""
    rows = json.loads(path.read_text())
    return [{key: float("nan") if value is None else value for key, value in row.items()} for row in rows]


def _array_like(path: Path, truth: sitk.Image, reference: Path) -> np.ndarray:
    image = sitk.ReadImage(path)
    same = image.GetSize() == truth.GetSize() and np.allclose(image.GetSpacing(), truth.GetSpacing(), atol=1e-3)
    if not same:
        raise ValueError(
            f"{path} has size {image.GetSize()} and spacing {image.GetSpacing()}, but its reference {reference} "
            f"{truth.GetSize()} and {truth.GetSpacing()}: they are not the same volume."
        )
    return sitk.GetArrayFromImage(image)


def _outcome(found: np.ndarray | None, wanted: np.ndarray) -> str:
    if found is None:
        return MISSING
    if wanted.any():
        return FOUND if found.any() else NOT_FOUND
    return FALSE_ALARM if found.any() else ABSENT
