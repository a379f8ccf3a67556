"""The sizes of SAM's encoders and the files that hold their weights, one row each.

Source: Kirillov et al., Segment Anything, ICCV 2023, and the package ``segment-anything`` 1.0
(``build_sam.py``). ``vit_tiny`` is ours: the same classes in a size that a laptop can run, pretrained on generated
images (``docs/vit_tiny.md``), in the package; ``vit_tiny_random`` is as large, with weights that nobody trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

PATCH = 16
MASK_STRIDE = 4  # SAM's and DeSAM's masks are at a quarter of the input size
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
DOWNLOAD_URL = "https://dl.fbaipublicfiles.com/segment_anything/"


@dataclass(frozen=True)
class Variant:
    """One encoder size.

    Attributes:
        global_blocks: Indexes of the blocks with global attention; the others attend in windows.
        prompt_dim: Channels of the neck, the prompts and the mask decoder.
        image_size: Input side in pixels of the pretrained position tables.
        file, md5, megabytes: The published weights file; empty where there is none, and weights are random.
        packaged: Whether that file comes with this package.
    """

    name: str
    embed_dim: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    prompt_dim: int = 256
    image_size: int = 1024
    file: str = ""
    md5: str = ""
    megabytes: int = 0
    packaged: bool = False

    @property
    def feature_channels(self) -> int:
        """Of the intermediate outputs that DeSAM reads (all global blocks' but the last) and the neck together."""
        return (len(self.global_blocks) - 1) * self.embed_dim + self.prompt_dim

    @property
    def remedy(self) -> str:
        """What to do where the file is missing or damaged."""
        return "install desam-nnunet again" if self.packaged else f"desam weights get {self.name}"

    @property
    def url(self) -> str:
        return DOWNLOAD_URL + self.file


_TINY = Variant("vit_tiny", 192, 8, 6, (1, 3, 5, 7), window=8, prompt_dim=128, image_size=256,
                file="vit_tiny.safetensors", md5="a52f4216152a62c5033e98f362f562d7", megabytes=10, packaged=True)
VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        Variant("vit_b", 768, 12, 12, (2, 5, 8, 11),
                file="sam_vit_b_01ec64.pth", md5="01ec64d29a2fca3f0661936605ae66f8", megabytes=375),
        Variant("vit_l", 1024, 24, 16, (5, 11, 17, 23),
                file="sam_vit_l_0b3195.pth", md5="0b3195507c641ddb6910d2bb5adee89c", megabytes=1250),
        Variant("vit_h", 1280, 32, 16, (7, 15, 23, 31),
                file="sam_vit_h_4b8939.pth", md5="4b8939a88964f0f4ff5f5b2642c598a6", megabytes=2564),
        _TINY,
        replace(_TINY, name="vit_tiny_random", file="", md5="", megabytes=0, packaged=False),
    )
}


def build_sam(variant: Variant, image_size: int | None = None) -> Sam:
    """SAM's own modules in the size of `variant`, with the package's default initialisation.

    Args:
        image_size: Input side in pixels, a multiple of 16; the variant's own where None.
    """
    size = image_size or variant.image_size
    grid = size // PATCH
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=size,
            patch_size=PATCH,
            embed_dim=variant.embed_dim,
            depth=variant.depth,
            num_heads=variant.heads,
            mlp_ratio=4,
            out_chans=variant.prompt_dim,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=variant.window,
            global_attn_indexes=variant.global_blocks,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=variant.prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=variant.prompt_dim,
            transformer=build_transformer(variant.prompt_dim),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=variant.prompt_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def build_neck(variant: Variant) -> nn.Sequential:
    """The neck of SAM's image encoder in the size of `variant`, with the package's default initialisation."""
    return ImageEncoderViT(PATCH, PATCH, embed_dim=variant.embed_dim, depth=0, out_chans=variant.prompt_dim).neck


def build_transformer(dim: int, *, mlp_dim: int | None = None, heads: int = 8, depth: int = 2) -> TwoWayTransformer:
    """SAM's two-way transformer; the MLP is eight times as wide as `dim`, as published (256, 2048)."""
    return TwoWayTransformer(depth=depth, embedding_dim=dim, mlp_dim=mlp_dim or 8 * dim, num_heads=heads)
