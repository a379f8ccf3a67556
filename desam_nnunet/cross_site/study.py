"""One study: its settings, and where everything of it lies. Importing this imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from desam_nnunet.nnunet.names import CONFIGURATION, FOLDERS, STOCK_PLANS
from desam_nnunet.nnunet.sites import Case, Sites
from desam_nnunet.system.files import replace_file

FILE = "study.json"
LOCK = "study.lock"  # held by the call that works at it
VERSION = 2  # of the file; 1 had none


@dataclass(frozen=True)
class Trainer:
    """What a study knows of a trainer. `method` is empty for nnU-Net's own, which have none of this package's."""

    method: str = ""
    plans: str = STOCK_PLANS
    frozen_features: bool = False


@dataclass(frozen=True)
class Study:
    """Everything that decides a result, and nothing of the machine."""

    out: Path  # the study's folder
    sites: Sites  # sources and targets alike
    datasets: dict[str, str]  # nnU-Net's, of every site
    dataset_json: dict[str, Any]  # the same for all sites but for the number of cases
    existing: bool  # whether the data sets lie in the user's own nnU-Net folders; else in `out`
    trainers: dict[str, Trainer]  # by name
    sources: tuple[str, ...]  # where they are trained
    targets: tuple[str, ...]  # which are segmented
    folds: tuple[str, ...] = ("0",)  # as typed after -f
    plans: str = ""  # for all trainers; empty for each method's own, or where there are settings
    settings: dict[str, Any] = field(default_factory=dict)  # keys of the plans' 2D configuration for all trainers
    tolerance: float = 2.0  # of the surface Dice, in mm
    version: int = VERSION

    @property
    def plans_made(self) -> dict[str, str]:
        """Of every plans file that the study itself makes at each source, a trainer that it is for."""
        made = {} if self.plans else {kind.plans: name for name, kind in reversed(self.trainers.items())}
        return {plans: name for plans, name in made.items() if plans != STOCK_PLANS}

    def folder(self, name: str) -> Path:
        """One of nnU-Net's three, :data:`~desam_nnunet.nnunet.names.FOLDERS`."""
        return Path(os.environ[name]).absolute() if self.existing else self.out / name

    def lock(self, rule: str, *names: str) -> Path:
        """Of a job. Where other studies may change the same folders, it lies beside them and is called as they are,
        whatever this study calls the site."""
        if not self.existing or rule not in ("prepare", "plan", "encode", "train"):
            return self.out / "locks" / rule / f"{'/'.join(names)}.lock"
        source, *others = names
        if rule == "encode":  # of a method: two of one study may share plans, and build side by side
            plans = next(kind.plans for kind in self.trainers.values() if kind.method == others[0])
            others = [f"{others[0]}__{plans}"]
        elif rule == "train":
            others[0] = self.model(source, others[0]).name
        folder = self.folder("nnUNet_preprocessed") / "desam_locks" / self.datasets[source] / rule
        return folder / f"{'/'.join(others) or 'all'}.lock"

    @property
    def environment(self) -> dict[str, str]:
        """nnU-Net's variables."""
        return {name: str(self.folder(name)) for name in FOLDERS}

    def number(self, source: str) -> str:
        """Of the data set, as nnU-Net's commands take it."""
        return str(int(self.datasets[source].removeprefix("Dataset")[:3]))

    def preprocessed(self, source: str) -> Path:
        return self.folder("nnUNet_preprocessed") / self.datasets[source]

    def model(self, source: str, trainer: str) -> Path:
        name = f"{trainer}__{self.trainers[trainer].plans}__{CONFIGURATION}"
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

    def scores(self, *cell: str, of: str = "scores") -> Path:
        """Of metrics; of `errors`, where segmentations are wrong."""
        return self.out / of / "/".join(cell[:-1]) / f"{cell[-1]}.json"

    def picture(self, *cell: str, of: str = "cases") -> Path:
        return self.out / "pictures" / "/".join(cell) / f"{of}.webp"

    def record(self, rule: str, *names: str) -> Path:
        """Written when a job of nnU-Net's is done: what it took."""
        return self.out / "records" / rule / "/".join(names[:-1]) / f"{names[-1]}.json"

    def read_record(self, rule: str, *names: str) -> dict[str, Any]:
        """Empty where there is none."""
        path = self.record(rule, *names)
        return json.loads(path.read_text()) if path.is_file() else {}

    def cells(self) -> Iterable[tuple[str, str, str]]:
        """Source, trainer and target, in order."""
        return ((source, trainer, target) for source in self.sources for trainer in self.trainers
                for target in self.tested_at(source))

    def tested_at(self, source: str) -> list[str]:
        """Where models of `source` are tested; on its own held-out cases first, of which fold ``all`` has none."""
        held_out = [] if "all" in self.folds else [source]
        return [*held_out, *(target for target in self.targets if target != source)]

    def write(self, path: Path) -> None:
        replace_file(path, [json.dumps(plain(self), indent=4).encode()])


def read_study(path: Path, out: Path) -> Study:
    """What :meth:`Study.write` wrote; `out` is the study's folder."""
    content = json.loads(path.read_text())
    sites = {site: [Case(row["case"], tuple(Path(image[0]) for image in row["images"]), Path(row["label"][0]))
                    for row in rows] for site, rows in content["sites"].items()}
    trainers = {name: Trainer(**facts) for name, facts in content["trainers"].items()}
    names = {key: tuple(content[key]) for key in ("sources", "targets", "folds")}
    return Study(out=out, **content | names | {"sites": sites, "trainers": trainers})


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
