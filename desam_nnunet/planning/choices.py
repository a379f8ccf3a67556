"""The choices that nnU-Net's user does not have to make: each a pure function that also says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Generic, NamedTuple, TypeVar

from desam_nnunet.encoders.base import MIN_IMAGE_SIZE
from desam_nnunet.sam.slabs import DEPTH
from desam_nnunet.sam.tiles import MASK_STRIDE
from desam_nnunet.system.durations import duration

T = TypeVar("T")

_SIZE_STEP = 64  # about as much lies between the input sizes that are considered

MAX_BATCH_SIZE, MIN_BATCH_SIZE = 8, 2  # the published one; Dice and InstanceNorm gain from a second tile
GOOD_BATCH_SIZE = 4  # an encoder that leaves no room for it is too large
EPOCHS = 50  # the published number
MAX_ITERATIONS = 250  # of an epoch, nnU-Net's
MIN_ITERATIONS = 25
SHORT_EPOCHS, FEWEST_ITERATIONS = 10, 400  # of a training that is planned by draws; what the default was measured with
_COARSEST = 2.5  # pixels of a tile per mask pixel
_LARGEST_OF_MEDIAN = 1.5  # a few large slices do not decide the patch
_FEWEST_SLICES = 3  # of the median volume, for slabs
_VIEWS = ((4, 3600), (2, 8 * 3600))  # the best number first, and the seconds that encoding may take for its sake


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value, and one line that says why."""

    value: T
    reason: str


def choose_patch(
    planes: Sequence[tuple[int, int]], divisor: tuple[int, int], image_size: int
) -> Choice[tuple[int, int]]:
    """A patch that shows a whole slice, as far as the masks of an encoder at `image_size` can resolve it.

    Args:
        planes: Rows and columns of every case, at the planned spacing.
        divisor: What nnU-Net's own architecture divides each side by, so that it trains on the same plans; it needs
            at least twice that.
    """
    limit = int(_COARSEST * image_size / MASK_STRIDE)
    axes = list(zip(*planes, strict=True))
    largest = [max(sides) for sides in axes]
    wanted = [min(max(sides), math.ceil(_LARGEST_OF_MEDIAN * median_high(sides))) for sides in axes]
    rows, columns = (
        max(2 * step, min(_round_up(side, step), limit // step * step))
        for side, step in zip(wanted, divisor, strict=True))
    if rows >= largest[0] and columns >= largest[1]:
        reason = "every slice is one tile"
    elif max(wanted) > limit:
        reason = f"slices reach {largest[0]} x {largest[1]}, masks at {image_size} resolve tiles of {limit}"
    else:
        reason = "1.5 times the median slice; the largest slices take several tiles"
    return Choice((rows, columns), reason)


def choose_image_sizes(patch: tuple[int, int], native: int, multiple: int) -> list[Choice[int]]:
    """The encoder's input: as large as gives a mask pixel for every pixel of the tile, at most its own size.

    Args:
        native: Its own size, a multiple of `multiple`.
        multiple: Of which all sizes are one that the encoder takes.

    Returns:
        That size, then smaller ones for where memory is short, down to a quarter of it.
    """
    step = _round_up(_SIZE_STEP, multiple)
    size = min(_round_up(MASK_STRIDE * max(patch), step), native)
    reason = "more does not pay" if size < native else "the encoder's own size"
    pixels = max(patch) * MASK_STRIDE / size
    smaller = range(size - step, max(size // 4, MIN_IMAGE_SIZE) - 1, -step)
    return [Choice(size, f"masks have a pixel for every {pixels:.2g} pixel(s) of the tile, {reason}"),
            *(Choice(side, "what fits into the memory") for side in smaller)]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def wanted_batch_size(tiles: int) -> int:
    """Where memory does not matter."""
    return min(MAX_BATCH_SIZE, max(MIN_BATCH_SIZE, round(0.05 * tiles)))


def choose_batch_size(tiles: int, fits: Callable[[int], bool]) -> Choice[int] | None:
    """The published batch, or what memory and the number of tiles allow; None where not even two tiles fit."""
    wanted = wanted_batch_size(tiles)
    best = next((size for size in range(wanted, MIN_BATCH_SIZE - 1, -1) if fits(size)), None)
    if best is None:
        return None
    if best < wanted:
        return Choice(best, "what fits into the memory")
    if best == MAX_BATCH_SIZE:
        return Choice(best, "as many as DeSAM was published with")
    return Choice(best, "the least" if best == MIN_BATCH_SIZE else "5 % of the tiles, as in nnU-Net")


class Slab(NamedTuple):
    """Slices that are shown together, and slabs in a batch."""

    depth: int
    batch_size: int


def choose_slab(slices: Sequence[int], batch_size: int, fits: Callable[[Slab], bool]) -> Choice[Slab] | None:
    """As many slices as see each other, and about as many in a batch as without slabs; None where there are few slices.

    Always an odd number: of an even one nnU-Net's window has no middle slice, and its outer ones hardly count.

    Args:
        slices: Of every case.
        batch_size: Tiles in a batch without slabs.
    """
    if median_high(slices) < _FEWEST_SLICES:
        return None
    wanted = max(MIN_BATCH_SIZE, round(batch_size / DEPTH))
    best = next((slab for count in range(wanted, 0, -1) if fits(slab := Slab(DEPTH, count))), None)
    return best and Choice(best, "a slice and the two on either side that it sees")


class Storage(NamedTuple):
    """Where training reads features from: ``cached`` or ``online``; the cache's views, type and size on disk."""

    features: str = "online"
    views: int = 1
    dtype: str = "float16"
    gigabytes: float = 0.0


def choose_checkpointing(kept: Choice[int] | None, recomputed: Choice[int] | None) -> tuple[Choice[int], bool] | None:
    """Whether blocks are computed again in the backward pass: only where too few tiles fit otherwise.

    Args:
        kept, recomputed: The batch without and with it.

    Returns:
        The batch that results, and whether; None where neither fits.
    """
    if kept is not None and (kept.value >= GOOD_BATCH_SIZE or recomputed is None or recomputed.value <= kept.value):
        return kept, False
    return None if recomputed is None else (recomputed, True)


def choose_storage(
    tiles: int, bytes_per_tile: dict[str, int], disk: float, seconds_per_view: float, views: int | None
) -> Choice[Storage]:
    """Cached features where they fit on the disk, with augmented views where time and disk allow them.

    Args:
        tiles: Of the whole data set.
        bytes_per_tile: Per type on disk, the most exact first.
        disk: Bytes that the cache may take.
        seconds_per_view: That encoding every tile once takes on this machine.
        views: As asked for; None leaves the choice.
    """
    drawn = EPOCHS * MAX_ITERATIONS * MAX_BATCH_SIZE
    if tiles > drawn:
        return Choice(Storage(), f"there are {tiles} tiles, of which training draws {drawn}")
    counts = [views] if views else [*(count for count, most in _VIEWS if count * seconds_per_view <= most), 1]
    for dtype, size in bytes_per_tile.items():
        for count in counts:
            if count * tiles * size <= disk:
                gigabytes = count * tiles * size / 1e9
                views_of = f", their {count} views counted" if count > 1 else ""
                reason = (f"{gigabytes:.1f} GB, about {duration(count * seconds_per_view)} to encode {count * tiles} "
                          f"tiles{views_of}")
                return Choice(Storage("cached", count, dtype, gigabytes), reason)
    least = counts[-1] * tiles * min(bytes_per_tile.values()) / 1e9
    reason = f"a cache of {tiles} tiles takes at least {least:.1f} GB, {disk / 1e9:.1f} GB are to be had"
    return Choice(Storage(), reason)


def choose_augmentation(storage: Storage, *, frozen: bool) -> Choice[str]:
    """Of views after the first, or of online training: what held up best under a simulated shift, where that was tried.

    Args:
        frozen: Whether the method leaves the encoder as it is.
    """
    if not frozen:
        return Choice("nnunet", "nnU-Net's own; no other was tried with this method")
    if storage.features == "cached" and storage.views == 1:
        return Choice("nnunet", "not used: the only view is the tile as it is")
    return Choice("strong", "for other hospitals; at home it costs a little (docs/results.md)")


class Schedule(NamedTuple):
    """Keys of the plans' section ``sam``."""

    epochs: int
    iterations_per_epoch: int
    val_iterations_per_epoch: int


def choose_schedule(tiles: int, views: int, batch_size: int, draws: int | None) -> Choice[Schedule]:
    """Epochs within nnU-Net's 250 iterations.

    Args:
        tiles: Of a fold's training cases.
        views: Of each, stored.
        batch_size: Tiles in a batch.
        draws: Of each tile, in whichever view; None for the published number of epochs, each about as many draws as
            there are tiles, views counted.
    """
    if draws is None:
        epochs, once = EPOCHS, math.ceil(views * tiles / batch_size)
        iterations = min(MAX_ITERATIONS, max(MIN_ITERATIONS, once))
    else:
        total = min(EPOCHS * MAX_ITERATIONS, max(FEWEST_ITERATIONS, math.ceil(draws * tiles / batch_size)))
        iterations = min(MAX_ITERATIONS, math.ceil(total / SHORT_EPOCHS))
        epochs = math.ceil(total / iterations)
    seen = epochs * iterations * batch_size / max(1, tiles * views)
    views_of = f" in each of {views} views" if views > 1 else ""
    reason = f"{tiles} tiles train in each fold, drawn {seen:.1f} times each{views_of} on average"
    return Choice(Schedule(epochs, iterations, max(5, iterations // 5)), reason)
