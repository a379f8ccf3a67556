"""DeSAM as nnU-Net sees it: prediction from the grid, voting, classes, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SIZE, tiny_sam
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.encoders.base import Level
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import IMAGE, build_sam, build_transformer
from desam_nnunet.networks.desam.network import DeSAM, build_desam
from desam_nnunet.networks.desam.pdmm import PDMM
from desam_nnunet.networks.desam.prim import PRIM
from desam_nnunet.networks.desam.prompters import (
    GridPrompter,
    PointPrompter,
    Prompter,
    SinglePrompter,
    WholeBoxPrompter,
)
from desam_nnunet.networks.frame import ABSENT_LOGIT, Outline
from desam_nnunet.sam.prompts import Prompts, point_grid
from desam_nnunet.sam.tiles import TileToImage, logits_to_tile

GRID, BOX = GridPrompter(3), WholeBoxPrompter()
ANYTHING = GridPrompter(3, threshold=-1e9)  # every class is present


def make(num_classes: int = 1, prompter: Prompter = GRID, *, channels: int = 1, background: bool = True,
         **options: Any) -> DeSAM:
    to_image = TileToImage(IMAGE, SIZE, "percentile")
    outline = Outline(tiny_sam(), to_image, channels, num_classes + background, background, None)
    return build_desam(outline, prompter, **options).eval()


class HandMadeScores(nn.Module):
    """Stands in for the IoU head: row by row of the grid, what the test wants."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores  # N K
        self.seen = 0

    def forward(self, token: Tensor) -> Tensor:
        start = self.seen % len(self.scores)
        self.seen += len(token)
        return self.scores[start : start + len(token)]


def with_scores(network: DeSAM, scores: list[list[float]]) -> DeSAM:
    network.prim.iou_head = HandMadeScores(torch.tensor(scores))  # type: ignore[assignment]
    return network


@torch.no_grad()
def test_one_class_is_the_mask_of_the_best_point() -> None:
    network = with_scores(make(), [[0.1]] * 4 + [[0.9]] + [[0.6]] * 4)
    tile = torch.randn(1, 1, 48, 64)
    logits = network(tile)
    assert logits.shape == (1, 2, 48, 64)
    assert logits[:, 0].eq(0).all()
    geometry = network.geometry(tile)
    best = point_grid(geometry, 3, tile.device)[4:5]
    masks, _ = network(network.encode(tile), Prompts(points=best))
    torch.testing.assert_close(logits[:, 1:], logits_to_tile(masks, geometry))


@torch.no_grad()
def test_classes_take_their_own_best_points_and_absent_ones_the_constant() -> None:
    network = with_scores(make(3), [[0.9, 0.5, 0.1], [0.1, 0.2, 0.7]] + [[0.0, 0.0, 0.0]] * 7)
    tile = torch.randn(1, 1, 64, 64)
    logits = network(tile)
    geometry = network.geometry(tile)
    points = point_grid(geometry, 3, tile.device)
    for channel, point in ((0, 0), (2, 1)):
        masks, _ = network(network.encode(tile), Prompts(points=points[point : point + 1]))
        torch.testing.assert_close(logits[0, channel + 1], logits_to_tile(masks, geometry)[0, channel])
    assert logits[0, 2].eq(ABSENT_LOGIT).all()  # 0.5 is not above the threshold


@torch.no_grad()
def test_equal_points_share_a_run() -> None:
    network = with_scores(make(3), [[0.0] * 3] * 5 + [[0.9] * 3] + [[0.0] * 3] * 3)
    runs = []
    network.pdmm.fusion.register_forward_hook(lambda _m, _i, out: runs.append(len(out)))
    network(torch.randn(1, 1, 64, 64))
    assert runs == [1]


@torch.no_grad()
@pytest.mark.parametrize("prompter", [ANYTHING, BOX])
def test_logits_stay_within_what_nnunet_can_add_up(prompter: Prompter) -> None:
    network = make(prompter=prompter)
    network.pdmm.seg_layers.weight *= 1e6
    logits = network(torch.randn(1, 1, 64, 64))
    assert logits.abs().max() == 100


@torch.no_grad()
def test_regions_have_no_background() -> None:
    network = with_scores(make(2, background=False), [[0.0, 0.0]] * 9)
    logits = network(torch.randn(2, 1, 64, 64))
    assert logits.shape == (2, 2, 64, 64)
    assert logits.eq(ABSENT_LOGIT).all()


@torch.no_grad()
def test_grid_in_chunks_is_the_grid_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make(2)
    tile = torch.randn(1, 1, 64, 64)
    features, geometry = network.encode(tile), network.geometry(tile)
    at_once = network.scores(features, geometry)
    monkeypatch.setattr("desam_nnunet.networks.desam.network._TOKENS_AT_ONCE", 2 * 64)
    torch.testing.assert_close(network.scores(features, geometry), at_once, rtol=0, atol=1e-5)
    assert at_once.shape == (9, 2)


@torch.no_grad()
def test_a_batch_is_its_tiles_one_by_one() -> None:
    for network in (make(prompter=GridPrompter(3, 0.0)), make(prompter=BOX)):
        tiles = torch.randn(3, 1, 64, 64)
        one_by_one = torch.cat([network(tile[None]) for tile in tiles])
        torch.testing.assert_close(network(tiles), one_by_one, rtol=0, atol=1e-4)


@torch.no_grad()
def test_more_channels_are_encoded_in_groups_and_averaged() -> None:
    network = make(channels=5)
    tile = torch.randn(1, 5, 64, 64)
    features = network.encode(tile)
    groups = [make(channels=n).encode(part) for n, part in ((3, tile[:, :3]), (2, tile[:, 3:]))]
    torch.testing.assert_close(features.neck, (groups[0].neck + groups[1].neck) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.levels[1], (groups[0].levels[1] + groups[1].levels[1]) / 2, rtol=0, atol=1e-5)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 2 channel\(s\), but the model was planned for 1"):
        make()(torch.randn(1, 2, 64, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(value: float) -> None:
    tile = torch.zeros(1, 1, 64, 64)
    tile[0, 0, 3, 4] = value
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        make()(tile)


def test_the_encoder_is_in_no_state_and_no_parameters() -> None:
    network = make()
    encoder = {id(parameter) for parameter in network.encoder.parameters()}
    assert not encoder & {id(parameter) for parameter in network.parameters()}
    assert {key.split(".")[0] for key in network.state_dict()} == {"prim", "pdmm", "prompt_encoder"}
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"prim", "pdmm"}


def test_the_encoder_moves_along_and_stays_in_eval_mode() -> None:
    network = make().to(torch.float64).train()
    assert network.encoder.network.pos_embed.dtype == torch.float64  # as a device would
    assert not network.encoder.training
    assert network.prim.training


def test_there_is_no_initialize_for_nnunet_to_apply() -> None:
    assert not hasattr(make(), "initialize")


@pytest.mark.parametrize("mask_stride", [4, 2, 1])
@pytest.mark.parametrize("prompter", [GRID, BOX])
def test_every_trained_parameter_gets_a_gradient(prompter: Prompter, mask_stride: int) -> None:
    """DDP without find_unused_parameters asks for it."""
    network = make(2, prompter, mask_stride=mask_stride)
    tiles = torch.randn(2, 1, 64, 64)
    point, box = torch.full((2, 1, 2), 9.0), torch.tensor([[0.0, 0, 64, 64]] * 2)
    prompts = Prompts(points=point) if isinstance(prompter, PointPrompter) else Prompts(boxes=box)
    masks, scores = network(network.encode(tiles), prompts)
    (masks.square().mean() + (0 if scores is None else scores.square().mean())).backward()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert (scores is None) == isinstance(prompter, SinglePrompter)


@torch.no_grad()
@pytest.mark.parametrize("prompter", [ANYTHING, BOX])
@pytest.mark.parametrize("mask_stride", [4, 2, 1])
def test_masks_are_as_fine_as_asked_for(prompter: Prompter, mask_stride: int) -> None:
    network, tile = make(2, prompter, mask_stride=mask_stride), torch.randn(1, 1, 48, 64)
    geometry = network.geometry(tile)
    assert geometry.mask == (96 // mask_stride, SIZE // mask_stride)
    features, prompts = network.encode(tile), Prompts(points=torch.full((1, 1, 2), 9.0))
    masks, _ = network(features, prompts)
    assert masks.shape == (1, 2, SIZE // mask_stride, SIZE // mask_stride)
    logits = network(tile)
    assert logits.shape == (1, 3, 48, 64)
    assert not logits[:, 1:].eq(ABSENT_LOGIT).all()
    assert len(network.pdmm.contexts) == {4: 3, 2: 4, 1: 5}[mask_stride]


def test_masks_coarser_than_the_encoders_last_map_are_refused() -> None:
    spec = replace(ENCODERS["vit_tiny"].architecture.spec(SIZE), neck=Level(128, 2))
    with pytest.raises(ValueError, match="desam.mask_stride is 4, but the encoder's last map has a stride of 2"):
        PDMM(spec=spec, prompt_dim=128, num_classes=1)


@torch.no_grad()
@pytest.mark.parametrize("mask_stride", [4, 1])
@pytest.mark.parametrize("prompter", [ANYTHING, BOX])
def test_through_the_input_masks_are_enlarged_before_they_come_to_the_tile(
    prompter: Prompter, mask_stride: int
) -> None:
    """As published: masks to the encoder's input, its padding cut, and that to the tile."""
    network, tile = make(1, prompter, through_input=True, mask_stride=mask_stride), torch.randn(1, 1, 48, 64)
    logits, geometry = network(tile), network.geometry(tile)
    if isinstance(prompter, PointPrompter):
        best = network.scores(network.encode(tile), geometry)[:, 0].argmax()
        prompts = Prompts(points=prompter.points(geometry, tile.device)[best][None])
    else:
        prompts = prompter.prompts(geometry, 1, tile.device)
    masks, _ = network(network.encode(tile), prompts)
    enlarged = F.interpolate(masks, size=(SIZE, SIZE), mode="bilinear")[..., :96, :]
    torch.testing.assert_close(logits[:, 1:], F.interpolate(enlarged, size=(48, 64), mode="bilinear"))
    network.through_input = False
    assert torch.equal(network(tile), logits) == (mask_stride == 1)


def test_published_numbers_of_parameters() -> None:
    """10.9 M and 13.2 M for ViT-B and ViT-H, of which PDMM 7.5 M and 9.8 M (published implementation)."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    unused = 128 * 128 + 2 * 64 * 64 + 128  # shortcuts and deep supervision's output, which we leave out
    with torch.device("meta"):
        prim = PRIM(transformer=build_transformer(256), num_classes=1, iou_hidden=256)
        for name, size, total in (("vit_b", 7.5, 10.9), ("vit_h", 9.8, 13.2)):
            pdmm = PDMM(spec=ENCODERS[name].architecture.spec(1024), prompt_dim=256, num_classes=1)
            assert (count(pdmm) + unused) / 1e6 == pytest.approx(size, abs=0.05)
            assert (count(prim) + count(pdmm) + unused) / 1e6 == pytest.approx(total, abs=0.05)


def test_prim_starts_from_sams_decoder() -> None:
    sam = build_sam(ENCODERS["vit_tiny"].architecture)
    prim = PRIM(transformer=build_transformer(128), num_classes=3, iou_hidden=128)
    prim.load_from_sam(sam.mask_decoder)
    sparse, image, positions = torch.randn(2, 2, 128), torch.randn(2, 128, 8, 8), torch.randn(1, 128, 8, 8)
    with torch.no_grad():
        iou = prim(image, positions, sparse, score=True).iou
        for one in range(2):  # SAM's decoder takes the prompts of one image
            expected = sam.mask_decoder.predict_masks(image[one : one + 1], positions, sparse[one : one + 1],
                                                      torch.zeros(1))[1][:, :1]
            torch.testing.assert_close(iou[one : one + 1], expected.expand(-1, 3), rtol=0, atol=1e-5)


class Votes(nn.Module):
    """The network with hand-made scores per call, so that calls of nnU-Net's predictor vote."""

    def __init__(self, network: DeSAM, present: Callable[[int], bool]) -> None:
        super().__init__()
        self.network = network
        self.present = present
        self.calls = 0

    def forward(self, tile: Tensor) -> Tensor:
        score = 0.9 if self.present(self.calls) else 0.1
        self.calls += 1
        return with_scores(self.network, [[score]] * 9)(tile)


def vote(present: Callable[[int], bool], *, folds: int = 1, mirrors: tuple[int, ...] | None = None,
         width: int = 64) -> tuple[Tensor, int]:
    """Foreground logit minus background, of nnU-Net's predictor on one constant slice, and the calls it took."""
    network = make()
    with torch.no_grad():
        network.pdmm.seg_layers.weight.zero_()
        network.pdmm.seg_layers.register_forward_hook(lambda _m, _i, out: out + 6)  # a present class has logit 6
    votes = Votes(with_scores(network, [[0.0]] * 9), present)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.network, predictor.allowed_mirroring_axes = votes, mirrors
    predictor.list_of_parameters = [votes.state_dict()] * folds
    predictor.configuration_manager = type("Configuration", (), {"patch_size": [64, 64]})()
    predictor.label_manager = LabelManager({"background": 0, "organ": 1}, None)
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 1, 64, width))
    return (logits[1] - logits[0])[0].float(), votes.calls


def test_folds_vote() -> None:
    logit, calls = vote(lambda call: call > 0, folds=3)
    assert calls == 3
    torch.testing.assert_close(logit, torch.full_like(logit, (6 + 6 - 10) / 3), rtol=0, atol=1e-2)
    assert (vote(lambda call: call == 0, folds=2)[0] < 0).all()


def test_mirrors_vote() -> None:
    logit, calls = vote(lambda call: call != 2, mirrors=(0, 1))
    assert calls == 4
    torch.testing.assert_close(logit, torch.full_like(logit, (3 * 6 - 10) / 4), rtol=0, atol=1e-2)


def test_overlapping_tiles_vote() -> None:
    logit, calls = vote(lambda call: call != 1, width=128)  # tiles at 0, 32 and 64; the middle one says absent
    assert calls == 3
    row = logit[32]
    assert row[0] > 0
    assert row[64] < 0  # the middle tile's centre
    assert row[127] > 0
    between = row[48].item()  # as far from the first tile's centre as from the middle one's: no veto, a mean
    assert between == pytest.approx((6 - 10) / 2, abs=0.3)
