"""Opens a study: what was asked for, checked against the data and against what its folder holds.

Importing this imports nothing heavy, so that a dry run takes seconds: PyTorch and nnU-Net's trainers come only with
settings, with trainers of others, and PyTorch with data sets of nnU-Net's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from desam_nnunet.cross_site.study import FILE, LOCK, VERSION, Study, Trainer, plain, plain_sites, read_study
from desam_nnunet.nnunet.labels import check_values, classes_of, given_labels, labels_of
from desam_nnunet.nnunet.names import FOLDS, SPLITS, STOCK_PLANS
from desam_nnunet.nnunet.sites import Sites, check_sites, common_description, ending_of, read_sites, sites_of_datasets
from desam_nnunet.nnunet.splits import read_splits
from desam_nnunet.system.files import TEMPORARY
from desam_nnunet.training.methods import METHODS, check_trainers, method_of, methods_of

_GROWING = ("trainers", "sources", "targets")  # what a later call may add to
_STUDY_PLANS = "CrossSitePlans"
_WIDEST = 10_000  # mm
DEFAULT_TRAINERS = ("DeSAMTrainer", "nnUNetTrainer")


def open_study(
    data: Path | None, datasets: Sequence[str], out: Path, *, trainers: Sequence[str], sources: Sequence[str],
    targets: Sequence[str], folds: Sequence[str], plans: str, settings: Path | None, labels: Sequence[str],
    channels: Sequence[str], tolerance: float,
) -> Study:
    """The study that was asked for: a new one, or the one that `out` holds, with trainers and sites added.

    Args:
        data: Folder or manifest, see :func:`~desam_nnunet.nnunet.sites.read_sites`.
        datasets: Instead of it, ``SITE=DATASET`` of data sets in nnU-Net's folders.
        trainers, sources, targets: Empty for those of the study that `out` holds, or for the default: every site.

    Raises:
        FileNotFoundError, ValueError: What was given can't be a study; one sentence says why.
    """
    if (data is None) == (not datasets):
        raise ValueError("Give the sites' data: a folder or manifest, or nnU-Net's data sets with -d SITE=DATASET.")
    if datasets and (labels or channels):
        raise ValueError("--labels and --channels are for data that are no nnU-Net data sets yet: -d has them from "
                         "dataset.json.")
    before = _read(out)
    known = before or dict.fromkeys(_GROWING, ())
    trainers = _unique(trainers or known["trainers"] or DEFAULT_TRAINERS)
    check_trainers(trainers)
    if settings is not None and plans:
        raise ValueError(f"-p {plans} and --settings exclude each other: put the settings into these plans.")
    chosen: dict[str, Any] = {}
    if settings is not None:
        from desam_nnunet.settings.shared import read_settings  # takes seconds

        chosen = read_settings(settings, methods_of([*METHODS, *trainers]))
    if data is not None:
        sites = read_sites(data)
        names = {site: f"Dataset{number:03d}_{site}" for number, site in enumerate(sites, 1)}
    else:
        sites, names = sites_of_datasets(datasets)
    study = Study(
        out.resolve(), sites, names, {}, data is None,
        {name: _trainer(name, plans, chosen, data is None) for name in trainers},
        _known_sites(sources or known["sources"], sites, "--sources"),
        _known_sites(targets or known["targets"], sites, "--targets"), tuple(sorted(set(map(str, folds)))), plans,
        chosen, tolerance)
    _check(study)
    if chosen:
        from desam_nnunet.settings.shared import check_settings

        check_settings(chosen, methods_of(trainers))
    study = replace(study, dataset_json=_description(study, before, labels, channels))
    return study if before is None else _joined(before, study)


def _trainer(name: str, plans: str, settings: dict[str, Any], existing: bool) -> Trainer:
    method = method_of(name)
    if settings:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        plans = f"{_STUDY_PLANS}_{digest}" if existing else _STUDY_PLANS  # there beside those of other studies
    if method is None:
        return Trainer(plans=plans or STOCK_PLANS)
    return Trainer(method.name, plans or method.plans_name, method.frozen_features)


def _description(
    study: Study, before: dict[str, Any] | None, labels: Sequence[str], channels: Sequence[str]
) -> dict[str, Any]:
    """``dataset.json`` without its number of cases. Files are looked into where they are not those of before."""
    unchanged = before is not None and before["sites"] == plain_sites(study.sites)
    if study.existing:
        description = common_description(study.folder("nnUNet_raw"), study.datasets)
        if not unchanged:
            classes, ignored = classes_of(description)
            check_values(check_sites(study.sites), {ignored}.union(*classes.values()), "dataset.json")
        return description
    first = next(iter(study.sites.values()))[0]
    number = len(first.images)
    if before is None or not unchanged:
        description = {"labels": labels_of(check_sites(study.sites), labels), "file_ending": ending_of(first.label)}
        channels = channels or [f"image {index}" if number > 1 else "image" for index in range(number)]
    else:
        description = before["dataset_json"] | ({"labels": given_labels(labels)} if labels else {})
    if channels and len(channels) != number:
        raise ValueError(f"--channels names {len(channels)} channel(s), but {first.name} has {number} image file(s).")
    names = {str(index): name for index, name in enumerate(channels)} or description["channel_names"]
    return {"channel_names": names} | {key: description[key] for key in ("labels", "file_ending")}


def _check(study: Study) -> None:
    if not 0 < study.tolerance <= _WIDEST:
        raise ValueError(f"--tolerance is {study.tolerance}, but must be a distance above 0 and at most {_WIDEST} mm "
                         "(longer than any volume).")
    if bad := [fold for fold in study.folds if fold != "all" and fold not in map(str, range(FOLDS))]:
        raise ValueError(f"-f {bad[0]} is no fold: give some of 0 to {FOLDS - 1}, or all.")
    if "all" in study.folds and len(study.folds) > 1:
        raise ValueError("-f all trains on all cases and can't be mixed with other folds.")
    for source in study.sources if "all" not in study.folds else ():
        number = len(study.sites[source])
        split = study.preprocessed(source) / SPLITS
        if study.existing and split.is_file():
            splits = len(read_splits(split))
            if bad := [fold for fold in study.folds if int(fold) >= splits]:
                raise ValueError(f"-f {bad[0]}: {split} has {splits} fold(s), counted from 0.")
        elif number < FOLDS:
            raise ValueError(
                f"Site {source} has {number} case(s), but nnU-Net's {FOLDS} folds need {FOLDS}: add -f all to train "
                "on all of them, or leave it out of --sources.")
    if not any(target != source for source in study.sources for target in study.targets):
        raise ValueError("There is no other site to segment: a study needs a target that is not the source.")
    if study.plans in ("", STOCK_PLANS):
        return
    if not study.existing:
        raise ValueError(f"There are no plans '{study.plans}' of data sets that are yet to be made: use --settings, or "
                         "-d with data sets that are planned.")
    for source in study.sources:
        path = study.preprocessed(source) / f"{study.plans}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: plan it for every source first.")


def _joined(before: dict[str, Any], study: Study) -> Study:
    """The study on disk with what this call adds; other data and settings are refused."""
    now = plain(study)
    if changed := _changed_case(before["sites"], now["sites"]):
        raise ValueError(f"{study.out} holds a study with other data: {changed}. Give another folder with -o.")
    for name, value in now.items():
        if name not in _GROWING and before[name] != value:
            was, this = (shorten(json.dumps(each), 60, placeholder=" ...") for each in (before[name], value))
            raise ValueError(f"{study.out} holds a study with other {name} ({was}, now {this}): give the same, or "
                             "another folder with -o.")
    trainers = {name: Trainer(**facts) for name, facts in (before["trainers"] | now["trainers"]).items()}
    grown: dict[str, Any] = {name: _unique([*before[name], *now[name]]) for name in ("sources", "targets")}
    return replace(study, trainers=trainers, **grown)


def _changed_case(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first case whose files are not those of before; empty where there is none."""
    for site in sorted(before.keys() | now.keys()):
        then, here = ({row["case"]: row for row in sites.get(site, [])} for sites in (before, now))
        for case in sorted(then.keys() | here.keys()):
            if then.get(case) != here.get(case):
                word = "is new" if case not in then else "is gone" if case not in here else "has changed since"
                return f"case {case} of site {site} {word}"
    return ""


def _read(out: Path) -> dict[str, Any] | None:
    path = out / FILE
    if not path.is_file():
        if out.is_dir() and any(
                path.name != LOCK and not path.name.endswith(TEMPORARY) for path in out.iterdir()):
            raise FileExistsError(f"{out} holds other things than a study: give a new folder with -o.")
        return None
    try:
        before = json.loads(path.read_text())
        if before.get("sites") and "version" not in before:
            raise FileExistsError(f"{out} holds a study of an earlier version, which had no Snakemake beneath: its "
                                  "report stays as it is; to go on, begin it again in another folder with -o.")
        if before.keys() != {field.name for field in fields(Study)} - {"out"} or before["version"] != VERSION:
            raise ValueError(path)
        read_study(path, out)
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of another version: give another folder with -o.") from error
    return before


def _known_sites(names: Sequence[str], sites: Sites, flag: str) -> tuple[str, ...]:
    for name in names:
        if name not in sites:
            raise ValueError(f"{flag} {name} is not among the sites {', '.join(sites)}.")
    return _unique(names or sites)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
