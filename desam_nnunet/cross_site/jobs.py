"""The jobs of a study's rules, each in a process of its own, in the study's folder.

    python -m desam_nnunet.cross_site.jobs PARENT DEVICE RULE NAMES... -- nnUNetv2_train 1 2d 0 -tr DeSAMTrainer

A job ends, with all of its workers, when the process PARENT that started it is gone: otherwise a study that was killed
and started again would train the same model twice at once. Those that can skip what is there import nothing heavy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from runpy import run_module
from typing import Any

from desam_nnunet.cross_site.study import FILE, Study, read_study
from desam_nnunet.nnunet.labels import classes_of
from desam_nnunet.nnunet.leftovers import (
    clear_preprocessed,
    is_preprocessed,
    is_trained,
    put_damaged_aside,
    remove_stale_predictions,
)
from desam_nnunet.nnunet.names import CHECKPOINT, CONFIGURATION, SPLITS, STOCK_PLANS
from desam_nnunet.nnunet.sites import write_dataset
from desam_nnunet.nnunet.splits import read_splits
from desam_nnunet.system.files import replace_file
from desam_nnunet.system.gpus import one_gpu
from desam_nnunet.system.processes import alone, end_with

_PATIENCE = 20  # seconds in which a job of a killed call ends
_TAKEN = ("Another process does this job, perhaps of another study of the same data, or of a call that was killed "
          "while its jobs ran on a cluster: wait for it, or cancel it.")
_SKIPPED = {"skipped": True}
_ON_GPU = ("plan", "encode", "train", "predict")
Record = dict[str, Any]


def main() -> None:
    """One job; its record, if its rule has one, is written when all else is done."""
    parent, device, rule, *words = sys.argv[1:]
    end_with(int(parent))
    names = words[:words.index("--")] if "--" in words else words
    study = read_study(Path(FILE), Path.cwd())
    os.environ |= study.environment
    with (alone(study.lock(rule, *names), _PATIENCE, _TAKEN),
          one_gpu(study.out / "locks") if device == "cuda" and rule in _ON_GPU else nullcontext()):
        took = _RULES[rule](study, *names, command=words[len(names) + 1:], device=device)
        if took is not None:
            record = study.record(rule, *names)
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_file(record, [json.dumps(took).encode()])


def _run(command: list[str], device_name: str) -> Record:
    """Runs one of nnU-Net's commands, or of ours, in this process; what it took."""
    begin = time.monotonic()
    sys.argv = command
    if command[0] == "python":
        sys.argv = command[2:]  # without -m
        run_module(command[2], run_name="__main__")
    else:
        (entry,) = entry_points(group="console_scripts", name=command[0])
        if code := entry.load()():
            sys.exit(code)
    seconds = time.monotonic() - begin
    import torch

    from desam_nnunet.system.machine import describe_machine, peak_memory

    device = torch.device(device_name)
    return {"seconds": seconds, "peak_mb": peak_memory(device) / 1e6, "machine": describe_machine(device)}


def _prepare(study: Study, source: str, *, command: list[str], device: str) -> Record:
    cases, folder = study.sites[source], study.preprocessed(source)
    if study.existing:
        ending = study.dataset_json["file_ending"]
        done = is_preprocessed(folder, study.plans or STOCK_PLANS, ending, [case.name for case in cases])
        return _SKIPPED if done else _run(command, device)
    write_dataset(study.folder("nnUNet_raw") / study.datasets[source], study.dataset_json, cases)
    clear_preprocessed(folder)
    return _run(command, device)


def _plan(study: Study, source: str, plans: str, *, command: list[str], device: str) -> Record:
    path = study.preprocessed(source) / f"{plans}.json"
    if command:
        return _SKIPPED if path.is_file() else _run(command, device)
    content: dict[str, Any] = json.loads(path.with_name(f"{STOCK_PLANS}.json").read_text())
    configuration = content["configurations"][CONFIGURATION]
    configuration |= study.settings
    from desam_nnunet.planning.facts import check_patch

    for name, trainer in study.trainers.items():
        if not trainer.method:
            check_patch(configuration, name)
    replace_file(path, [json.dumps(content | {"plans_name": plans}, indent=4).encode()])
    return {}


def _encode(study: Study, source: str, method: str, *, command: list[str], device: str) -> Record:
    return _run(command, device) if is_to_be_cached(study, source, method) else _SKIPPED


def is_to_be_cached(study: Study, source: str, method: str) -> bool:
    """Whether a fold of `method` is yet to be trained, and reads stored features; plans without our section do."""
    from desam_nnunet.settings.sections import SamSection

    plans = {name: trainer.plans for name, trainer in study.trainers.items() if trainer.method == method}
    content = json.loads((study.preprocessed(source) / f"{next(iter(plans.values()))}.json").read_text())
    section = content["configurations"][CONFIGURATION].get("sam", {})
    return section.get("features", SamSection.features) == "cached" and not all(
        is_trained(study.fold(source, trainer, fold)) for trainer in plans for fold in study.folds)


def _train(study: Study, source: str, trainer: str, fold: str, *, command: list[str], device: str) -> Record:
    folder = study.fold(source, trainer, fold)
    if is_trained(folder):
        return _SKIPPED
    put_damaged_aside(folder)
    return _run(command, device)


def _predict(study: Study, source: str, trainer: str, target: str, *, command: list[str], device: str) -> Record:
    files = study.predictions(source, trainer, target).values()
    remove_stale_predictions(study.prediction_folder(source, trainer, target),
                             [study.fold(source, trainer, fold) / CHECKPOINT for fold in study.folds])
    before = sum(path.is_file() for path in files)
    took = _run(command, device)
    return took | {"volumes": sum(path.is_file() for path in files) - before}


def _score(study: Study, source: str, trainer: str, target: str, **_: object) -> None:
    from desam_nnunet.evaluation.errors import error_rows
    from desam_nnunet.evaluation.scores import score_cases, write_rows

    references = {case.name: case.label for case in study.sites[target]}
    if target == source:  # the cases that the folds did not train on, from nnU-Net's split
        splits = read_splits(study.preprocessed(source) / SPLITS)
        held_out = {case for fold in study.folds for case in splits[int(fold)]["val"]}
        references = {case: path for case, path in references.items() if case in held_out}
    given = (study.predictions(source, trainer, target), references, *classes_of(study.dataset_json), study.tolerance)
    write_rows(study.scores(source, trainer, target), score_cases(*given))
    write_rows(study.scores(source, trainer, target, of="errors"), error_rows(*given))


def _picture(study: Study, source: str, trainer: str, target: str, **_: object) -> None:
    """Of segmentations, and where the trainer has such a network, of what PRIM thinks of the grid's points."""
    from desam_nnunet.evaluation.pictures import draw_cases
    from desam_nnunet.evaluation.scores import chosen_cases, read_rows

    chosen = chosen_cases(read_rows(study.scores(source, trainer, target)))
    cases = {case.name: case for case in study.sites[target]}
    classes, ignored = classes_of(study.dataset_json)
    cell = (source, trainer, target)
    if source != target and study.trainers[trainer].frozen_features:
        from desam_nnunet.evaluation.score_maps import draw_scores

        draw_scores(study.model(source, trainer), study.folds[0], cases[chosen[len(chosen) // 2][1]], classes,
                    study.picture(*cell, of="points"))
    draw_cases(chosen, cases, study.predictions(*cell), classes, ignored, study.picture(*cell))


def _report(study: Study, **_: object) -> None:
    from desam_nnunet.cross_site.report import write_report

    write_report(study)


_RULES: dict[str, Callable[..., Record | None]] = {
    "prepare": _prepare, "plan": _plan, "encode": _encode, "train": _train, "predict": _predict,
    "score": _score, "picture": _picture, "report": _report}

if __name__ == "__main__":
    main()
