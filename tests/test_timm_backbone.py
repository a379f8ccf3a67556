"""Backbones of timm's: which maps are read, how images are normalised, and what weights files may hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import checksum
from safetensors.torch import save_file

from desam_nnunet.encoders.base import Level
from desam_nnunet.encoders.timm_backbone import TimmBackbone
from desam_nnunet.encoders.weights import find_row, identify, load_encoder

MODELS = ("vit_small_patch16_dinov3", "sam2_hiera_tiny", "convnext_tiny", "repvit_m1_1")
SIZE = 64


@pytest.mark.parametrize("model", MODELS)
def test_features_are_as_the_spec_says_and_neither_vanish_nor_explode(model: str) -> None:
    loaded = load_encoder(f"timm_random/{model}", SIZE)
    loaded.encoder.dtype = torch.float32
    features = loaded.encoder(torch.randn(2, 3, SIZE, SIZE))
    for feature, level in zip(features.tensors, loaded.encoder.spec.maps, strict=True):
        assert tuple(feature.shape) == (2, level.channels, *(2 * (SIZE // level.stride,)))
        assert 1e-3 < feature.std() < 1e3
        assert not torch.equal(feature[0], feature[1])
    assert not loaded.trained
    assert loaded.neck is not None
    assert loaded.neck(features.neck).shape == (2, 256, *(2 * (SIZE // 16,)))


def test_of_a_pyramid_the_neck_reads_stride_16_and_of_a_plain_vit_the_last_quarter() -> None:
    pyramid, plain = TimmBackbone("convnext_tiny").spec(SIZE), TimmBackbone("vit_small_patch16_dinov3").spec(SIZE)
    assert pyramid.levels == (Level(96, 4), Level(192, 8), Level(768, 32))
    assert pyramid.neck == Level(384, 16)
    assert plain.maps == (Level(384, 16),) * 4
    assert load_encoder("timm_random/vit_small_patch16_dinov3", SIZE).encoder.network.out_indices == [2, 5, 8, 11]


@pytest.mark.parametrize("model", MODELS)
def test_images_are_normalised_as_the_model_was_trained(model: str) -> None:
    published = timm.get_pretrained_cfg(model)
    assert published is not None
    image = TimmBackbone(model).spec(SIZE).image
    assert (image.highest, image.mean, image.std) == (1.0, published.mean, published.std)


def test_random_weights_are_the_same_every_time_and_named_by_their_model() -> None:
    first, again = (checksum(load_encoder("timm_random/repvit_m1_1", SIZE).encoder) for _ in range(2))
    assert first == again
    names = {identify(f"timm_random/{model}") for model in MODELS}
    assert len(names) == len(MODELS)
    assert all(name.startswith("random:") for name in names)


def test_a_file_named_after_the_model_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path))
    state = timm.create_model("repvit_m1_1").state_dict()  # with its classifier, as timm's own files have it
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "repvit_m1_1.safetensors")
    loaded = load_encoder("timm/repvit_m1_1", SIZE)
    ours = loaded.encoder.network.state_dict()
    assert ours
    assert all(torch.equal(value, state[key.removeprefix("model.")]) for key, value in ours.items())
    assert loaded.encoder.identity == identify("timm/repvit_m1_1")
    assert loaded.encoder.identity.startswith("md5:")


def test_a_vits_positions_are_interpolated_for_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path))
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "vit_tiny_patch16_224.safetensors")
    loaded = load_encoder("timm/vit_tiny_patch16_224", SIZE)
    assert loaded.encoder(torch.randn(1, 3, SIZE, SIZE)).neck.shape == (1, 192, 4, 4)


def test_a_file_of_another_model_is_refused_by_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESAM_WEIGHTS", str(tmp_path))
    save_file({"stem.weight": torch.ones(1)}, tmp_path / "repvit_m1_1.safetensors")
    with pytest.raises(ValueError, match="repvit_m1_1.safetensors as timm/repvit_m1_1: .* is missing"):
        load_encoder("timm/repvit_m1_1", SIZE)


def test_models_that_no_decoder_here_can_read_are_refused() -> None:
    with pytest.raises(ValueError, match="timm has no model 'convnext_tinny': did you mean convnext_tiny"):
        find_row("timm/convnext_tinny")
    with pytest.raises(ValueError, match="a stride of 14 pixels"):
        find_row("timm_random/vit_small_patch14_dinov2")
    with pytest.raises(FileNotFoundError, match="No weights file .*: desam weights get timm/repvit_m1_1"):
        load_encoder("timm/repvit_m1_1", SIZE)


def test_a_size_that_is_no_multiple_of_the_largest_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="sam.image_size is 80, but must be a multiple of 32, between 64 and"):
        load_encoder("timm_random/convnext_tiny", 80)


def test_a_model_that_can_not_compute_again_keeps_what_it_needs() -> None:
    """timm's Twins refuses checkpointing, which changes memory alone."""
    encoder = load_encoder("timm_random/twins_svt_small", SIZE).encoder
    images = torch.randn(1, 3, SIZE, SIZE)
    assert torch.equal(encoder.neck(images, recompute=True), encoder.neck(images))


def test_only_plain_vits_offer_their_projections() -> None:
    """Of a pyramid, the stages behind the neck would be adapted for nothing."""
    offers = {model: TimmBackbone(model).offers for model in MODELS}
    assert [model for model in MODELS if "projections" in offers[model]] == ["vit_small_patch16_dinov3"]
