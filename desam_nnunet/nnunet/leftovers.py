"""What nnU-Net has finished, and what of it a kill has left half done: how one knows, and how it is cleared away."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import SimpleITK as sitk

from desam_nnunet.nnunet.names import CHECKPOINT, CONFIGURATION, SPLITS
from desam_nnunet.nnunet.sites import ENDINGS
from desam_nnunet.system.files import replace_file

_MADE_BY = "checkpoints.json"  # beside predictions: the hashes of what made them


def is_preprocessed(folder: Path, plans: str, ending: str, cases: Iterable[str]) -> bool:
    """Whether all cases of the data set in a folder of ``nnUNet_preprocessed`` are."""
    path = folder / f"{plans}.json"
    if not path.is_file():
        return False
    data = folder / json.loads(path.read_text())["configurations"][CONFIGURATION]["data_identifier"]
    return all((data / f"{case}.pkl").is_file() and  # written last
               (folder / "gt_segmentations" / f"{case}{ending}").is_file() for case in cases)


def clear_preprocessed(folder: Path) -> None:
    """Empties the folder of a preprocessed data set, since what is there is half of something; the split stays, because
    trained folds rest on it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != SPLITS:
            path.unlink()


def is_trained(folder: Path) -> bool:
    """Whether a fold has no work left; a checkpoint that a kill has cut off is none."""
    return zipfile.is_zipfile(folder / CHECKPOINT) and (folder / "validation" / "summary.json").is_file()


def put_damaged_aside(folder: Path) -> None:
    """Renames the checkpoints of a fold that a kill has cut off: nnU-Net would try them first."""
    for path in (folder / name for name in (CHECKPOINT, "checkpoint_latest.pth", "checkpoint_best.pth")):
        if path.is_file() and not zipfile.is_zipfile(path):
            path.replace(path.with_name(f"{path.name}.damaged"))


def remove_stale_predictions(folder: Path, checkpoints: list[Path]) -> None:
    """Removes what other checkpoints have made and what a kill has cut off, since nnU-Net goes by names."""
    made_by = folder / _MADE_BY
    now = {path.parent.name: _hash_of(path) for path in checkpoints}
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


def _hash_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
