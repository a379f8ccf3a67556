"""A method of one's own: a linear probe, one convolution of a single pixel on all of an encoder's frozen maps.

What it reaches is what the features are worth by themselves: a quick way to compare encoders.

    export nnUNet_extTrainer=$nnUNet_extTrainer:/path/to/examples/extend/trainers
    nnUNetv2_train 501 2d 0 -tr LinearProbeTrainer
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.frame import FrozenSamNetwork, Outline
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.tiles import Geometry
from desam_nnunet.settings.sections import Method
from desam_nnunet.training.frozen import FrozenSamTrainer


@dataclass(frozen=True)
class ProbeSection:
    """What the plans' section `linear_probe` holds. Attributes: lr: Adam's initial learning rate."""

    lr: float = 1e-2


class LinearProbe(FrozenSamNetwork):
    """Every map, normalised and brought to the masks' size, into one linear layer."""

    def __init__(self, outline: Outline) -> None:
        super().__init__(encoder=outline.loaded.encoder, to_image=outline.to_image, num_channels=outline.num_channels,
                         background=outline.background)  # and no neck of its own, which would be trained
        self.probe = nn.Conv2d(self.encoder.spec.channels, outline.num_classes, 1)

    def decode(self, features: Features, prompts: Prompts) -> tuple[Tensor, None]:
        size = 2 * [self.to_image.image_size // self.mask_stride]
        maps = [F.interpolate(F.instance_norm(x), size, mode="bilinear") for x in features.tensors]
        return self.probe(torch.cat(maps, dim=1)), None

    def predict(self, features: Features, geometry: Geometry) -> Tensor:
        return self.tile_logits(self.decode(features, Prompts())[0], geometry)


class LinearProbeTrainer(FrozenSamTrainer):
    """Trains the probe with nnU-Net's own loss."""

    method = Method("linear_probe", ProbeSection, "LinearProbePlans", frozen_features=True)

    @classmethod
    def build_network(cls, outline: Outline) -> LinearProbe:
        return LinearProbe(outline)

    def compute_loss(self, inputs: Features, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.bare_network.tile_logits(self.network(inputs)[0], self.bare_network.geometry(target))
        return self.loss(logits, target), logits
