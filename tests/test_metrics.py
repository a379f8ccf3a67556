"""Metrics of a case: by hand, against oracles, and where masks are empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

from desam_nnunet.evaluation.metrics import METRICS, case_metrics
from desam_nnunet.evaluation.scores import PROTOCOLS, read_rows, score_cases, slice_axis, write_rows
from desam_nnunet.nnunet.labels import classes_of

SHAPE, SPACING = (6, 12, 14), (3.0, 1.0, 1.0)
DIAGONAL = float(np.linalg.norm([18, 12, 14]))
EMPTY = np.zeros(SHAPE, bool)


def box(z: slice, y: slice, x: slice) -> np.ndarray:
    mask = EMPTY.copy()
    mask[z, y, x] = True
    return mask


def blob(seed: int, shape: tuple[int, int, int], share: float = 0.3) -> np.ndarray:
    field = gaussian_filter(np.random.RandomState(seed).rand(*shape), 1.5)
    return field > np.quantile(field, 1 - share)


def measured(prediction: np.ndarray | None, reference: np.ndarray, tolerance: float = 2.0) -> dict[str, float]:
    return case_metrics(prediction, reference, SPACING, tolerance=tolerance, axis=0)


def test_a_shifted_box_by_hand() -> None:
    """Two slices of 4 x 4: every voxel is a boundary voxel, and a quarter of each mask is 1 mm from the other."""
    reference = box(np.s_[2:4], np.s_[4:8], np.s_[4:8])
    prediction = box(np.s_[2:4], np.s_[4:8], np.s_[5:9])
    found = measured(prediction, reference)
    expected = {"dice": 0.75, "iou": 0.6, "hd95": 1.0, "assd": 0.25, "nsd": 1.0, "volume_ml": 0.0,
                "volume_percent": 0.0, "false_ml": 0.0}
    assert found == pytest.approx(expected)


def test_volumes_by_hand() -> None:
    """Eight voxels of 3 cubic millimetres on a slice without the organ, 32 in it."""
    reference = box(np.s_[2:4], np.s_[4:8], np.s_[4:8])
    found = measured(reference | box(np.s_[0:1], np.s_[0:2], np.s_[0:4]), reference)
    assert found["volume_ml"] == pytest.approx(0.024)
    assert found["volume_percent"] == pytest.approx(25.0)
    assert found["false_ml"] == pytest.approx(0.024)
    missed = measured(box(np.s_[2:3], np.s_[4:8], np.s_[4:8]), reference)
    assert missed["volume_percent"] == pytest.approx(-50.0)
    assert missed["false_ml"] == 0


@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    (EMPTY, EMPTY, {"dice": 1, "iou": 1, "hd95": 0, "assd": 0, "nsd": 1, "volume_ml": 0, "volume_percent": 0,
                    "false_ml": 0}),
    (EMPTY, blob(0, SHAPE), {"dice": 0, "iou": 0, "hd95": DIAGONAL, "assd": DIAGONAL, "nsd": 0,
                             "volume_percent": -100, "false_ml": 0}),
    (blob(0, SHAPE), EMPTY, {"dice": 0, "iou": 0, "hd95": DIAGONAL, "assd": DIAGONAL, "nsd": 0,
                             "volume_percent": float("nan"), "false_ml": 0.003 * blob(0, SHAPE).sum()}),
    (None, blob(0, SHAPE), {"dice": 0, "iou": 0, "hd95": DIAGONAL, "assd": DIAGONAL, "nsd": 0,
                            "volume_percent": -100}),
    (None, EMPTY, {"dice": 0, "iou": 0, "hd95": DIAGONAL, "assd": DIAGONAL, "nsd": 0,
                   "volume_ml": 0.003 * EMPTY.size, "volume_percent": float("nan"), "false_ml": 0.003 * EMPTY.size}),
], ids=["both empty", "not found", "false alarm", "missing", "missing, of nothing"])
def test_empty_masks(prediction: np.ndarray | None, reference: np.ndarray, expected: dict[str, float]) -> None:
    found = measured(prediction, reference)
    assert {key: found[key] for key in expected} == pytest.approx(expected, nan_ok=True)
    assert set(found) == {metric.key for metric in METRICS}


@pytest.mark.parametrize("seed", range(6))
def test_surface_dice_is_deepminds(seed: int) -> None:
    shape = (9 + seed, 20, 17)
    spacing = tuple(np.random.RandomState(seed).uniform(0.6, 3.5, 3))
    pair = blob(seed, shape), blob(seed + 100, shape, 0.2)
    for tolerance in (0.4, 1.7, 3.1):
        ours = case_metrics(*pair, spacing, tolerance=tolerance, axis=0)["nsd"]
        theirs = compute_surface_dice_at_tolerance(compute_surface_distances(pair[1], pair[0], spacing), tolerance)
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert 0 < theirs <= 1


def boundary(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Voxels with a face neighbour outside, outside the volume too, in mm."""
    padded = np.pad(mask, 1)
    inside = np.ones_like(mask)
    for axis in range(3):
        for shift in (-1, 1):
            inside &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inside) * spacing


@pytest.mark.parametrize("seed", range(6))
def test_distances_are_those_of_a_search_over_all_pairs(seed: int) -> None:
    shape = (7 + seed, 16, 19)
    spacing = tuple(np.random.RandomState(seed).uniform(0.6, 3.5, 3))
    prediction, reference = blob(seed, shape), blob(seed + 50, shape, 0.15)
    apart = cdist(boundary(prediction, spacing), boundary(reference, spacing))
    there, back = apart.min(1), apart.min(0)
    found = case_metrics(prediction, reference, spacing, tolerance=1, axis=0)
    assert found["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-4)
    assert found["assd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-4)


def test_the_published_protocol_by_hand() -> None:
    """Slices 2, 3 and 4 have the organ: 4 is dropped, and 2 of 12 rows and 3 of 14 columns of each border are empty."""
    protocol = PROTOCOLS[1]
    reference = box(np.s_[2:5], np.s_[4:8], np.s_[4:8])
    seen, wanted = protocol.restrict(np.ones(SHAPE, bool), reference, 0)
    assert np.flatnonzero(wanted.any((1, 2))).tolist() == [2, 3]
    assert np.array_equal(seen, box(np.s_[2:4], np.s_[2:10], np.s_[3:11]))
    turned = protocol.restrict(np.ones(SHAPE, bool).swapaxes(0, 2), reference.swapaxes(0, 2), 2)
    assert np.array_equal(turned[0].swapaxes(0, 2), seen)


def test_slices_are_along_the_widest_spacing() -> None:
    assert slice_axis((3.0, 1.0, 1.0)) == 0
    assert slice_axis((0.7, 4.0, 0.7)) == 1
    assert slice_axis((1.0, 1.0, 1.0)) == 0


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)) -> Path:
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, path)
    return path


def test_a_folder_with_regions_an_ignore_label_and_a_missing_case(tmp_path: Path) -> None:
    labels = {"background": 0, "organ": [1, 2], "lesion": 2, "ignore": 3}
    classes, ignored = classes_of({"labels": labels})
    assert classes == {"organ": (1, 2), "lesion": (2,)}
    reference = np.zeros(SHAPE, int)
    reference[2:5, 4:8, 4:8] = 1
    reference[3, 5:7, 5:7] = 2
    reference[:, :2] = ignored
    prediction = np.where(reference == ignored, 1, reference)
    files = {name: write(tmp_path / f"{name}.nii.gz", reference) for name in ("one", "two")}
    rows = score_cases({"one": write(tmp_path / "guess.nii.gz", prediction)}, files, classes, ignored, 2.0)
    path = tmp_path / "rows.json"
    write_rows(path, rows)
    rows = read_rows(path)
    assert {row["case"] for row in rows} == {"one", "two"}
    assert all(row["dice"] == 1 and row["outcome"] == "found" for row in rows if row["case"] == "one")
    assert all(row["dice"] == 0 and row["outcome"] == "missing" for row in rows if row["case"] == "two")
    lesion = [row["protocol"] for row in rows if row["class"] == "lesion"]
    assert lesion == ["volume", "volume"]  # on one slice only, of which the published protocol leaves nothing


@pytest.mark.parametrize(("array", "spacing"), [
    (np.zeros((6, 12, 13)), (1.0, 1.0, 3.0)), (np.zeros(SHAPE), (1.0, 1.0, 2.5)),
])
def test_another_geometry_is_refused(tmp_path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    reference = write(tmp_path / "reference.nii.gz", np.ones(SHAPE))
    prediction = write(tmp_path / "prediction.nii.gz", array, spacing)
    with pytest.raises(ValueError, match="but its reference .* they are not the same volume"):
        score_cases({"a": prediction}, {"a": reference}, {"organ": (1,)}, None, 2.0)
