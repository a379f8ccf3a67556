"""What a pretraining run follows from."""

from __future__ import annotations

from dataclasses import dataclass

from desam_nnunet.augmentation.randomness import BATCHES
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import SamViT

SIZES = {row.name: row.architecture for row in ENCODERS.values() if isinstance(row.architecture, SamViT)}
MAX_SEED = 999  # each has a second stream, for prompts; above lie the images that no run is trained on
_LARGEST_BATCH, _MOST_PROMPTS, _LARGEST_WEIGHT = 10_000, 256, 1000


@dataclass(frozen=True)
class Recipe:
    """The settings of a run. The learning rate rises over the first hundredth of the steps and falls as a cosine."""

    encoder: str = "vit_tiny"  # one of SAM's sizes, from whose random weights the run starts
    images: int = 200_000  # generated in all; none is seen twice
    batch_size: int = 16
    prompts: int = 4  # points for each image, and as many boxes
    lr: float = 1e-3  # AdamW's highest
    regions: float = 1.0  # weight of the descriptions of regions beside the promptable objective; 0 leaves them out
    seed: int = 0  # of the images and prompts, 0 to 999

    def __post_init__(self) -> None:
        _require(self.encoder in SIZES, "encoder", self.encoder, f"one of {', '.join(SIZES)}")
        _require(0 < self.batch_size <= _LARGEST_BATCH, "batch size", self.batch_size,
                 f"between 1 and {_LARGEST_BATCH} (more images than any memory holds)")
        _require(self.batch_size <= self.images < self.batch_size * BATCHES, "number of images", self.images,
                 "at least the batch size, and at most a million batches")
        _require(0 < self.prompts <= _MOST_PROMPTS, "number of prompts", self.prompts,
                 f"between 1 and {_MOST_PROMPTS} (each is a pass through the decoder)")
        _require(0 < self.lr <= 1, "learning rate", self.lr, "above 0 and at most 1 (Adam's step is about as large)")
        _require(0 <= self.regions <= _LARGEST_WEIGHT, "weight of the regions", self.regions,
                 f"between 0 and {_LARGEST_WEIGHT} (beside which the promptable objective is nothing)")
        _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"between 0 and {MAX_SEED}")

    @property
    def size(self) -> SamViT:
        return SIZES[self.encoder]

    @property
    def steps(self) -> int:
        return self.images // self.batch_size


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"The {name} is {value!r}, but must be {expected}.")
