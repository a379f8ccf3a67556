"""``desam cache``: lists, verifies and deletes the stores of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from desam_nnunet.cache.store import open_stores, store_folders
from desam_nnunet.cache.verify import verify_store
from desam_nnunet.nnunet.datasets import dataset_folder


class Row(NamedTuple):
    """What a list says of a store."""

    store: str
    cases: str
    size: str
    encoder: str
    stored_as: str
    tile: str
    views: str


def describe_stores(dataset: str) -> list[Row]:
    """A row for each store that this version can read."""
    return [
        Row(store.folder.name, str(len(store.cases())), f"{store.size() / 1e9:.2f} GB",
            f"{store.recipe.encoder} at {store.recipe.image_size}",
            f"{store.recipe.dtype}, computed in {store.recipe.precision}",
            " x ".join(map(str, store.recipe.patch_size)), str(store.recipe.views))
        for store in open_stores(dataset_folder(dataset))]


def unreadable_stores(dataset: str) -> list[str]:
    """A line for each store that this version can't read."""
    root = dataset_folder(dataset)
    unknown = {path.name for path in store_folders(root)} - {store.folder.name for store in open_stores(root)}
    return [f"{name}: damaged, or made by another version of desam_nnunet; --delete {name} removes it"
            for name in sorted(unknown)]


def verify_stores(dataset: str) -> list[str]:
    """Every store, as :func:`~desam_nnunet.cache.verify.verify_store`; a line for each that this version can't read."""
    stores = open_stores(dataset_folder(dataset))
    return unreadable_stores(dataset) + [finding for store in stores for finding in verify_store(store)]


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
