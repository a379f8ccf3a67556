"""What a study does, step by step: each is done once, and can be done again."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cross_site.budget import KEYS
from desam_nnunet.cross_site.conditions import (
    clear_preprocessed,
    is_missing,
    is_to_be_cached,
    is_unprepared,
    is_untrained,
    planned,
    put_damaged_aside,
    remove_stale_predictions,
)
from desam_nnunet.cross_site.pictures import draw_cases
from desam_nnunet.cross_site.score_maps import draw_scores
from desam_nnunet.cross_site.study import CHECKPOINT, Study, method_of
from desam_nnunet.evaluation.scores import classes_of, score_cases, write_rows
from desam_nnunet.networks.desam.prompters import PointPrompter
from desam_nnunet.nnunet.datasets import STOCK_PLANS
from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.nnunet.model_folder import read_description
from desam_nnunet.planning.facts import CONFIGURATION, SPLITS
from desam_nnunet.settings.resolve import read_own
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.system.files import replace_file
from desam_nnunet.training.desam import DeSAMTrainer
from desam_nnunet.training.registry import find_trainer

BUDGET = "desam_nnunet.cross_site.budget:main"
_MOST_WORKERS = 8


class Step(NamedTuple):
    """A piece of work that is noted on disk when it is done."""

    kind: str
    names: tuple[str, ...]  # of sites, trainer and fold that it is for
    part: int | None  # which pair of source and trainer it belongs to; None for what all pairs need
    command: tuple[str, ...] = ()  # one of nnU-Net's or of ours, for a process of its own
    work: Callable[[], None] = lambda: None  # in this process, before the command if there is one
    needed: Callable[[], bool] = lambda: True  # asked once the steps before are done

    @property
    def name(self) -> str:
        return "__".join((self.kind, *self.names))

    @property
    def title(self) -> str:
        return " ".join((self.kind, *self.names))

    @property
    def typed(self) -> str:
        """The command as one would type it."""
        words = ("python", "-m", BUDGET.partition(":")[0], *self.command[1:])
        return shlex.join(words if self.command[:1] == (BUDGET,) else self.command)


def steps_of(study: Study, device: str) -> list[Step]:
    """Everything but the report, in an order in which each step finds what it needs."""
    return [*_preparation(study, device), *_pairs(study, device)]


def _preparation(study: Study, device: str) -> Iterator[Step]:
    yield Step("links", (), None, work=partial(_write_links, study))
    for source in study.sources:
        prepare = Step("prepare", (source,), None, _prepare(study, source))
        if study.existing:
            yield prepare._replace(needed=partial(is_unprepared, study, source))
        else:
            yield Step("data", (source,), None, work=partial(_write_dataset, study, source))
            yield prepare._replace(work=partial(clear_preprocessed, study, source))
        yield from _plans(study, source, device)


def _prepare(study: Study, source: str) -> tuple[str, ...]:
    workers = str(min(_MOST_WORKERS, os.cpu_count() or 1))
    common = ("-d", _number(study, source), "-c", CONFIGURATION, "-np", workers)
    if study.existing and (plans := planned(study, source)) is not None:
        return ("nnUNetv2_preprocess", *common, "-plans_name", plans)
    return ("nnUNetv2_plan_and_preprocess", *common, "-npfp", workers, "--verify_dataset_integrity")


def _plans(study: Study, source: str, device: str) -> Iterator[Step]:
    """Plans, and the features of the trainers that cache them."""
    if study.settings:
        yield Step("plan", (source,), None, work=partial(_write_plans, study, source))
    for name, (trainer, *_) in study.trainers_by_method.items():
        plans = study.plans_of(trainer)
        if not study.plans and not study.settings:
            yield Step("plan", (source, name), None, (
                "desam", "plan", "-d", _number(study, source), "--trainer", trainer, "-device", device),
                needed=partial(is_missing, study.preprocessed(source) / f"{plans}.json"))
        if find_trainer(trainer).method.frozen_features:
            yield Step("encode", (source, name), None, (
                "desam", "cache", "-d", _number(study, source), "-p", plans, "-tr", trainer, "-device", device),
                needed=partial(is_to_be_cached, study, source, name))


def _pairs(study: Study, device: str) -> Iterator[Step]:
    pairs = [(source, trainer) for source in study.sources for trainer in study.trainers]
    for part, (source, trainer) in enumerate(pairs):
        for fold in study.folds:
            folder = study.fold(source, trainer, fold)
            yield Step("train", (source, trainer, fold), part, _train(study, source, trainer, fold, device),
                       partial(put_damaged_aside, folder), partial(is_untrained, folder))
        checkpoints = [study.fold(source, trainer, fold) / CHECKPOINT for fold in study.folds]
        for target in study.tested_at(source):
            cell = (source, trainer, target)
            if target != source:
                yield Step("predict", cell, part, _predict(study, *cell, device),
                           partial(remove_stale_predictions, study.prediction_folder(*cell), checkpoints))
            yield Step("score", cell, part, work=partial(_score, study, *cell))
            yield Step("look", cell, part, work=partial(_look, study, *cell))


def _train(study: Study, source: str, trainer: str, fold: str, device: str) -> tuple[str, ...]:
    common = ("-tr", trainer, "-p", study.plans_of(trainer), "-device", device)
    if method_of(trainer) is None and study.settings:
        sam = {field.name: field.default for field in fields(SamSection)} | study.settings.get("sam", {})
        return (BUDGET, _number(study, source), fold, *common, *(f"--{key}={sam[key]}" for key in KEYS))
    return ("nnUNetv2_train", _number(study, source), CONFIGURATION, fold, *common, "--c")


def _predict(study: Study, source: str, trainer: str, target: str, device: str) -> tuple[str, ...]:
    one_process = ("-npp", "0", "-nps", "0") if device == "cpu" else ()  # which has all cores
    out = str(study.prediction_folder(source, trainer, target))
    return ("nnUNetv2_predict", "-i", str(study.images(target)), "-o", out, "-d", _number(study, source),
            "-c", CONFIGURATION, "-f", *study.folds, "-tr", trainer, "-p", study.plans_of(trainer), "-device", device,
            "--continue_prediction", "--disable_progress_bar", *one_process)


def _write_links(study: Study) -> None:
    """The images of every site under nnU-Net's names, as links, or copies where links can't be made."""
    ending = study.dataset_json["file_ending"]
    for site, cases in study.sites.items():
        study.images(site).mkdir(parents=True, exist_ok=True)
        for case in cases:
            for channel, image in enumerate(case.images):
                link = study.images(site) / f"{case.name}_{channel:04d}{ending}"
                if link.exists():
                    continue
                link.unlink(missing_ok=True)
                try:
                    link.symlink_to(image)
                except OSError:
                    replace_file(link, [image.read_bytes()])


def _write_dataset(study: Study, source: str) -> None:
    """The raw data set of one source: a description that names its files where they are, and no other site's."""
    raw = study.folder("nnUNet_raw") / study.datasets[source]
    raw.mkdir(parents=True, exist_ok=True)
    cases = {case.name: {"images": [str(path) for path in case.images], "label": str(case.label)}
             for case in study.sites[source]}
    content = study.dataset_json | {"numTraining": len(cases), "dataset": cases}
    replace_file(raw / "dataset.json", [json.dumps(content, indent=4).encode()])


def _score(study: Study, source: str, trainer: str, target: str) -> None:
    references = {case.name: case.label for case in study.sites[target]}
    if target == source:  # the cases that the folds did not train on, from nnU-Net's split
        splits = json.loads((study.preprocessed(source) / SPLITS).read_text())
        held_out = {case for fold in study.folds for case in splits[int(fold)]["val"]}
        references = {case: path for case, path in references.items() if case in held_out}
    rows = score_cases(study.predictions(source, trainer, target), references, *classes_of(study.dataset_json),
                       study.tolerance)
    path = study.scores(source, trainer, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)


def _look(study: Study, source: str, trainer: str, target: str) -> None:
    draw_cases(study, source, trainer, target)
    if source != target and _reads_scores(study, source, trainer):
        draw_scores(study, source, trainer, target)


def _reads_scores(study: Study, source: str, trainer: str) -> bool:
    """Whether the model's prompter chooses by PRIM's scores."""
    kind = look_up(trainer)
    if not issubclass(kind, DeSAMTrainer):
        return False
    plans, _ = read_description(study.model(source, trainer))
    configuration = PlansManager(plans).get_configuration(CONFIGURATION).configuration
    return isinstance(kind.prompter(read_own(configuration, kind.method)), PointPrompter)


def _write_plans(study: Study, source: str) -> None:
    """nnU-Net's plans with the study's settings in the 2D configuration."""
    folder = study.preprocessed(source)
    plans: dict[str, Any] = json.loads((folder / f"{STOCK_PLANS}.json").read_text())
    configuration = plans["configurations"][CONFIGURATION]
    configuration |= study.settings
    for trainer in study.trainers:
        if method_of(trainer) is None:
            _check_patch(configuration, trainer)
    plans["plans_name"] = study.plans_of("")
    replace_file(folder / f"{plans['plans_name']}.json", [json.dumps(plans, indent=4).encode()])


def _check_patch(configuration: dict[str, Any], trainer: str) -> None:
    """Refuses a patch that nnU-Net's network, which `trainer` trains, can't halve as often as it does."""
    strides = configuration["architecture"]["arch_kwargs"]["strides"]
    steps = [math.prod(axis) for axis in zip(*strides, strict=True)]
    patch = configuration["patch_size"]
    if any(length % step for length, step in zip(patch, steps, strict=True)):
        raise ValueError(f"patch_size is {patch}, but {trainer}'s network needs multiples of {steps} here: begin "
                         "another study with such a one, or without nnU-Net's trainers.")


def follows(step: Step, earlier: Step) -> bool:
    """Whether `step`, later in the order, rests on what `earlier` makes."""
    pair = step.names[:2]
    if len(earlier.names) < 2:  # of a source
        return step.names[:1] == earlier.names
    if earlier.kind in ("plan", "encode"):  # of a source and a method
        if step.part is not None:
            method = method_of(pair[1])
            pair = (pair[0], method.name if method else "")
        return pair == earlier.names
    if earlier.kind == "train":
        return pair == earlier.names[:2] and step.kind in ("predict", "score", "look")
    after = {"predict": ("score", "look"), "score": ("look",)}.get(earlier.kind, ())
    return step.names == earlier.names and step.kind in after


def _number(study: Study, source: str) -> str:
    return str(convert_dataset_name_to_id(study.datasets[source]))
