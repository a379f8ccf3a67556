"""What the plans' section ``sam`` holds, which all trainers share, and what a method says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

INTENSITY_RULES = ("percentile", "window", "unit")
SECTIONS = ("sam", "desam", "pdmm", "samed", "dbsam")  # of this package's, in the plans
FEATURES = ("online", "cached")
DTYPES = ("float16", "int8")
AUGMENTATIONS = ("nnunet", "strong")
VIEW_GEOMETRIES = ("case", "tile")
DEFAULT_ENCODER = "vit_b"
AS_BEFORE = "as before"  # in a field's metadata, any section's: what its absence means in older plans than the key is


_MOST = {  # and why not more
    "views": (100, "each view encodes and stores every tile once more"),
    "epochs": (100_000, "nnU-Net's own training has 1000"),
    "iterations_per_epoch": (100_000, "nnU-Net's own epoch has 250"),
    "val_iterations_per_epoch": (100_000, "nnU-Net's own epoch has 50"),
}


@dataclass(frozen=True)
class SamSection:
    """What all trainers of this package share.

    Attributes:
        encoder: A name of ``desam weights list``, ``timm/`` and a model of timm's, ``timm_random/`` and one for random
            weights, or the path of a weights file.
        identity: Names the encoder's weights: ``md5:`` and the file's hash, or generator and seed. Resuming and
            predicting with other weights is refused.
        image_size: Side of the encoder's input in pixels, a multiple of its largest stride (16 for SAM), at least 64. A
            tile's longer side is scaled to it.
        intensity: How a tile becomes 0 to 255: ``percentile``, ``window`` or ``unit``.
        regions: Whether the data set trains regions, which have no background output.
        features: ``cached``: every tile is encoded once, before training, and read from disk; ``online``: augmented
            tiles are encoded as they come. SAMed and DB-SAM change the encoder's features: always ``online``.
        views: Versions of each cached tile, the first as it is, the others augmented once.
        augmentation: How views after the first, and online training, change a tile: ``nnunet`` as nnU-Net does, or
            ``strong``: with intensities as scanners elsewhere might give them.
        view_geometry: Whether a view turns, scales and mirrors all tiles of a ``case`` alike, so that neighbouring
            slices fit together, as slabs need it, or each ``tile`` by itself; intensities are drawn for each tile.
        cache_dtype: ``float16`` or ``int8``, of the cache on disk.
        epochs: Of training; the learning rate decays to zero over them.
        iterations_per_epoch: Training steps of an epoch.
        val_iterations_per_epoch: Validation steps of an epoch.
    """

    encoder: str = field(metadata={"default": f"`{DEFAULT_ENCODER}`"})
    identity: str = field(metadata={"default": "filled in"})
    image_size: int = field(metadata={"default": "the encoder's own: 1024 for SAM's, 256 for `vit_tiny`; for SAMed at "
                                                 "most 512"})
    intensity: str = field(metadata={"default": "from nnU-Net's normalisation"})
    regions: bool = field(metadata={"default": "filled in"})
    features: str = "cached"
    views: int = 1
    augmentation: str = field(default="nnunet", metadata={AS_BEFORE: "nnunet"})
    view_geometry: str = field(default="tile", metadata={AS_BEFORE: "tile"})
    cache_dtype: str = "float16"
    epochs: int = 50
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50

    def __post_init__(self) -> None:
        for name in ("encoder", "identity"):
            require(getattr(self, name).isprintable(), f"sam.{name}", getattr(self, name), "text that can be printed")
        require(self.intensity in INTENSITY_RULES, "sam.intensity", self.intensity, " or ".join(INTENSITY_RULES))
        require(self.features in FEATURES, "sam.features", self.features, " or ".join(FEATURES))
        require(self.augmentation in AUGMENTATIONS, "sam.augmentation", self.augmentation, " or ".join(AUGMENTATIONS))
        require(self.view_geometry in VIEW_GEOMETRIES, "sam.view_geometry", self.view_geometry,
                " or ".join(VIEW_GEOMETRIES))
        require(self.cache_dtype in DTYPES, "sam.cache_dtype", self.cache_dtype, " or ".join(DTYPES))
        for name, (most, why) in _MOST.items():
            require(1 <= getattr(self, name) <= most, f"sam.{name}", getattr(self, name),
                    f"between 1 and {most} ({why})")

    @property
    def iterations(self) -> int:
        """Of the whole training."""
        return self.epochs * self.iterations_per_epoch


@dataclass(frozen=True)
class Method:
    """What a trainer says of its method; everything else finds the method through the trainer.

    Attributes:
        name: Of its section in the plans.
        section: A dataclass of what stands there, with a field ``lr``; fields are of type int, float, str or bool.
        plans_name: That ``desam plan`` gives.
        batch_size: At most this on plans without our sections, which may ask for many more.
        image_size: The input side is at most this, unless it is given; None for no bound.
        frozen_features: Whether the encoder's output never changes, so that it can be stored.
        slabs: Whether its network lets neighbouring slices see each other, where the plans show them together.
        needs: What it asks of an encoder's architecture, see
            :class:`~desam_nnunet.encoders.base.Architecture`; empty for features alone.
        stride: Of every map, in pixels, where it takes no other; 0 for any.
        defaults: What defaults of its section depend on the shared one.
        draws: How often planned training draws each tile, in whichever of its views; None for the published 50 epochs
            that see every view about once.
    """

    name: str
    section: type
    plans_name: str
    batch_size: int = 8
    image_size: int | None = None
    frozen_features: bool = False
    slabs: bool = False
    needs: str = ""
    stride: int = 0
    defaults: Callable[[SamSection], dict[str, Any]] = lambda _: {}
    draws: int | None = None


def require_rate(key: str, value: float) -> None:
    """Refuses a learning rate that no training survives."""
    require(0 < value <= 1, key, value, "above 0 and at most 1 (Adam's step is about as large as its learning rate)")


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Refuses a value of the plans' key with a ValueError that says what is expected."""
    if not holds:
        raise ValueError(f"The plans' key {key} is {value!r}, but must be {expected}.")
