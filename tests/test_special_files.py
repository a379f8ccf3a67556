"""Pipes, folders and devices in the place of files: each reader says so at once, and none waits or reads for ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from fuzzing import outcome
from test_cache_store import RECIPE, fill

from desam_nnunet.cache.entry import DamagedEntryError
from desam_nnunet.cache.store import Store, open_stores
from desam_nnunet.encoders.weights import describe_file
from desam_nnunet.nnunet.model_folder import read_checkpoint, read_description
from desam_nnunet.nnunet.sites import check_sites, read_sites
from desam_nnunet.nnunet.volumes import check_volumes
from desam_nnunet.settings.shared import read_settings


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def weights(path: Path) -> Any:
    return lambda: describe_file(path)


def plans(path: Path) -> Any:
    (path.parent / "dataset.json").write_text("{}")
    return lambda: read_description(path.parent, path.stem)


def checkpoint(path: Path) -> Any:
    return lambda: read_checkpoint(path.parents[1], "0", path.name)


def settings(path: Path) -> Any:
    return lambda: read_settings(path, [])


def manifest(path: Path) -> Any:
    return lambda: check_sites(read_sites(path))


def image(path: Path) -> Any:
    label = path.with_name("label.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8)), label)
    return lambda: check_volumes("Case a", [path], label)


def reference(path: Path) -> Any:
    other = path.with_name("image.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8)), other)
    return lambda: check_volumes("Case a", [other], path)


FILES: dict[str, Callable[[Path], Any]] = {
    "weights.pth": weights, "weights.safetensors": weights, "plans.json": plans,
    "fold_0/checkpoint_final.pth": checkpoint,
    "settings.json": settings, "manifest.csv": manifest, "manifest.json": manifest, "image.nii": image,
    "image.nrrd": image, "reference.nii.gz": reference,
}


@pytest.mark.parametrize("kind", [a_pipe, a_folder, an_endless_device])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_in_one_sentence(tmp_path: Path, name: str, kind: Callable[[Path], None]) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    read = FILES[name](path)
    kind(path)
    assert outcome(read, OSError) is None


@pytest.mark.parametrize("kind", [a_pipe, a_folder, an_endless_device])
@pytest.mark.parametrize("name", ["00000_0.tile", "case.json", "store.json"])
def test_a_store_takes_nothing_for_a_file_that_is_none(tmp_path: Path, name: str, kind: Callable[[Path], None]) -> None:
    store = Store(tmp_path, replace(RECIPE))
    fill(store)
    path = next(store.folder.rglob(name))
    path.unlink()
    kind(path)
    read = outcome(lambda: store.read("case", 0, 0, "content"), DamagedEntryError, OSError)
    assert (read is None) == name.endswith("tile")
    assert store.has("case", 0, 0, "content") == (not name.endswith("tile"))
    assert (store.complete("case", "content") is None) == (name != "store.json")
    assert (open_stores(tmp_path) == []) == (name == "store.json")
