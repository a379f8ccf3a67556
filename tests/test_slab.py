"""Slices that see their neighbours: networks on slabs, and the slabs of the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE, tiny_sam
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_cache_loader import make as make_loader  # noqa: F401 - a fixture
from torch import Tensor

from desam_nnunet.augmentation.slabs import slice_by_slice
from desam_nnunet.cache.loader import MISSING, CachedLoader, Draw
from desam_nnunet.cache.store import Tile
from desam_nnunet.encoders.sam_vit import IMAGE
from desam_nnunet.networks.desam.network import build_desam
from desam_nnunet.networks.desam.pdmm_alone import PDMMAlone
from desam_nnunet.networks.desam.pdmm_section import PdmmSection
from desam_nnunet.networks.desam.prompters import GridPrompter, Prompter, WholeBoxPrompter
from desam_nnunet.networks.frame import ABSENT_LOGIT, FrozenSamNetwork, Outline
from desam_nnunet.networks.neighbours import Neighbours
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.slabs import slabs_of, slices_of
from desam_nnunet.sam.tiles import TileToImage

DEPTH = 5
SOME = GridPrompter(3, threshold=0.0)


def outline(depth: int, section: Any = None) -> Outline:
    return Outline(tiny_sam(), TileToImage(IMAGE, SIZE, "percentile"), 1, 3, True, section, depth)


def pdmm(depth: int) -> FrozenSamNetwork:
    return PDMMAlone(outline(depth, PdmmSection(width=32))).eval()


def desam(prompter: Prompter) -> Callable[[int], FrozenSamNetwork]:
    return lambda depth: build_desam(outline(depth), prompter).eval()


NETWORKS = pytest.mark.parametrize("build", [pdmm, desam(SOME), desam(WholeBoxPrompter())],
                                   ids=["pdmm", "grid", "whole box"])


def alike(network: FrozenSamNetwork, other: FrozenSamNetwork) -> FrozenSamNetwork:
    """`network` with the weights of `other`, as far as it has them."""
    missing = network.load_state_dict(other.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".seg_layers." in key for key in missing.missing_keys)
    return network


def awake(network: FrozenSamNetwork) -> FrozenSamNetwork:
    """With neighbours that say something, as after training."""
    for module in network.modules():
        if isinstance(module, Neighbours):
            torch.nn.init.normal_(module.seg_layers[1].weight, std=0.1)
    return network


def volume(slices: int) -> Tensor:
    return torch.randn(1, 1, slices, 48, 48)


def test_slabs_are_slices_in_a_row() -> None:
    slabs = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6)
    slices = slices_of(slabs)
    assert slices.shape == (8, 3, 5, 6)
    assert torch.equal(slices[5], slabs[1, :, 1])
    assert torch.equal(slabs_of(slices, 4), slabs)
    assert slices_of(slices) is slices


@NETWORKS
@torch.no_grad()
def test_before_training_a_slab_is_its_slices_one_by_one(build: Callable[[int], FrozenSamNetwork]) -> None:
    flat = build(1)
    deep = alike(build(DEPTH), flat)
    for slab in (volume(DEPTH), volume(1).expand(-1, -1, DEPTH, -1, -1)):
        expected = torch.cat([flat(slab[:, :, z]) for z in range(DEPTH)])
        torch.testing.assert_close(slices_of(deep(slab)), expected, rtol=0, atol=1e-5)


@NETWORKS
@torch.no_grad()
def test_a_slice_sees_two_on_either_side(build: Callable[[int], FrozenSamNetwork]) -> None:
    network = awake(build(7))
    slab = volume(7)
    changed = slab.clone()
    changed[:, :, 3] = torch.randn(48, 48)
    difference = (network(slab) - network(changed)).abs().amax((0, 1, 3, 4))
    assert [bool(value > 1e-4) for value in difference] == [False, True, True, True, True, True, False]


@NETWORKS
@torch.no_grad()
def test_slices_that_are_missing_are_as_if_the_slab_ended(build: Callable[[int], FrozenSamNetwork]) -> None:
    deep = awake(build(DEPTH))
    short = build(3)
    short.load_state_dict(deep.state_dict())
    slab = volume(3)
    padded = torch.zeros(1, 1, DEPTH, 48, 48)
    padded[:, :, 1:4] = slab
    torch.testing.assert_close(deep(padded)[:, :, 1:4], short(slab), rtol=0, atol=1e-4)
    assert torch.isfinite(deep(torch.zeros_like(padded))).all()


def test_features_say_which_slices_are_missing() -> None:
    network = pdmm(DEPTH)
    slab = volume(DEPTH)
    slab[:, :, 1] = 0
    features = network.encode_slices(slices_of(slab))
    there = network.there(features)
    assert there is not None
    assert there.tolist() == [True, False, True, True, True]
    assert pdmm(1).there(features) is None
    np.testing.assert_array_equal(features.part(1).neck, 0)
    torch.testing.assert_close(features.part(2).neck, network.encode(slab[:, :, 2]).neck)


def test_training_sees_all_slabs_of_a_batch_apart() -> None:
    """What one slab's slices are does not reach the other, and gradients reach the module."""
    network = awake(pdmm(DEPTH)).train()
    features = network.encode(slices_of(torch.randn(2, 1, DEPTH, 48, 48)))
    masks, _ = network(features, Prompts())
    other = network.encode(slices_of(torch.cat([torch.randn(1, 1, DEPTH, 48, 48), volume(DEPTH)])))
    mixed = features.joined([other.part(0, DEPTH), features.part(1, DEPTH)])
    torch.testing.assert_close(network(mixed, Prompts())[0][DEPTH:], masks[DEPTH:])
    masks.square().mean().backward()
    (module,) = (module for module in network.modules() if isinstance(module, Neighbours))
    assert all(layer.weight.grad.abs().max() > 0 for layer in module.seg_layers)


class Counted(torch.nn.Module):
    """An encoder whose images are counted."""

    def __init__(self, network: FrozenSamNetwork) -> None:
        super().__init__()
        self.images = 0
        network.encoder.register_forward_pre_hook(self._count)

    def _count(self, _: Any, args: tuple[Tensor]) -> None:
        self.images += len(args[0])


@torch.no_grad()
def test_windows_that_overlap_encode_each_slice_once() -> None:
    """Within the memory's budget, mirrored in all axes; a second volume makes room by itself."""
    network = pdmm(4)
    count = Counted(network)
    for _ in range(2):
        scan = volume(10)
        count.images = 0
        for first in (0, 2, 4, 6):
            for axes in ((), (3,), (4,), (3, 4), (2,), (2, 3)):
                network(scan[:, :, first : first + 4].flip(axes))
        assert count.images == 10 * 4
    one = network.encode(slices_of(volume(1))).nbytes
    network.memory.clear()
    network.memory.budget = 4 * one  # of four: the two that come again must be among them
    count.images = 0
    for first in (0, 2, 4, 6):
        network(scan[:, :, first : first + 4])
    assert count.images == 10


def test_cached_slabs_hold_what_is_drawn_as_neighbours(make_loader: Callable[..., CachedLoader]) -> None:  # noqa: F811
    loader = make_loader(depth=2, views=1)
    starts = set()
    for _ in range(50):
        draws = loader.draw()
        assert len(draws) == 2 * loader.batch_size
        for one, other in zip(draws[::2], draws[1::2], strict=True):
            assert other == one._replace(number=one.number + 1)
            starts.add(one.number)
    assert starts == {0, 1}
    batch = loader.read([Draw("case", 0, 0), Draw("case", 1, 0)])
    assert batch["target"].shape == (2, 1, 6, 8)
    single = loader.read([Draw("case", 1, 0)])
    torch.testing.assert_close(batch["features"].part(1).neck, single["features"].neck)


def test_where_a_slice_has_several_tiles_a_slab_stays_at_one_place(
    make_loader: Callable[..., CachedLoader],  # noqa: F811
) -> None:
    two_in_a_slice = [Tile(number // 2, 0, 4 * (number % 2)) for number in range(6)]
    loader = make_loader(tiles=two_in_a_slice, depth=2)
    slabs = set()
    for _ in range(100):
        draws = loader.draw()
        slabs |= {(one.number, other.number) for one, other in zip(draws[::2], draws[1::2], strict=True)}
    assert slabs == {(0, 2), (2, 4), (1, 3), (3, 5)}


@pytest.mark.parametrize("in_memory", [False, True])
def test_slices_that_a_volume_lacks(make_loader: Callable[..., CachedLoader], in_memory: bool) -> None:  # noqa: F811
    loader = make_loader(depth=6, in_memory=in_memory)
    expected = [MISSING, MISSING, 0, 1, 2, MISSING]
    for _ in range(3):
        draws = loader.draw()
        assert [draw.number for draw in draws[:6]] == expected
        batch = loader.read(draws)
        there = [bool(batch["features"].part(place).neck.any()) for place in range(6)]
        assert there == [number != MISSING for number in expected]
        assert not batch["target"][[0, 1, 5]].any()
        assert batch["target"][3].any()


def test_gaps_stay_blank_and_slices_do_not_mix_whatever_is_done_to_them() -> None:
    """Online: slices outside of the volume, which have the label -1, stay zero and become background."""
    stock = nnUNetTrainer.get_training_transforms((3, 16, 16), (-0.1, 0.1), None, (1, 2), True)
    for transform in stock.transforms:
        if getattr(transform, "apply_probability", 1) < 1:
            transform.apply_probability = 0.7  # each often
    transforms = slice_by_slice(stock)
    for _ in range(20):
        image = torch.randn(1, 3, 16, 16) + 5
        labels = torch.ones(1, 3, 16, 16, dtype=torch.int16)
        image[:, 1] = 700  # what a blur across slices would spread
        image[:, 2], labels[:, 2] = 0, -1
        sample = transforms(image=image, segmentation=labels)
        assert sample["image"].shape == (1, 3, 16, 16)
        assert not sample["image"][:, 2].any()
        assert sample["image"][:, 0].abs().max() < 60
        assert sample["image"][:, :2].flatten(2).any(2).all()
        assert sample["segmentation"].unique().tolist() in ([0, 1], [0])


def test_stored_tiles_are_those_of_single_slices() -> None:
    """A slice of zeros that is really there is encoded for the store alike, whoever builds it."""
    blank = torch.zeros(2, 1, 48, 48)
    flat, deep = pdmm(1).encode(blank), pdmm(DEPTH).encode(blank)
    assert flat.neck.any()
    assert torch.equal(flat.neck, deep.neck)


def test_slices_that_are_missing_cost_nothing() -> None:
    """Nothing is found in them, so that neither Dice nor cross-entropy moves, and no score is learnt there."""
    network = awake(pdmm(DEPTH)).train()
    tiles = slices_of(torch.randn(2, 1, DEPTH, 48, 48))
    tiles[DEPTH - 2 : DEPTH] = 0
    masks, _ = network(network.encode_slices(tiles), Prompts())
    assert masks[DEPTH - 2 : DEPTH].eq(ABSENT_LOGIT).all()
    assert not masks[: DEPTH - 2].eq(ABSENT_LOGIT).any()


def test_out_of_memory_encodes_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    network = pdmm(DEPTH)
    tiles = slices_of(volume(DEPTH))
    whole = network.encode(tiles)
    encode, seen = network.encode, []

    def small(given: Tensor) -> Any:
        if len(given) > 2:
            raise torch.OutOfMemoryError
        seen.append(len(given))
        return encode(given)

    monkeypatch.setattr(network, "encode", small)
    torch.testing.assert_close(network.encode_slices(tiles).neck, whole.neck)
    assert seen == [2, 1, 2]
