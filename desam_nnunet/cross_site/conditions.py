"""Whether a step has anything to do, and what a kill in the middle of one has left to clear away."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
import zlib
from pathlib import Path

import SimpleITK as sitk

from desam_nnunet.cross_site.sites import ENDINGS
from desam_nnunet.cross_site.study import CHECKPOINT, Study, method_of
from desam_nnunet.encoders.weights import file_hash
from desam_nnunet.planning.facts import CONFIGURATION, SPLITS, STOCK_PLANS
from desam_nnunet.settings.sections import FEATURES
from desam_nnunet.system.files import replace_file

_MADE_BY = "checkpoints.json"  # beside predictions: the hashes of what made them


def planned(study: Study, source: str) -> str | None:
    """The plans that an existing data set has, whose preprocessed data are used; None where it has none."""
    name = study.plans or STOCK_PLANS
    return name if (study.preprocessed(source) / f"{name}.json").is_file() else None


def is_unprepared(study: Study, source: str) -> bool:
    """Whether a case is not preprocessed. A study's own data set begins anew, since what is there is half of something;
    the split stays, because trained folds rest on it."""
    folder = study.preprocessed(source)
    if not study.existing:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != SPLITS:
                path.unlink()
        return True
    plans = planned(study, source)
    if plans is None:
        return True
    configuration = json.loads((folder / f"{plans}.json").read_text())["configurations"][CONFIGURATION]
    data = folder / configuration["data_identifier"]
    ending = study.dataset_json["file_ending"]
    return not all((data / f"{case.name}.pkl").is_file() and  # written last
                   (folder / "gt_segmentations" / f"{case.name}{ending}").is_file() for case in study.sites[source])


def is_to_be_cached(study: Study, source: str, method: str) -> bool:
    """Whether a fold of `method` is yet to be trained, and reads stored features; plans without our section do."""
    trainers = [trainer for trainer in study.trainers if (of := method_of(trainer)) is not None and of.name == method]
    folds = (study.model(source, trainer) / f"fold_{fold}" for trainer in trainers for fold in study.folds)
    plans = json.loads((study.preprocessed(source) / f"{study.plans_of(trainers[0])}.json").read_text())
    features = plans["configurations"][CONFIGURATION].get("sam", {}).get("features", FEATURES[1])
    return features == FEATURES[1] and any(map(is_untrained, folds))


def final_checkpoints(study: Study, source: str, trainer: str) -> list[Path]:
    """Of all folds, whether they are there or not."""
    return [study.model(source, trainer) / f"fold_{fold}" / CHECKPOINT for fold in study.folds]


def is_missing(path: Path) -> bool:
    return not path.is_file()


def is_untrained(folder: Path) -> bool:
    """Whether a fold has work left. Checkpoints that a kill has cut off are put aside: nnU-Net would try them first."""
    names = (CHECKPOINT, "checkpoint_latest.pth", "checkpoint_best.pth")
    for path in (folder / name for name in names):
        if path.is_file() and not zipfile.is_zipfile(path):
            path.replace(path.with_name(f"{path.name}.damaged"))
    return not ((folder / CHECKPOINT).is_file() and (folder / "validation" / "summary.json").is_file())


def is_unsegmented(folder: Path, checkpoints: list[Path]) -> bool:
    """There is always something to do. What other checkpoints have made is removed, and what a kill has cut off, since
    nnU-Net goes by names."""
    if not all(path.is_file() for path in checkpoints):
        return True  # nnU-Net says which
    made_by = folder / _MADE_BY
    now = {path.parent.name: file_hash(path) for path in checkpoints}
    is_ours = made_by.is_file() and json.loads(made_by.read_text()) == now
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name.endswith(ENDINGS) and not (is_ours and _is_whole(path)):
            path.unlink()
    replace_file(made_by, [json.dumps(now).encode()])
    return True


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                while stream.read(2**24):
                    pass  # the checksum is at the end
        sitk.ReadImage(path)
    except (OSError, EOFError, RuntimeError, zlib.error):
        return False
    return True
