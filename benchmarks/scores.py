"""Scores of the grid's points, features given: without image streams against an image stream for each point."""

from __future__ import annotations

import torch
from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.networks.desam.network import DeSAM, build_desam
from desam_nnunet.networks.desam.prompters import GridPrompter
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.prompts import Prompts, point_grid
from desam_nnunet.sam.tiles import TileToImage
from measure import Report, compare
from reference import build, let_points_pass, smooth_noise

TOKENS = 32768  # of the image, in all streams together: eight points at 1024
EQUAL = 1e-5


def run(device: torch.device, repeats: int) -> Report:
    report = Report("scores", "Scores of 81 points", (
        "One tile, features given, float32, one class. Reference: PRIM as it is trained, which makes the image stream "
        f"of every point, with projections shared or moved to the tokens' side, {TOKENS} image tokens at a time. The "
        f"scores were compared before timing and are equal within {EQUAL:.0e}. vit_tiny is pretrained, ViT-B random."),
        device)
    with torch.inference_mode():
        for name, size, required in (("vit_b", 1024, 2.5), ("vit_b", 512, None), ("vit_b", 256, None),
                                     ("vit_tiny", 256, 2.0)):
            network, features, tile = (tiny if name == "vit_tiny" else random)(size, device)
            theirs, ours = streams(network, features, tile), network.scores(features, network.geometry(tile))
            error = float((theirs - ours).abs().max())
            assert error < EQUAL, f"the scores differ by {error:.1e}"
            report.add("Scores", compare(
                f"{name} at {size}", lambda n=network, f=features, t=tile: streams(n, f, t),
                lambda n=network, f=features, t=tile: n.scores(f, n.geometry(t)), device=device, repeats=repeats,
                required=required, notes={"largest difference": f"{error:.1e}"}))
    return report


def random(size: int, device: torch.device) -> tuple[DeSAM, Features, Tensor]:
    """ViT-B's sizes; the scores are stretched to a deviation of 1."""
    _, network, tile = build("vit_b", size, device)
    maps = [torch.randn(1, channels, size // 16, size // 16, device=device) for channels in (768, 768, 768, 256)]
    features = Features(tuple(maps[:3]), maps[3])
    let_points_pass(network, features, tile)
    return network, features, tile


def tiny(size: int, device: torch.device) -> tuple[DeSAM, Features, Tensor]:
    torch.manual_seed(0)
    loaded = load_encoder("vit_tiny", size)
    to_image = TileToImage(loaded.encoder.spec.image, size, "percentile")
    network = build_desam(Outline(loaded, to_image, 1, 2, True, None), GridPrompter(9)).to(device).eval()
    tile = smooth_noise(1).to(device)
    return network, network.encode(tile), tile


def streams(network: DeSAM, features: Features, tile: Tensor) -> Tensor:
    at_once = max(1, TOKENS // features.neck[0, 0].numel())
    points = point_grid(network.geometry(tile), 9, tile.device)
    scores = [network._prim(features.neck, Prompts(points=part), score=True).iou for part in points.split(at_once)]
    return torch.cat([part for part in scores if part is not None])
