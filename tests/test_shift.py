"""The simulated shift: another look of the same anatomy, the same whenever it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from desam_nnunet.evaluation import shift


def volume() -> np.ndarray:
    """Bodies of different intensities with some texture."""
    random = np.random.default_rng(3)
    rows, columns = np.meshgrid(np.arange(64), np.arange(72), indexing="ij")
    plane = 100.0 + 300 * (np.hypot(rows - 30, columns - 40) < 14) + 150 * (columns > 60)
    return np.stack([plane] * 4) + random.normal(0, 12, (4, 64, 72))


def test_the_same_name_gives_the_same_volume_and_another_name_another() -> None:
    first, again, other = (shift.shifted(volume(), name) for name in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1)


@pytest.mark.parametrize("name", [f"Case{number:02d}" for number in range(12)])
def test_every_case_changes_within_its_own_range(name: str) -> None:
    before = volume()
    after = shift.shifted(before, name)
    low, high = np.percentile(before, (0.5, 99.5))
    assert after.shape == before.shape
    assert after.dtype == np.float32
    assert low - 1e-3 <= after.min() <= after.max() <= high + 1e-3
    assert np.abs(after - before).mean() > 0.01 * (high - low)


@pytest.mark.parametrize("change", [
    shift._local_contrast, shift._coil, shift._reordered, shift._sharpened, shift._ghosts])
def test_each_change_changes_pixels_in_place_of_others(change: object) -> None:
    before = np.clip((volume() - 60) / 500, 0, 1).astype(np.float32)
    after = change(before, np.random.default_rng(0))  # type: ignore[operator]
    assert after.shape == before.shape
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 0.02


@pytest.mark.parametrize("name", [f"even{number}" for number in range(8)])
def test_a_volume_of_one_value_stays_finite(name: str) -> None:
    assert np.isfinite(shift.shifted(np.full((2, 32, 32), 7.0), name)).all()


def test_the_command_writes_every_image_at_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    image = sitk.GetImageFromArray(volume())
    image.SetSpacing((0.6, 0.6, 3.6))
    image.SetOrigin((1.0, 2.0, 3.0))
    sitk.WriteImage(image, tmp_path / "images" / "Case01_0000.nii.gz")
    monkeypatch.setattr("sys.argv", ["shift", str(tmp_path / "images"), str(tmp_path / "out"), "--draws", "2"])
    shift.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Case01_draw0_0000.nii.gz", "Case01_draw1_0000.nii.gz"]
    written = sitk.ReadImage(tmp_path / "out" / "Case01_draw1_0000.nii.gz")
    assert written.GetSpacing() == pytest.approx(image.GetSpacing())
    assert written.GetOrigin() == pytest.approx(image.GetOrigin())
    assert np.allclose(sitk.GetArrayFromImage(written), shift.shifted(volume(), "Case01_draw1_0000.nii.gz"))


def test_a_file_that_is_no_image_of_nnunets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["shift", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        shift.main()
