"""What many cases say together: means with intervals, and whether trainers differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

_SEED = 0
_RESAMPLES = 9999
_CONFIDENCE = 0.95
SIGNIFICANT = 0.05


class Summary(NamedTuple):
    """Of one metric over cases. `low` and `high` bound the mean: a bootstrap 95 % interval over cases (percentiles of
    9999 resamples), not a number where there is one case."""

    cases: int
    mean: float
    low: float
    high: float
    median: float
    sd: float
    min: float
    max: float


class Comparison(NamedTuple):
    """Of two trainers on the same cases."""

    first: str
    second: str
    cases: int
    difference: float  # mean of first less second
    p: float  # of the paired Wilcoxon signed-rank test, two-sided, not corrected


def summarise(values: Sequence[float] | np.ndarray) -> Summary:
    """Values that are not numbers are left out; the rest are cases, one value each."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    if len(known) == 0:
        return Summary(0, *[float("nan")] * 7)
    low = high = sd = float("nan")
    if len(known) > 1:
        low, high = stats.bootstrap((known,), np.mean, n_resamples=_RESAMPLES, confidence_level=_CONFIDENCE,
                                    method="percentile", rng=np.random.default_rng(_SEED)).confidence_interval
        sd = known.std(ddof=1)
    figures = (known.mean(), low, high, np.median(known), sd, known.min(), known.max())
    return Summary(len(known), *map(float, figures))


def per_case(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One value per case (rows) and trainer (columns, in the order of `rows`), so that every case counts once.

    Args:
        rows: With the columns ``trainer``, ``target``, ``case`` and `metric`. A case that was segmented by models of
            several sources, or has several classes, counts with its mean over them.
    """
    table = rows.pivot_table(index=["target", "case"], columns="trainer", values=metric, aggfunc="mean", sort=True)
    return table[[name for name in rows["trainer"].unique() if name in table]]


def compare(table: pd.DataFrame) -> Iterator[Comparison]:
    """Every pair of trainers, on the cases that both have.

    Args:
        table: Of :func:`per_case`.
    """
    for first, second in combinations(table.columns, 2):
        difference = (table[first] - table[second]).dropna().to_numpy()
        if len(difference) == 0:
            continue
        p = 1.0
        if np.any(difference != 0):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of ties and small samples
                p = float(stats.wilcoxon(difference).pvalue)
        yield Comparison(first, second, len(difference), float(difference.mean()), p)


def holm(p_values: Sequence[float] | pd.Series) -> list[float]:
    """p-values corrected for their number. Source: Holm, Scandinavian Journal of Statistics 6:65-70, 1979."""
    given = np.asarray(p_values, float)
    order = np.argsort(given, kind="stable")
    corrected = np.empty(len(given))
    corrected[order] = np.maximum.accumulate(np.arange(len(given), 0, -1) * given[order]).clip(max=1)
    return corrected.tolist()
