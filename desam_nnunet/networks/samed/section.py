"""What the plans say of SAMed."""

from __future__ import annotations

from dataclasses import dataclass, field

from desam_nnunet.settings.sections import AS_BEFORE, Method, require, require_rate

LORA_TARGETS = "qkv"
_MAX_WARMUP = 250  # iterations, as published
_LONGEST_WARMUP = 1_000_000


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
        lr_after_step: Whether the learning rate is set after each iteration for the next, from the number of the one
            that is done, as published. Plans without the key, from before it existed, mean false: one iteration ahead.
    """

    warmup: int = field(metadata={"default": "250, at most a tenth of the iterations"})
    rank: int = 4
    targets: str = "qv"
    lr: float = 0.005
    checkpointing: bool = False
    lr_after_step: bool = field(default=True, metadata={AS_BEFORE: False})

    def __post_init__(self) -> None:
        require(0 <= self.warmup <= _LONGEST_WARMUP, "samed.warmup", self.warmup,
                f"between 0 and {_LONGEST_WARMUP} (a whole training has no more iterations)")
        require(1 <= self.rank <= 64, "samed.rank", self.rank, "between 1 and 64 (the rank of a head's own matrices)")
        letters = set(self.targets)
        require(bool(letters) and letters <= set(LORA_TARGETS) and len(letters) == len(self.targets),
                "samed.targets", self.targets, "some of the letters q, k and v, each once")
        require_rate("samed.lr", self.lr)


SAMED = Method("samed", SamedSection, "SAMedPlans", image_size=512, needs="projections",
               defaults=lambda sam: {"warmup": min(_MAX_WARMUP, sam.iterations // 10)})
