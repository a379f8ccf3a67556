"""MobileSAM's and LiteMedSAM's encoder, against its operations written out."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.encoders.base import Level, State
from desam_nnunet.encoders.state import read_weights
from desam_nnunet.encoders.tiny_vit import TinyViT, TinyViTEncoder
from desam_nnunet.encoders.tiny_vit_frozen import frozen_form
from desam_nnunet.encoders.weights import describe_file, find_row, find_weights, load_encoder
from desam_nnunet.networks.samed.lora import AdaptedLinear, LowRank
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens
from desam_nnunet.sam.tiles import Geometry, TileToImage, cut_padding

HEADS, WINDOWS, DEPTHS = (4, 5, 10), (7, 14, 7), (2, 6, 2)
SIZE = 128
IMAGES = Path(os.environ.get("DESAM_PROMISE12", Path(__file__).parents[2] / "shared" / "data" / "promise12"))
real_data = pytest.mark.skipif(not IMAGES.is_dir(), reason=f"no images in {IMAGES}: set DESAM_PROMISE12")


class Written:
    """TinyViT in plain operations, on the weights of a file as it is published."""

    def __init__(self, state: State, stem_stride: int) -> None:
        self.state = {key.removeprefix("image_encoder."): value for key, value in state.items()}
        self.stem_stride = stem_stride

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Levels and neck of images (B, 3, S, S)."""
        step, padding = (2, 1) if self.stem_stride == 4 else (1, 0)
        x = F.gelu(self.convolve("patch_embed.seq.0", x, step, padding))
        x = self.convolve("patch_embed.seq.2", x, step, padding)
        for block in ("layers.0.blocks.0", "layers.0.blocks.1"):
            x = self.mobile(block, x)
        maps = []
        for stage in range(3):
            x = self.merge(f"layers.{stage}.downsample", x, 1 if stage == 2 else 2)
            for block in range(DEPTHS[stage]):
                x = self.block(f"layers.{stage + 1}.blocks.{block}", x, HEADS[stage], WINDOWS[stage])
            maps.append(x)
        return [*maps, self.neck(x)]

    def convolve(self, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        x = F.conv2d(x, self.state[f"{name}.c.weight"], stride=stride, padding=padding, groups=groups)
        mean, var, weight, bias = (
            self.state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def mobile(self, name: str, x: Tensor) -> Tensor:
        y = F.gelu(self.convolve(f"{name}.conv1", x))
        y = F.gelu(self.convolve(f"{name}.conv2", y, padding=1, groups=y.shape[1]))
        return F.gelu(self.convolve(f"{name}.conv3", y) + x)

    def merge(self, name: str, x: Tensor, stride: int) -> Tensor:
        x = F.gelu(self.convolve(f"{name}.conv1", x))
        x = F.gelu(self.convolve(f"{name}.conv2", x, stride, padding=1, groups=x.shape[1]))
        return self.convolve(f"{name}.conv3", x)

    def block(self, name: str, x: Tensor, heads: int, window: int) -> Tensor:
        """Windows are filled up with zeros, which are attended to."""
        batch, width, rows, columns = x.shape
        filled = F.pad(x, (0, -columns % window, 0, -rows % window)).permute(0, 2, 3, 1)
        y = torch.zeros_like(filled)
        for top in range(0, filled.shape[1], window):
            for left in range(0, filled.shape[2], window):
                here = (slice(None), slice(top, top + window), slice(left, left + window))
                tokens = filled[here].reshape(batch, window * window, width)
                y[here] = self.attend(f"{name}.attn", tokens, heads, window).view(batch, window, window, width)
        x = x + y[:, :rows, :columns].permute(0, 3, 1, 2)
        x = self.convolve(f"{name}.local_conv", x, padding=1, groups=width)
        tokens = self.norm(f"{name}.mlp.norm", x.flatten(2).transpose(1, 2))
        tokens = self.linear(f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", tokens)))
        return x + tokens.transpose(1, 2).view_as(x)

    def attend(self, name: str, tokens: Tensor, heads: int, window: int) -> Tensor:
        qkv = self.linear(f"{name}.qkv", self.norm(f"{name}.norm", tokens))
        split = qkv.unflatten(-1, (heads, -1)).transpose(1, 2)  # B heads N 3d, head by head
        q, k, v = split.chunk(3, dim=-1)
        place = torch.arange(window * window)
        y, x = place // window, place % window
        index = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + self.state[f"{name}.attention_biases"][:, index]
        return self.linear(f"{name}.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def neck(self, x: Tensor) -> Tensor:
        for convolution, norm, padding in ((0, 1, 0), (2, 3, 1)):
            x = F.conv2d(x, self.state[f"neck.{convolution}.weight"], padding=padding).permute(0, 2, 3, 1)
            weight, bias = self.state[f"neck.{norm}.weight"], self.state[f"neck.{norm}.bias"]
            x = F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6).permute(0, 3, 1, 2)
        return x


def assert_same_features(encoder_name: str, state: State, stem_stride: int) -> None:
    loaded = load_encoder(encoder_name, SIZE)
    loaded.encoder.dtype = torch.float32
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = Written(state, stem_stride)(images)
    spec = loaded.encoder.spec
    for feature, level, wanted in zip(loaded.encoder(images).tensors, spec.maps, expected, strict=True):
        assert tuple(feature.shape) == (2, level.channels, *(2 * (SIZE // level.stride,)))
        assert (feature - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_lite_medsams_published_weights_give_the_features_of_the_written_out_network() -> None:
    file = find_weights("lite_medsam")
    assert file is not None
    assert describe_file(file).endswith("the published lite_medsam")
    assert_same_features("lite_medsam", read_weights(file), 1)


def test_mobile_sams_shapes_give_the_features_of_the_written_out_network(tmp_path: Path) -> None:
    state = find_row("mobile_sam").architecture.random_state()
    classifier = {"image_encoder.norm_head.weight": torch.ones(320), "image_encoder.head.weight": torch.ones(1000, 320)}
    torch.save(state | classifier, tmp_path / "mine.pt")
    assert_same_features(str(tmp_path / "mine.pt"), state, 4)


def test_whole_and_in_portions_with_gradients_and_without_it_is_the_same_network() -> None:
    """With gradients nothing runs in portions, and a low-rank update of q learns as in timm's own modules."""
    torch.manual_seed(0)
    network = TinyViT(1).build(SIZE).image_encoder.eval()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                for values in (layer.weight, layer.running_var):
                    values.uniform_(0.5, 1.5)
    spec = TinyViT(1).spec(SIZE)
    stock, ours = TinyViTEncoder(deepcopy(network), spec, ""), TinyViTEncoder(frozen_form(network), spec, "")
    images, gradients = torch.rand(1, 3, SIZE, SIZE), []
    for encoder in (stock, ours):
        encoder.dtype = torch.float32
        projection = encoder.projections()[3]
        layer = getattr(projection.attention, projection.name)
        torch.manual_seed(1)
        update = LowRank(layer.in_features, len(projection.rows["q"]), 2)
        torch.nn.init.ones_(update.up.weight)
        setattr(projection.attention, projection.name, AdaptedLinear(layer, [(update, projection.rows["q"])]))
        encoder.neck(images).square().mean().backward()
        gradients.append(update.down.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        portions = ours.neck(images)
    torch.testing.assert_close(portions, ours.neck(images).detach(), rtol=1e-4, atol=1e-5)


def test_strides_and_images_are_those_of_the_two_publications() -> None:
    mobile, lite = TinyViT(4).spec(1024), TinyViT(1).spec(256)
    assert mobile.maps == (Level(128, 8), Level(160, 16), Level(320, 16), Level(256, 16))
    assert lite.maps == (Level(128, 2), Level(160, 4), Level(320, 4), Level(256, 4))
    assert (mobile.image.highest, lite.image.highest, lite.image.resize, lite.image.rescale) == (255, 1, "area", True)


def test_queries_keys_and_values_are_found_head_by_head() -> None:
    encoder = TinyViT(1).blank(SIZE).encoder
    projection = encoder.projections()[0]
    attention = projection.attention
    layer = getattr(attention, projection.name)
    tokens = torch.randn(1, 49, layer.in_features)
    before = attention.qkv(tokens).view(1, 49, attention.num_heads, 3, -1)
    for place, letter in enumerate("qkv"):
        update = LowRank(layer.in_features, len(projection.rows[letter]), 2)
        torch.nn.init.ones_(update.up.weight)
        adapted = AdaptedLinear(layer, [(update, projection.rows[letter])])
        after = adapted(tokens).view_as(before)
        changed = [not torch.equal(before[..., part, :], after[..., part, :]) for part in range(3)]
        assert changed == [part == place for part in range(3)]


@real_data
@pytest.mark.parametrize("case", ["RUNMC/Case13", "UCL/Case26"])
def test_a_box_prompt_on_a_prostate_finds_the_prostate(case: str) -> None:
    """Trained on scans of Radboud among others, as RUNMC's are: this shows that pixels, stride and neck are right."""
    image, label = (sitk.GetArrayFromImage(sitk.ReadImage(str(IMAGES / f"{case}{end}.nii.gz")))
                    for end in ("", "_segmentation"))
    low, high = np.percentile(image, (0.5, 99.5))
    volume = ((np.clip(image, low, high) - low) / (high - low)).astype(np.float32)
    slices = np.flatnonzero(label.any((1, 2)))[2:-2:4]
    common = both = 0
    for z in slices:
        predicted = segment_with_box(torch.from_numpy(volume[z]), label[z] > 0)
        common += int((predicted & (label[z] > 0)).sum())
        both += int(predicted.sum() + (label[z] > 0).sum())
    assert 2 * common / both >= 0.80


@torch.no_grad()
def segment_with_box(image: Tensor, reference: np.ndarray) -> np.ndarray:
    """SAM's own decoder, asked with the reference's box. Args: image: (H, W), 0 to 1."""
    loaded = load_encoder("lite_medsam", 256)
    geometry = Geometry((image.shape[0], image.shape[1]), 256, mask_stride=1)
    neck = loaded.encoder(TileToImage(loaded.encoder.spec.image, 256, "unit")(image[None, None])[:, 0]).neck
    rows, columns = np.flatnonzero(reference.any(1)), np.flatnonzero(reference.any(0))
    scale = geometry.scaled[0] / image.shape[0]
    box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32) * scale
    sparse, dense = prompt_tokens(loaded.prompt_encoder, Prompts(boxes=box))
    masks, _ = loaded.mask_decoder(
        image_embeddings=neck, image_pe=dense_positions(loaded.prompt_encoder), sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense, multimask_output=False)
    size = (image.shape[0], image.shape[1])
    logits = F.interpolate(cut_padding(masks, geometry), size=size, mode="bilinear", align_corners=False)
    return (logits[0, 0] > 0).numpy()
