"""Tables over cases: summaries of every group of them, and comparisons of trainers."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from desam_nnunet.evaluation.metrics import METRICS
from desam_nnunet.evaluation.scores import FALSE_ALARM, MISSING, NOT_FOUND, PROTOCOLS
from desam_nnunet.evaluation.statistics import compare, holm, per_case, summarise
from desam_nnunet.nnunet.sites import ALL

FAILURES = (MISSING, NOT_FOUND, FALSE_ALARM)


def summaries(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean, interval, median, spread and range of every metric, per protocol, class, group of cases and trainer.

    Groups are source and target; ``all`` stands for every source, or every target, and never mixes in a source's own
    held-out cases. A case counts once in a group: with its mean, where several sources' models segmented it.
    """
    rows = []
    for group, chosen in _groups(scores):
        for metric in METRICS:
            table = per_case(chosen, metric.key)
            failed = chosen["outcome"].isin(FAILURES).groupby(chosen["trainer"])
            for trainer in table.columns:
                rows.append(group | {"trainer": trainer, "metric": metric.key} | summarise(table[trainer])._asdict()
                            | {"failures": int(failed.sum()[trainer]), "segmentations": int(failed.size()[trainer])})
    return pd.DataFrame(rows)


def comparisons(scores: pd.DataFrame) -> pd.DataFrame:
    """Every pair of trainers in every group; signed metrics are compared by their size.

    Holm's correction (column ``p_holm``) is for one protocol, class and metric, over the pairs of all groups of one
    kind: everything together, targets, sources, or pairs of source and target. ``favours`` is the trainer with the
    better mean.
    """
    rows = []
    for group, chosen in _groups(scores):
        kind = f"{group['source'] == ALL} {group['target'] == ALL}"
        for metric in METRICS:
            values = chosen.assign(**{metric.key: chosen[metric.key].abs()}) if metric.better == "zero" else chosen
            for pair in compare(per_case(values, metric.key)):
                up = pair.difference > 0
                favours = "" if pair.difference == 0 else pair.first if up == (metric.better == "high") else pair.second
                rows.append(group | {"metric": metric.key, "kind": kind} | pair._asdict() | {"favours": favours})
    table = pd.DataFrame(rows)
    if not rows:
        return table
    families = table.groupby(["protocol", "class", "metric", "kind"])["p"]
    return table.assign(p_holm=families.transform(lambda p: pd.Series(holm(p), p.index))).drop(columns="kind")


def _groups(scores: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """What each group is of, and its rows."""
    classes = list(dict.fromkeys(scores["class"]))
    for protocol in PROTOCOLS:
        of_protocol = scores[scores["protocol"] == protocol.name]
        for name in [ALL, *classes] if len(classes) > 1 else classes:
            of_class = of_protocol if name == ALL else of_protocol[of_protocol["class"] == name]
            unseen = of_class[of_class["source"] != of_class["target"]]
            of_all = {"protocol": protocol.name, "class": name, "source": ALL, "target": ALL}
            yield of_all, unseen
            for table, keys in ((unseen, ["source"]), (unseen, ["target"]), (of_class, ["source", "target"])):
                for sites in table[keys].drop_duplicates().to_dict("records"):
                    yield of_all | sites, table[(table[keys] == pd.Series(sites)).all(axis=1)]


def no_formula(cell: object) -> object:
    """A text that a spreadsheet would compute is marked as text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell
