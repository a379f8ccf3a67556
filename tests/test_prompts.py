"""Prompts: where they lie and what they are drawn from."""

from __future__ import annotations

import torch
from conftest import Operations, tiny_sam

from desam_nnunet.sam.prompts import (
    Prompts,
    dense_positions,
    point_grid,
    prompt_tokens,
    sample_boxes,
    sample_points,
    whole_box,
)
from desam_nnunet.sam.tiles import Geometry

CPU = torch.device("cpu")


def drawn(target: torch.Tensor, labelled: torch.Tensor | None = None, times: int = 400) -> tuple:
    """Pixels (row, column) and targets of many draws on one tile of (K, H, W)."""
    batch = target[None].expand(times, -1, -1, -1)
    labelled = torch.ones(target.shape[1:], dtype=torch.bool) if labelled is None else labelled
    side = target.shape[-1]
    prompts, targets = sample_points(batch, labelled.expand(times, -1, -1), Geometry((side, side), side))
    x, y = prompts.points[:, 0].round().long().T
    return y, x, targets


def test_grid_holds_the_cells_centres_of_the_tile_not_of_its_padding() -> None:
    points = point_grid(Geometry((50, 100), 64), 2, CPU)
    expected = [[16, 8], [48, 8], [16, 24], [48, 24]]  # of 32 x 64, counted from the edge as published
    assert points[:, 0].tolist() == expected
    moved = point_grid(Geometry((50, 100), 64), 2, CPU, offset=-0.5)  # pixel centres at whole numbers
    assert moved[:, 0].tolist() == [[15.5, 7.5], [47.5, 7.5], [15.5, 23.5], [47.5, 23.5]]


def test_published_grid() -> None:
    """The published code asks at the centres of nine cells of 1024 pixels, (i + 0.5) / 9 of the side."""
    points = point_grid(Geometry((256, 256), 1024), 9, CPU)[:, 0]
    expected = torch.tensor([(i + 0.5) / 9 * 1024 for i in range(9)])
    torch.testing.assert_close(points[:9, 0], expected)
    torch.testing.assert_close(points[::9, 1], expected)


def test_boxes_are_made_on_the_device() -> None:
    geometry, target = Geometry((50, 100), 64), torch.ones(1, 1, 50, 100, dtype=torch.bool)
    with Operations() as seen:
        whole_box(geometry, 2, CPU)
        sample_boxes(target, geometry)
    assert "lift_fresh" not in seen.names


def test_whole_box_is_the_tile() -> None:
    assert whole_box(Geometry((50, 100), 64), 2, CPU).boxes.tolist() == [[0, 0, 64, 32]] * 2


def test_half_the_points_are_background_where_there_is_an_organ() -> None:
    target = torch.zeros(1, 16, 16, dtype=torch.bool)
    target[0, 2:4, 5:9] = True
    row, column, targets = drawn(target)
    inside = target[0, row, column]
    assert torch.equal(inside.float(), targets.inside[:, 0])
    assert 0.4 < inside.float().mean() < 0.6
    assert len(set(zip(row[inside].tolist(), column[inside].tolist(), strict=True))) == 8  # all of the organ's pixels


def test_a_tile_without_organ_gets_background_points() -> None:
    *_, targets = drawn(torch.zeros(2, 16, 16, dtype=torch.bool))
    assert targets.inside.eq(0).all()
    assert targets.valid.all()


def test_on_tiles_without_organ_half_the_points_lie_where_others_have_one() -> None:
    target = torch.zeros(1000, 1, 16, 16, dtype=torch.bool)
    target[0, 0, 4:6, 4:6] = True  # 4 of 256 pixels, in one tile of the batch
    labelled = torch.ones(1000, 16, 16, dtype=torch.bool)
    prompts, targets = sample_points(target, labelled, Geometry((16, 16), 16))
    x, y = prompts.points[1:, 0].round().long().T
    assert targets.inside[1:].eq(0).all()
    assert 0.45 < target[0, 0, y, x].float().mean() < 0.57  # 0.5 + 0.5 * 4 / 256


def test_classes_are_drawn_uniformly_from_those_present() -> None:
    target = torch.zeros(3, 16, 16, dtype=torch.bool)
    target[0, :12] = True  # large
    target[2, 15, 15] = True  # a single pixel
    *_, targets = drawn(target, times=2000)
    share = targets.inside.mean(0)
    assert share[1] == 0
    torch.testing.assert_close(share[[0, 2]], torch.tensor([0.25, 0.25]), rtol=0, atol=0.05)


def test_a_point_in_two_regions_has_both_targets() -> None:
    target = torch.zeros(2, 8, 8, dtype=torch.bool)
    target[0, 2:6, 2:6] = True
    target[1, 3:5, 3:5] = True
    row, column, targets = drawn(target)
    core = target[1, row, column]
    assert core.any()
    assert targets.inside[core].eq(1).all()


def test_no_point_on_the_ignore_label() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.bool)
    target[0, :2] = True
    labelled = torch.zeros(8, 8, dtype=torch.bool)
    labelled[:, :3] = True
    row, column, targets = drawn(target, labelled)
    assert labelled[row, column].all()
    assert targets.valid.all()


def test_nothing_labelled_counts_nothing() -> None:
    *_, targets = drawn(torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool))
    assert not targets.valid.any()


def test_a_tile_that_is_all_organ_gets_foreground_points() -> None:
    *_, targets = drawn(torch.ones(1, 8, 8, dtype=torch.bool))
    assert targets.inside.eq(1).all()


def test_points_lie_on_pixel_centres_in_sams_coordinates() -> None:
    target = torch.zeros(1, 1, 8, 16, dtype=torch.bool)
    target[0, 0, 3, 5] = True
    labelled = target[:, 0]
    points = sample_points(target, labelled, Geometry((8, 16), 64))[0].points
    assert points.tolist() == [[[5.5 * 4 - 0.5, 3.5 * 4 - 0.5]]]


def test_boxes_lie_around_the_class_drawn_within_their_shift() -> None:
    """A tile of 50 x 100 in an input of 1024: 10.24 pixels of the input for one of the tile."""
    geometry = Geometry((50, 100), 1024)
    target = torch.zeros(1, 2, 50, 100, dtype=torch.bool)
    target[0, 0, 10:20, 30:50] = True
    target[0, 1, 0:3, 90:100] = True
    prompts, chosen = sample_boxes(target.expand(200, -1, -1, -1), geometry)
    second = chosen[:, 0, 95]
    assert 0.3 < second.float().mean() < 0.7
    assert torch.equal(chosen[second], target[0, 1].expand(int(second.sum()), -1, -1))
    for which, box, largest in ((~second, (30, 10, 50, 20), 20), (second, (90, 0, 100, 3), 10.24 * 3 / 4)):
        moved = prompts.boxes[which] - 10.24 * torch.tensor(box)
        assert moved.abs().max() <= 20
        assert 0.75 * largest < moved[:, 3].max() <= largest + 1e-3
    assert prompts.boxes.min() == 0  # sides stay in the tile
    assert prompts.boxes[:, 2].max() == 1024


def test_a_tile_without_foreground_gets_a_box_around_it() -> None:
    prompts, chosen = sample_boxes(torch.zeros(50, 3, 32, 32, dtype=torch.bool), Geometry((32, 32), 64))
    assert not chosen.any()
    assert (prompts.boxes - torch.tensor([0.0, 0.0, 64.0, 64.0])).abs().max() <= 64 * 20 / 1024


def test_boxes_are_drawn_again_from_the_same_seed() -> None:
    target = torch.rand(4, 2, 16, 16) > 0.9
    draws = [sample_boxes(target, Geometry((16, 16), 64), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(draws[0][0].boxes, draws[1][0].boxes)
    assert torch.equal(draws[0][1], draws[1][1])


def test_boxes_around_the_smallest_object_are_not_turned_inside_out() -> None:
    target = torch.zeros(1, 1, 160, 160, dtype=torch.bool)
    target[0, 0, 80, 40] = True
    boxes = sample_boxes(target.expand(300, -1, -1, -1), Geometry((160, 160), 1024))[0].boxes
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    middle = boxes[:, :2] + boxes[:, 2:]
    assert (middle / 2 - torch.tensor([40.5, 80.5]) * 6.4).abs().max() <= 6.4 / 4


def test_coordinates_keep_float32_under_autocast() -> None:
    encoder = tiny_sam().prompt_encoder
    prompts = Prompts(points=torch.tensor([[[17.0, 101.0]], [[63.0, 4.0]]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = (*prompt_tokens(encoder, prompts), dense_positions(encoder))
    for within, without in zip(rounded, (*prompt_tokens(encoder, prompts), dense_positions(encoder)), strict=True):
        assert torch.equal(within, without)
