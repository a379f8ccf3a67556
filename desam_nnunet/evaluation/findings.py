"""What a study found, in plain words and short tables."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from desam_nnunet.evaluation.errors import BOUNDARY, EXTRA, MISSED, THIRDS
from desam_nnunet.evaluation.scores import FALSE_ALARM, MISSING, NOT_FOUND
from desam_nnunet.evaluation.statistics import SIGNIFICANT, Summary, compare, holm, per_case, summarise

METRIC = "dice"
FEWEST = 6  # volumes: with fewer no paired rank test finds anything, and bootstrap intervals are too short
_WORDS = {MISSED: "parts of the organ were missed", EXTRA: "something else was taken for the organ",
          BOUNDARY: "the border is off by little", "": "nothing is wrong"}
_OUTCOMES = {MISSING: "there is no segmentation", NOT_FOUND: "nothing was found",
             FALSE_ALARM: "something was found where there is nothing"}


def sentences(scores: pd.DataFrame) -> list[str]:
    """One for each pair of trainers, on volumes of sites that they had not seen.

    Args:
        scores: Of one protocol, all classes.
    """
    unseen = scores[scores["source"] != scores["target"]]
    return [_sentence(gain) for gain in _gains(unseen)]


class _Gain(NamedTuple):
    """What the first of two trainers has more than the second, case by case; `p` of the paired test, corrected by
    Holm's method for the number of pairs."""

    first: str
    second: str
    more: Summary
    p: float


def _sentence(gain: _Gain) -> str:
    more = gain.more
    better, worse = (gain.first, gain.second) if more.mean > 0 else (gain.second, gain.first)
    begin = f"On {more.cases} volume{'s' if more.cases > 1 else ''} of sites that neither had seen, "
    if more.mean == 0:
        return f"{begin}{gain.first} and {gain.second} had the same Dice on average."
    said = f"{begin}{better} had a Dice that was {abs(more.mean):.3f} higher than that of {worse} on average"
    if more.cases < FEWEST:
        return f"{said}: too few volumes to say more."
    low, high = (more.low, more.high) if more.mean > 0 else (-more.high, -more.low)
    said = f"{said} (95 % interval {low:.3f} to {high:.3f}): "
    if low > 0 and gain.p < SIGNIFICANT:  # the interval alone is too short for few volumes
        return f"{said}a difference is likely."
    why = "as the interval holds zero" if low <= 0 else "but a paired test finds no difference"
    return f"{said}{why}, this study does not show which is better."


def _gains(scores: pd.DataFrame) -> list[_Gain]:
    """Of every pair of trainers."""
    table = per_case(scores, METRIC)
    pairs = list(compare(table))
    return [_Gain(pair.first, pair.second, summarise(table[pair.first] - table[pair.second]), p)
            for pair, p in zip(pairs, holm([pair.p for pair in pairs]), strict=True)]


def shift(scores: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Side by side in and out of the domain: every trainer's mean with its drop, every pair's difference, and their
    summaries, as plain data.

    Args:
        scores: Of one protocol, all classes.
    """
    own = scores["source"] == scores["target"]
    inside, outside = scores[own], scores[~own]
    rows = []
    for trainer in dict.fromkeys(scores["trainer"]):
        here, there = (summarise(per_case(part[part["trainer"] == trainer], METRIC).to_numpy().ravel())
                       for part in (inside, outside))
        rows.append({"trainer": trainer, "inside": here._asdict(), "outside": there._asdict(),
                     "drop": there.mean - here.mean})
    within = {gain[:2]: gain.more._asdict() for gain in _gains(inside)} if own.any() else {}
    pairs = [{"pair": f"{gain.first} \N{MINUS SIGN} {gain.second}", "inside": within.get(gain[:2]),
              "outside": gain.more._asdict()} for gain in _gains(outside)]
    return {"trainers": rows, "pairs": pairs}


def worst_cases(scores: pd.DataFrame, errors: pd.DataFrame) -> list[dict[str, Any]]:
    """The worst case of every trainer from every source at every other site, the worst first, and what is wrong.

    Args:
        scores: Of one protocol, all classes.
    """
    keys = ["source", "trainer", "target", "case"]
    mean = scores[scores["source"] != scores["target"]].groupby(keys, as_index=False)[METRIC].mean()
    worst = mean.loc[mean.groupby(keys[:3])[METRIC].idxmin()].sort_values(METRIC)
    largest = errors.assign(all=errors[[MISSED, EXTRA, BOUNDARY]].sum(axis=1)).sort_values("all").groupby(keys).tail(1)
    joined = worst.merge(largest, on=keys).merge(scores[[*keys, "class", "outcome"]], on=[*keys, "class"])
    return [row | {"words": _OUTCOMES.get(row["outcome"], _WORDS[row["wrong"]])} for row in joined.to_dict("records")]


def position_means(errors: pd.DataFrame) -> list[dict[str, Any]]:
    """Every trainer's mean Dice in each third of each class, over volumes of unseen sites that have them."""
    unseen = errors[errors["source"] != errors["target"]]
    known = unseen.dropna(subset=list(THIRDS))
    return [{"trainer": trainer, "class": name, "volumes": len(rows)} | dict(rows[list(THIRDS)].astype(float).mean())
            for (trainer, name), rows in known.groupby(["trainer", "class"], sort=False)]
