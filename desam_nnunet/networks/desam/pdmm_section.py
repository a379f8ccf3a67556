"""What the plans say of PDMM alone."""

from __future__ import annotations

from dataclasses import dataclass

from desam_nnunet.settings.sections import Method, require, require_rate


@dataclass(frozen=True)
class PdmmSection:
    """PDMM's own settings.

    Attributes:
        width: Channels of its coarsest level, at least 16; each next one has half as many. 256 with SAM's encoders
            is published.
        lr: Adam's initial learning rate, decayed polynomially (0.9).
        mask_stride: Pixels of the encoder's input along a side of a mask's pixel: 1, 2 or 4.
    """

    width: int = 64
    lr: float = 1e-2
    mask_stride: int = 4

    def __post_init__(self) -> None:
        require(16 <= self.width <= 1024, "pdmm.width", self.width,
                "between 16 and 1024 (groups of 16 channels; wider than any encoder's maps)")
        require_rate("pdmm.lr", self.lr)
        require(self.mask_stride in (1, 2, 4), "pdmm.mask_stride", self.mask_stride, "1, 2 or 4")


PDMM_ALONE = Method("pdmm", PdmmSection, "PDMMPlans", frozen_features=True, slabs=True, draws=16)
