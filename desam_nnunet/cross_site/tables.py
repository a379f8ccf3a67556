"""A study's figures as tables: scores of every case, summaries, comparisons of trainers, and what each model took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from desam_nnunet.cross_site.sites import ALL
from desam_nnunet.cross_site.study import Study
from desam_nnunet.evaluation.metrics import METRICS
from desam_nnunet.evaluation.scores import COLUMNS, FALSE_ALARM, MISSING, NOT_FOUND, PROTOCOLS, read_rows
from desam_nnunet.evaluation.statistics import compare, holm, per_case, summarise
from desam_nnunet.nnunet.model_folder import read_checkpoint
from desam_nnunet.nnunet.names import CHECKPOINT

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


class Cost(NamedTuple):
    """Of one trainer on one source, its folds together; None where it is not known. Peaks are of the GPU where there
    was one, else of the process."""

    source: str
    trainer: str
    parameters: int  # in one fold's checkpoint; SAM's frozen encoder is in none
    checkpoint_mb: float  # of one fold, the optimiser's state included
    training_minutes: float  # all epochs of all folds, from nnU-Net's log, which survives a resumed training
    training_peak_mb: float | None
    seconds_per_volume: float | None  # at prediction, start and export included
    prediction_peak_mb: float | None


def cost_of(study: Study, source: str, trainer: str) -> Cost:
    """Reads the checkpoints and the notes of the steps."""
    minutes, parameters = 0.0, 0
    for fold in study.folds:
        checkpoint = read_checkpoint(study.model(source, trainer), fold, CHECKPOINT)
        log = checkpoint["logging"]
        minutes += sum(end - begin for begin, end in
                       zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)) / 60
        weights = checkpoint["network_weights"].values()  # nnU-Net's network lists the same tensor under several names
        parameters = sum({(value.data_ptr(), value.shape): value.numel() for value in weights}.values())
    size = (study.fold(source, trainer, study.folds[0]) / CHECKPOINT).stat().st_size / 1e6
    training = [study.read_record("train", source, trainer, fold) for fold in study.folds]
    prediction = [study.read_record("predict", source, trainer, target) for target in study.targets]
    timed = [note for note in prediction if note.get("volumes")]  # not what an interrupted run had done before
    volumes, seconds = (sum(note[key] for note in timed) for key in ("volumes", "seconds"))
    return Cost(source, trainer, parameters, size, minutes, _peak(training), seconds / volumes if volumes else None,
                _peak(prediction))


def encoding_minutes(study: Study, source: str) -> float:
    """What it took to store the features of one source, for all trainers that read them."""
    methods = {trainer.method for trainer in study.trainers.values() if trainer.frozen_features}
    return sum(study.read_record("encode", source, method).get("seconds", 0) for method in methods) / 60


def machines_of(study: Study) -> list[str]:
    """Every machine that a command of the study ran on."""
    notes = [json.loads(path.read_text()) for path in (study.out / "records").rglob("*.json")]
    return sorted({", ".join(f"{key} {value}" for key, value in note["machine"].items())
                   for note in notes if "machine" in note})


def _peak(notes: list[dict[str, Any]]) -> float | None:
    return max((note["peak_mb"] for note in notes if "peak_mb" in note), default=None)
