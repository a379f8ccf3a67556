"""The plans' sections: what all trainers share (``sam``), and one section for each method."""

from __future__ import annotations

from dataclasses import dataclass, field

from desam_nnunet.cache.store import DTYPES
from desam_nnunet.encoders.registry import PATCH
from desam_nnunet.sam.tiles import INTENSITY_RULES

FEATURES = ("online", "cached")
DEFAULT_ENCODER = "vit_b"
LORA_TARGETS = "qkv"


@dataclass(frozen=True)
class SamSection:
    """What all trainers of this package share.

    Attributes:
        encoder: ``vit_b``, ``vit_l``, ``vit_h``, ``vit_tiny`` (small, in the package), ``vit_tiny_random``, or the
            path of a weights file.
        identity: Names the encoder's weights: ``md5:`` and the file's hash, or generator and seed. Resuming and
            predicting with other weights is refused.
        image_size: Side of SAM's input in pixels, a multiple of 16, at least 64. A tile's longer side is scaled to it.
        intensity: How a tile becomes 0 to 255: ``percentile``, ``window`` or ``unit``.
        regions: Whether the data set trains regions, which have no background output.
        features: ``cached``: every tile is encoded once, before training, and read from disk; ``online``: augmented
            tiles are encoded as they come. SAMed and DB-SAM change the encoder's features: always ``online``.
        views: Versions of each cached tile, the first as it is, the others augmented once as nnU-Net augments.
        cache_dtype: ``float16`` or ``int8``, of the cache on disk.
        epochs: Of training; the learning rate decays to zero over them.
        iterations_per_epoch: Training steps of an epoch.
        val_iterations_per_epoch: Validation steps of an epoch.
    """

    encoder: str = field(metadata={"default": f"`{DEFAULT_ENCODER}`"})
    identity: str = field(metadata={"default": "filled in"})
    image_size: int = field(metadata={"default": "the variant's own: 1024, of `vit_tiny` 256; for SAMed at most 512"})
    intensity: str = field(metadata={"default": "from nnU-Net's normalisation"})
    regions: bool = field(metadata={"default": "filled in"})
    features: str = "cached"
    views: int = 1
    cache_dtype: str = "float16"
    epochs: int = 50
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50

    def __post_init__(self) -> None:
        _require(self.image_size >= 4 * PATCH and self.image_size % PATCH == 0,
                 "sam.image_size", self.image_size, f"a multiple of {PATCH}, at least {4 * PATCH}")
        _require(self.intensity in INTENSITY_RULES, "sam.intensity", self.intensity, " or ".join(INTENSITY_RULES))
        _require(self.features in FEATURES, "sam.features", self.features, " or ".join(FEATURES))
        _require(self.cache_dtype in DTYPES, "sam.cache_dtype", self.cache_dtype, " or ".join(DTYPES))
        for name in ("views", "epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
            _require(getattr(self, name) > 0, f"sam.{name}", getattr(self, name), "a positive number")

    @property
    def iterations(self) -> int:
        """Of the whole training."""
        return self.epochs * self.iterations_per_epoch


@dataclass(frozen=True)
class DesamSection:
    """DeSAM's own settings.

    Attributes:
        grid: Points per side of the prompt grid at prediction, 1 to 64.
        iou_threshold: A class whose best score is not above it is absent from the tile; 0 to 1.
        lr: Adam's initial learning rate, decayed polynomially (0.9).
    """

    grid: int = 9
    iou_threshold: float = 0.5
    lr: float = 1e-4

    def __post_init__(self) -> None:
        _require(1 <= self.grid <= 64, "desam.grid", self.grid, "between 1 and 64")
        _require(0 <= self.iou_threshold <= 1, "desam.iou_threshold", self.iou_threshold, "between 0 and 1")
        _require(self.lr > 0, "desam.lr", self.lr, "a positive number")


@dataclass(frozen=True)
class SamedSection:
    """SAMed's own settings.

    Attributes:
        warmup: Iterations over which the learning rate rises to `lr`; it decays polynomially (0.9) after them.
        rank: Of the low-rank updates, 1 to 64.
        targets: Which projections of an attention they change: any of the letters ``q``, ``k`` and ``v``.
        lr: AdamW's highest learning rate.
        checkpointing: Whether the encoder's blocks are computed again in the backward pass instead of kept: less
            memory, more time.
    """

    warmup: int = field(metadata={"default": "250, at most a tenth of the iterations"})
    rank: int = 4
    targets: str = "qv"
    lr: float = 0.005
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(self.warmup >= 0, "samed.warmup", self.warmup, "0 or a positive number")
        _require(1 <= self.rank <= 64, "samed.rank", self.rank, "between 1 and 64")
        letters = set(self.targets)
        _require(bool(letters) and letters <= set(LORA_TARGETS) and len(letters) == len(self.targets),
                 "samed.targets", self.targets, "some of the letters q, k and v, each once")
        _require(self.lr > 0, "samed.lr", self.lr, "a positive number")


@dataclass(frozen=True)
class DbsamSection:
    """DB-SAM's own settings.

    Attributes:
        lr: AdamW's highest learning rate: it rises over the first epoch and decays polynomially (0.9) after it.
        checkpointing: Whether blocks are computed again in the backward pass instead of kept: less memory, more time.
    """

    lr: float = 1e-4
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(self.lr > 0, "dbsam.lr", self.lr, "a positive number")


@dataclass(frozen=True)
class Method:
    """What the sections' defaults depend on.

    Attributes:
        section: The method's own.
        plans_name: That ``desam plan`` gives.
        batch_size: At most this on plans without our sections, which may ask for many more.
        image_size: The input side is at most this, unless it is given; None for no bound.
        frozen_features: Whether the encoder's output never changes, so that it can be stored.
    """

    section: type
    plans_name: str
    batch_size: int = 8
    image_size: int | None = None
    frozen_features: bool = False


METHODS: dict[str, Method] = {
    "desam": Method(DesamSection, "DeSAMPlans", frozen_features=True),
    "samed": Method(SamedSection, "SAMedPlans", image_size=512),
    "dbsam": Method(DbsamSection, "DBSAMPlans", batch_size=2),
}
SECTIONS: dict[str, type] = {"sam": SamSection} | {name: method.section for name, method in METHODS.items()}


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"The plans' key {key} is {value!r}, but must be {expected}.")
