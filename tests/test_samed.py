"""SAMed: low-rank updates of the frozen encoder, what trains, what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SIZE, Workspace, make_trainer, tiny_sam

from desam_nnunet.encoders.base import LoadedEncoder
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import IMAGE
from desam_nnunet.networks.frame import Outline
from desam_nnunet.networks.samed.lora import AdaptedLinear, LowRank
from desam_nnunet.networks.samed.network import SAMed
from desam_nnunet.published.formats import official_samed_names
from desam_nnunet.sam.tiles import TileToImage
from desam_nnunet.training.samed import SAMedTrainer


def build(loaded: LoadedEncoder | None = None, *, size: int = SIZE, outputs: int = 2, channels: int = 1,
          **settings: Any) -> SAMed:
    given = {"rank": 4, "targets": "qv", "adapt_decoder": False, "checkpointing": False} | settings
    to_image = TileToImage(SAMedTrainer.image_of(IMAGE), size, "percentile")
    return SAMed(Outline(loaded or tiny_sam(), to_image, channels, outputs, True, None), **given)


def shake(network: SAMed) -> SAMed:
    """Updates that are not zero any more."""
    for name, parameter in network.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def test_starts_as_sam_exactly() -> None:
    network, tiles = build(), torch.randn(2, 1, 96, 80)
    images = network.images(tiles).flatten(0, 1)
    base = tiny_sam().encoder(images).neck
    with torch.no_grad():
        assert torch.equal(network.encoder.neck(images), base)
        assert all(layer._merged is None for layer in network._adapted)
        assert torch.equal(network.encode(tiles), base)
        assert all(layer._merged is not None for layer in network._adapted)
        assert not torch.equal(shake(network).encode(tiles), base)


@pytest.mark.parametrize("adapt_decoder", [False, True])
@pytest.mark.parametrize("targets", ["qv", "qkv", "k"])
def test_merged_weights_give_the_same_logits(targets: str, adapt_decoder: bool) -> None:
    network = shake(build(targets=targets, adapt_decoder=adapt_decoder)).eval()
    tiles = torch.randn(2, 1, 96, 80)
    apart = network(tiles).detach()
    with torch.no_grad():
        torch.testing.assert_close(network(tiles), apart, rtol=0, atol=1e-5)


def test_merged_weights_never_grow_old() -> None:
    network, tiles = shake(build()).eval(), torch.randn(1, 1, 96, 96)
    with torch.inference_mode():
        before = network(tiles)
        merged = [layer._merged for layer in network._adapted]
        assert len(merged) == 8
        assert torch.equal(network(tiles), before)
        assert all(layer._merged is one for layer, one in zip(network._adapted, merged, strict=True))
        original = {key: value.clone() for key, value in network.state_dict().items()}
        other = {key: -value if key.endswith("up.weight") else value for key, value in network.state_dict().items()}
        network.load_state_dict(other)  # as nnU-Net's predictor goes from fold to fold
        after = network(tiles)
        assert not torch.equal(after, before)
        network._apply(lambda x: x.clone())  # as nnU-Net moves it to a GPU: its weights have no version any more
        assert all(layer.weight.is_inference() for layer in network._adapted)
        torch.testing.assert_close(network(tiles), after, rtol=0, atol=0)
        merged = [layer._merged for layer in network._adapted]
        network(tiles)
        assert all(layer._merged is one for layer, one in zip(network._adapted, merged, strict=True))
        network.load_state_dict(original)
        assert torch.equal(network(tiles), before)
    network = shake(build()).eval()
    with torch.inference_mode():
        after = network(tiles)
    apart = network(tiles)  # with gradients
    torch.testing.assert_close(after, apart.detach(), rtol=0, atol=1e-5)
    assert all(layer._merged is None for layer in network._adapted)
    apart.square().mean().backward()
    with torch.no_grad():
        network(tiles)
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3).step()
    stepped = network(tiles).detach()
    assert not torch.allclose(stepped, apart.detach(), rtol=0, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(network(tiles), stepped, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapt_decoder", [False, True])
def test_all_that_trains_gets_a_gradient_and_nothing_else(adapt_decoder: bool) -> None:
    network = shake(build(adapt_decoder=adapt_decoder))
    network(torch.randn(2, 1, 96, 96)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith(("prompt_encoder.", "decoder.seg_layers.iou_head.")) or name.endswith(".k_proj.bias")
               for name in frozen)
    for module in network.held:
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_checkpointing_changes_no_gradient() -> None:
    tiles = torch.randn(1, 1, 96, 96)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = shake(build(checkpointing=checkpointing))
        network(tiles).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


def test_channels_are_encoded_in_groups() -> None:
    network = shake(build(channels=5)).eval()
    tiles = torch.randn(1, 5, 96, 96)
    images = network.images(tiles)[0]
    assert images.shape == (2, 3, SIZE, SIZE)
    assert images.min() >= 0
    assert images.max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(network.encode(tiles)[0], network.encoder.neck(images).mean(0))


@pytest.mark.parametrize(("adapt_decoder", "megabytes"), [(False, 25), (True, 12)])
def test_a_checkpoint_of_vit_b_with_eight_organs_is_small(adapt_decoder: bool, megabytes: float) -> None:
    with torch.device("meta"):
        network = build(ENCODERS["vit_b"].architecture.blank(512), size=512, outputs=9, adapt_decoder=adapt_decoder)
    saved = sum(value.nbytes for value in network.state_dict().values())
    assert 1e6 < saved < megabytes * 1e6


@pytest.mark.parametrize("late", [True, False])
def test_published_schedule(workspace: Workspace, late: bool) -> None:
    """Published code sets the rate after each step, so that each iteration but the first has that of the one before.
    """
    plans = workspace.plans()
    plans["configurations"]["2d"]["sam"] |= {"epochs": 10, "iterations_per_epoch": 100}
    plans["configurations"]["2d"]["samed"] = {"warmup": 200} | ({} if late else {"lr_after_step": False})
    trainer = make_trainer("SAMedTrainer", workspace, plans=plans)
    trainer.initialize()
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.9, 0.999))
    assert group["lr"] == pytest.approx(0.005 / 200)
    rates = []
    for epoch in range(10):
        trainer.lr_scheduler.step(epoch)
        for _ in range(100):
            rates.append(group["lr"])
            trainer.lr_scheduler.advance()
    if late:
        assert rates.pop(0) == rates[0]
    assert rates[:200] == pytest.approx([0.005 * (k + 1) / 200 for k in range(200)])
    assert rates[200:] == pytest.approx([0.005 * (1 - k / 1000) ** 0.9 for k in range(len(rates) - 200)])


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([4, 0, 7]), None])
def test_an_update_reaches_its_rows_alone(rows: slice | torch.Tensor | None) -> None:
    base, x = torch.nn.Linear(6, 8), torch.randn(2, 3, 6)
    update = LowRank(6, 8 if rows is None else 3, rank=2)
    torch.nn.init.normal_(update.up.weight)
    layer = AdaptedLinear(base, [(update, rows)])
    expected = base(x).detach()
    expected[..., slice(None) if rows is None else rows] += update(x).detach()
    torch.testing.assert_close(layer(x).detach(), expected)
    layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_the_rows_of_an_update_move_along_and_are_in_no_checkpoint() -> None:
    layer = AdaptedLinear(torch.nn.Linear(6, 8), [(LowRank(6, 3, rank=2), torch.tensor([4, 0, 7]))])
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert [rows.device.type for rows in layer.to("meta").buffers()] == ["meta"]


def test_the_cache_is_not_for_adapted_encoders(workspace: Workspace) -> None:
    trainer = make_trainer("SAMedTrainer", workspace)
    assert trainer.sam.features == "online"


@pytest.mark.parametrize(("targets", "named"), [("q", "q"), ("v", "v"), ("qkv", "k, q, v")])
def test_other_updates_than_of_q_and_v_have_no_published_name(targets: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"format has updates of q and v, but these are of {named}\\."):
        official_samed_names(build(targets=targets).state_dict())
