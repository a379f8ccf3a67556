"""Whether a step has anything to do, and how what a kill in the middle of one has left is cleared away."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
import zlib
from pathlib import Path

import SimpleITK as sitk

from desam_nnunet.cross_site.sites import ENDINGS
from desam_nnunet.cross_site.study import CHECKPOINT, Study
from desam_nnunet.encoders.weights import file_hash
from desam_nnunet.nnunet.datasets import STOCK_PLANS
from desam_nnunet.planning.facts import CONFIGURATION, SPLITS
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.system.files import replace_file

_MADE_BY = "checkpoints.json"  # beside predictions: the hashes of what made them


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
    data = folder / json.loads((folder / f"{plans}.json").read_text())["configurations"][CONFIGURATION][
        "data_identifier"]
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


def is_missing(path: Path) -> bool:
    return not path.is_file()


def is_to_be_cached(study: Study, source: str, method: str) -> bool:
    """Whether a fold of `method` is yet to be trained, and reads stored features; plans without our section do."""
    trainers = study.trainers_by_method[method]
    plans = json.loads((study.preprocessed(source) / f"{study.plans_of(trainers[0])}.json").read_text())
    features = plans["configurations"][CONFIGURATION].get("sam", {}).get("features", SamSection.features)
    return features == "cached" and any(
        is_untrained(study.fold(source, trainer, fold)) for trainer in trainers for fold in study.folds)


def is_untrained(folder: Path) -> bool:
    """Whether a fold has work left; a checkpoint that a kill has cut off is none."""
    return not (zipfile.is_zipfile(folder / CHECKPOINT) and (folder / "validation" / "summary.json").is_file())


def put_damaged_aside(folder: Path) -> None:
    """Renames the checkpoints of a fold that a kill has cut off: nnU-Net would try them first."""
    for path in (folder / name for name in (CHECKPOINT, "checkpoint_latest.pth", "checkpoint_best.pth")):
        if path.is_file() and not zipfile.is_zipfile(path):
            path.replace(path.with_name(f"{path.name}.damaged"))


def remove_stale_predictions(folder: Path, checkpoints: list[Path]) -> None:
    """Removes what other checkpoints have made and what a kill has cut off, since nnU-Net goes by names."""
    if not all(path.is_file() for path in checkpoints):
        return  # nnU-Net says which
    made_by = folder / _MADE_BY
    now = {path.parent.name: file_hash(path) for path in checkpoints}
    is_ours = made_by.is_file() and json.loads(made_by.read_text()) == now
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name.endswith(ENDINGS) and not (is_ours and _is_whole(path)):
            path.unlink()
    replace_file(made_by, [json.dumps(now).encode()])


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
