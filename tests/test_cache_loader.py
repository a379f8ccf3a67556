"""Batches of cached tiles are drawn as nnU-Net draws its patches."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from test_cache_store import RECIPE, features

from desam_nnunet.cache.entry import DamagedEntryError
from desam_nnunet.cache.loader import CachedLoader, Draw
from desam_nnunet.cache.store import ChangedCaseError, Store, Tile

PLAIN = {"background": 0, "a": 1, "b": 2}
EMPTY, ONLY_A, MOSTLY_B = 0, 1, 2
SLICES = tuple(Tile(number, 0, 0) for number in range(3))


def target_of(number: int) -> np.ndarray:
    """Tile 0 is empty, tile 1 has 20 pixels of a, tile 2 has 5 of a and 30 of b. The last row lies outside."""
    target = np.zeros((6, 8), int)
    target.flat[:20] = number == ONLY_A
    if number == MOSTLY_B:
        target.flat[:5], target.flat[5:35] = 1, 2
    target[5] = -1
    return target


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., CachedLoader]:
    def build(
        labels: dict[str, Any] = PLAIN, order: list[int] | None = None, tiles: Sequence[Tile] = SLICES, **options: Any
    ) -> CachedLoader:
        store = Store(tmp_path, RECIPE)
        store.create()
        for number in range(len(tiles)):
            store.write("case", number, 0, features(number), target_of(number), "content")
        store.finish("case", "content", list(tiles))
        record = store.complete("case", "content")
        assert record is not None
        manager = LabelManager(labels, order)
        transforms = nnUNetTrainer.get_validation_transforms(
            None, foreground_labels=manager.foreground_labels,
            regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label)
        defaults = {"batch_size": 4, "oversample": 0.5, "probabilistic": False, "workers": 0, "pin_memory": False,
                    "in_memory": False, "views": 1}
        return CachedLoader(store, {"case": record}, label_manager=manager, transforms=transforms,
                            **(defaults | options))

    return build


def shares(loader: CachedLoader, place: int, batches: int = 2000) -> dict[int, float]:
    np.random.seed(0)
    counts = Counter(loader.draw()[place].number for _ in range(batches))
    return {number: count / batches for number, count in counts.items()}


def test_the_last_of_a_batch_hold_foreground_class_by_class(make: Callable[..., CachedLoader]) -> None:
    loader = make()
    anywhere, foreground = shares(loader, 0), shares(loader, 3)
    assert anywhere == pytest.approx(dict.fromkeys((EMPTY, ONLY_A, MOSTLY_B), 1 / 3), abs=0.04)
    # half of the time class a: 20 of 25 pixels in tile 1; half of the time class b: all in tile 2
    assert foreground == pytest.approx({ONLY_A: 0.4, MOSTLY_B: 0.6}, abs=0.04)


def test_probabilistic_oversampling_is_per_sample(make: Callable[..., CachedLoader]) -> None:
    drawn = shares(make(probabilistic=True, oversample=1.0), 0)
    assert EMPTY not in drawn


def test_with_an_ignore_label_tiles_are_drawn_by_their_labelled_pixels(make: Callable[..., CachedLoader]) -> None:
    drawn = shares(make({"background": 0, "a": 1, "ignore": 2}, oversample=0.0), 0)
    assert drawn == pytest.approx({EMPTY: 40 / 90, ONLY_A: 40 / 90, MOSTLY_B: 10 / 90}, abs=0.04)


def test_regions_are_targets_and_classes(make: Callable[..., CachedLoader]) -> None:
    loader = make({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    draws = loader.draw()
    batch = loader.read([draw._replace(number=MOSTLY_B) for draw in draws])
    assert batch["target"].sum((2, 3)).tolist() == [[35, 30]] * 4
    # whole: 20 of 55 pixels in tile 1; core: all in tile 2
    assert shares(loader, 3) == pytest.approx({ONLY_A: 10 / 55, MOSTLY_B: 45 / 55}, abs=0.04)


@pytest.mark.parametrize("options", [{"workers": 2}, {"in_memory": True}, {"workers": 1, "in_memory": True}])
def test_threads_and_memory_change_nothing(make: Callable[..., CachedLoader], options: dict[str, Any]) -> None:
    loaders = make(), make(**options)
    batches = []
    for loader in loaders:
        np.random.seed(3)
        batches.append([copy.deepcopy(next(loader)) for _ in range(5)])
        loader.close()
    for one, other in zip(*batches, strict=True):
        assert one["keys"] == other["keys"] == ["case"] * 4
        assert torch.equal(one["target"], other["target"])
        assert torch.equal(one["features"].neck, other["features"].neck)
        for a, b in zip(one["features"].levels, other["features"].levels, strict=True):
            assert torch.equal(a, b)


def test_no_tile_is_kept_once_memory_is_short(
    make: Callable[..., CachedLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much was free when training began: other trainings fill it as well."""
    monkeypatch.setattr("desam_nnunet.cache.loader.memory_limit", lambda: 10**9)
    loader, free = make(in_memory=True), iter([10**9, 10**8 - 1])
    monkeypatch.setattr("desam_nnunet.cache.loader.free_memory", lambda device: next(free, 0))
    read, real = [], Store.read
    monkeypatch.setattr(Store, "read", lambda self, case, number, *rest: read.append(number) or real(
        self, case, number, *rest))
    draws = [Draw("case", number, 0) for number in (0, 1, 1, 0)]
    batches = [loader.read(draws) for _ in range(2)]
    assert read == [0, 1, 1, 1, 1]
    assert torch.equal(batches[0]["features"].neck, batches[1]["features"].neck)


def test_a_batch_stays_valid_while_the_next_one_is_used(make: Callable[..., CachedLoader]) -> None:
    loader = make(workers=2)
    last = next(loader)
    for _ in range(10):
        before = last["features"].neck.clone()
        batch = next(loader)
        wait(loader._coming)  # all that is read ahead has been written somewhere
        assert torch.equal(last["features"].neck, before)
        last = batch
    loader.close()


def test_features_and_target_belong_together(make: Callable[..., CachedLoader]) -> None:
    loader = make()
    draws = [draw._replace(number=number) for number, draw in zip((2, 0, 1, 2), loader.draw(), strict=True)]
    batch = loader.read(draws)
    for place, number in enumerate((2, 0, 1, 2)):
        assert torch.equal(batch["features"].neck[place], features(number).neck.half())
        assert torch.equal(batch["target"][place, 0], torch.from_numpy(target_of(number)).short().clamp(min=0))


def test_a_damaged_tile_ends_in_one_sentence_and_is_built_again(make: Callable[..., CachedLoader]) -> None:
    loader = make()
    path = loader.store.entries("case")[1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    draw = loader.draw()[0]._replace(number=1)
    with pytest.raises(DamagedEntryError, match=r"00001_0.tile is damaged.*Start again with --c: this tile alone"):
        loader.read([draw])
    assert list(loader.store.missing("case", "content", [Tile(n, 0, 0) for n in range(3)])) == [(1, 0)]


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_tile_of_another_version_of_the_case_is_left_alone(make: Callable[..., CachedLoader], change: str) -> None:
    """Another training has built the changed case: its tiles are good, only this training can't go on with them."""
    loader = make()
    store, path = loader.store, loader.store.entries("case")[1]
    if change == "replaced":
        store.write("case", 1, 0, features(1), target_of(1), "changed")
    else:
        path.unlink()
    before = {other: other.read_bytes() for other in path.parent.iterdir()}
    with pytest.raises(ChangedCaseError, match="Tile 1 of case in .* was replaced or removed while training ran"):
        loader.read([loader.draw()[0]._replace(number=1)])
    assert {other: other.read_bytes() for other in path.parent.iterdir()} == before
