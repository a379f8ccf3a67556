"""Where segmentations are wrong: what was missed or added, on which slice, and along which third of the organ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import distance_transform_edt

from desam_nnunet.evaluation.scores import Row, class_masks, slice_axis
from desam_nnunet.nnunet.labels import Classes

THIRDS = ("upper third (base)", "middle third", "lower third (apex)")
MISSED, EXTRA, BOUNDARY = "missed", "extra", "boundary"
_UPRIGHT = 0.7  # least part of the body's axis in that of the slices


def error_rows(
    predictions: Mapping[str, Path], references: Mapping[str, Path], classes: Classes, ignored: int | None,
    tolerance: float,
) -> list[Row]:
    """Rows of every case that has a reference, one for each class; all slices count.

    An error is of the `boundary` where its voxel's centre lies within `tolerance` mm of that of a voxel on the other
    side of the reference's surface, and of one of the prediction; else it is `missed` or `extra`. Thirds are those of
    the reference's extent along the body, as far as the slices' axis is the body's.

    Args:
        predictions: A case without one, or whose file does not exist, has everything missed.
    """
    return [{"case": case} | row for case, path in sorted(references.items())
            for row in _case_rows(predictions.get(case), path, classes, ignored, tolerance)]


def _case_rows(
    prediction: Path | None, reference: Path, classes: Classes, ignored: int | None, tolerance: float
) -> Iterator[Row]:
    image = sitk.ReadImage(reference)
    spacing = image.GetSpacing()[::-1]
    axis = slice_axis(spacing)
    upwards = image.GetDirection()[6 + 2 - axis]  # of the patient, where slices count up
    moved = (spacing[axis], *(side for other, side in enumerate(spacing) if other != axis))
    for name, *masks in class_masks(prediction, reference, image, classes, ignored):
        pred, ref = (np.moveaxis(mask, axis, 0) for mask in masks)
        yield {"class": name} | class_errors(pred, ref, moved, tolerance) | thirds(pred, ref, upwards)


def class_errors(pred: np.ndarray, ref: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict[str, Any]:
    """Volumes in ml of masks (slices, rows, columns) and of the three kinds of errors, the kind with most, and the
    slice with most errors; the kind is empty where there are none."""
    ml = float(np.prod(spacing)) / 1000
    wrong = pred != ref
    near = np.zeros_like(ref)
    if ref.any() and pred.any():
        depth = distance_transform_edt(ref, spacing) + distance_transform_edt(~ref, spacing)
        near = (depth <= tolerance) & (distance_transform_edt(~pred, spacing) <= tolerance)
    kinds = {MISSED: wrong & ref & ~near, EXTRA: wrong & ~ref & ~near, BOUNDARY: wrong & near}
    volumes = {kind: ml * int(mask.sum()) for kind, mask in kinds.items()}
    most = max(volumes, key=lambda kind: volumes[kind]) if wrong.any() else ""
    return {"reference_ml": ml * int(ref.sum()), "predicted_ml": ml * int(pred.sum())} | volumes | {
        "wrong": most, "slice": int(wrong.sum((1, 2)).argmax())}


def thirds(pred: np.ndarray, ref: np.ndarray, upwards: float) -> dict[str, float | None]:
    """Dice of each third of the slices that the reference has; None where there are fewer than three, or the axis of
    the slices is not the body's.

    Args:
        upwards: Part of the body's axis in that of the slices, from -1 to 1: the direction's cosine.
    """
    slices = np.flatnonzero(ref.any((1, 2)))
    if len(slices) < len(THIRDS) or abs(upwards) < _UPRIGHT:
        return dict.fromkeys(THIRDS)
    ordered = slices[::-1] if upwards > 0 else slices
    return {name: 2 * int((pred[part] & ref[part]).sum()) / int(pred[part].sum() + ref[part].sum())
            for name, part in zip(THIRDS, np.array_split(ordered, len(THIRDS)), strict=True)}
