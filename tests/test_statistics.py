"""Statistics over cases, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from desam_nnunet.evaluation.statistics import compare, holm, per_case, summarise


def test_a_summary_by_hand() -> None:
    found = summarise([1.0, 2.0, float("nan"), 3.0, 6.0])
    assert (found.cases, found.mean, found.median, found.min, found.max) == (4, 3.0, 2.5, 1.0, 6.0)
    assert found.sd == pytest.approx(np.sqrt(14 / 3))
    assert 1.0 <= found.low < 3.0 < found.high <= 6.0
    assert found == summarise([1.0, 2.0, 3.0, 6.0])  # resampled the same way every time


def test_the_interval_of_many_is_the_normal_one() -> None:
    values = np.random.RandomState(0).normal(5, 2, 400)
    found = summarise(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.03)


def test_one_case_has_no_interval_and_none_has_nothing() -> None:
    one = summarise([0.5])
    assert (one.cases, one.mean) == (1, 0.5)
    assert np.isnan([one.low, one.high, one.sd]).all()
    assert np.isnan(summarise([]).mean)
    assert summarise([]).cases == 0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def rows(**values: list[float]) -> pd.DataFrame:
    return pd.DataFrame([{"trainer": trainer, "target": "B", "case": str(case), "dice": value}
                         for trainer, given in values.items() for case, value in enumerate(given)])


def test_pairs_by_hand() -> None:
    """Six differences of one sign: 2 of the 64 patterns of signs are as extreme."""
    worse = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    better = [0.2, 0.31, 0.42, 0.53, 0.64, 0.75]
    found = {(pair.first, pair.second): pair
             for pair in compare(per_case(rows(a=worse, b=better, c=worse), "dice"))}
    assert found["a", "b"].p == pytest.approx(2 / 64)
    assert found["a", "b"].difference == pytest.approx(-0.125)
    assert found["a", "c"].p == 1.0


def test_a_case_counts_once_whatever_its_classes_and_sources() -> None:
    table = pd.concat([rows(a=[0.2, 0.8]), rows(a=[0.6])])
    found = per_case(table, "dice")
    assert found["a"].tolist() == pytest.approx([0.4, 0.8])


def test_cases_that_one_trainer_lacks_are_left_out_of_the_pair() -> None:
    (pair,) = compare(per_case(rows(a=[0.1, 0.2, 0.3], b=[0.2, 0.3]), "dice"))
    assert pair.cases == 2
