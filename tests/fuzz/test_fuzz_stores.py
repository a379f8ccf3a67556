"""Stores whose files were changed, swapped, renamed or removed behind our back."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from fuzzing import outcome
from hypothesis import given
from hypothesis import strategies as st
from test_cache_store import RECIPE, features

from desam_nnunet.cache.entry import DamagedEntryError
from desam_nnunet.cache.store import Store, Tile
from desam_nnunet.cache.verify import verify_store

CASES, NUMBERS, VIEWS = ("a", "b"), 2, 2
PLACES = [(case, number, view) for case in CASES for number in range(NUMBERS) for view in range(VIEWS)]
KINDS = ("flip", "cut", "grow", "swap", "copy over", "rename", "remove", "blank", "record", "recipe")


def seed(place: tuple[str, int, int]) -> int:
    return PLACES.index(place)


def made(root: Path) -> Store:
    store = Store(root, replace(RECIPE, views=VIEWS))
    store.create()
    for place in PLACES:
        store.write(*place, features(seed(place)), np.full((6, 8), seed(place)), f"content of {place[0]}")
    for case in CASES:
        store.finish(case, f"content of {case}", [Tile(number, 0, 0) for number in range(NUMBERS)])
    return store


def spoil(store: Store, kind: str, one: Path, other: Path, at: int) -> None:
    content = bytearray(one.read_bytes()) if one.is_file() else bytearray()
    if kind == "flip" and content:
        content[at % len(content)] ^= 1 << at % 8
        one.write_bytes(content)
    elif kind == "cut":
        one.write_bytes(content[: at % (len(content) + 1)])
    elif kind == "grow":
        one.write_bytes(content + bytes(at % 50 + 1))
    elif kind == "swap" and other.is_file():
        theirs = other.read_bytes()
        other.write_bytes(content)
        one.write_bytes(theirs)
    elif kind == "copy over" and other.is_file():
        one.write_bytes(other.read_bytes())
    elif kind == "rename" and one.is_file():
        os.replace(one, one.with_name(f"{at % 3:05d}_{at % 2}.tile"))
    elif kind == "remove":
        one.unlink(missing_ok=True)
    elif kind == "blank":
        one.write_bytes(b"")
    elif kind == "record":
        path = one.with_name("case.json")
        text = bytearray(path.read_bytes())
        text[at % len(text)] ^= 1 << at % 7
        path.write_bytes(text)
    elif kind == "recipe":
        path = store.folder / "store.json"
        path.write_bytes(path.read_bytes()[: at % 300])


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(PLACES), st.sampled_from(PLACES),
                          st.integers(0, 10**6)), min_size=1, max_size=3))
def test_what_is_read_is_what_was_written_there(changes: list[tuple[str, tuple, tuple, int]]) -> None:
    """Every tile is its own, or refused; what verify leaves is sound, and what it says is one line each."""
    root = Path(tempfile.mkdtemp())
    try:
        store = made(root)
        for kind, one, other, at in changes:
            spoil(store, kind, store.path(*one), store.path(*other), at)
        for place in PLACES:
            case, number, view = place
            read = outcome(lambda c=case, n=number, v=view: store.read(c, n, v, f"content of {c}"), DamagedEntryError)
            if read is not None:
                found, target = read
                assert (target == seed(place)).all()
                expected = features(seed(place))
                assert all(np.array_equal(ours, theirs.half())
                           for ours, theirs in zip(found.tensors, expected.tensors, strict=True))
            outcome(lambda c=case: store.complete(c, f"content of {c}") or True)
        assert all(line.isprintable() for line in verify_store(store))
        assert len(verify_store(store)) == 1  # what it found is gone
    finally:
        shutil.rmtree(root)
