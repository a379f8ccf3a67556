"""``desam cache``: lists, verifies and deletes the stores of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

from desam_nnunet.cache.store import Store, open_stores, store_folders
from desam_nnunet.cache.verify import verify_store
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
    """Every store, as :func:`~desam_nnunet.cache.verify.verify_store`; a line for each that this version can't read."""
    stores, findings = _stores_of(dataset)
    return findings + [finding for store in stores for finding in verify_store(store)]


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
