"""SAMed and SAMed_s against tensors of the published implementation, loaded by its official key names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder
from torch import Tensor, nn

from desam_nnunet.encoders.attention import use_exact_attention
from desam_nnunet.encoders.base import FeatureSpec, Level, LoadedEncoder
from desam_nnunet.encoders.sam_vit import IMAGE, PATCH, SamViTEncoder, build_transformer
from desam_nnunet.networks.frame import Outline
from desam_nnunet.networks.samed.network import SAMed
from desam_nnunet.published.formats import (
    adapts_decoder,
    is_official_samed,
    official_samed_names,
    rename_official_samed,
)
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.training.samed import SAMedTrainer

LOGITS = 1e-5  # absolute, float32, as the golden files state
FILES = ("samed_small", "samed_s_small")


class Golden(NamedTuple):
    sam: dict[str, Tensor]
    checkpoint: dict[str, Tensor]
    image: Tensor
    logits: Tensor
    masks: Tensor
    sizes: dict[str, str]


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    with safe_open(Path(__file__).parent / "golden" / f"{request.param}.safetensors", "pt") as file:
        tensors, sizes = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Golden(part("sam."), part("lora."), tensors["input.image"], tensors["output.low_res_logits"],
                  tensors["output.masks"], sizes)


def published(golden: Golden, *, exact: bool) -> SAMed:
    """The golden SAM with the golden checkpoint, in the encoder's plain or in our attention."""
    sizes = {key: int(value) for key, value in golden.sizes.items() if value.isdigit()}
    side, dim = sizes["image_size"] // 16, sizes["dim"]
    blocks = tuple(map(int, golden.sizes["global_attn_indexes"].split(",")))
    vit = ImageEncoderViT(
        img_size=sizes["image_size"], patch_size=16, embed_dim=sizes["encoder_dim"], depth=sizes["depth"],
        num_heads=sizes["heads"], mlp_ratio=4, out_chans=dim, qkv_bias=True, use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), window_size=sizes["window_size"], global_attn_indexes=blocks)
    transformer = build_transformer(dim, mlp_dim=sizes["mlp_dim"], heads=sizes["decoder_heads"])
    for module, name in ((vit, "image_encoder."), (transformer, "mask_decoder.transformer.")):
        module.load_state_dict({key.removeprefix(name): value for key, value in golden.sam.items()
                                if key.startswith(name)})
    spec = FeatureSpec((Level(sizes["encoder_dim"], PATCH),) * (len(blocks) - 1), Level(dim, PATCH), IMAGE)
    loaded = LoadedEncoder(
        SamViTEncoder(use_exact_attention(vit) if exact else vit, spec, "golden", blocks[:-1]),
        PromptEncoder(dim, (side, side), (sizes["image_size"],) * 2, mask_in_chans=16),
        MaskDecoder(transformer_dim=dim, transformer=transformer))
    to_image = TileToImage(SAMedTrainer.image_of(IMAGE), sizes["image_size"], "unit")
    network = SAMed(Outline(loaded, to_image, 3, sizes["num_classes"] + 1, True, None), rank=sizes["rank"],
                    targets="qv", adapt_decoder=adapts_decoder(golden.checkpoint))
    network.encoder.dtype = torch.float32  # also where the CPU has bfloat16
    network.load_state_dict(rename_official_samed(golden.checkpoint))
    return network.eval()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_logits_are_the_published_ones(golden: Golden, exact: bool, gradients: bool) -> None:
    network = published(golden, exact=exact)
    with torch.set_grad_enabled(gradients):
        logits = network.decode(network.encoder.neck(golden.image))
    torch.testing.assert_close(logits, golden.logits, rtol=0, atol=LOGITS)


def test_masks_are_the_published_ones(golden: Golden) -> None:
    network = published(golden, exact=True)
    with torch.no_grad():
        masks = network.tile_logits(network.decode(network.encoder.neck(golden.image)), network.geometry(golden.image))
    torch.testing.assert_close(masks, golden.masks, rtol=0, atol=LOGITS)


def test_the_checkpoint_matters(golden: Golden) -> None:
    network = published(golden, exact=True)
    with torch.no_grad():
        network.updates[0]["v"].up.weight.zero_()
        changed = network.decode(network.encoder.neck(golden.image))
    assert (changed - golden.logits).abs().max() > 100 * LOGITS


def test_names_come_back(golden: Golden) -> None:
    assert is_official_samed(golden.checkpoint)
    back = official_samed_names(published(golden, exact=True).state_dict())
    assert back.keys() == golden.checkpoint.keys()
    for key, value in golden.checkpoint.items():
        assert torch.equal(back[key], value)
