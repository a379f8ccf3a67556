"""TinyViT with SAM's neck, prompt encoder and mask decoder, as MobileSAM and LiteMedSAM are.

The network is timm's ``tiny_vit_5m_224`` with another stem, a last stage that keeps its resolution, and other names of
its weights.

Source: Wu et al., TinyViT, ECCV 2022; Zhang et al., Faster Segment Anything (MobileSAM), 2023, section 3; Ma et al.,
Segment Anything in Medical Images, Nature Communications 2024, and its branch LiteMedSAM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from segment_anything.modeling import Sam
from timm.models.tiny_vit import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from desam_nnunet.encoders.base import (
    Architecture,
    Encoder,
    Features,
    FeatureSpec,
    ImageSpec,
    Level,
    LoadedEncoder,
    Projection,
    State,
)
from desam_nnunet.encoders.sam_vit import IMAGE as SAM_IMAGE
from desam_nnunet.encoders.sam_vit import assemble_sam, build_neck
from desam_nnunet.encoders.tiny_vit_frozen import frozen_form

_WIDTHS = (64, 128, 160, 320)
_DIM = 256
_LITE_IMAGE = ImageSpec(16, resize="area", rescale=True)
_UNUSED = re.compile(r"image_encoder\.(norm_head|head)\.")  # MobileSAM's file keeps its classifier


class TinyViTWithNeck(nn.Module):
    """timm's network without its head, whose last stage keeps its resolution, and SAM's neck."""

    def __init__(self, stem_stride: int) -> None:
        super().__init__()
        vit: Any = timm.create_model("tiny_vit_5m_224", num_classes=0)
        vit.head = nn.Identity()
        vit.stages[-1].downsample.conv2.conv.stride = (1, 1)
        if stem_stride == 1:
            for layer in (vit.patch_embed.conv1, vit.patch_embed.conv2):
                layer.conv = nn.Conv2d(layer.conv.in_channels, layer.conv.out_channels, 1, bias=False)
        self.vit = vit
        self.neck = build_neck(_WIDTHS[-1], _DIM)


class TinyViTEncoder(Encoder):
    """The outputs of the last three stages are its levels."""

    network: TinyViTWithNeck

    def run(self, images: Tensor, *, levels: bool = True, recompute: bool = False) -> Features:
        vit: Any = self.network.vit
        first, *others = vit.stages
        x = first(vit.patch_embed(images))
        kept = []
        for stage in others:
            x = checkpoint(stage, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else stage(x)
            kept.append(x)
        maps = tuple(x.float().contiguous() for x in kept) if levels else ()
        return Features(maps, self.network.neck(x).float())

    def projections(self) -> list[Projection]:
        """Queries, keys and values stand head by head."""
        attentions = [module for module in self.network.vit.modules() if isinstance(module, Attention)]
        return [Projection(attention, "qkv", _rows_by_head(attention)) for attention in attentions]


@dataclass(frozen=True)
class TinyViT(Architecture):
    """The size of TinyViT that both have; `stem_stride` is 4 where the stem halves the image twice, else 1."""

    family = "tiny_vit"
    offers = frozenset({"projections"})

    stem_stride: int

    def spec(self, image_size: int) -> FeatureSpec:
        strides = [2 * self.stem_stride, 4 * self.stem_stride, 4 * self.stem_stride]
        levels = tuple(Level(*level) for level in zip(_WIDTHS[1:], strides, strict=True))
        image = SAM_IMAGE if self.stem_stride == 4 else _LITE_IMAGE
        return FeatureSpec(levels, Level(_DIM, strides[-1]), image)

    def shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {_published_name(key): value.shape for key, value in self.build().state_dict().items()}

    def blank(self, image_size: int, identity: str = "") -> LoadedEncoder:
        return self._assembled(self.build(image_size), image_size, identity)

    def load(self, state: State, image_size: int, identity: str) -> LoadedEncoder:
        sam = self.build(image_size)
        sam.load_state_dict({key: state[_published_name(key)] for key in sam.state_dict()})
        return self._assembled(sam, image_size, identity)

    def build(self, image_size: int = 256) -> Sam:
        """SAM's modules around the network, by timm's names of its weights, whose shapes are the same at every size."""
        side = image_size // self.spec(image_size).neck.stride
        return assemble_sam(TinyViTWithNeck(self.stem_stride), _DIM, side, image_size)

    def unused(self, key: str) -> bool:
        return _UNUSED.match(key) is not None

    def _assembled(self, sam: Sam, image_size: int, identity: str) -> LoadedEncoder:
        encoder = TinyViTEncoder(frozen_form(sam.image_encoder), self.spec(image_size), identity)
        return LoadedEncoder(encoder, sam.prompt_encoder.requires_grad_(False).eval(), sam.mask_decoder)


def _published_name(key: str) -> str:
    """The name of a weight in published files."""
    prefix = "image_encoder.vit."
    if not key.startswith(prefix):
        return key
    name = key.removeprefix(prefix).replace(".conv.", ".c.")
    name = re.sub(r"^patch_embed\.conv([12])\.", lambda match: f"patch_embed.seq.{2 * int(match[1]) - 2}.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name)
    return "image_encoder." + re.sub(r"^stages\.", "layers.", name)


def _rows_by_head(attention: Attention) -> dict[str, Tensor]:
    widths = [attention.key_dim, attention.key_dim, attention.val_dim]
    rows = torch.arange(attention.num_heads * sum(widths)).view(attention.num_heads, -1).split(widths, dim=1)
    return {letter: part.flatten() for letter, part in zip("qkv", rows, strict=True)}
