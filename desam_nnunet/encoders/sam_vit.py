"""Segment Anything's own vision transformer, in every size, with its prompt encoder and mask decoder.

Source: Kirillov et al., Segment Anything, ICCV 2023, and the package ``segment-anything`` 1.0 (``build_sam.py``); which
outputs are levels, Gao et al., DeSAM, MICCAI 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from desam_nnunet.encoders.attention import use_exact_attention
from desam_nnunet.encoders.base import (
    Architecture,
    Encoder,
    Features,
    FeatureSpec,
    ImageSpec,
    Level,
    LoadedEncoder,
    PlainViT,
    Projection,
    State,
)

PATCH = 16
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
IMAGE = ImageSpec(PATCH, 255.0, PIXEL_MEAN, PIXEL_STD)


class SamViTEncoder(Encoder):
    """SAM's ``ImageEncoderViT`` with exact attention; the outputs of some of its blocks are its levels."""

    network: ImageEncoderViT

    def __init__(self, vit: ImageEncoderViT, spec: FeatureSpec, identity: str, level_blocks: tuple[int, ...]) -> None:
        super().__init__(vit, spec, identity)
        self.level_blocks = level_blocks

    def run(self, images: Tensor, *, levels: bool = True, recompute: bool = False) -> Features:
        return read_features(self.network, self._embed(images), self.level_blocks if levels else (), recompute)

    def projections(self) -> list[Projection]:
        """Thirds of a fused layer."""
        return [Projection(block.attn, "qkv", thirds(block.attn.qkv)) for block in self.network.blocks]

    def plain_vit(self) -> PlainViT:
        vit = self.network
        return PlainViT(self._embed, vit.blocks, vit.neck, vit.pos_embed.shape[-1], vit.blocks[0].attn.num_heads)

    def _embed(self, images: Tensor) -> Tensor:
        """The first block's input (B, S/16, S/16, D)."""
        return self.network.patch_embed(images) + self.network.pos_embed


def read_features(vit: ImageEncoderViT, x: Tensor, level_blocks: tuple[int, ...], recompute: bool = False) -> Features:
    """Blocks and neck on the first block's input (B, S/16, S/16, D); levels are the outputs of some blocks."""
    levels = []
    for index, block in enumerate(vit.blocks):
        x = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
        if index in level_blocks:
            levels.append(x.permute(0, 3, 1, 2).float().contiguous())  # B H W D -> B D H W
    return Features(tuple(levels), vit.neck(x.permute(0, 3, 1, 2)).float())


def thirds(fused: nn.Linear) -> dict[str, slice]:
    """Where queries, keys and values stand among the outputs of a layer that makes one after the other."""
    width = fused.out_features // 3
    return {letter: slice(part * width, (part + 1) * width) for part, letter in enumerate("qkv")}


@dataclass(frozen=True)
class SamViT(Architecture):
    """One size of SAM.

    Attributes:
        global_blocks: Indexes of the blocks with global attention, the others attend in windows. The outputs of all
            of these but the last are levels.
        prompt_dim: Channels of the neck, the prompts and the mask decoder.
        tables: Input side in pixels of the pretrained position tables.
    """

    family = "sam_vit"
    offers = frozenset({"projections", "plain ViT"})

    embed_dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    prompt_dim: int = 256
    tables: int = 1024

    def spec(self, image_size: int) -> FeatureSpec:
        levels = (Level(self.embed_dim, PATCH),) * (len(self.global_blocks) - 1)
        return FeatureSpec(levels, Level(self.prompt_dim, PATCH), IMAGE)

    def shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {key: value.shape for key, value in build_sam(self).state_dict().items()}

    def blank(self, image_size: int, identity: str = "") -> LoadedEncoder:
        return self._assembled(build_sam(self, image_size), image_size, identity)

    def load(self, state: State, image_size: int, identity: str) -> LoadedEncoder:
        with torch.device("meta"):  # the real values come with the state: nothing is initialised twice
            sam = build_sam(self, image_size)
        sam.load_state_dict(resize_positions(state, self, image_size), assign=True)
        return self._assembled(sam, image_size, identity)

    def operations(self, image_size: int) -> int:
        """Linear layers, and the two products of attention, global or within windows, as SAM defines them."""
        tokens = (image_size // PATCH) ** 2
        linear = self.depth * 24 * tokens * self.embed_dim**2
        windows = self.depth - len(self.global_blocks)
        seen = len(self.global_blocks) * tokens + windows * min(tokens, self.window**2)
        return linear + 4 * tokens * seen * self.embed_dim

    def _assembled(self, sam: Sam, image_size: int, identity: str) -> LoadedEncoder:
        encoder = SamViTEncoder(
            use_exact_attention(sam.image_encoder), self.spec(image_size), identity, self.global_blocks[:-1])
        return LoadedEncoder(encoder, sam.prompt_encoder.requires_grad_(False).eval(), sam.mask_decoder)


def build_sam(size: SamViT, image_size: int | None = None) -> Sam:
    """SAM's own modules, freshly initialised, for an input of `image_size` pixels or that of the pretrained tables."""
    image_size = image_size or size.tables
    vit = ImageEncoderViT(
        image_size, PATCH, embed_dim=size.embed_dim, depth=size.depth, num_heads=size.heads, out_chans=size.prompt_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=size.window,
        global_attn_indexes=size.global_blocks)
    return assemble_sam(vit, size.prompt_dim, image_size // PATCH, image_size)


def assemble_sam(image_encoder: nn.Module, dim: int, side: int, image_size: int) -> Sam:
    """SAM's modules around an image encoder, whose neck has `dim` channels and `side` pixels a side."""
    return Sam(image_encoder, build_prompt_encoder(dim, side, image_size), build_mask_decoder(dim))


def build_prompt_encoder(dim: int, side: int, image_size: int) -> PromptEncoder:
    """SAM's prompt encoder, for an input of `image_size` pixels and maps of `side`."""
    return PromptEncoder(
        embed_dim=dim, image_embedding_size=(side, side), input_image_size=(image_size, image_size), mask_in_chans=16)


def build_mask_decoder(dim: int) -> MaskDecoder:
    """SAM's mask decoder, with its four masks."""
    return MaskDecoder(transformer_dim=dim, transformer=build_transformer(dim), iou_head_hidden_dim=dim)


def build_neck(channels: int, dim: int) -> nn.Sequential:
    """The neck of SAM's image encoder, with the package's default initialisation: `channels` to `dim`."""
    return ImageEncoderViT(PATCH, PATCH, embed_dim=channels, depth=0, out_chans=dim).neck


def build_transformer(dim: int, *, mlp_dim: int | None = None, heads: int = 8, depth: int = 2) -> TwoWayTransformer:
    """SAM's two-way transformer; the MLP is eight times as wide as `dim`, as published (256, 2048)."""
    return TwoWayTransformer(depth=depth, embedding_dim=dim, mlp_dim=mlp_dim or 8 * dim, num_heads=heads)


def resize_positions(state: State, size: SamViT, image_size: int) -> State:
    """Interpolates the position tables of the image encoder for another input size.

    The absolute table bilinearly, the relative tables of the global blocks linearly as SAM's
    ``get_rel_pos`` does at run time; windows keep their tables.
    """
    if image_size == size.tables:
        return state
    grid = image_size // PATCH
    resized = dict(state)
    absolute = state["image_encoder.pos_embed"].permute(0, 3, 1, 2)  # 1 H W D -> 1 D H W
    absolute = F.interpolate(absolute, size=(grid, grid), mode="bilinear", align_corners=False)
    resized["image_encoder.pos_embed"] = absolute.permute(0, 2, 3, 1)
    for block in size.global_blocks:
        for axis in "hw":
            key = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            table = state[key].T[None]  # L C -> 1 C L
            resized[key] = F.interpolate(table, size=2 * grid - 1, mode="linear")[0].T.contiguous()
    return resized
