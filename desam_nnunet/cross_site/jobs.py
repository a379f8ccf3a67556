"""The jobs of a study's rules, each in a process of its own, in the study's folder.

    python -m desam_nnunet.cross_site.jobs PARENT DEVICE RULE NAMES... -- nnUNetv2_train 1 2d 0 -tr DeSAMTrainer

A job ends, with all of its workers, when the process PARENT that started it is gone: otherwise a study that was killed
and started again would train the same model twice at once.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from runpy import run_module
from typing import Any

import psutil
from filelock import FileLock, Timeout

from desam_nnunet.cross_site.sites import ENDINGS
from desam_nnunet.cross_site.study import FILE, Study, read_study
from desam_nnunet.nnunet.names import CHECKPOINT, CONFIGURATION, SPLITS, STOCK_PLANS
from desam_nnunet.system.files import replace_file

_MADE_BY = "checkpoints.json"  # beside predictions: the hashes of what made them
_PATIENCE = 20  # seconds in which a job of a killed call ends
_SKIPPED = {"skipped": True}
Record = dict[str, Any]


def main() -> None:
    """One job: its record, if its rule has one, is written when all else is done."""
    parent, device, rule, *words = sys.argv[1:]
    threading.Thread(target=_end_with, args=[int(parent)], daemon=True).start()
    names = words[:words.index("--")] if "--" in words else words
    study = read_study(Path(FILE), Path.cwd())
    os.environ |= study.environment
    with _alone(study.out / "locks" / rule / "/".join(names)), _one_gpu(study, device):
        took = globals()[f"_{rule}"](study, *names, command=words[len(names) + 1:], device=device)
        if took is not None:
            record = study.record(rule, *names)
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_file(record, [json.dumps(took).encode()])


def _end_with(parent: int) -> None:
    while psutil.pid_exists(parent):
        time.sleep(0.5)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time does a job, on all machines that see the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=_PATIENCE):
            yield
    except Timeout as error:
        raise RuntimeError("Another process does this job, perhaps of a call that was killed while its jobs ran on a "
                           "cluster: wait for it, or cancel it.") from error


@contextmanager
def _one_gpu(study: Study, device: str) -> Iterator[None]:
    """Shows this process one of several GPUs, which no other job of the study on this machine has."""
    gpus = visible_gpus() if device == "cuda" else []
    for gpu in gpus if len(gpus) > 1 else []:
        lock = FileLock(study.out / "locks" / f"gpu {os.uname().nodename} {gpu}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        break
    yield


def visible_gpus() -> list[str]:
    """By the names that CUDA_VISIBLE_DEVICES has for them. CUDA is not initialised."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def _run(command: Sequence[str], device_name: str) -> Record:
    """Runs one of nnU-Net's commands, or of ours, in this process; what it took."""
    begin = time.monotonic()
    sys.argv = list(command)
    if command[0] == "python":
        sys.argv = list(command[2:])  # without -m
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
    if study.existing:
        return _run(command, device) if is_unprepared(study, source) else _SKIPPED
    raw = study.folder("nnUNet_raw") / study.datasets[source]
    raw.mkdir(parents=True, exist_ok=True)
    cases = {case.name: {"images": [str(path) for path in case.images], "label": str(case.label)}
             for case in study.sites[source]}  # where they are, and no other site's
    content = study.dataset_json | {"numTraining": len(cases), "dataset": cases}
    replace_file(raw / "dataset.json", [json.dumps(content, indent=4).encode()])
    clear_preprocessed(study, source)
    return _run(command, device)


def planned(study: Study, source: str) -> str | None:
    """The plans that an existing data set has, whose preprocessed data are used; None where it has none."""
    name = study.plans or STOCK_PLANS
    return name if (study.preprocessed(source) / f"{name}.json").is_file() else None


def is_unprepared(study: Study, source: str) -> bool:
    """Whether a case of an existing data set is not preprocessed."""
    plans = planned(study, source)
    if plans is None:
        return True
    folder = study.preprocessed(source)
    data = folder / _configuration(study, source, plans)["data_identifier"]
    ending = study.dataset_json["file_ending"]
    return not all((data / f"{case.name}.pkl").is_file() and  # written last
                   (folder / "gt_segmentations" / f"{case.name}{ending}").is_file() for case in study.sites[source])


def clear_preprocessed(study: Study, source: str) -> None:
    """Empties the folder of a study's own data set, since what is there is half of something; the split stays, because
    trained folds rest on it."""
    folder = study.preprocessed(source)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != SPLITS:
            path.unlink()


def _plan(study: Study, source: str, plans: str, *, command: list[str], device: str) -> Record:
    path = study.preprocessed(source) / f"{plans}.json"
    if command:
        return _SKIPPED if path.is_file() else _run(command, device)
    content: dict[str, Any] = json.loads(path.with_name(f"{STOCK_PLANS}.json").read_text())
    configuration = content["configurations"][CONFIGURATION]
    configuration |= study.settings
    for name, trainer in study.trainers.items():
        if not trainer.method:
            check_patch(configuration, name)
    replace_file(path, [json.dumps(content | {"plans_name": plans}, indent=4).encode()])
    return {}


def check_patch(configuration: dict[str, Any], trainer: str) -> None:
    """Refuses a patch that nnU-Net's network, which `trainer` trains, can't halve as often as it does."""
    strides = configuration["architecture"]["arch_kwargs"]["strides"]
    steps = [math.prod(axis) for axis in zip(*strides, strict=True)]
    patch = configuration["patch_size"]
    if any(length % step for length, step in zip(patch, steps, strict=True)):
        raise ValueError(f"patch_size is {patch}, but {trainer}'s network needs multiples of {steps} here: begin "
                         "another study with such a one, or without nnU-Net's trainers.")


def _encode(study: Study, source: str, method: str, *, command: list[str], device: str) -> Record:
    return _run(command, device) if is_to_be_cached(study, source, method) else _SKIPPED


def is_to_be_cached(study: Study, source: str, method: str) -> bool:
    """Whether a fold of `method` is yet to be trained, and reads stored features; plans without our section do."""
    trainers = {name: facts.plans for name, facts in study.trainers.items() if facts.method == method}
    from desam_nnunet.settings.sections import SamSection

    section = _configuration(study, source, next(iter(trainers.values()))).get("sam", {})
    return section.get("features", SamSection.features) == "cached" and not all(
        is_trained(study.fold(source, trainer, fold)) for trainer in trainers for fold in study.folds)


def _configuration(study: Study, source: str, plans: str) -> dict[str, Any]:
    content = json.loads((study.preprocessed(source) / f"{plans}.json").read_text())
    return content["configurations"][CONFIGURATION]


def _train(study: Study, source: str, trainer: str, fold: str, *, command: list[str], device: str) -> Record:
    folder = study.fold(source, trainer, fold)
    if is_trained(folder):
        return _SKIPPED
    put_damaged_aside(folder)
    return _run(command, device)


def is_trained(folder: Path) -> bool:
    """Whether a fold has no work left; a checkpoint that a kill has cut off is none."""
    return zipfile.is_zipfile(folder / CHECKPOINT) and (folder / "validation" / "summary.json").is_file()


def put_damaged_aside(folder: Path) -> None:
    """Renames the checkpoints of a fold that a kill has cut off: nnU-Net would try them first."""
    for path in (folder / name for name in (CHECKPOINT, "checkpoint_latest.pth", "checkpoint_best.pth")):
        if path.is_file() and not zipfile.is_zipfile(path):
            path.replace(path.with_name(f"{path.name}.damaged"))


def _predict(study: Study, source: str, trainer: str, target: str, *, command: list[str], device: str) -> Record:
    files = study.predictions(source, trainer, target).values()
    remove_stale_predictions(study.prediction_folder(source, trainer, target),
                             [study.fold(source, trainer, fold) / CHECKPOINT for fold in study.folds])
    before = sum(path.is_file() for path in files)
    took = _run(command, device)
    return took | {"volumes": sum(path.is_file() for path in files) - before}


def remove_stale_predictions(folder: Path, checkpoints: list[Path]) -> None:
    """Removes what other checkpoints have made and what a kill has cut off, since nnU-Net goes by names."""
    from desam_nnunet.encoders.weights import file_hash

    made_by = folder / _MADE_BY
    now = {path.parent.name: file_hash(path) for path in checkpoints}
    is_ours = made_by.is_file() and json.loads(made_by.read_text()) == now
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name.endswith(ENDINGS) and not (is_ours and _is_whole(path)):
            path.unlink()
    replace_file(made_by, [json.dumps(now).encode()])


def _is_whole(path: Path) -> bool:
    import SimpleITK as sitk

    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                while stream.read(2**24):
                    pass  # the checksum is at the end
        sitk.ReadImage(path)
    except (OSError, EOFError, RuntimeError, zlib.error):
        return False
    return True


def _score(study: Study, source: str, trainer: str, target: str, **_: object) -> None:
    from desam_nnunet.evaluation.scores import classes_of, score_cases, write_rows

    references = {case.name: case.label for case in study.sites[target]}
    if target == source:  # the cases that the folds did not train on, from nnU-Net's split
        splits = json.loads((study.preprocessed(source) / SPLITS).read_text())
        held_out = {case for fold in study.folds for case in splits[int(fold)]["val"]}
        references = {case: path for case, path in references.items() if case in held_out}
    rows = score_cases(study.predictions(source, trainer, target), references, *classes_of(study.dataset_json),
                       study.tolerance)
    write_rows(study.scores(source, trainer, target), rows)


def _picture(study: Study, source: str, trainer: str, target: str, **_: object) -> None:
    from desam_nnunet.cross_site.pictures import draw_cases

    if source != target and study.trainers[trainer].frozen_features:
        from desam_nnunet.cross_site.score_maps import draw_scores, has_scores

        if has_scores(study, source, trainer):
            draw_scores(study, source, trainer, target)
    draw_cases(study, source, trainer, target)


def _report(study: Study, **_: object) -> None:
    from desam_nnunet.cross_site.report import write_report

    write_report(study)


if __name__ == "__main__":
    main()
