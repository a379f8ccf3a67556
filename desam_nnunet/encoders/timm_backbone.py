"""Any backbone of timm's that gives its intermediate maps: SAM 2's Hiera, DINOv3, ConvNeXt, RepViT and others.

A pyramid's last four maps are read: the one nearest to stride 16 takes the neck's place, the others are levels. Of a
plain vision transformer, whose maps are all of one size, the outputs after each quarter of its blocks are read, and
the last takes the neck's place. Neck, prompt encoder and mask decoder start fresh.

Source: Wightman, PyTorch Image Models, 2019.
"""

from __future__ import annotations

import difflib
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import timm
import torch
from timm.models import PretrainedCfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from desam_nnunet.encoders.base import (
    MIN_IMAGE_SIZE,
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
from desam_nnunet.encoders.sam_vit import build_mask_decoder, build_neck, build_prompt_encoder, thirds

_MAPS = 4
_NECK_STRIDE = 16
_DIM = 256  # of SAM's prompts


class TimmEncoder(Encoder):
    """A model of timm's, of whose maps the one with number `neck_map` takes the neck's place."""

    network: FeatureGetterNet

    def __init__(self, network: FeatureGetterNet, spec: FeatureSpec, identity: str, neck_map: int) -> None:
        super().__init__(network, spec, identity)
        self.neck_map = neck_map

    def run(self, images: Tensor, *, levels: bool = True, recompute: bool = False) -> Features:
        model: Any = self.network.model
        with suppress(AssertionError, NotImplementedError):  # of models that can't: they keep what they need
            model.set_grad_checkpointing(recompute and torch.is_grad_enabled())
        maps = [x.float().contiguous() for x in self.network(images)]
        neck = maps.pop(self.neck_map)
        return Features(tuple(maps) if levels else (), neck)

    def projections(self) -> list[Projection]:
        """Thirds of a fused layer of a plain ViT, whose last block is the neck's."""
        model: Any = self.network.model
        return [Projection(block.attn, "qkv", thirds(block.attn.qkv)) for block in model.blocks]


class _Maps(NamedTuple):
    """Which of a model's maps are read: their numbers as timm counts them, and which of these is the neck's.

    Attributes:
        is_plain: Whether all are of one size.
    """

    indices: list[int]
    levels: list[Level]
    neck: int
    is_plain: bool


@dataclass(frozen=True)
class TimmBackbone(Architecture):
    """A model by timm's name of it."""

    family = "timm_backbone"

    model: str

    def __post_init__(self) -> None:
        if not timm.is_model(self.model):
            near = difflib.get_close_matches(self.model, timm.list_models(), n=3)
            hint = f": did you mean {', '.join(near)}?" if near else "."
            raise ValueError(f"timm has no model '{self.model}'{hint}")

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]
        is_able = self._maps.is_plain and _has_fused_projections(self._blank)
        return frozenset({"projections"} if is_able else ())

    @cached_property
    def published(self) -> PretrainedCfg:
        """What timm says of its weights; where it has several, of those that it takes by default."""
        published = timm.get_pretrained_cfg(self.model)
        assert published is not None  # of any model that timm knows
        return published

    @property
    def image_size(self) -> int:
        """The input side that it was trained with, as a multiple of its largest stride."""
        multiple = self._image.multiple
        return max(MIN_IMAGE_SIZE, self.published.input_size[-1] // multiple * multiple)

    def spec(self, image_size: int) -> FeatureSpec:
        levels = list(self._maps.levels)
        neck = levels.pop(self._maps.neck)
        return FeatureSpec(tuple(levels), neck, self._image)

    def shapes(self) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in self._blank.state_dict().items()}

    def blank(self, image_size: int, identity: str = "") -> LoadedEncoder:
        return self._assembled(self._create(image_size), image_size, identity)

    def load(self, state: State, image_size: int, identity: str) -> LoadedEncoder:
        """timm interpolates position tables where the input's size asks for it."""
        overlay = {"state_dict": dict(state), "source": ""}
        whole = self._create(image_size, pretrained=True, pretrained_cfg_overlay=overlay)
        return self._assembled(whole, image_size, identity)

    def unused(self, key: str) -> bool:
        """A classifier's."""
        return key in self._classifier

    @property
    def _image(self) -> ImageSpec:
        multiple = max(level.stride for level in self._maps.levels)
        mean, std = (tuple(map(float, row)) for row in (self.published.mean, self.published.std))
        return ImageSpec(multiple, 1.0, mean, std)  # type: ignore[arg-type]

    @cached_property
    def _maps(self) -> _Maps:
        whole: Any = self._blank
        rows = [Level(int(row["num_chs"]), int(row["reduction"])) for row in whole.feature_info]
        if len(rows) < _MAPS or not hasattr(whole, "forward_intermediates"):
            raise ValueError(f"timm's {self.model} gives no {_MAPS} intermediate maps, which a decoder here reads: "
                             "choose another encoder.")
        is_plain = len({level.stride for level in rows}) == 1
        indices = list(range(len(rows) - _MAPS, len(rows)))
        if is_plain:
            indices = [len(rows) * quarter // _MAPS - 1 for quarter in range(1, _MAPS + 1)]
        levels = [rows[index] for index in indices]
        if odd := sorted({level.stride for level in levels if level.stride & (level.stride - 1)}):
            raise ValueError(f"timm's {self.model} gives maps at a stride of {odd[0]} pixels, which doubling does not "
                             "bring to the masks: choose an encoder with strides of 4, 8, 16 or 32.")
        neck = max(range(_MAPS), key=lambda number: (-abs(math.log2(levels[number].stride / _NECK_STRIDE)), number))
        return _Maps(indices, levels, neck, is_plain)

    @cached_property
    def _blank(self) -> nn.Module:
        """Without values and classifier, to be asked for shapes."""
        with torch.device("meta"):
            return self._create()

    @cached_property
    def _classifier(self) -> set[str]:
        with torch.device("meta"):
            return set(timm.create_model(self.model).state_dict()) - set(self.shapes())

    def _create(self, image_size: int | None = None, **options: Any) -> nn.Module:
        if image_size is not None and self.published.fixed_input_size:
            options["img_size"] = image_size
        return timm.create_model(self.model, num_classes=0, **options)

    def _assembled(self, whole: nn.Module, image_size: int, identity: str) -> LoadedEncoder:
        maps, spec = self._maps, self.spec(image_size)
        encoder = TimmEncoder(
            FeatureGetterNet(whole, out_indices=tuple(maps.indices), norm=maps.is_plain), spec, identity, maps.neck)
        neck = build_neck(spec.neck.channels, _DIM)
        prompt_encoder = build_prompt_encoder(_DIM, image_size // spec.neck.stride, image_size)
        return LoadedEncoder(
            encoder, prompt_encoder.requires_grad_(False).eval(), build_mask_decoder(_DIM), neck, trained=False)


def _has_fused_projections(whole: nn.Module) -> bool:
    """Whether every block has an attention whose layer ``qkv`` is called, bias and all."""
    blocks: Any = getattr(whole, "blocks", ())
    attentions = [getattr(block, "attn", None) for block in blocks]
    return bool(attentions) and all(
        isinstance(getattr(attention, "qkv", None), nn.Linear) and getattr(attention, "q_bias", None) is None
        for attention in attentions)
