"""``desam cache --verify``: everything that a training would find wrong with a store, before it starts."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from desam_nnunet.cache.entry import DamagedEntryError, read_entry
from desam_nnunet.cache.store import Store, check_meta
from desam_nnunet.cache.tiles import content_of, tiles_of
from desam_nnunet.nnunet.datasets import open_cases
from desam_nnunet.system.files import told

_TILE = re.compile(r"(\d{5})_(\d+)\.tile")


def verify_store(store: Store) -> list[str]:
    """Reads every byte; what is damaged or misplaced is removed, to be built again. A line per finding."""
    findings: list[str] = []
    dataset = _preprocessed(store)
    expected = set(dataset.identifiers) if dataset else set()
    sound, unknown = 0, 0
    for case in store.cases():
        content = content_of(Path(dataset.source_folder), case) if dataset and case in expected else None
        for path in store.entries(case):
            finding, knows_its_place = _look_at(store, case, path, content)
            findings += finding
            sound += not finding
            unknown += not finding and not knows_its_place
        if dataset and case not in expected:
            findings.append(f"{store.folder.name}: {case} is not in the preprocessed data: nothing reads it.")
    for case in sorted(expected):
        assert dataset is not None
        findings += _lacking(store, dataset, case)
    older = f"; of {unknown} the position is unknown, since they are from before entries held it" if unknown else ""
    return [*findings, f"{store.folder.name}: {sound} tile(s) are as they were written{older}."]


def _preprocessed(store: Store) -> nnUNetBaseDataset | None:
    """The data that it was made from, if that is still there."""
    with suppress(FileNotFoundError):
        return open_cases(store.folder.parents[1] / store.recipe.data_identifier)
    return None


def _look_at(store: Store, case: str, path: Path, content: str | None) -> tuple[list[str], bool]:
    """What is wrong with a file, at most one line, and whether it knows which tile it is.

    Args:
        content: Of the case as it is preprocessed now; None where that is not known.
    """
    try:
        name = _TILE.fullmatch(path.name)
        if name is None:
            raise DamagedEntryError(f"{told(path)} is no name of a tile.")
        arrays, meta = read_entry(path)
        check_meta(path, meta, case, int(name[1]), int(name[2]), arrays)
        if content not in (None, meta["content"]):
            raise DamagedEntryError(f"{path} was made from another version of the case.")
    except DamagedEntryError as error:
        store.discard(path)
        return [f"{error} Removed: the next build makes what is missing."], False
    except OSError as error:
        return [f"{path} can't be read ({error.strerror}): remove it."], False
    return [], "place" in meta


def _lacking(store: Store, dataset: nnUNetBaseDataset, case: str) -> list[str]:
    """What a build would make of a case, at most one line."""
    content = content_of(Path(dataset.source_folder), case)
    if store.complete(case, content) is not None:
        return []
    record = store.record_path(case)
    if record.exists() and not record.is_file():
        return [f"{record} is no file: remove it."]
    tiles = tiles_of(dataset.load_case(case)[0].shape[1:], store.recipe.patch_size)
    missing, total = len(store.missing(case, content, tiles)), len(tiles) * store.recipe.views
    what = f"{missing} of {total} tiles are missing or of another version" if missing else (
        "its case.json is missing, damaged or out of date")
    return [f"{store.folder.name}: {case}: {what}. The next build makes it good."]
