"""One data set's embeddings on disk, for one encoder and one way to make its tiles.

    nnUNet_preprocessed/Dataset501_X/desam_cache/<data identifier>_<key>/
        store.json          the recipe: everything that changes a feature, in clear
        <case>/case.json    written when the case is complete: its tiles, their labels, what it was made from
        <case>/00012_0.tile the features and the target of tile 12, view 0

Every file is written under a temporary name and renamed, and nothing is deleted but what is stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from desam_nnunet.cache.entry import Arrays, DamagedEntryError, is_count, packed, read_entry, read_meta
from desam_nnunet.encoders.base import Features, FeatureSpec
from desam_nnunet.system.files import TEMPORARY, replace_file, told

FOLDER = "desam_cache"
FORMAT = 1
_RECIPE = "store.json"
_CASE = "case.json"
_MOST = 100  # levels, more than any encoder has
_ABANDONED = 3600  # seconds after which a temporary file belongs to no running build


@dataclass(frozen=True)
class Recipe:
    """Everything but the images themselves that changes a feature; two stores with one recipe are the same store.

    Attributes:
        data_identifier: nnU-Net's name of the preprocessed data.
        encoder, identity, image_size, intensity: As in the plans' section ``sam``.
        window: Per channel, for the intensity rule ``window``.
        patch_size: Height and width of a tile.
        step: Of the sliding window, in tiles.
        views: Versions of each tile, the first as it is.
        augmentation: Names what the others are made with; empty where there are none.
        dtype: ``float16`` or ``int8``, on disk.
        precision: In which the encoder computed.
        reads: Which maps were read of which images, where the identity of the weights does not say so.
    """

    data_identifier: str
    encoder: str
    identity: str
    image_size: int
    intensity: str
    window: tuple[tuple[float, float], ...]
    patch_size: tuple[int, int]
    step: float
    views: int
    augmentation: str
    dtype: str
    precision: str
    format: int = FORMAT
    reads: str = ""

    def fields(self) -> dict[str, Any]:
        """As it is written; stores that are older than `reads` have none."""
        return {key: value for key, value in asdict(self).items() if key != "reads" or value}

    @property
    def key(self) -> str:
        """SHA-256 over all of it but the encoder's path, which its identity makes superfluous."""
        return hashlib.sha256(json.dumps(self.fields() | {"encoder": ""}, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> str:
        return f"{self.data_identifier}_{self.key[:12]}"


class Tile(NamedTuple):
    """A patch-sized window: slice, and row and column of its first pixel, which padding makes negative."""

    slice: int
    top: int
    left: int


class CaseRecord(NamedTuple):
    """A complete case.

    Attributes:
        content: Names the preprocessed images and labels that it was made from.
        tiles: In the order of their numbers.
        labels: Per tile and view, how many pixels each label has.
        sizes: Of its files, in bytes.
    """

    content: str
    tiles: tuple[Tile, ...]
    labels: tuple[tuple[dict[int, int], ...], ...]
    sizes: dict[str, int]


class ChangedCaseError(ValueError):
    """The case was preprocessed again since, and what is stored belongs to its new version."""


class Store:
    """Reads and writes one store.

    Args:
        root: The data set's folder in ``nnUNet_preprocessed``.
    """

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = root / FOLDER / recipe.folder

    def create(self) -> None:
        """Makes the folder, writes the recipe, and removes what killed builds left under temporary names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / _RECIPE, [json.dumps(self.recipe.fields()).encode()])
        for path in self.folder.glob(f"*/.*{TEMPORARY}"):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    def complete(self, case: str, content: str) -> CaseRecord | None:
        """The record of `case`, if it was made from `content` and every file is there in its full length."""
        path = self.record_path(case)
        if not path.is_file():  # a pipe in its place would never end
            return None
        sizes = {path.name: path.stat().st_size for path in self.entries(case)}
        try:
            given = json.loads(path.read_text())
            record = given["record"]
            is_current = given["crc"] == _crc_of(record) and record["content"] == content
            is_whole = record["sizes"].items() <= sizes.items()
            tiles = tuple(Tile(*map(int, tile)) for tile in record["tiles"])
            labels = tuple(tuple({int(k): int(n) for k, n in view.items()} for view in views)
                           for views in record["labels"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not is_current or not is_whole or [len(views) for views in labels] != [self.recipe.views] * len(tiles):
            return None
        return CaseRecord(content, tiles, labels, record["sizes"])

    def missing(self, case: str, content: str, tiles: Sequence[Tile]) -> list[tuple[int, int]]:
        """Numbers and views of the tiles that are not here yet, or were made from another content."""
        return [(number, view) for number in range(len(tiles)) for view in range(self.recipe.views)
                if not self.has(case, number, view, content)]

    def has(self, case: str, number: int, view: int, content: str) -> bool:
        """Whether a tile is here in its full length, made from `content`, and no other one's file lies in its place."""
        path = self.path(case, number, view)
        try:
            meta = read_meta(path)
            check_meta(path, meta, case, number, view)
        except (OSError, DamagedEntryError):
            return False
        return meta["content"] == content

    def bytes_of(self, case: str, number: int, view: int) -> int:
        """What a tile takes on disk now, whatever it was made from."""
        path = self.path(case, number, view)
        return path.stat().st_size if path.is_file() else 0

    def write(self, case: str, number: int, view: int, features: Features, target: np.ndarray, content: str) -> int:
        """Stores one tile, features (C, h, w) each and labels (H, W); returns its size in bytes."""
        (self.folder / case).mkdir(exist_ok=True)
        parts = self.packed(case, number, view, features, target, content)
        return replace_file(self.path(case, number, view), parts)

    def packed(
        self, case: str, number: int, view: int, features: Features, target: np.ndarray, content: str
    ) -> list[bytes]:
        """The parts of a tile's file, as :meth:`write` has them."""
        arrays = {"target": target.astype(np.int16)}
        for name, feature in zip(_names(len(features.levels)), features.tensors, strict=True):
            arrays |= pack(name, feature, self.recipe.dtype)
        values, counts = np.unique(target, return_counts=True)
        labels = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
        meta = {"content": content, "place": [case, number, view], "levels": len(features.levels), "labels": labels}
        return packed(arrays, meta)

    def finish(self, case: str, content: str, tiles: Sequence[Tile]) -> None:
        """Removes tiles that a case no longer has and writes its record; its other tiles are all here.

        In this order, because a case with a record is not looked at again.
        """
        paths = [[self.path(case, number, view) for view in range(self.recipe.views)] for number in range(len(tiles))]
        labels = [[read_meta(path)["labels"] for path in views] for views in paths]
        sizes = {path.name: path.stat().st_size for views in paths for path in views}
        record = {"content": content, "tiles": tiles, "labels": labels, "sizes": sizes}
        for path in self.entries(case):
            if path.name not in sizes:
                path.unlink(missing_ok=True)
        replace_file(self.record_path(case), [json.dumps({"crc": _crc_of(record), "record": record}).encode()])

    def read(
        self, case: str, number: int, view: int, content: str, into: Features | None = None
    ) -> tuple[Features, np.ndarray]:
        """Features (C, h, w) each, in float16 and without a batch dimension, and labels (H, W) of one tile.

        Args:
            into: Tensors to fill and return, such as a place in a batch.

        Raises:
            DamagedEntryError: Naming the file, which is damaged or another tile's; it is to be built again. Files from
                before entries knew their place are taken at their name.
            ChangedCaseError: It is sound, but belongs to another version of the case.
            FileNotFoundError: It is not here.
        """
        path = self.path(case, number, view)
        outputs = {} if into is None else dict(zip(_names(len(into.levels)), into.tensors, strict=True))
        places = {name: x.numpy() for name, x in outputs.items() if self.recipe.dtype == "float16"}
        arrays, meta = read_entry(path, places)
        check_meta(path, meta, case, number, view, arrays)
        if meta["content"] != content:
            raise ChangedCaseError(f"{path} was made from another version of the case.")
        *levels, neck = (unpack(name, arrays, outputs.get(name)) for name in _names(meta["levels"]))
        return Features(tuple(levels), neck), arrays["target"]

    def discard(self, path: Path) -> None:
        """Removes a tile's file and the word that its case is complete."""
        (path.parent / _CASE).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def entries(self, case: str) -> list[Path]:
        """The files of a case's tiles."""
        return sorted((self.folder / case).glob("*.tile"))

    def cases(self) -> list[str]:
        """The cases of which something is stored."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir()) if self.folder.is_dir() else []

    def size(self) -> int:
        """Bytes of all tiles on disk."""
        return sum(path.stat().st_size for case in self.cases() for path in self.entries(case))

    def record_path(self, case: str) -> Path:
        """The file that says that a case is complete, whether it is there or not."""
        return self.folder / case / _CASE

    def path(self, case: str, number: int, view: int) -> Path:
        """The file of one tile, whether it is there or not."""
        return self.folder / case / f"{number:05d}_{view}.tile"


def check_meta(
    path: Path, meta: dict[str, Any], case: str, number: int, view: int, arrays: Arrays | None = None
) -> None:
    """Refuses an entry that is another tile's or none; one from before entries knew their place is taken at its name.

    Args:
        arrays: What it holds, if it has been read.

    Raises:
        DamagedEntryError: Naming the tile that it is.
    """
    place, levels = meta.get("place", [case, number, view]), meta.get("levels")
    sound = (isinstance(meta.get("content"), str) and _are_labels(meta.get("labels"))
             and isinstance(place, list) and len(place) == 3 and is_count(levels) and levels < _MOST)
    if not sound or (arrays is not None and not _are_whole(arrays, ["target", *_names(levels or 0)])):
        raise DamagedEntryError(f"{path} is no tile: its fields are others.")
    if place != [case, number, view]:
        raise DamagedEntryError(f"{path} is in the wrong place: it is tile {told(place[1])}, view {told(place[2])}, of "
                                f"{told(place[0])}.")


def _are_whole(arrays: Arrays, names: Sequence[str]) -> bool:
    """Whether all are there, and the scales of those that need them."""
    return all(name in arrays and (arrays[name].dtype != np.int8 or f"{name}_scale" in arrays) for name in names)


def _are_labels(value: object) -> bool:
    """Whether it is how many pixels each label has, as JSON has it."""
    return isinstance(value, dict) and all(
        key.removeprefix("-").isdecimal() and is_count(count) for key, count in value.items())


def store_folders(root: Path) -> list[Path]:
    """The folders of all stores of a data set, whatever version made them."""
    return sorted(path for path in (root / FOLDER).glob("*") if path.is_dir())


def open_stores(root: Path) -> list[Store]:
    """Every store of a data set that this version can read."""
    stores = []
    for folder in store_folders(root):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if not (folder / _RECIPE).is_file():  # a pipe in its place would never end
                continue
            given: dict[str, Any] = json.loads((folder / _RECIPE).read_text())
            given |= {"window": tuple(map(tuple, given["window"])), "patch_size": tuple(given["patch_size"])}
            store = Store(root, Recipe(**given))
            if store.folder == folder and store.recipe.format == FORMAT:
                stores.append(store)
    return stores


def pack(name: str, feature: torch.Tensor, dtype: str) -> Arrays:
    """A feature (C, h, w) as it is stored: float16, or int8 with one scale per channel; never beyond float16."""
    limit = torch.finfo(torch.float16).max
    if dtype == "float16":  # what was beyond is infinite by then
        return {name: feature.to(torch.float16).clamp(-limit, limit).cpu().numpy()}
    feature = feature.clamp(-limit, limit)
    scale = (feature.float().abs().amax((1, 2)) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    values = (feature.float() / scale[:, None, None]).round().to(torch.int8)
    return {name: values.cpu().numpy(), f"{name}_scale": scale.cpu().numpy()}


def unpack(name: str, arrays: Arrays, out: torch.Tensor | None = None) -> torch.Tensor:
    """The feature (C, h, w) in float16. Args: out: Where int8 is unpacked to."""
    values = torch.from_numpy(arrays[name])
    if (scale := arrays.get(f"{name}_scale")) is None:
        return values
    return torch.mul(values, torch.from_numpy(scale)[:, None, None], out=out).half()


def entry_bytes(spec: FeatureSpec, image_size: int, patch_size: Sequence[int], dtype: str) -> int:
    """About how many bytes a tile takes."""
    scales = 4 * spec.channels if dtype == "int8" else 0
    return spec.values(image_size) * np.dtype(dtype).itemsize + scales + int(np.prod(patch_size)) // 4 + 1024


def _names(levels: int) -> list[str]:
    return [*(f"level{index}" for index in range(levels)), "neck"]


def _crc_of(record: object) -> int:
    return zlib.crc32(json.dumps(record).encode())
