"""A study's figures as tables: scores of every case, summaries, comparisons of trainers, and what each model took."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pandas as pd

from desam_nnunet.cross_site.study import Study
from desam_nnunet.evaluation.scores import COLUMNS, read_rows
from desam_nnunet.nnunet.model_folder import read_checkpoint
from desam_nnunet.nnunet.names import CHECKPOINT


def all_scores(study: Study) -> pd.DataFrame:
    """A row per source, trainer, target, case, class and protocol."""
    return pd.DataFrame(_rows(study, "scores"), columns=["source", "trainer", "target", *COLUMNS])


def all_errors(study: Study) -> pd.DataFrame:
    """A row per source, trainer, target, case and class."""
    return pd.DataFrame(_rows(study, "errors"))


def _rows(study: Study, of: str) -> list[dict[str, Any]]:
    return [dict(zip(("source", "trainer", "target"), cell, strict=True)) | row
            for cell in study.cells() for row in read_rows(study.scores(*cell, of=of))]


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
