"""Metrics of one class in one volume, in millimetres. Distances and surfaces are MONAI's.

Surface distances (HD95, ASSD) are between boundary voxels: foreground voxels with a face neighbour outside. The
normalised surface Dice is between surface elements, weighted by their area, as in DeepMind's ``surface-distance``
(Nikolov et al., arXiv 1809.04430). The two differ: boundary voxels lie half a voxel inside the surface, and each
counts once, however much surface it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

NONE = "\N{EN DASH}"  # printed where there is no value


class Metric(NamedTuple):
    """A column of every table."""

    key: str  # in CSV and JSON
    name: str  # this and the rest: in the report
    unit: str
    digits: int  # after the point
    better: str  # high, low, or zero for signed differences
    meaning: str  # one sentence, empty masks included

    def text(self, value: float | None) -> str:
        """As it is printed; a dash where there is none."""
        return NONE if value is None or value != value else f"{value:.{self.digits}f}"


METRICS = (
    Metric("dice", "Dice", "", 3, "high",
           "Overlap: twice the common volume by the sum of both. 1 where both are empty, 0 where one is."),
    Metric("iou", "IoU", "", 3, "high",
           "Overlap: the common volume by that of both together. 1 where both are empty, 0 where one is."),
    Metric("hd95", "HD95", "mm", 1, "low",
           "The larger of the two 95th percentiles of the distances from each boundary voxel to the other boundary. "
           "0 where both are empty, the diagonal of the volume where one is."),
    Metric("assd", "ASSD", "mm", 2, "low",
           "Mean distance from each boundary voxel of both masks to the other boundary. 0 where both are empty, the "
           "diagonal of the volume where one is."),
    Metric("nsd", "Surface Dice", "", 3, "high",
           "Share of both surfaces, by area, that lies within the tolerance of the other. 1 where both are empty, 0 "
           "where one is."),
    Metric("volume_ml", "Volume difference", "ml", 1, "zero", "Predicted volume less the reference's."),
    Metric("volume_percent", "Volume difference", "%", 0, "zero",
           "The same in percent of the reference. Undefined, and left out, where the reference alone is empty."),
    Metric("false_ml", "False volume", "ml", 2, "low",
           "What was segmented on slices on which the reference has nothing."),
)


def case_metrics(
    prediction: np.ndarray | None, reference: np.ndarray, spacing: Sequence[float], *, tolerance: float, axis: int
) -> dict[str, float]:
    """Every metric of :data:`METRICS` for one class of one volume.

    A missing prediction gets the worst value of each: that of a prediction that finds nothing, and, where the
    reference is empty, that of one that finds something everywhere.

    Args:
        prediction: Mask, or None where there is none.
        reference: Mask of the same shape, three axes.
        spacing: Of these axes, in mm.
        tolerance: Of the surface Dice, in mm.
        axis: Along which the volume is cut into slices.

    Raises:
        ValueError: The shapes differ.
    """
    false = np.ones_like(reference) if prediction is None else prediction  # what counts on slices without the class
    if prediction is None:
        prediction = np.full_like(reference, not reference.any())
    if prediction.shape != reference.shape:
        raise ValueError(f"The prediction has the shape {prediction.shape}, the reference {reference.shape}.")
    ml = float(np.prod(spacing)) / 1000
    common, predicted, actual = (int(mask.sum()) for mask in (prediction & reference, prediction, reference))
    if predicted == actual == 0:
        row = {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "assd": 0.0, "nsd": 1.0}
    else:
        row = {"dice": 2 * common / (predicted + actual), "iou": common / (predicted + actual - common)}
        row |= _surfaces(prediction, reference, spacing, tolerance)
    difference = predicted - actual
    percent = 100 * difference / actual if actual else 0.0 if difference == 0 else float("nan")
    return row | {"volume_ml": ml * difference, "volume_percent": percent,
                  "false_ml": ml * _on_free_slices(false, reference, axis)}


def _surfaces(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """Distances and surfaces; where a mask is empty they are as far from each other as the volume allows."""
    if not (prediction.any() and reference.any()):
        diagonal = float(np.linalg.norm(np.multiply(reference.shape, spacing)))
        return {"hd95": diagonal, "assd": diagonal, "nsd": 0.0}
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    # 1 1 Z H W
    first, second = (torch.from_numpy(np.ascontiguousarray(mask, np.uint8))[None, None]
                     for mask in (prediction, reference))
    place: Any = {"include_background": True, "spacing": list(map(float, spacing))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own deprecations
        hd95 = compute_hausdorff_distance(first, second, percentile=95, **place)
        assd = compute_average_surface_distance(first, second, symmetric=True, **place)
        nsd = compute_surface_dice(first, second, class_thresholds=[tolerance], use_subvoxels=True, **place)
    return {"hd95": float(hd95), "assd": float(assd), "nsd": float(nsd)}


def _on_free_slices(prediction: np.ndarray, reference: np.ndarray, axis: int) -> int:
    """Voxels of `prediction` on slices on which `reference` has none."""
    others = tuple(other for other in range(reference.ndim) if other != axis)
    free = ~reference.any(others)
    return int(prediction.sum(others)[free].sum())
