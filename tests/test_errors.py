"""Where segmentations are wrong, and what a study found, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from desam_nnunet.evaluation.errors import BOUNDARY, EXTRA, MISSED, THIRDS, class_errors, error_rows, thirds
from desam_nnunet.evaluation.findings import position_means, sentences, shift, worst_cases
from desam_nnunet.evaluation.pictures import agreement_plot

SHAPE = (9, 30, 30)
SPACING = (4.0, 1.0, 1.0)


def cube(*slices: int, rows: slice = slice(5, 25)) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[list(slices), rows, 5:25] = True
    return mask


def test_a_slice_that_is_missed_and_one_that_is_added() -> None:
    found = class_errors(cube(1, 2, 3, 6), cube(1, 2, 3, 4, 5), SPACING, tolerance=1.0)
    assert found[MISSED] == pytest.approx(2 * 20 * 20 * 4 / 1000)  # its rim too: the prediction's surface is 4 mm away
    assert found[BOUNDARY] == 0
    assert found[EXTRA] == pytest.approx(20 * 20 * 4 / 1000)
    assert (found["wrong"], found["slice"]) == (MISSED, 4)
    assert (found["reference_ml"], found["predicted_ml"]) == pytest.approx((8.0, 6.4))


def test_a_border_that_is_off_by_one_voxel() -> None:
    found = class_errors(cube(1, 2, 3, rows=slice(6, 26)), cube(1, 2, 3), SPACING, tolerance=1.0)
    assert found[BOUNDARY] == pytest.approx(2 * 3 * 20 * 4 / 1000)
    assert (found[MISSED], found[EXTRA], found["wrong"]) == (0.0, 0.0, BOUNDARY)
    assert class_errors(cube(1), cube(1), SPACING, tolerance=1.0)["wrong"] == ""


def test_a_small_organ_that_was_not_found_has_no_border_that_is_off() -> None:
    """All of it lies within the tolerance of its own surface."""
    organ = np.zeros(SHAPE, bool)
    organ[3:5, 10:13, 10:13] = True
    found = class_errors(np.zeros_like(organ), organ, SPACING, tolerance=5.0)
    assert (found[BOUNDARY], found["wrong"]) == (0.0, MISSED)
    assert class_errors(organ, np.zeros_like(organ), SPACING, tolerance=5.0)["wrong"] == EXTRA


def test_thirds_are_along_the_body() -> None:
    reference, prediction = cube(1, 2, 3, 4, 5, 6), cube(5, 6)
    assert list(thirds(prediction, reference, 1.0).values()) == [1.0, 0.0, 0.0]  # the last slice is the upper one
    assert list(thirds(prediction, reference, -1.0).values()) == [0.0, 0.0, 1.0]
    assert set(thirds(prediction, reference, 0.1).values()) == {None}
    assert set(thirds(prediction, cube(1, 2), 1.0).values()) == {None}


def test_files_whose_slices_are_along_another_axis(tmp_path: Path) -> None:
    """Slices along the file's first axis, which points to the feet; a missing prediction has everything missed."""
    array = np.moveaxis(cube(1, 2, 3, 4, 5, 6), 0, 2).astype(np.uint8)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((4.0, 1.0, 1.0))
    image.SetDirection((0, 1, 0, 0, 0, 1, -1, 0, 0))
    sitk.WriteImage(image, tmp_path / "reference.nii.gz")
    array[..., 1:3] = 0
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, tmp_path / "prediction.nii.gz")
    references = dict.fromkeys(("a", "b"), tmp_path / "reference.nii.gz")
    first, second = error_rows({"a": tmp_path / "prediction.nii.gz"}, references, {"organ": (1,)}, None, 1.0)
    assert [first[name] for name in THIRDS] == [0.0, 1.0, 1.0]
    assert (first["case"], first["wrong"], first["slice"]) == ("a", MISSED, 1)
    assert second["predicted_ml"] == 0
    assert [second[name] for name in THIRDS] == [0.0, 0.0, 0.0]


def scores(**dices: list[float]) -> pd.DataFrame:
    """Of models of A, on cases of B; of one case of A, which is half as good."""
    return pd.DataFrame([
        {"source": "A", "trainer": trainer, "target": "A" if case == 0 else "B", "case": str(case), "dice": dice,
         "class": "organ", "outcome": "found"}
        for trainer, given in dices.items() for case, dice in enumerate([given[0] / 2, *given])])


def test_sentences_say_what_the_interval_allows() -> None:
    (clear,) = sentences(scores(one=[0.8, 0.7, 0.9] * 2, two=[0.5, 0.4, 0.6] * 2))
    assert clear == ("On 6 volumes of sites that neither had seen, one had a Dice that was 0.300 higher than that of "
                     "two on average (95 % interval 0.300 to 0.300): a difference is likely.")
    (open_,) = sentences(scores(one=[0.8, 0.2] * 3, two=[0.5, 0.7] * 3))
    assert "two had a Dice that was 0.100 higher than that of one on average (95 % interval -0." in open_
    assert open_.endswith("as the interval holds zero, this study does not show which is better.")
    assert sentences(scores(one=[0.8], two=[0.5])) == [
        "On 1 volume of sites that neither had seen, one had a Dice that was 0.300 higher than that of two on average: "
        "too few volumes to say more."]
    assert sentences(scores(one=[0.5], two=[0.5]))[0].endswith("one and two had the same Dice on average.")
    assert sentences(scores(one=[0.5])) == []


def test_volumes_that_agree_by_chance_are_no_finding() -> None:
    """All five on one side: the bootstrap's interval excludes zero in every sixteenth of such studies."""
    said = sentences(scores(one=[0.8, 0.7, 0.9, 0.8, 0.8], two=[0.5, 0.4, 0.6, 0.5, 0.7]))
    assert said[0].endswith("too few volumes to say more.")
    found = sentences(scores(one=[0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.49], two=[0.5, 0.6, 0.7, 0.55, 0.65, 0.75, 0.99]))[0]
    assert "does not show which is better" in found


def test_an_interval_without_zero_is_not_enough() -> None:
    more = [0.3, 0.3, 0.3, 0.3, 0.3, -0.01, -0.02]
    (said,) = sentences(scores(one=[0.5 + value for value in more], two=[0.5] * 7))
    assert said.endswith("but a paired test finds no difference, this study does not show which is better.")


def test_many_pairs_are_not_as_many_chances() -> None:
    """p of the one clear pair is 0.031 alone, and 0.094 for three pairs."""
    clear = {"one": [0.8, 0.7, 0.9, 0.8, 0.75, 0.85], "two": [0.5, 0.4, 0.6, 0.55, 0.5, 0.6]}
    assert sentences(scores(**clear))[0].endswith("a difference is likely.")
    said = sentences(scores(**clear, three=[0.8, 0.3, 0.9, 0.2, 0.75, 0.1]))
    assert "one had a Dice that was" in said[0]
    assert said[0].endswith("but a paired test finds no difference, this study does not show which is better.")


def test_at_home_and_elsewhere() -> None:
    found = shift(scores(one=[0.8, 0.6], two=[0.4, 0.2]))
    assert [round(row["drop"], 6) for row in found["trainers"]] == [0.3, 0.1]
    (pair,) = found["pairs"]
    assert (pair["inside"]["mean"], pair["outside"]["mean"]) == pytest.approx((0.2, 0.4))
    without = scores(one=[0.8, 0.6], two=[0.4, 0.2]).query("source != target")
    assert shift(without)["pairs"][0]["inside"] is None
    assert np.isnan(shift(without)["trainers"][0]["drop"])


def test_the_worst_case_and_the_means_along_the_organ() -> None:
    table = scores(one=[0.8, 0.6])
    errors = table.drop(columns=["dice", "outcome"]).assign(**{
        "reference_ml": 10.0, "predicted_ml": 9.0, MISSED: 2.0, EXTRA: 0.5, BOUNDARY: 0.5,
        "wrong": MISSED, "slice": 3} | {name: [0.0, 0.5, 0.7] for name in THIRDS})
    (worst,) = worst_cases(table, errors)
    assert (worst["case"], worst["dice"], worst["words"]) == ("2", 0.6, "parts of the organ were missed")
    (nothing,) = worst_cases(table.assign(outcome="not found"), errors)
    assert nothing["words"] == "nothing was found"
    (means,) = position_means(errors)
    assert (means["volumes"], means[THIRDS[0]]) == (2, pytest.approx(0.6))
    errors.loc[1, list(THIRDS)] = None
    assert position_means(errors)[0]["volumes"] == 1
    drawing = agreement_plot(errors.assign(target="B$_b$ & C"))
    assert "-1.0 " in drawing
    assert "B$_b$ &amp; C" in drawing  # the names of others are text
