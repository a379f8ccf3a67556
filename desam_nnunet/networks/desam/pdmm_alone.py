"""PDMM alone: a convolutional decoder on frozen features, without a prompt and without PRIM.

Source: Gao et al., DeSAM, MICCAI 2024, section 3.3, ablation (a). The width is ours: the paper's is the encoder's
prompt width, 256 with SAM.
"""

from __future__ import annotations

from torch import Tensor, nn

from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.desam.pdmm import PDMM
from desam_nnunet.networks.frame import FrozenSamNetwork, Outline
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import Geometry


class PDMMAlone(FrozenSamNetwork):
    """The neck's map, brought to PDMM's width, stands where PRIM's mask embedding stood."""

    def __init__(self, outline: Outline) -> None:
        loaded, section = outline.loaded, outline.section
        super().__init__(
            encoder=loaded.encoder, to_image=outline.to_image, num_channels=outline.num_channels,
            background=outline.background, neck=loaded.neck, mask_stride=section.mask_stride, depth=outline.depth)
        dim, width = loaded.prompt_dim, section.width
        self.narrowed = nn.Identity() if dim == width else nn.Conv2d(dim, width, 1, bias=False)
        self.pdmm = PDMM(spec=loaded.encoder.spec, prompt_dim=width, num_classes=outline.num_classes,
                         mask_stride=section.mask_stride, depth=outline.depth)

    def decode(self, features: Features, prompts: Prompts) -> tuple[Tensor, None]:
        contexts = self.pdmm.context(features.levels)
        return self.pdmm(self.narrowed(features.neck), contexts, self.there(features)), None

    def predict(self, features: Features, geometry: Geometry) -> Tensor:
        return self.tile_logits(self.decode(features, Prompts())[0], geometry)
