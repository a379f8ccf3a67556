"""Grid prediction of one tile from its features: ours against every prompt through the whole decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.networks.desam.network import DeSAM
from measure import Report, compare
from peak import measured_peak
from reference import build, let_points_pass, published_grid

ROUNDING = 1e-6  # of the largest logit


def run(device: torch.device, repeats: int) -> Report:
    report = Report("grid", "Grid prediction against the published procedure", (
        "RANDOM weights, ViT-B's sizes, one tile of 320 x 320, features given. Reference: all points, nine at a time, "
        "each through segment_anything's transformer and the whole PDMM. The scores are shifted so that at least 40 "
        "points of 81 pass and the best leads by more than 1e-3; the masks of both are not empty and identical but for "
        "pixels whose logit is zero within rounding, which are counted; checked in float32 before timing; timed under "
        "nnU-Net's autocast, which is float32 on a CPU."), device)
    with torch.inference_mode():
        for size, points, classes, required in (
            (1024, 9, 1, 25.0), (512, 9, 1, None), (256, 9, 1, None),
            (256, 5, 1, None), (256, 3, 1, None), (256, 9, 3, None), (256, 9, 8, None),
        ):
            network, features, tile, notes = prepare(size, points, classes, device)
            with torch.autocast("cuda", enabled=device.type == "cuda"):
                report.add("Time", compare(
                    f"{size}, {points * points} points, {classes} class(es)",
                    lambda n=network, f=features, t=tile: published_grid(n, f, t),
                    lambda n=network, f=features, t=tile: ours(n, f, t),
                    device=device, repeats=repeats, required=required, notes=notes))
    peaks = {who: measured_peak("grid", who, device) for who in ("reference", "ours")}
    for who, peak in peaks.items():
        report.fact(f"peak memory at 1024, 81 points, above the network's own, {who}", f"{peak / 1e6:.0f} MB")
    assert peaks["ours"] <= peaks["reference"], "grid prediction needs more memory than the reference"
    return report


def prepare(
    size: int, points: int, classes: int, device: torch.device
) -> tuple[DeSAM, Features, Tensor, dict[str, str]]:
    """A network whose points pass, features, and the proof that both procedures give the same masks."""
    subject = build("vit_b", size, device, grid=points, classes=classes)
    network, tile = subject.network, subject.tile
    side = size // 16
    features = Features(tuple(torch.randn(1, 768, side, side, device=device) for _ in range(3)),
                        torch.randn(1, 256, side, side, device=device))
    passing = let_points_pass(network, features, tile)
    assert passing > points * points // 2 - 1
    theirs, mine = published_grid(network, features, tile), ours(network, features, tile)
    masks = theirs[:, 1:] > 0
    differ = masks != (mine[:, 1:] > 0)
    assert bool((theirs[:, 1:][differ].abs() < ROUNDING * theirs.abs().max()).all()), "the masks differ"
    filled = [float(share) for share in masks[0].float().mean((1, 2))]
    assert all(0 < share < 1 for share in filled), "a mask is empty or full: nothing is compared"
    error = float((theirs - mine).abs().max() / theirs.abs().max())
    return network, features, tile, {"points that pass": str(passing), "largest error / largest logit": f"{error:.1e}",
                                     "pixels that differ": str(int(differ.sum())),
                                     "mask": ", ".join(f"{share:.0%}" for share in filled)}


def ours(network: DeSAM, features: Features, tile: Tensor) -> Tensor:
    return network.predict(features, network.geometry(tile))
