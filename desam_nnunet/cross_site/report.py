"""The end of a study: one page to show, and all figures as CSV and JSON. It is made from what lies on disk alone, so
that the same study gives the same report."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from desam_nnunet import __version__
from desam_nnunet.cross_site.study import Study, plain
from desam_nnunet.evaluation.findings import position_means, sentences, shift, worst_cases
from desam_nnunet.evaluation.page import render_page
from desam_nnunet.evaluation.scores import COLUMNS, read_rows, without_nan
from desam_nnunet.evaluation.tables import comparisons, no_formula, summaries
from desam_nnunet.nnunet.model_folder import count_parameters, epoch_seconds, read_checkpoint, read_description
from desam_nnunet.nnunet.names import CHECKPOINT, CONFIGURATION
from desam_nnunet.system.files import replace_file

_PACKAGES = ("nnunetv2", "torch", "monai", "scipy", "SimpleITK")


def write_report(study: Study) -> None:
    """Writes ``report.html``, ``report.json``, ``scores.csv`` and ``summary.csv``."""
    cells = list(study.cells())
    scores = pd.DataFrame(_rows(study, "scores"), columns=["source", "trainer", "target", *COLUMNS])
    errors = pd.DataFrame(_rows(study, "errors"))
    summary, pairs = summaries(scores), comparisons(scores)
    volume = scores[scores["protocol"] == "volume"]
    content = {
        "study": plain(study), "versions": {"desam-nnunet": __version__} | {name: version(name) for name in _PACKAGES},
        "settings": {source: {trainer: _settings(study, source, trainer) for trainer in study.trainers}
                     for source in study.sources},
        "costs": [cost_of(study, source, trainer)._asdict() for source in study.sources for trainer in study.trainers],
        "machines": machines_of(study),
        "encoding_minutes": {source: minutes for source in study.sources
                             if (minutes := encoding_minutes(study, source)) > 0},
        "sentences": sentences(volume), "positions": position_means(errors),
        "home_and_elsewhere": {of: without_nan(rows) for of, rows in shift(volume).items()},
        "worst": without_nan(worst_cases(volume, errors)),
        "summaries": without_nan(summary.to_dict("records")), "comparisons": without_nan(pairs.to_dict("records"))}
    _write(study.out / "report.json", json.dumps(content, indent=1, default=str))
    for name, table in (("scores", scores), ("summary", summary)):
        _write(study.out / f"{name}.csv", table.map(no_formula).to_csv(index=False))
    pictures, maps = ({cell: path for cell in cells if (path := study.picture(*cell, of=of)).is_file()}
                      for of in ("cases", "points"))
    page = render_page(content, scores, errors, summary, cells=cells, pictures=pictures, maps=maps)
    _write(study.out / "report.html", page)


def _write(path: Path, text: str) -> None:
    replace_file(path, [text.encode()])


def _rows(study: Study, of: str) -> list[dict[str, Any]]:
    """A row per source, trainer, target, case and class, and of scores per protocol."""
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
    """Reads checkpoints and records."""
    checkpoints = [read_checkpoint(study.model(source, trainer), fold, CHECKPOINT) for fold in study.folds]
    minutes = sum(map(epoch_seconds, checkpoints)) / 60
    size = (study.fold(source, trainer, study.folds[0]) / CHECKPOINT).stat().st_size / 1e6
    training = [study.read_record("train", source, trainer, fold) for fold in study.folds]
    prediction = [study.read_record("predict", source, trainer, target) for target in study.targets]
    timed = [note for note in prediction if note.get("volumes")]  # not what an interrupted run had done before
    volumes, seconds = (sum(note[key] for note in timed) for key in ("volumes", "seconds"))
    return Cost(source, trainer, count_parameters(checkpoints[0]), size, minutes, _peak(training),
                seconds / volumes if volumes else None, _peak(prediction))


def encoding_minutes(study: Study, source: str) -> float:
    """What it took to store the features of one source, for all trainers that read them."""
    methods = {trainer.method for trainer in study.trainers.values() if trainer.frozen_features}
    return sum(study.read_record("encode", source, method).get("seconds", 0) for method in sorted(methods)) / 60


def machines_of(study: Study) -> list[str]:
    """Every machine that a command of the study ran on."""
    notes = [json.loads(path.read_text()) for path in (study.out / "records").rglob("*.json")]
    return sorted({", ".join(f"{key} {value}" for key, value in note["machine"].items())
                   for note in notes if "machine" in note})


def _peak(notes: list[dict[str, Any]]) -> float | None:
    return max((note["peak_mb"] for note in notes if "peak_mb" in note), default=None)


def _settings(study: Study, source: str, trainer: str) -> dict[str, Any]:
    """What the model folder says of itself, without nnU-Net's network."""
    plans, _ = read_description(study.model(source, trainer))
    configuration = plans["configurations"][CONFIGURATION]
    method = study.trainers[trainer].method
    keys = ("batch_size", "patch_size", "spacing", "normalization_schemes", *(("sam", method) if method else ()))
    return {"plans": plans["plans_name"]} | {key: configuration[key] for key in keys if key in configuration}
