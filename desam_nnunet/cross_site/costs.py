"""What each model of a study took: parameters, bytes, time and memory."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from desam_nnunet.cross_site.study import CHECKPOINT, Study, method_of
from desam_nnunet.nnunet.model_folder import read_checkpoint


class Cost(NamedTuple):
    """Of one trainer on one source, its folds together; None where it is not known.

    Attributes:
        parameters: In one fold's checkpoint; SAM's frozen encoder is in none.
        checkpoint_mb: Of one fold, the optimiser's state included.
        training_minutes: All epochs of all folds, from nnU-Net's log, which survives a resumed training.
        training_peak_mb, prediction_peak_mb: Of the GPU where there was one, else of the process.
        seconds_per_volume: At prediction, start and export included.
    """

    source: str
    trainer: str
    parameters: int
    checkpoint_mb: float
    training_minutes: float
    training_peak_mb: float | None
    seconds_per_volume: float | None
    prediction_peak_mb: float | None


def cost_of(study: Study, source: str, trainer: str) -> Cost:
    """Reads the checkpoints and the notes of the steps."""
    model = study.model(source, trainer)
    minutes, parameters = 0.0, 0
    for fold in study.folds:
        checkpoint = read_checkpoint(model, fold, CHECKPOINT)
        log = checkpoint["logging"]
        minutes += sum(end - begin for begin, end in
                       zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)) / 60
        weights = checkpoint["network_weights"].values()  # nnU-Net's network lists the same tensor under several names
        parameters = sum({(value.data_ptr(), value.shape): value.numel() for value in weights}.values())
    size = (model / f"fold_{study.folds[0]}" / CHECKPOINT).stat().st_size / 1e6
    training = [_note(study, "train", source, trainer, fold) for fold in study.folds]
    prediction = [_note(study, "predict", source, trainer, target) for target in study.targets if target != source]
    timed = [note for note in prediction if note.get("volumes")]  # not what an interrupted run had done before
    volumes, seconds = (sum(note[key] for note in timed) for key in ("volumes", "seconds"))
    return Cost(source, trainer, parameters, size, minutes, _peak(training), seconds / volumes if volumes else None,
                _peak(prediction))


def encoding_minutes(study: Study, source: str) -> float:
    """What it took to store the features of one source, for all trainers that read them."""
    methods = {method.name for trainer in study.trainers if (method := method_of(trainer)) is not None}
    notes = [_note(study, "encode", source, method) for method in sorted(methods)]
    return sum(note.get("seconds", 0) for note in notes if not note.get("skipped")) / 60


def machines_of(study: Study) -> list[str]:
    """Every machine that a command of the study ran on."""
    found = {", ".join(f"{key} {value}" for key, value in note["machine"].items())
             for path in sorted((study.out / "state").glob("*.json"))
             if "machine" in (note := json.loads(path.read_text()))}
    return sorted(found)


def _note(study: Study, *names: str) -> dict[str, Any]:
    path = study.note("__".join(names))
    return json.loads(path.read_text()) if path.is_file() else {}


def _peak(notes: list[dict[str, Any]]) -> float | None:
    return max((note["peak_mb"] for note in notes if "peak_mb" in note), default=None)
