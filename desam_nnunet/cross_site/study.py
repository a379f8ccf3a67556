"""One study: its settings, and where everything of it lies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from desam_nnunet.cross_site.sites import Sites
from desam_nnunet.nnunet.datasets import STOCK_PLANS
from desam_nnunet.nnunet.lookup import look_up
from desam_nnunet.planning.facts import CONFIGURATION
from desam_nnunet.settings.sections import Method
from desam_nnunet.system.files import replace_file
from desam_nnunet.training.base import SamTrainer

STUDY_PLANS = "CrossSitePlans"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
FILE = "study.json"
CHECKPOINT = "checkpoint_final.pth"  # what predicts
SCORES = "__scores"  # behind a picture's name


@lru_cache
def method_of(trainer: str) -> Method | None:
    """The method of a trainer of this package's kind; None for nnU-Net's own."""
    kind = look_up(trainer)
    return kind.method if issubclass(kind, SamTrainer) else None


@dataclass(frozen=True)
class Study:
    """Everything that decides a result, and nothing of the machine."""

    out: Path  # the study's folder
    sites: Sites  # sources and targets alike
    datasets: dict[str, str]  # nnU-Net's, of every site
    dataset_json: dict[str, Any]  # the same for all sites but for the number of cases
    existing: bool  # whether the data sets lie in the user's own nnU-Net folders; else in `out`
    trainers: tuple[str, ...]
    sources: tuple[str, ...]  # where they are trained
    targets: tuple[str, ...]  # which are segmented
    folds: tuple[str, ...] = ("0",)  # as typed after -f
    plans: str = ""  # for all trainers; empty for each method's own, or where there are settings
    settings: dict[str, Any] = field(default_factory=dict)  # keys of the plans' 2D configuration for all trainers
    tolerance: float = 2.0  # of the surface Dice, in mm

    @property
    def trainers_by_method(self) -> dict[str, list[str]]:
        """This package's kind of trainers, by the name of their method."""
        trainers: dict[str, list[str]] = {}
        for trainer in self.trainers:
            if (method := method_of(trainer)) is not None:
                trainers.setdefault(method.name, []).append(trainer)
        return trainers

    def folder(self, name: str) -> Path:
        """One of nnU-Net's three, :data:`FOLDERS`."""
        return Path(os.environ[name]) if self.existing else self.out / name

    def preprocessed(self, source: str) -> Path:
        return self.folder("nnUNet_preprocessed") / self.datasets[source]

    def plans_of(self, trainer: str) -> str:
        """The name of the plans that `trainer` trains with."""
        if self.settings and self.existing:  # beside those of other studies, in the user's folders
            digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
            return f"{STUDY_PLANS}_{digest[:8]}"
        if self.settings:
            return STUDY_PLANS
        method = method_of(trainer)
        return self.plans or (method.plans_name if method else STOCK_PLANS)

    def model(self, source: str, trainer: str) -> Path:
        name = f"{trainer}__{self.plans_of(trainer)}__{CONFIGURATION}"
        return self.folder("nnUNet_results") / self.datasets[source] / name

    def fold(self, source: str, trainer: str, fold: str) -> Path:
        return self.model(source, trainer) / f"fold_{fold}"

    def images(self, site: str) -> Path:
        """A folder as nnUNetv2_predict wants it."""
        return self.out / "sites" / site

    def predictions(self, source: str, trainer: str, target: str) -> dict[str, Path]:
        """The file of every case of `target`, whether it is there or not; on the source itself, of held-out cases."""
        ending = self.dataset_json["file_ending"]
        if source == target:
            folders = [self.fold(source, trainer, fold) / "validation" for fold in self.folds]
            return {path.name.removesuffix(ending): path for folder in folders
                    for path in sorted(folder.glob(f"*{ending}"))}
        folder = self.prediction_folder(source, trainer, target)
        return {case.name: folder / f"{case.name}{ending}" for case in self.sites[target]}

    def prediction_folder(self, source: str, trainer: str, target: str) -> Path:
        return self.out / "predictions" / source / trainer / target

    def scores(self, source: str, trainer: str, target: str) -> Path:
        return self.out / "scores" / f"{source}__{trainer}__{target}.json"

    def picture(self, source: str, trainer: str, target: str, ending: str = "") -> Path:
        """Of the segmentations; with :data:`SCORES` as ending, of PRIM's scores."""
        return self.out / "pictures" / f"{source}__{trainer}__{target}{ending}.webp"

    def note(self, step: str) -> Path:
        """Written when a step is done: what it took."""
        return self.out / "state" / f"{step}.json"

    def read_note(self, step: str) -> dict[str, Any]:
        """Empty where there is none."""
        return json.loads(self.note(step).read_text()) if self.note(step).is_file() else {}

    def cells(self) -> Iterable[tuple[str, str, str]]:
        """Source, trainer and target, in order."""
        return ((source, trainer, target) for source in self.sources for trainer in self.trainers
                for target in self.tested_at(source))

    def tested_at(self, source: str) -> list[str]:
        """Where models of `source` are tested; on its own held-out cases first, of which fold ``all`` has none."""
        held_out = [] if "all" in self.folds else [source]
        return [*held_out, *(target for target in self.targets if target != source)]

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        replace_file(self.out / FILE, [json.dumps(plain(self), indent=4).encode()])


def plain(study: Study) -> dict[str, Any]:
    """As JSON reads it back; `out` is where the file lies."""
    content = asdict(study) | {"sites": plain_sites(study.sites)}
    del content["out"]
    return json.loads(json.dumps(content))


def plain_sites(sites: Sites) -> dict[str, list[dict[str, Any]]]:
    return {site: [{"case": case.name, "images": [_stamp(path) for path in case.images], "label": _stamp(case.label)}
                   for case in cases] for site, cases in sites.items()}


def _stamp(path: Path) -> list[Any]:
    """A file, and what changes when it does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns]
