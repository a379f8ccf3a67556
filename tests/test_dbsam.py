"""DB-SAM: two branches around a frozen encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SIZE, TRAINED, tiny_sam
from torch import nn
from torch.nn import functional as F

from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import IMAGE
from desam_nnunet.networks.dbsam.dual_branch import BilateralExchange, ChannelAttention, Fusion, Stem
from desam_nnunet.networks.dbsam.network import DBSAM
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens
from desam_nnunet.sam.tiles import TileToImage


def build(*, classes: int = 1, background: bool = True, checkpointing: bool = False, boxes: int | None = None
          ) -> DBSAM:
    to_image = TileToImage(IMAGE, SIZE, "percentile")
    outline = Outline(tiny_sam(), to_image, 1, classes + background, background, None)
    return DBSAM(outline, checkpointing=checkpointing, boxes=boxes)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_every_stem_ends_at_a_sixteenth(level: int) -> None:
    stem = Stem(48, level)
    assert stem(torch.randn(2, 3, SIZE, SIZE)).shape == (2, SIZE // 16, SIZE // 16, 48)
    assert sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in stem.layers) == 4 - level


def test_channel_attention_starts_as_nothing_and_is_the_formula() -> None:
    block, x = ChannelAttention(16), torch.randn(2, 5, 6, 16)
    assert torch.equal(block(x), x)
    nn.init.normal_(block.project.weight)
    nn.init.normal_(block.project.bias)
    y = F.gelu(block.depthwise(block.norm(x).permute(0, 3, 1, 2)))
    weights = torch.sigmoid(block.squeeze.fc2(F.relu(block.squeeze.fc1(y.mean((2, 3), keepdim=True)))))
    torch.testing.assert_close(block(x), x + block.project(y * weights).permute(0, 2, 3, 1))
    assert block.squeeze.fc1.out_channels == 4


def test_both_branches_read_what_was_before_the_exchange() -> None:
    exchange = BilateralExchange(24, heads=3).eval()
    tokens, maps = torch.randn(1, 4, 4, 24), torch.randn(1, 4, 4, 4, 24)
    with torch.no_grad():
        new_tokens, new_maps = exchange(tokens, maps)
        exchange.maps_read.project.weight.zero_()  # what the maps read changes nothing for the tokens
        same_tokens, other_maps = exchange(tokens, maps)
        assert torch.equal(same_tokens, new_tokens)
        assert not torch.equal(other_maps, new_maps)
        exchange.tokens_read.project.weight.zero_()
        other_tokens, same_maps = exchange(tokens, maps)
    assert torch.equal(same_maps, other_maps)
    assert not torch.equal(other_tokens, new_tokens)


def test_fusion_weighs_the_maps_at_each_pixel_and_channel() -> None:
    fusion = Fusion(24).eval()
    fusion.feed = nn.Identity()
    tokens, maps = torch.randn(1, 3, 3, 24), torch.randn(1, 4, 3, 3, 24)
    every = torch.cat([tokens[:, None], maps], 1)
    with torch.no_grad():
        fused = fusion(tokens, maps)
        assert ((fused >= every.amin(1)) & (fused <= every.amax(1))).all()
        fusion.scores[2][3].bias[5] = 1e4  # the second convolution map wins in channel 5
        torch.testing.assert_close(fusion(tokens, maps)[..., 5], maps[:, 1, ..., 5])


@pytest.mark.parametrize("depth", [6, 3])
def test_blocks_that_four_does_not_divide_are_spread_over_the_stages(depth: int) -> None:
    size = replace(ENCODERS["vit_tiny"].architecture, depth=depth, global_blocks=tuple(range(depth)))
    outline = Outline(size.blank(SIZE), TileToImage(IMAGE, SIZE, "percentile"), 1, 2, True, None)
    network = DBSAM(outline, checkpointing=False)
    order = []
    for module in (*network.channel_attention, *network.exchanges):
        module.register_forward_hook(lambda module, *_: order.append(type(module).__name__[0]))
    network(torch.randn(1, 1, 96, 96)).square().sum().backward()
    assert "".join(order) == {6: "CBCCBCBCCB", 3: "BCBCBCB"}[depth]
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def test_drop_path_and_dropout_are_off_at_prediction() -> None:
    network, tiles = build().eval(), torch.randn(1, 1, 96, 80)
    with torch.no_grad():
        assert torch.equal(network(tiles), network(tiles))
        assert network(tiles).shape == (1, 2, 96, 80)
        assert network(tiles)[:, 0].eq(0).all()
        network.train()
        assert not torch.equal(network(tiles), network(tiles))
    assert not network.encoder.training


def test_regions_have_no_background() -> None:
    with torch.no_grad():
        assert build(classes=3, background=False).eval()(torch.randn(1, 1, 96, 96)).shape == (1, 3, 96, 96)


def test_all_that_trains_gets_a_gradient_and_the_encoder_none() -> None:
    network = build(classes=2)
    network(torch.randn(2, 1, 96, 96)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    assert {name.split(".")[0] for name in network.state_dict()} == TRAINED["DBSAMTrainer"] | {"prompt_encoder"}


def test_a_box_changes_the_mask() -> None:
    network, tiles = build().eval(), torch.randn(1, 1, 96, 96)
    with torch.no_grad():
        whole = network(tiles)
        torch.testing.assert_close(network(tiles, torch.tensor([[0.0, 0.0, SIZE, SIZE]])), whole)
        assert not torch.equal(network(tiles, torch.tensor([[10.0, 10.0, 60.0, 60.0]])), whole)


@pytest.mark.parametrize("tokens", [1, 4])
def test_with_boxes_there_is_one_mask_and_four_tokens_start_as_sams_decoder(tokens: int) -> None:
    network, tiles, box = build(classes=3, boxes=tokens), torch.randn(1, 1, 96, 96), torch.tensor([[9.0, 9, 70, 70]])
    assert network(tiles, box).shape == (1, 1, 96, 96)
    with pytest.raises(ValueError, match="was trained with boxes from the reference"):
        network(tiles)
    network(tiles, box).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    sam, neck = tiny_sam(), torch.randn(1, 128, SIZE // 16, SIZE // 16)
    sparse, dense = prompt_tokens(sam.prompt_encoder, Prompts(boxes=box))
    with torch.no_grad():
        theirs, _ = sam.mask_decoder.predict_masks(neck, dense_positions(sam.prompt_encoder), sparse, dense)
        same = torch.allclose(network.decode(neck, Prompts(boxes=box)), theirs[:, :1], rtol=0, atol=1e-4)
    assert same == (tokens == 4)


def test_checkpointing_changes_no_gradient() -> None:
    tiles, gradients = torch.randn(1, 1, 96, 96), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = build(checkpointing=checkpointing)
        for module in network.modules():  # no random numbers between the two
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.eval()
        network(tiles).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)
