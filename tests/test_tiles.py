"""The mapping from nnU-Net's tile to SAM's image and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Operations

from desam_nnunet.encoders.base import ImageSpec
from desam_nnunet.encoders.sam_vit import IMAGE, PIXEL_MEAN, PIXEL_STD
from desam_nnunet.sam.tiles import Geometry, TileToImage, channel_groups, ct_window, intensity_rule, logits_to_tile


def to_255(image: torch.Tensor) -> torch.Tensor:
    """SAM's normalisation undone: (..., 3, S, S) in 0-255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return image * std + mean


@pytest.mark.parametrize(
    ("tile", "scaled", "mask"),
    [
        ((160, 160), (256, 256), (64, 64)),
        ((100, 200), (128, 256), (32, 64)),
        ((200, 101), (256, 128), (64, 32)),  # 129.28 rounded to whole mask pixels
        ((512, 2), (256, 4), (64, 1)),
    ],
)
def test_geometry(tile: tuple[int, int], scaled: tuple[int, int], mask: tuple[int, int]) -> None:
    geometry = Geometry(tile, 256)
    assert geometry.scaled == scaled
    assert geometry.mask == mask
    finer = Geometry(tile, 256, mask_stride=1)
    assert finer.mask == finer.scaled == scaled


def test_percentiles_span_0_to_255() -> None:
    tile = torch.arange(1001.0).reshape(1, 1, 77, 13) * 3 - 50  # 0.5 and 99.5 percent: values 5 and 995
    unit = TileToImage(IMAGE, 64, "percentile")._to_unit(tile).flatten()
    assert unit[:6].eq(0).all()
    assert unit[995:].eq(1).all()
    torch.testing.assert_close(unit[500], torch.tensor(0.5))


def test_percentiles_ignore_a_change_of_contrast() -> None:
    tile = torch.randn(2, 1, 32, 32)
    to_image = TileToImage(IMAGE, 64, "percentile")
    torch.testing.assert_close(to_image(tile), to_image(tile * 7 - 3), rtol=0, atol=1e-4)


def test_a_few_pixels_in_padding_do_not_disappear() -> None:
    tile = torch.zeros(1, 1, 96, 96)
    tile[..., 40:46, 40:46] = torch.linspace(1, 2, 36).reshape(6, 6)
    unit = TileToImage(IMAGE, 96, "percentile")._to_unit(tile)
    torch.testing.assert_close(unit, tile / 2)


def test_window_is_fixed() -> None:
    to_image = TileToImage(IMAGE, 32, "window", ((-1.0, 3.0),))
    assert to_255(to_image(torch.full((1, 1, 32, 32), 1.0))).round().unique().tolist() == [128]  # 127.5
    assert to_255(to_image(torch.full((1, 1, 32, 32), 9.0))).round().unique().tolist() == [255]


def test_unit_is_clipped() -> None:
    tile = torch.tensor([-1.0, 2.0]).repeat(16, 8)[None, None]
    values = to_255(TileToImage(IMAGE, 32, "unit")(tile))
    assert values.min() >= -1e-3
    assert values.max() <= 255 + 1e-3


@pytest.mark.parametrize("intensity", ["percentile", "window", "unit"])
def test_a_constant_tile_maps_to_0(intensity: str) -> None:
    image = TileToImage(IMAGE, 32, intensity, ((0.0, 1.0),))(torch.zeros(1, 1, 16, 16))
    torch.testing.assert_close(to_255(image), torch.zeros_like(image), rtol=0, atol=1e-4)


@pytest.mark.parametrize("intensity", ["percentile", "window", "unit"])
def test_constants_lie_on_the_device_and_in_no_checkpoint(intensity: str) -> None:
    to_image = TileToImage(IMAGE, 32, intensity, ((0.0, 1.0),))
    with Operations() as seen:
        to_image(torch.rand(1, 1, 16, 16))
    assert "lift_fresh" not in seen.names
    assert not to_image.state_dict()


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_channel_groups(channels: int, groups: int) -> None:
    tiles = torch.randn(2, channels, 8, 8)
    images = channel_groups(tiles)
    assert [tuple(image.shape) for image in images] == [(2, 3, 8, 8)] * groups
    assert TileToImage(IMAGE, 32, "unit")(tiles).shape == (2, groups, 3, 32, 32)
    torch.testing.assert_close(images[0][:, 0], tiles[:, 0])


def test_two_channels_give_their_mean_as_third() -> None:
    tiles = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(channel_groups(tiles)[0][:, 2], tiles.mean(1))


def test_padding_is_bottom_and_right_and_0_after_normalisation() -> None:
    image = TileToImage(IMAGE, 64, "unit")(torch.rand(1, 1, 16, 32))[0, 0]
    assert image[:, 32:].eq(0).all()
    assert image[:, :32].ne(0).any()


@pytest.mark.parametrize("stride", [4, 2, 1])
def test_logits_lie_where_the_tile_does(stride: int) -> None:
    geometry = Geometry((40, 80), 64, stride)  # scaled to 32 x 64, published masks 8 x 16
    finer = 4 // stride
    masks = torch.zeros(1, 1, 16 * finer, 16 * finer)
    masks[:, :, 8 * finer:] = 99.0  # padding
    masks[0, 0, 2 * finer, 12 * finer] = 8.0
    logits = logits_to_tile(masks, geometry)
    assert logits.shape == (1, 1, 40, 80)
    assert logits.max() <= 8
    row, column = divmod(int(logits.argmax()), 80)
    side = 5 / finer  # of a mask's pixel, in pixels of the tile
    assert (row, column) == pytest.approx(((2 * finer + 0.5) * side, (12 * finer + 0.5) * side), abs=1)


def test_images_are_shrunk_and_stretched_as_an_encoder_wants() -> None:
    """Means of areas, then each image's own range; a constant image stays 0, and enlarging is bilinear."""
    tile = torch.tensor([[0.2, 0.4], [0.4, 0.6]]).repeat_interleave(64, 0).repeat_interleave(64, 1)[None, None]
    areas = ImageSpec(16, highest=2.0, resize="area")
    image = TileToImage(areas, 64, "unit")(tile)[0, 0]
    torch.testing.assert_close(image[:, ::32, ::32], 2 * tile[0, :, ::64, ::64].expand(3, -1, -1))
    assert len(image.unique()) == 3  # no pixel lies between two areas
    stretched = TileToImage(replace(areas, rescale=True), 64, "unit")
    torch.testing.assert_close(stretched(tile)[0, 0][0, ::32, ::32], torch.tensor([[0.0, 1.0], [1.0, 2.0]]))
    assert stretched(torch.full((1, 1, 96, 96), 0.7)).eq(0).all()
    assert len(stretched(tile[..., ::4, ::4])[0, 0].unique()) > 3


def test_intensity_rule_follows_the_normalisation() -> None:
    assert intensity_rule(["ZScoreNormalization"]) == "percentile"
    assert intensity_rule(["CTNormalization", "CTNormalization"]) == "window"
    assert intensity_rule(["CTNormalization", "ZScoreNormalization"]) == "percentile"
    assert intensity_rule(["RGBTo01Normalization"] * 3) == "unit"
    assert intensity_rule(["NoNormalization"]) == "percentile"


def test_ct_window_is_the_clipped_range_after_normalisation() -> None:
    properties = {"0": {"mean": 50.0, "std": 100.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0}}
    assert ct_window(properties, 1) == ((-2.0, 2.0),)
