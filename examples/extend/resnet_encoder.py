"""An encoder of one's own: torchvision's ResNet-18, with random weights, as `resnet_encoder:RESNET`.

Anything that Python can import is an encoder's name in the plans: put this file on PYTHONPATH, or into a package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from desam_nnunet.encoders.base import Architecture, Encoder, Features, FeatureSpec, ImageSpec, Level, LoadedEncoder
from desam_nnunet.encoders.registry import EncoderRow
from desam_nnunet.encoders.sam_vit import build_mask_decoder, build_neck, build_prompt_encoder


class ResNetEncoder(Encoder):
    """The outputs of the four stages; the third, at stride 16, takes the neck's place."""

    def run(self, images: Tensor, *, levels: bool = True, recompute: bool = False) -> Features:
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        maps = [x := stage(x) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
        first, second, neck, last = (x.float() for x in maps)
        return Features((first, second, last) if levels else (), neck)


@dataclass(frozen=True)
class ResNet18(Architecture):
    """One size is enough for an example."""

    family = "resnet"

    def spec(self, image_size: int) -> FeatureSpec:
        image = ImageSpec(multiple=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return FeatureSpec((Level(64, 4), Level(128, 8), Level(512, 32)), Level(256, 16), image)

    def shapes(self) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in torchvision.models.resnet18(num_classes=1).state_dict().items()}

    def blank(self, image_size: int, identity: str = "") -> LoadedEncoder:
        spec, net = self.spec(image_size), torchvision.models.resnet18(num_classes=1)
        prompts: nn.Module = build_prompt_encoder(256, image_size // spec.neck.stride, image_size).requires_grad_(False)
        return LoadedEncoder(ResNetEncoder(net, spec, identity), prompts.eval(), build_mask_decoder(256),
                             build_neck(spec.neck.channels, 256), trained=False)

    def load(self, state: dict[str, Tensor], image_size: int, identity: str) -> LoadedEncoder:
        loaded = self.blank(image_size, identity)
        loaded.encoder.network.load_state_dict(state)
        return loaded


RESNET = EncoderRow("resnet_encoder:RESNET", ResNet18(), image_size=224)  # with file="...": weights from that file
