"""The phantom: the same for the same seed, learnable but no matter of a threshold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import phantom

SMALL = {site.name: dataclasses.replace(site, thickness=8.0) for site in phantom.SITES}


def cases(site: str, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [phantom.make_case(SMALL[site], np.random.default_rng([0, k])) for k in range(count)]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in sorted(folder.rglob("*.nii.gz"))}


def test_cases_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    for name, count in (("few", 1), ("more", 2)):
        phantom.write_dataset(tmp_path / name, cases=count)
    few, more = arrays(tmp_path / "few"), arrays(tmp_path / "more")
    assert len(few) == 2
    assert len(more) == 4
    for name, array in few.items():
        np.testing.assert_array_equal(array, more[name])


@pytest.mark.parametrize("site", SMALL)
def test_organ_lies_inside_and_both_ends_are_free(site: str) -> None:
    for image, label in cases(site, 3):
        assert image.shape == label.shape
        assert set(np.unique(label)) == {0, 1}
        with_organ = label.any((1, 2))
        assert not with_organ[0]
        assert not with_organ[-1]
        assert 0.3 <= with_organ.mean() <= 0.75


def test_no_threshold_finds_the_organ() -> None:
    """The best pair of thresholds, chosen with the truth in hand, stays below a Dice of 0.6."""
    for image, label in cases("SiteA", 3):
        steps = np.percentile(image, np.arange(50, 100, 5))
        best = max(2 * (mask & (label > 0)).sum() / (mask.sum() + label.sum())
                   for low in steps for high in steps[steps > low]
                   for mask in [(image > low) & (image < high)])
        assert best < 0.6


def test_sites_differ(tmp_path: Path) -> None:
    phantom.write_unseen(tmp_path, cases=1)
    spacings = {site: sitk.ReadImage(tmp_path / site / "images" / f"{site}_000_0000.nii.gz").GetSpacing()
                for site in ("SiteB", "SiteC")}
    assert spacings["SiteB"] == pytest.approx((0.9, 0.9, 4.5))
    assert spacings["SiteC"] == pytest.approx((1.5, 1.5, 3.0))


def test_files_of_another_data_set_are_not_mixed_in(tmp_path: Path) -> None:
    phantom.write_dataset(tmp_path, cases=2)
    with pytest.raises(FileExistsError, match=r"SiteA_001.* is not of this data set"):
        phantom.write_dataset(tmp_path, cases=1)
