"""What the plans say of DeSAM."""

from __future__ import annotations

from dataclasses import dataclass, field

from desam_nnunet.settings.sections import AS_BEFORE, Method, require, require_rate


@dataclass(frozen=True)
class DesamSection:
    """DeSAM's own settings.

    Attributes:
        grid: Points per side of the prompt grid at prediction, 1 to 64.
        iou_threshold: A class whose best score is not above it is absent from the tile; 0 to 1.
        lr: Adam's initial learning rate, decayed polynomially (0.9).
        mask_stride: Pixels of the encoder's input along a side of a mask's pixel: 1, 2 or 4; 4 is published.
        grid_offset: Added to the grid's points, in pixels of the encoder's input; 0 is published. Plans without the
            key, from before it existed, mean -0.5.
        through_input: Whether mask logits are first enlarged to the encoder's input and then brought to the tile, as
            published, a slight blur.
    """

    grid: int = 9
    iou_threshold: float = 0.5
    lr: float = 1e-4
    mask_stride: int = field(default=4, metadata={AS_BEFORE: 4})
    grid_offset: float = field(default=0.0, metadata={AS_BEFORE: -0.5})
    through_input: bool = field(default=False, metadata={AS_BEFORE: False})

    def __post_init__(self) -> None:
        require(1 <= self.grid <= 64, "desam.grid", self.grid, "between 1 and 64 (4096 points, each a prompt)")
        require(0 <= self.iou_threshold <= 1, "desam.iou_threshold", self.iou_threshold, "between 0 and 1")
        require_rate("desam.lr", self.lr)
        require(self.mask_stride in (1, 2, 4), "desam.mask_stride", self.mask_stride, "1, 2 or 4")
        require(-8 <= self.grid_offset <= 8, "desam.grid_offset", self.grid_offset,
                "between -8 and 8 (half a pixel of the encoder's map)")


DESAM = Method("desam", DesamSection, "DeSAMPlans", frozen_features=True, slabs=True)
