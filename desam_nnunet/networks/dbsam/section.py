"""What the plans say of DB-SAM."""

from __future__ import annotations

from dataclasses import dataclass, field

from desam_nnunet.settings.sections import AS_BEFORE, Method, require, require_rate


@dataclass(frozen=True)
class DbsamSection:
    """DB-SAM's own settings.

    Attributes:
        lr: AdamW's highest learning rate: it rises over the first epoch and decays polynomially (0.9) after it.
        checkpointing: Whether blocks are computed again in the backward pass instead of kept: less memory, more time.
        mask_tokens: Of the decoder of ``DBSAMTrainerBoxes``, of which the first makes the mask: 4 as in SAM, or 1.
            Plans without the key, from before it existed, mean 1.
    """

    lr: float = 1e-4
    checkpointing: bool = False
    mask_tokens: int = field(default=4, metadata={AS_BEFORE: 1})

    def __post_init__(self) -> None:
        require_rate("dbsam.lr", self.lr)
        require(self.mask_tokens in (1, 4), "dbsam.mask_tokens", self.mask_tokens, "1 or 4")


DBSAM = Method("dbsam", DbsamSection, "DBSAMPlans", batch_size=2, needs="plain ViT", stride=16)
