"""What a study found, in plain words and short tables."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pandas as pd

from desam_nnunet.evaluation.errors import BOUNDARY, EXTRA, MISSED, THIRDS
from desam_nnunet.evaluation.statistics import Summary, per_case, summarise

METRIC = "dice"
_WORDS = {MISSED: "parts of the organ were missed", EXTRA: "something else was taken for the organ",
          BOUNDARY: "the border is off by little", "": "nothing is wrong"}


def sentences(scores: pd.DataFrame) -> list[str]:
    """One for each pair of trainers, on volumes of sites that they had not seen.

    Args:
        scores: Of one protocol, all classes.
    """
    unseen = scores[scores["source"] != scores["target"]]
    return [_sentence(first, second, gain) for first, second, gain in _gains(unseen)]


def _sentence(first: str, second: str, gain: Summary) -> str:
    better, worse = (first, second) if gain.mean > 0 else (second, first)
    begin = f"On {gain.cases} volume(s) of sites that neither had seen, "
    if gain.mean == 0:
        return f"{begin}{first} and {second} had the same Dice."
    said = f"{begin}{better} had a Dice that was {abs(gain.mean):.3f} higher than that of {worse} on average"
    if gain.cases == 1:
        return f"{said}; one volume is too few to say more."
    low, high = (gain.low, gain.high) if gain.mean > 0 else (-gain.high, -gain.low)
    said = f"{said} (95 % interval {low:.3f} to {high:.3f}): "
    if low > 0:
        return f"{said}a difference is likely."
    return f"{said}as the interval holds zero, this study does not show which is better."


def _gains(scores: pd.DataFrame) -> list[tuple[str, str, Summary]]:
    """Every pair of trainers, and what the first has more than the second, case by case."""
    table = per_case(scores, METRIC)
    trainers = [name for name in dict.fromkeys(scores["trainer"]) if name in table]
    return [(first, second, summarise(table[first] - table[second])) for first, second in combinations(trainers, 2)]


def shift(scores: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Side by side in and out of the domain: every trainer's mean with its drop, every pair's difference.

    Args:
        scores: Of one protocol, all classes.
    """
    own = scores["source"] == scores["target"]
    inside, outside = scores[own], scores[~own]
    rows = []
    for trainer in dict.fromkeys(scores["trainer"]):
        here, there = (summarise(per_case(part[part["trainer"] == trainer], METRIC).to_numpy().ravel())
                       for part in (inside, outside))
        rows.append({"trainer": trainer, "inside": here, "outside": there, "drop": there.mean - here.mean})
    within = {(first, second): gain for first, second, gain in _gains(inside)} if own.any() else {}
    pairs = [{"pair": f"{first} \N{MINUS SIGN} {second}", "inside": within.get((first, second)), "outside": gain}
             for first, second, gain in _gains(outside)]
    return {"trainers": rows, "pairs": pairs}


def worst_cases(scores: pd.DataFrame, errors: pd.DataFrame) -> list[dict[str, Any]]:
    """The worst case of every trainer from every source at every other site, the worst first, and what is wrong.

    Args:
        scores: Of one protocol, all classes.
    """
    keys = ["source", "trainer", "target", "case"]
    mean = scores[scores["source"] != scores["target"]].groupby(keys, as_index=False)[METRIC].mean()
    worst = mean.loc[mean.groupby(keys[:3])[METRIC].idxmin()].sort_values(METRIC)
    largest = errors.assign(all=errors[[MISSED, EXTRA, BOUNDARY]].sum(axis=1)).sort_values("all").groupby(keys).last()
    joined = worst.merge(largest.reset_index(), on=keys)
    return [row | {"words": _WORDS[row["wrong"]]} for row in joined.to_dict("records")]


def position_means(errors: pd.DataFrame) -> list[dict[str, Any]]:
    """Every trainer's mean Dice in each third of the organ, over volumes of unseen sites that have them."""
    unseen = errors[errors["source"] != errors["target"]]
    known = unseen.dropna(subset=list(THIRDS))
    means = known.groupby("trainer", sort=False)[list(THIRDS)].agg(lambda part: part.astype(float).mean())
    return [{"trainer": trainer, "volumes": int((known["trainer"] == trainer).sum())} | dict(row)
            for trainer, row in means.iterrows()]
