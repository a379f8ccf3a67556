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

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cross_site.budget import KEYS
from desam_nnunet.cross_site.conditions import (
    final_checkpoints,
    is_missing,
    is_to_be_cached,
    is_unprepared,
    is_unsegmented,
    is_untrained,
    planned,
)
from desam_nnunet.cross_site.datasets import write_dataset, write_links
from desam_nnunet.cross_site.pictures import draw_cases
from desam_nnunet.cross_site.score_maps import draw_scores
from desam_nnunet.cross_site.study import Study, method_of
from desam_nnunet.evaluation.scores import classes_of, score_cases, write_rows
from desam_nnunet.networks.desam.prompters import PointPrompter
from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.nnunet.model_folder import read_description
from desam_nnunet.planning.facts import CONFIGURATION, SPLITS, STOCK_PLANS
from desam_nnunet.settings.resolve import read_own
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.system.files import replace_file
from desam_nnunet.training.desam import DeSAMTrainer

BUDGET = "desam_nnunet.cross_site.budget:main"
_MOST_WORKERS = 8


class Step(NamedTuple):
    """A piece of work that is noted on disk when it is done.

    Attributes:
        kind: ``links``, ``data``, ``prepare``, ``plan``, ``encode``, ``train``, ``predict``, ``score`` or ``look``.
        names: Sites, trainer and fold that it is for.
        part: Which of all pairs of source and trainer it belongs to; None for what all pairs need.
        command: One of nnU-Net's or of ours, for a process of its own; or
        work: what to do in this process.
        needed: Says, once the steps before are done, whether there is anything to do, and clears away what a kill left.
    """

    kind: str
    names: tuple[str, ...]
    part: int | None
    command: tuple[str, ...] = ()
    work: Callable[[], None] | None = None
    needed: Callable[[], bool] | None = None

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
    yield Step("links", (), None, work=partial(write_links, study))
    for source in study.sources:
        if not study.existing:
            yield Step("data", (source,), None, work=partial(write_dataset, study, source))
        yield Step("prepare", (source,), None, _prepare(study, source), needed=partial(is_unprepared, study, source))
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
    first: dict[str, str] = {}
    for trainer in study.trainers:
        if (name := _method_name(trainer)) is not None:
            first.setdefault(name, trainer)
    for method, trainer in first.items():
        plans = study.plans_of(trainer)
        if not study.plans and not study.settings:
            yield Step("plan", (source, method), None, (
                "desam", "plan", "-d", _number(study, source), "--trainer", trainer, "-device", device),
                needed=partial(is_missing, study.preprocessed(source) / f"{plans}.json"))
        if _is_frozen(trainer):
            yield Step("encode", (source, method), None, (
                "desam", "cache", "-d", _number(study, source), "-p", plans, "-tr", trainer, "-device", device),
                needed=partial(is_to_be_cached, study, source, method))


def _method_name(trainer: str) -> str | None:
    method = method_of(trainer)
    return method.name if method else None


def _is_frozen(trainer: str) -> bool:
    method = method_of(trainer)
    return method is not None and method.frozen_features


def _pairs(study: Study, device: str) -> Iterator[Step]:
    pairs = [(source, trainer) for source in study.sources for trainer in study.trainers]
    for part, (source, trainer) in enumerate(pairs):
        for fold in study.folds:
            folder = study.model(source, trainer) / f"fold_{fold}"
            yield Step("train", (source, trainer, fold), part, _train(study, source, trainer, fold, device),
                       needed=partial(is_untrained, folder))
        for target in study.tested_at(source):
            cell = (source, trainer, target)
            if target != source:
                folder, checkpoints = study.predicted(*cell), final_checkpoints(study, source, trainer)
                yield Step("predict", cell, part, _predict(study, source, trainer, target, device),
                           needed=partial(is_unsegmented, folder, checkpoints))
            yield Step("score", cell, part, work=partial(_score, study, *cell))
            yield Step("look", cell, part, work=partial(_look, study, *cell))


def _train(study: Study, source: str, trainer: str, fold: str, device: str) -> tuple[str, ...]:
    common = ("-tr", trainer, "-p", study.plans_of(trainer), "-device", device)
    if method_of(trainer) is None and study.settings:
        sam = {field.name: field.default for field in fields(SamSection)} | study.settings.get("sam", {})
        return (BUDGET, _number(study, source), fold, *common, *(f"--{key}={sam[key]}" for key in KEYS))
    return ("nnUNetv2_train", _number(study, source), CONFIGURATION, fold, *common, "--c")


def _predict(study: Study, source: str, trainer: str, target: str, device: str) -> tuple[str, ...]:
    calm = ("-npp", "0", "-nps", "0") if device == "cpu" else ()  # in one process, which has all cores
    return ("nnUNetv2_predict", "-i", str(study.images(target)), "-o", str(study.predicted(source, trainer, target)),
            "-d", _number(study, source), "-c", CONFIGURATION, "-f", *study.folds, "-tr", trainer,
            "-p", study.plans_of(trainer), "-device", device, "--continue_prediction", *calm)


def _score(study: Study, source: str, trainer: str, target: str) -> None:
    predictions = study.predictions(source, trainer, target)
    references = study.references(target)
    if target == source:
        own = held_out(study, source)
        references = {case: path for case, path in references.items() if case in own}
    classes, ignored = classes_of(study.dataset_json)
    rows = score_cases(predictions, references, classes, ignored, study.tolerance)
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


def held_out(study: Study, source: str) -> set[str]:
    """The cases of the source that the folds did not train on, from nnU-Net's split."""
    splits = json.loads((study.preprocessed(source) / SPLITS).read_text())
    return {case for fold in study.folds for case in splits[int(fold)]["val"]}


def _write_plans(study: Study, source: str) -> None:
    """nnU-Net's plans with the study's settings in the 2D configuration."""
    folder = study.preprocessed(source)
    plans: dict[str, Any] = json.loads((folder / f"{STOCK_PLANS}.json").read_text())
    configuration = plans["configurations"][CONFIGURATION]
    configuration |= study.settings
    if others := [trainer for trainer in study.trainers if method_of(trainer) is None]:
        _check_patch(configuration, others[0])
    plans["plans_name"] = study.plans_of("")
    replace_file(folder / f"{plans['plans_name']}.json", [json.dumps(plans, indent=4).encode()])


def _check_patch(configuration: dict[str, Any], trainer: str) -> None:
    """Raises: ValueError: nnU-Net's network, which `trainer` trains, can't halve the patch as often as it does."""
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
        return pair == earlier.names if step.part is None else (pair[0], _method_name(pair[1])) == earlier.names
    if earlier.kind == "train":
        return pair == earlier.names[:2] and step.kind in ("predict", "score", "look")
    after = {"predict": ("score", "look"), "score": ("look",)}.get(earlier.kind, ())
    return step.names == earlier.names and step.kind in after


def _number(study: Study, source: str) -> str:
    return str(int(study.datasets[source][len("Dataset"):][:3]))
