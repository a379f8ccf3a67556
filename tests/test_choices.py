"""What the planner chooses, from numbers alone."""

from __future__ import annotations

import pytest

from desam_nnunet.planning.choices import (
    Choice,
    Storage,
    choose_augmentation,
    choose_batch_size,
    choose_checkpointing,
    choose_image_sizes,
    choose_patch,
    choose_schedule,
    choose_slab,
    choose_storage,
)
from desam_nnunet.system.durations import duration

SIZES = {"float16": 100, "int8": 50}


@pytest.mark.parametrize(("planes", "divisor", "limit", "patch", "reason"), [
    ([(160, 159)] * 3, (32, 32), 1024, (160, 160), "every slice is one tile"),
    ([(128, 100)], (16, 16), 1024, (128, 112), "every slice is one tile"),
    ([(512, 512)] * 9, (128, 128), 1024, (512, 512), "every slice is one tile"),
    ([(1024, 1024)], (256, 256), 1024, (512, 512), "slices reach 1024 x 1024, masks at 1024 resolve tiles of 640"),
    ([(512, 512)], (128, 128), 512, (256, 256), "masks at 512 resolve tiles of 320"),
    ([(100, 100)] * 9 + [(400, 100)], (4, 4), 1024, (152, 100), "1.5 times the median slice"),
    ([(160, 160)], (32, 32), 256, (160, 160), "every slice is one tile"),
    ([(512, 512)], (128, 128), 256, (256, 256), "resolve tiles of 160"),  # nnU-Net's network needs twice its divisor
    ([(20, 20)], (16, 16), 1024, (32, 32), "every slice is one tile"),
])
def test_a_tile_shows_a_slice_as_far_as_masks_resolve_it(
    planes: list[tuple[int, int]], divisor: tuple[int, int], limit: int, patch: tuple[int, int], reason: str
) -> None:
    choice = choose_patch(planes, divisor, limit)
    assert choice.value == patch
    assert reason in choice.reason
    assert all(side % by == 0 for side, by in zip(choice.value, divisor, strict=True))


@pytest.mark.parametrize(("patch", "native", "multiple", "size"), [
    ((160, 160), 1024, 16, 640), ((128, 112), 1024, 16, 512), ((512, 512), 1024, 16, 1024), ((40, 40), 1024, 32, 192),
    ((160, 160), 256, 16, 256), ((100, 100), 504, 28, 420), ((160, 160), 504, 28, 504), ((40, 40), 960, 96, 192),
])
def test_masks_have_a_pixel_for_every_pixel_up_to_the_encoders_own_size(
    patch: tuple[int, int], native: int, multiple: int, size: int
) -> None:
    assert choose_image_sizes(patch, native, multiple)[0].value == size


@pytest.mark.parametrize(("size", "multiple", "smaller"), [
    (256, 16, [192, 128, 64]), (64, 16, []), (1024, 16, list(range(960, 255, -64))), (420, 28, [336, 252, 168]),
])
def test_smaller_inputs_to_fall_back_to(size: int, multiple: int, smaller: list[int]) -> None:
    assert [choice.value for choice in choose_image_sizes((999, 999), size, multiple)] == [size, *smaller]


@pytest.mark.parametrize(("tiles", "fit", "batch", "reason"), [
    (1000, 99, 8, "published"), (1000, 5, 5, "memory"), (60, 99, 3, "5 % of the tiles"),
    (10, 99, 2, "the least"),
])
def test_batch_size(tiles: int, fit: int, batch: int, reason: str) -> None:
    choice = choose_batch_size(tiles, lambda size: size <= fit)
    assert choice is not None
    assert choice.value == batch
    assert reason in choice.reason


def test_no_batch_where_two_tiles_do_not_fit() -> None:
    assert choose_batch_size(1000, lambda size: size <= 1) is None


@pytest.mark.parametrize(("disk", "minutes", "asked", "features", "views", "dtype"), [
    (1e6, 0.6, None, "cached", 4, "float16"),
    (2500, 0.6, None, "cached", 2, "float16"),
    (1500, 0.6, None, "cached", 1, "float16"),
    (1e6, 24, None, "cached", 2, "float16"),
    (1e6, 240, None, "cached", 2, "float16"),
    (1e6, 241, None, "cached", 1, "float16"),
    (700, 0.6, None, "cached", 1, "int8"),
    (400, 0.6, None, "online", 1, "float16"),
    (1e6, 1800, 2, "cached", 2, "float16"),
    (1500, 0.6, 2, "cached", 2, "int8"),
    (900, 0.6, 2, "online", 1, "float16"),
])
def test_storage_by_disk_and_time(
    disk: float, minutes: float, asked: int | None, features: str, views: int, dtype: str
) -> None:
    choice = choose_storage(10, SIZES, disk, 60 * minutes, asked)
    value = choice.value
    assert (value.features, value.views, value.dtype) == (features, views, dtype)
    assert value.gigabytes * 1e9 <= disk
    time = duration(60 * minutes * views)
    assert features == "online" or f"about {time} to encode {10 * views} tiles" in choice.reason


@pytest.mark.parametrize(("slices", "batch", "fit", "slab"), [
    ([20] * 10, 8, 99, (5, 2)), ([20] * 10, 2, 99, (5, 2)), ([20] * 10, 16, 99, (5, 3)), ([20] * 10, 8, 5, (5, 1)),
    ([4, 4, 20], 8, 99, (5, 2)), ([3, 3, 3], 8, 99, (5, 2)), ([1, 1, 30], 8, 99, None), ([20] * 10, 8, 4, None),
])
def test_slabs_hold_about_as_many_slices_as_a_batch_without(
    slices: list[int], batch: int, fit: int, slab: tuple[int, int] | None
) -> None:
    """Args: fit: Slices that the memory holds."""
    choice = choose_slab(slices, batch, lambda slab: slab.depth * slab.batch_size <= fit)
    assert (choice and choice.value) == slab


@pytest.mark.parametrize(("features", "views", "frozen", "augmentation", "reason"), [
    ("cached", 4, True, "strong", "other hospitals"), ("online", 1, True, "strong", "other hospitals"),
    ("cached", 1, True, "nnunet", "not used"), ("online", 1, False, "nnunet", "no other was tried"),
])
def test_augmentation_by_what_was_tried(
    features: str, views: int, frozen: bool, augmentation: str, reason: str
) -> None:
    choice = choose_augmentation(Storage(features, views), frozen=frozen)
    assert choice.value == augmentation
    assert reason in choice.reason


def test_what_is_never_drawn_is_not_encoded() -> None:
    choice = choose_storage(100_001, SIZES, 1e12, 0.01, None)
    assert choice.value.features == "online"
    assert "100001 tiles, of which training draws 100000" in choice.reason


@pytest.mark.parametrize(("tiles", "views", "batch", "draws", "schedule"), [
    (400, 1, 8, None, (50, 50, 10)), (100, 4, 8, None, (50, 50, 10)), (100_000, 1, 8, None, (50, 250, 50)),
    (20, 1, 8, None, (50, 25, 5)),
    (200, 4, 8, 16, (10, 40, 8)), (200, 1, 8, 16, (10, 40, 8)),  # as measured on 13 cases
    (20, 1, 8, 16, (10, 40, 8)), (2000, 4, 8, 16, (16, 250, 50)), (100_000, 4, 8, 16, (50, 250, 50)),
])
def test_small_data_sets_train_shorter(
    tiles: int, views: int, batch: int, draws: int | None, schedule: tuple[int, int, int]
) -> None:
    assert choose_schedule(tiles, views, batch, draws).value == schedule


def test_the_reason_counts_draws_by_view() -> None:
    assert choose_schedule(200, 4, 8, 16).reason == (
        "200 tiles train in each fold, drawn 4.0 times each in each of 4 views on average")
    assert choose_schedule(400, 1, 8, None).reason == "400 tiles train in each fold, drawn 50.0 times each on average"


@pytest.mark.parametrize(("kept", "recomputed", "batch", "again"), [
    (8, 8, 8, False), (4, 8, 4, False), (3, 8, 8, True), (2, 2, 2, False), (None, 2, 2, True), (2, None, 2, False),
])
def test_blocks_are_computed_again_only_where_too_few_tiles_fit(
    kept: int | None, recomputed: int | None, batch: int, again: bool
) -> None:
    given = [None if size is None else Choice(size, "") for size in (kept, recomputed)]
    choice = choose_checkpointing(*given)
    assert choice is not None
    assert (choice[0].value, choice[1]) == (batch, again)


def test_checkpointing_can_not_help_where_nothing_fits() -> None:
    assert choose_checkpointing(None, None) is None
