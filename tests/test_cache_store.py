"""The embedding cache's files: what is written is read, and nothing else is ever taken for it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from desam_nnunet.cache.entry import DamagedEntryError, read_entry, read_meta, write_entry
from desam_nnunet.cache.store import (
    FOLDER,
    ChangedCaseError,
    Recipe,
    Store,
    Tile,
    entry_bytes,
    open_stores,
    pack,
    unpack,
)
from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.settings.sections import DTYPES

RECIPE = Recipe(data_identifier="plans_2d", encoder="vit_tiny", identity="random", image_size=128, intensity="unit",
                window=(), patch_size=(6, 8), step=0.5, views=1, augmentation="", dtype="float16", precision="float32")
TILES = (Tile(0, 0, 0), Tile(0, 0, 4))


def features(seed: int = 0) -> Features:
    generator = torch.manual_seed(seed)
    levels = tuple(torch.randn(12, 8, 8, generator=generator) * 3 for _ in range(3))
    return Features(levels, torch.randn(4, 8, 8, generator=generator))


def fill(store: Store, content: str = "content") -> None:
    store.create()
    for number, _ in store.missing("case", content, TILES):
        store.write("case", number, 0, features(number), np.full((6, 8), number), content)
    store.finish("case", content, TILES)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path, RECIPE)
    fill(store)
    return store


def test_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = {"a": np.random.randn(3, 5).astype(np.float32), "b": np.arange(7, dtype=np.int16), "c": np.zeros((2, 1, 3))
              .astype(np.int8)}
    size = write_entry(tmp_path / "entry", arrays, {"who": "é"})
    assert (tmp_path / "entry").stat().st_size == size
    read, meta = read_entry(tmp_path / "entry")
    assert meta == read_meta(tmp_path / "entry") == {"who": "é"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    write_entry(path, {"a": np.arange(50, dtype=np.float16), "b": np.arange(3, dtype=np.int8)}, {"key": 1})
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(DamagedEntryError, match="entry"):
            read_entry(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for read in (read_entry, read_meta):
            with pytest.raises(DamagedEntryError):
                read(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamagedEntryError, match="longer"):
        read_entry(path)


@contextlib.contextmanager
def quota() -> Iterator[None]:
    """No file may grow beyond 1000 bytes, as on a full disk. For the call alone: pytest writes to a file, too."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    write_entry(path, {"a": np.arange(5, dtype=np.float32)}, {})
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large"), quota():
        write_entry(path, {"a": np.random.randn(1000).astype(np.float32)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["entry"]


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Nobody's rights, where the tests run as the administrator. For the call alone: even pytest could read nothing."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_is_not_writable_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match=f"{tmp_path.name}/{FOLDER}"), unprivileged():
        Store(tmp_path, RECIPE).create()
    tmp_path.chmod(0o755)


def test_a_store_gives_back_features_targets_and_label_counts(store: Store) -> None:
    record = store.complete("case", "content")
    assert record is not None
    assert record.tiles == TILES
    assert record.labels == (({0: 48},), ({1: 48},))
    for number in range(2):
        read, target = store.read("case", number, 0, "content")
        assert (target == number).all()
        for ours, expected in zip((*read.levels, read.neck), (*features(number).levels, features(number).neck),
                                  strict=True):
            assert ours.dtype == torch.float16
            assert (ours.float() - expected).norm() < 1e-3 * expected.norm()


def test_int8_is_off_by_half_a_step_of_its_channel_and_the_rounding_of_float16() -> None:
    feature = torch.randn(5, 8, 8) * torch.tensor([0.1, 1.0, 50, 1e3, 0])[:, None, None]
    read = unpack("x", pack("x", feature, "int8"))
    step = feature.abs().amax((1, 2)) / 127
    assert ((read - feature).abs().amax((1, 2)) <= (0.5001 + 127 * 2**-11) * step).all()
    assert read[4].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_do_not_overflow(dtype: str) -> None:
    assert torch.isfinite(unpack("x", pack("x", torch.full((1, 2, 2), 1e6), dtype))).all()


@pytest.mark.parametrize(("dtype", "megabytes"), [("float16", 34), ("int8", 17)])
def test_bytes_of_a_vit_h_tile(tmp_path: Path, dtype: str, megabytes: int) -> None:
    """Noise, which does not compress: three levels of 1280 channels and a neck of 256, at 64 x 64."""
    store = Store(tmp_path, replace(RECIPE, dtype=dtype))
    store.create()
    vit_h = Features(tuple(torch.randn(1280, 64, 64) for _ in range(3)), torch.randn(256, 64, 64))
    size = store.write("case", 0, 0, vit_h, np.random.randint(0, 3, (256, 256)), "content")
    assert size <= megabytes * 1e6
    spec = ENCODERS["vit_h"].architecture.spec(1024)
    assert size == pytest.approx(entry_bytes(spec, 1024, (256, 256), dtype), rel=0.01)


def test_what_is_missing_truncated_or_stale_is_made_again_and_nothing_else(store: Store) -> None:
    paths = store.entries("case")
    for spoil in (lambda: paths[1].unlink(), lambda: os.truncate(paths[1], 40)):
        spoil()
        assert store.complete("case", "content") is None
        assert list(store.missing("case", "content", TILES)) == [(1, 0)]
        fill(store)
        assert store.complete("case", "content") is not None
    other = store.folder / "other"
    other.mkdir()
    assert store.complete("case", "changed") is None
    assert list(store.missing("case", "changed", TILES)) == [(0, 0), (1, 0)]
    fill(store, "changed")
    assert store.complete("case", "changed") is not None
    with pytest.raises(ChangedCaseError, match="another version of the case"):
        store.read("case", 0, 0, "content")
    assert other.is_dir()


def test_a_case_that_lost_tiles_after_a_killed_build_is_complete_again(tmp_path: Path) -> None:
    store = Store(tmp_path, RECIPE)
    store.create()
    for number in range(4):
        store.write("case", number, 0, features(number), np.zeros((6, 8)), "before")
    fill(store, "now")
    assert store.complete("case", "now") is not None
    assert len(store.entries("case")) == len(TILES)


def test_an_entry_whose_arrays_are_not_as_long_as_they_say_is_refused(tmp_path: Path) -> None:
    """Not damage, which checksums find, but a file that someone made: nothing is written past an array's end."""
    path = tmp_path / "entry"
    write_entry(path, {"a": np.arange(50, dtype=np.float16)}, {})
    whole = path.read_bytes()
    length = struct.unpack("<8sII", whole[:16])[1]
    header = whole[16 : 16 + length].replace(b"[50]", b"[40]")
    path.write_bytes(struct.pack("<8sII", whole[:8], length, zlib.crc32(header)) + header + whole[16 + length :])
    with pytest.raises(DamagedEntryError, match="another length than its shape says"):
        read_entry(path)


def test_leftovers_of_killed_builds_are_removed_when_old(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("desam_nnunet.cache.store.time.time", lambda: 10_000.0)
    old, young = (store.folder / "case" / f".00001_0.tile.{name}.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (6399, 6399))
    os.utime(young, (6401, 6401))
    store.create()
    assert not old.exists()
    assert young.exists()


def test_flipped_bytes_in_features_are_found_when_read(store: Store) -> None:
    path = store.entries("case")[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedEntryError, match="00000_0.tile is damaged"):
        store.read("case", 0, 0, "content")


@pytest.mark.parametrize("change", [
    {"identity": "md5:1"}, {"image_size": 256}, {"intensity": "window"}, {"patch_size": (8, 8)}, {"dtype": "int8"},
    {"precision": "bfloat16"}, {"views": 2}, {"augmentation": "other"}, {"step": 0.25},
    {"data_identifier": "other"}, {"format": 2}, {"window": ((0.0, 1.0),)},
])
def test_everything_that_changes_a_feature_changes_the_store(tmp_path: Path, change: dict[str, Any]) -> None:
    assert replace(RECIPE, **change).folder != RECIPE.folder


def test_the_same_weights_at_another_path_are_the_same_store() -> None:
    assert replace(RECIPE, encoder="/elsewhere/weights.pth").folder == RECIPE.folder


def test_stores_are_found_by_their_recipe(store: Store, tmp_path: Path) -> None:
    assert [found.recipe for found in open_stores(tmp_path)] == [RECIPE]
    foreign = tmp_path / FOLDER / "of_another_version"
    foreign.mkdir()
    (foreign / "store.json").write_text(json.dumps({"format": 99}))
    later = Store(tmp_path, replace(RECIPE, format=2))
    later.create()
    assert later.folder != store.folder
    assert [found.recipe for found in open_stores(tmp_path)] == [RECIPE]


@pytest.mark.parametrize("letter", ["content", "48"])
def test_a_flipped_byte_in_a_cases_record_costs_the_record_alone(store: Store, letter: str) -> None:
    record = store.folder / "case" / "case.json"
    text = record.read_text()
    place = text.index(letter)
    record.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1:])
    assert store.complete("case", "content") is None
    assert list(store.missing("case", "content", TILES)) == []
    store.finish("case", "content", TILES)
    assert record.read_text() == text


@pytest.mark.parametrize("changes", [
    {"place": 7}, {"place": None}, {"place": ["case", 0]}, {"place": ["case", 1, 0]}, {"content": None}, {"content": 3},
    {"levels": 99}, {"levels": -1}, {"levels": 10**9}, {"levels": True}, {"levels": 4}, {"labels": []},
    {"labels": {"a": 1}}, {"labels": {"1": -1}},
])
def test_a_tile_with_right_sums_and_other_fields_is_refused(store: Store, changes: dict[str, Any]) -> None:
    """Nobody writes such, but by hand."""
    path = store.path("case", 0, 0)
    arrays, meta = read_entry(path)
    write_entry(path, arrays, meta | changes)
    with pytest.raises(DamagedEntryError, match="is no tile: its fields are others|is in the wrong place"):
        store.read("case", 0, 0, "content")
    if changes.get("levels") not in (4, 99):  # which only the arrays show
        assert not store.has("case", 0, 0, "content")


def test_a_tile_of_int8_without_its_scales_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, replace(RECIPE, dtype="int8"))
    fill(store)
    path = store.path("case", 0, 0)
    arrays, meta = read_entry(path)
    write_entry(path, {name: array for name, array in arrays.items() if name != "neck_scale"}, meta)
    with pytest.raises(DamagedEntryError, match="is no tile: its fields are others"):
        store.read("case", 0, 0, "content")


@pytest.mark.parametrize("header", [
    [], {"meta": 1, "arrays": []}, {"meta": {}}, {"meta": {}, "arrays": {}}, {"meta": {}, "arrays": [1]},
    {"meta": {}, "arrays": [{"name": "a", "dtype": "int8", "shape": ["x"], "bytes": 1, "crc": 0}]},
    {"meta": {}, "arrays": [{"name": "a", "dtype": "int8", "shape": [1], "bytes": -1, "crc": 0}]},
])
def test_a_header_with_a_right_sum_and_other_fields_is_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "entry").write_bytes(struct.pack("<8sII", b"DESAM\x00\x01\n", len(text), zlib.crc32(text)) + text)
    for read in (read_entry, read_meta):
        with pytest.raises(DamagedEntryError, match="is no cache entry: its header has other fields"):
            read(tmp_path / "entry")


@pytest.mark.parametrize("changes", [
    {"sizes": []}, {"tiles": 3}, {"tiles": [[0, 0]]}, {"tiles": [["a", 0, 0]]}, {"labels": [3, 3]}, {"labels": []},
    {"labels": [[[1]], [[1]]]}, {"labels": [[{"a": 1}], [{"a": 1}]]}, {"labels": [[{}, {}], [{}, {}]]},
])
def test_a_record_with_a_right_sum_and_other_fields_is_none(store: Store, changes: dict[str, Any]) -> None:
    path = store.record_path("case")
    record = json.loads(path.read_text())["record"] | changes
    path.write_text(json.dumps({"crc": zlib.crc32(json.dumps(record).encode()), "record": record}))
    assert store.complete("case", "content") is None


def test_pipes_in_the_place_of_files_hold_nobody_up(store: Store) -> None:
    tile, record, recipe = store.path("case", 0, 0), store.record_path("case"), store.folder / "store.json"
    for path in (tile, record, recipe):
        path.unlink()
        os.mkfifo(path)
    assert not store.has("case", 0, 0, "content")
    with pytest.raises(OSError, match="not a regular file"):
        store.read("case", 0, 0, "content")
    assert store.complete("case", "content") is None
    assert open_stores(store.folder.parents[1]) == []
