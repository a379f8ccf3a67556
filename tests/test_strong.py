"""The recipe ``strong``: intensities change, anatomy and everything else of nnU-Net's augmentation stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from conftest import Workspace, make_trainer, tiny_sections
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from desam_nnunet.augmentation.acquisition import in_k_space, random_curves, random_network
from desam_nnunet.augmentation.randomness import Randomness
from desam_nnunet.augmentation.strong import OtherScanner, strengthened
from desam_nnunet.cache.store import Tile, open_stores
from desam_nnunet.cache.views import Augmentation, not_started
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.desam import DeSAMTrainer
from desam_nnunet.training.frozen import cached_loaders

CPU = torch.device("cpu")


def ramp(number: int, height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.linspace(0, 1, height * width).reshape(1, height, width).repeat(number, 1, 1)


def augmentation(name: str) -> Augmentation:
    configuration: Any = type("Configuration", (), {"patch_size": [64, 64], "use_mask_for_norm": [False]})()
    sam = SamSection("", "", 0, "unit", False, augmentation=name)
    return Augmentation(not_started(DeSAMTrainer, configuration, sam), by_case=True)


def test_curves_are_monotone_and_keep_the_ends() -> None:
    curves = random_curves(Randomness(CPU, 1, 0), ramp(20)).flatten(1)
    assert (curves.diff(dim=1) > 0).all()
    torch.testing.assert_close(curves[:, [0, -1]], torch.tensor([[0.0, 1.0]]).expand(20, -1))
    assert (curves - ramp(20).flatten(1)).abs().amax(1).min() > 0.02  # each is one


def test_random_networks_span_the_range_and_differ() -> None:
    seen = random_network(Randomness(CPU, 1, 0), ramp(20))
    torch.testing.assert_close(seen.amin((1, 2)), torch.zeros(20))
    torch.testing.assert_close(seen.amax((1, 2)), torch.ones(20))
    assert (seen[0] - seen[1:]).abs().amax((1, 2)).min() > 1e-3
    assert torch.isfinite(random_network(Randomness(CPU, 1, 0), torch.full((1, 8, 8), 0.5))).all()


def test_resolution_that_is_not_limited_changes_nothing() -> None:
    pictures = torch.rand(2, 31, 40)
    torch.testing.assert_close(in_k_space(Randomness(CPU, 1, 0), pictures, blurred=0, limited=0), pictures)


def test_a_scanner_with_no_probability_shows_the_tile_within_its_percentiles() -> None:
    still = OtherScanner(network=0, curve=0, inversion=0, bias=0, blur=0, limit=0, noise=0)
    tile = 100 * torch.rand(3, 30, 40) - 20
    middle = (tile > torch.quantile(tile, 0.02)) & (tile < torch.quantile(tile, 0.98))
    seen = still(image=tile)["image"]
    torch.testing.assert_close(seen[middle], tile[middle], rtol=0, atol=1e-4)


def test_draws_follow_the_generator_that_views_are_seeded_with() -> None:
    tile = torch.rand(1, 30, 40)
    seen = []
    for _ in range(2):
        np.random.seed(3)
        seen.append(OtherScanner()(image=tile.clone())["image"])
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], OtherScanner()(image=tile.clone())["image"])


def test_workers_that_share_the_state_of_pytorch_draw_different_scanners() -> None:
    """nnU-Net's workers are forked with one state of PyTorch's generator, and seed numpy's alone."""
    tile, seen = torch.rand(1, 30, 40), []
    for worker in range(2):
        torch.manual_seed(3)
        np.random.seed(worker)
        seen.append(OtherScanner()(image=tile.clone())["image"])
    assert not torch.equal(*seen)


def test_what_is_even_stays_and_what_is_nearly_even_keeps_its_organ() -> None:
    even, nearly = torch.full((1, 40, 40), 3.0), torch.zeros(1, 40, 40)
    nearly[0, 10, 10] = 5.0
    for seed in range(20):
        np.random.seed(seed)
        assert torch.equal(OtherScanner()(image=even.clone())["image"], even)
        scanner = OtherScanner(network=0, curve=0, inversion=0, bias=0, blur=0, limit=0, noise=0)
        torch.testing.assert_close(scanner(image=nearly.clone())["image"], nearly)


def test_elongated_patches_are_not_turned_further_than_nnunets_window_allows() -> None:
    stock = nnUNetTrainer.get_training_transforms((64, 32), (-0.26, 0.26), None, (0, 1), False,
                                                  use_mask_for_norm=[True])
    assert strengthened(stock).transforms[0].rotation == (-0.26, 0.26)


def test_only_space_and_intensities_are_other_than_nnunets() -> None:
    stock = nnUNetTrainer.get_training_transforms((64, 64), (-0.5, 0.5), None, (0, 1), False, use_mask_for_norm=[True])
    ours = strengthened(stock).transforms
    space = stock.transforms[0]
    assert space.p_rotation != ours[0].p_rotation  # nnU-Net's own is left as it was
    assert isinstance(ours[1], OtherScanner)
    assert ours[2:] == [x for x in stock.transforms[1:] if not isinstance(x, RandomTransform)]
    assert len(ours) == 5  # mirror, mask, label -1


def test_image_and_target_stay_together() -> None:
    seg = np.zeros((1, 1, 90, 90), np.int8)
    seg[0, 0, 20:50, 40:55] = 1
    data = (seg * 20.0 + np.random.default_rng(0).normal(0, 0.1, seg.shape)).astype(np.float32)
    augment, overlaps = augmentation("strong"), []
    for view in range(1, 40):
        image, target = augment(data, seg, Tile(0, 10, 12), "case", 0, view)
        assert target.min() == 0
        assert np.isfinite(image).all()
        inside = target == 1
        bright = np.abs(image[0] - np.median(image[0][~inside])) > np.abs(
            np.median(image[0][inside]) - np.median(image[0][~inside])) / 2
        overlaps.append(2 * (bright & inside).sum() / (bright.sum() + inside.sum()))
    assert np.median(overlaps) > 0.93  # noise and blur spoil some


def test_the_recipe_is_named_and_nnunets_own_keeps_its_name() -> None:
    class Plain(nnUNetTrainer):
        pass

    configuration: Any = type("Configuration", (), {"patch_size": [64, 64], "use_mask_for_norm": [False]})()
    plain = Augmentation(not_started(Plain, configuration, SamSection("", "", 0, "unit", False)), by_case=True)
    assert augmentation("nnunet").name == plain.name  # stores of before the key are found
    assert augmentation("strong").name == augmentation("strong").name != plain.name
    with pytest.raises(ValueError, match="sam.augmentation is 'mild', but must be nnunet or strong"):
        augmentation("mild")


def test_views_are_stored_under_the_recipe(workspace: Workspace) -> None:
    workspace.write_plans("StrongPlans", **tiny_sections(features="cached", views=2, augmentation="strong"))
    trainer = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans("StrongPlans"))
    trainer.initialize()
    for loader in cached_loaders(trainer):
        loader.close()
    recipes = {store.recipe.augmentation for store in open_stores(workspace.preprocessed)}
    assert Augmentation(trainer, by_case=False).name in recipes
    assert trainer.inference_allowed_mirroring_axes == (0, 1)
