"""A study's scores as tables: every case, summaries of groups of cases, and comparisons of trainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from desam_nnunet.cross_site.sites import ALL
from desam_nnunet.cross_site.study import Study
from desam_nnunet.evaluation.metrics import METRICS
from desam_nnunet.evaluation.protocols import PROTOCOLS
from desam_nnunet.evaluation.scores import COLUMNS, FALSE_ALARM, MISSING, NOT_FOUND, read_rows
from desam_nnunet.evaluation.statistics import compare, holm, per_case, summarise

FAILURES = (MISSING, NOT_FOUND, FALSE_ALARM)


def all_scores(study: Study) -> pd.DataFrame:
    """A row per source, trainer, target, case, class and protocol."""
    rows = [{"source": source, "trainer": trainer, "target": target} | row
            for source, trainer, target in study.cells() for row in read_rows(study.scores(source, trainer, target))]
    return pd.DataFrame(rows, columns=["source", "trainer", "target", *COLUMNS])


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


def _groups(scores: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    classes = list(dict.fromkeys(scores["class"]))
    for protocol in PROTOCOLS:
        of_protocol = scores[scores["protocol"] == protocol.name]
        for name in [ALL, *classes] if len(classes) > 1 else classes:
            chosen = of_protocol if name == ALL else of_protocol[of_protocol["class"] == name]
            for sites, rows in _of_sites(chosen):
                yield {"protocol": protocol.name, "class": name} | sites, rows


def _of_sites(scores: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    unseen = scores[scores["source"] != scores["target"]]
    yield {"source": ALL, "target": ALL}, unseen
    for source, rows in unseen.groupby("source", sort=False):
        yield {"source": str(source), "target": ALL}, rows
    for target, rows in unseen.groupby("target", sort=False):
        yield {"source": ALL, "target": str(target)}, rows
    for (source, target), rows in scores.groupby(["source", "target"], sort=False):
        yield {"source": str(source), "target": str(target)}, rows
