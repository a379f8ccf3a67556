"""``desam cache``: lists, verifies and deletes the stores of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

from desam_nnunet.cache.entry import DamagedEntryError, read_entry
from desam_nnunet.cache.store import Store, open_stores, store_folders
from desam_nnunet.nnunet.datasets import dataset_folder


def describe_stores(dataset: str) -> list[str]:
    """One line per store, and one for each that this version can't read."""
    stores, unreadable = _stores_of(dataset)
    return unreadable + [
        f"{store.folder.name}: {len(store.cases())} case(s), {store.size() / 1e9:.2f} GB, {store.recipe.encoder} at "
        f"{store.recipe.image_size}, {store.recipe.dtype}, computed in {store.recipe.precision}, "
        f"tiles {store.recipe.patch_size[0]} x {store.recipe.patch_size[1]}, {store.recipe.views} view(s)"
        for store in stores
    ]


def verify_stores(dataset: str) -> list[str]:
    """Reads every byte of every store; what is damaged is removed, to be built again. One line per finding."""
    stores, findings = _stores_of(dataset)
    for store in stores:
        tiles = 0
        for path in (path for case in store.cases() for path in store.entries(case)):
            try:
                read_entry(path)
                tiles += 1
            except DamagedEntryError as error:
                store.discard(path)
                findings.append(f"{error} Removed: the next build makes this tile again.")
        findings.append(f"{store.folder.name}: {tiles} tile(s) are as they were written.")
    return findings


def delete_stores(dataset: str, name: str | None) -> list[Path]:
    """Removes the store called `name`, or all of a data set's.

    Raises:
        ValueError: There is none of that name.
    """
    folders = store_folders(dataset_folder(dataset))
    chosen = [folder for folder in folders if name in (None, folder.name)]
    if name is not None and not chosen:
        known = ", ".join(folder.name for folder in folders) or "none"
        raise ValueError(f"There is no store '{name}' of {dataset_folder(dataset).name}; there are: {known}.")
    for folder in chosen:
        shutil.rmtree(folder)
    return chosen


def _stores_of(dataset: str) -> tuple[list[Store], list[str]]:
    """Those that this version can read, and a line for each other."""
    root = dataset_folder(dataset)
    stores = open_stores(root)
    unknown = {path.name for path in store_folders(root)} - {store.folder.name for store in stores}
    return stores, [f"{name}: damaged, or made by another version of desam_nnunet; --delete {name} removes it"
                    for name in sorted(unknown)]
