"""DeSAM against tensors of the published implementation, loaded by its official key names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

from desam_nnunet.encoders.base import Encoder, Features, FeatureSpec, Level
from desam_nnunet.encoders.sam_vit import IMAGE, build_transformer
from desam_nnunet.networks.desam.network import DeSAM
from desam_nnunet.networks.desam.pdmm import PDMM
from desam_nnunet.networks.desam.prim import PRIM
from desam_nnunet.networks.desam.prompters import GridPrompter, Prompter, WholeBoxPrompter
from desam_nnunet.published.formats import is_official, rename_official
from desam_nnunet.sam.prompts import Prompts, dense_positions, prompt_tokens, whole_box
from desam_nnunet.sam.tiles import Geometry, TileToImage

LOGITS = 1e-5  # absolute, float32, as the golden files state
TOKENS = 1e-6
GOLDEN = Path(__file__).parent / "golden" / "desam_decoder_small.safetensors"
SIZE, GRID, DIM, ENCODER_DIM = 128, 8, 64, 48
SPEC = FeatureSpec((Level(ENCODER_DIM, SIZE // GRID),) * 3, Level(DIM, SIZE // GRID), IMAGE)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def official(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}


@pytest.fixture(scope="module")
def features(golden: dict[str, Tensor]) -> Features:
    return Features(tuple(golden[f"input.feature_{level}"] for level in range(3)), golden["input.neck"])


def published(official: dict[str, Tensor], prompter: Prompter) -> DeSAM:
    network = DeSAM(
        encoder=Encoder(nn.Identity(), SPEC, "golden"),  # features are given
        prompt_encoder=PromptEncoder(DIM, (GRID, GRID), (SIZE, SIZE), mask_in_chans=16),
        prim=PRIM(transformer=build_transformer(DIM, mlp_dim=128), num_classes=1, iou_hidden=DIM),
        pdmm=PDMM(spec=SPEC, prompt_dim=DIM, num_classes=1),
        prompter=prompter,
        to_image=TileToImage(IMAGE, SIZE, "unit"),
    )
    network.load_state_dict(rename_official(official))
    return network.eval()


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_official_keys_are_recognised(official: dict[str, Tensor]) -> None:
    assert is_official(official)
    assert not is_official(rename_official(official))


def test_unknown_official_key_is_refused(official: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'decoder\.weight' is no key"):
        rename_official({**official, "decoder.weight": torch.zeros(1)})


@torch.no_grad()
def test_point_prompt(golden: dict[str, Tensor], official: dict[str, Tensor], features: Features) -> None:
    network = published(official, GridPrompter(9))
    prompts = Prompts(points=golden["points.coords"])
    close(prompt_tokens(network.prompt_encoder, prompts)[0], golden["points.sparse"], TOKENS)
    masks, iou = network(features, prompts)
    close(iou, golden["points.iou"], LOGITS)
    close(masks, golden["points.mask_logits"], LOGITS)


@torch.no_grad()
def test_whole_box(golden: dict[str, Tensor], official: dict[str, Tensor], features: Features) -> None:
    network = published(official, WholeBoxPrompter())
    prompts = whole_box(Geometry((SIZE, SIZE), SIZE), 2, torch.device("cpu"))
    sparse, dense = prompt_tokens(network.prompt_encoder, prompts)
    close(sparse, golden["wholebox.sparse"], TOKENS)
    close(dense_positions(network.prompt_encoder), golden["wholebox.dense_pe"], TOKENS)
    masks, _ = network(features, prompts)
    close(masks, golden["wholebox.mask_logits"], LOGITS)
    output = network.prim(features.neck + dense, golden["wholebox.dense_pe"], sparse, score=True)
    close(output.mask_embedding, golden["wholebox.mask_embedding"], LOGITS)
    close(output.iou, golden["wholebox.iou"], LOGITS)
