"""Augmented versions of cached tiles: seeded, image and target alike, in the store and out of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from conftest import Workspace, make_trainer, tiny_sections

from desam_nnunet.cache.manage import describe_stores
from desam_nnunet.cache.store import Tile, open_stores
from desam_nnunet.cache.tiles import crop
from desam_nnunet.cache.views import Augmentation, not_started
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.training.dataset_cache import build_dataset
from desam_nnunet.training.desam import DeSAMTrainer
from desam_nnunet.training.frozen import cached_loaders

PLANS = "ViewsPlans"


def augmentation(
    patch_size: tuple[int, int], trainer: type[DeSAMTrainer] = DeSAMTrainer, *, by_case: bool = False
) -> Augmentation:
    configuration: Any = type("Configuration", (), {"patch_size": list(patch_size), "use_mask_for_norm": [False]})()
    return Augmentation(not_started(trainer, configuration, SamSection("", "", 0, "unit", False)), by_case=by_case)


def volumes(side: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """An image that is bright where the label is, off centre and longer than wide."""
    seg = np.zeros((1, 2, side, side), np.int8)
    seg[0, 1, 20:50, 40:55] = 1
    data = seg * 20.0 + np.random.default_rng(0).normal(0, 0.1, seg.shape)
    return data.astype(np.float32), seg


class OnlyCropping(DeSAMTrainer):
    """Draws no rotation, scale or intensity: what is left is the crop out of the larger window."""

    @staticmethod
    def get_training_transforms(patch_size: Any, *_args: Any, **_options: Any) -> Any:
        return ComposeTransforms([SpatialTransform(
            patch_size, patch_center_dist_from_border=0, random_crop=False, p_elastic_deform=0, p_rotation=0,
            p_scaling=0, padding_mode_image="zeros", border_mode_seg="constant", padding_value_seg=-1)])


@pytest.mark.parametrize("patch_size", [(64, 64), (63, 64), (49, 71)])
@pytest.mark.parametrize("tile", [Tile(1, 10, 12), Tile(1, -7, 60)])
def test_a_view_that_changes_nothing_is_the_tile(patch_size: tuple[int, int], tile: Tile) -> None:
    data, seg = volumes()
    image, target = augmentation(patch_size, OnlyCropping)(data, seg, tile, "case", 0, 1)
    np.testing.assert_array_equal(image, crop(data, tile, patch_size, 0))
    np.testing.assert_array_equal(target, crop(seg, tile, patch_size, -1)[0])


@pytest.mark.parametrize("by_case", [False, True])
def test_views_are_seeded_and_leave_the_generators_alone(by_case: bool) -> None:
    data, seg = volumes()
    tile = Tile(1, 10, 12)
    augment = augmentation((64, 64), by_case=by_case)
    np.random.seed(1)
    torch.manual_seed(1)
    first = augment(data, seg, tile, "case", 3, 1)
    after = np.random.rand(), torch.rand(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert after == (np.random.rand(), torch.rand(1))
    again = augmentation((64, 64), by_case=by_case)(data, seg, tile, "case", 3, 1)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for other in (("case", 3, 2), ("case", 4, 1), ("other", 3, 1)):
        assert not np.array_equal(augment(data, seg, tile, *other)[0], first[0])


def test_a_view_of_a_case_moves_its_slices_alike() -> None:
    """Neighbouring slices fit together by case, and by tile they do not; intensities are each slice's own."""
    data, seg = volumes()
    data[0, 0], seg[0, 0] = data[0, 1], seg[0, 1]  # two equal slices
    for by_case in (True, False):
        augment = augmentation((64, 64), by_case=by_case)
        pairs = [[augment(data, seg, Tile(number, 10, 12), "case", number, view) for number in (0, 1)]
                 for view in range(1, 11)]
        alike = [np.array_equal(one[1], other[1]) for one, other in pairs]
        assert all(alike) if by_case else sum(alike) < 5
        assert len({target.tobytes() for (_, target), _ in pairs}) > 5  # views differ
        assert not all(np.array_equal(one[0], other[0]) for one, other in pairs)


@pytest.mark.parametrize("by_case", [False, True])
def test_image_and_target_are_transformed_alike(by_case: bool) -> None:
    data, seg = volumes()
    augment = augmentation((64, 64), by_case=by_case)
    corners = set()
    for view in range(1, 40):
        image, target = augment(data, seg, Tile(1, 10, 12), "case", 0, view)
        assert image.shape == (1, 64, 64)
        assert target.min() == 0  # nothing is left outside
        bright = image[0] > (image.min() + image.max()) / 2
        assert 2 * (bright & (target == 1)).sum() > 0.93 * (bright.sum() + (target == 1).sum())
        rows, columns = np.nonzero(target == 1)
        corners.add((rows.mean() > 32, columns.mean() > 32))
    assert len(corners) == 4  # mirrored along both axes


def test_the_name_says_what_would_change_a_view() -> None:
    names = {augmentation((64, 64)).name, augmentation((64, 32)).name, augmentation((64, 64), OnlyCropping).name}
    names.add(augmentation((64, 64), by_case=True).name)
    assert len(names) == 4
    assert augmentation((64, 64)).name == augmentation((64, 64)).name


def test_views_in_the_store_the_loaders_and_the_checkpoint(workspace: Workspace) -> None:
    """The command and training name the same store; validation draws tiles as they are; prediction may mirror."""
    workspace.write_plans(PLANS, **tiny_sections(views=3))
    store = build_dataset("501", PLANS, "2d", "DeSAMTrainer", torch.device("cpu"), 1, 0)
    assert [row.views for row in describe_stores("501") if row.store == store.folder.name] == ["3"]
    case = store.cases()[0]
    tiles = {path.name.split("_")[0] for path in store.entries(case)}
    assert len(store.entries(case)) == 3 * len(tiles)
    before = {path: path.read_bytes() for path in store.entries(case)}
    trainer = make_trainer("DeSAMTrainer", workspace, plans=workspace.plans(PLANS))
    trainer.initialize()
    training, validation = cached_loaders(trainer)
    assert trainer.inference_allowed_mirroring_axes == (0, 1)
    assert training.store.folder == store.folder
    assert {draw.view for _ in range(30) for draw in training.draw()} == {0, 1, 2}
    assert {draw.view for _ in range(30) for draw in validation.draw()} == {0}
    store.discard(store.path(case, 0, 1))
    build_dataset("501", PLANS, "2d", "DeSAMTrainer", torch.device("cpu"), 1, 0)
    assert {path: path.read_bytes() for path in store.entries(case)} == before
    assert store.folder in [other.folder for other in open_stores(workspace.preprocessed)]
