"""One training step on online features: ours against stock encoder and transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from desam_nnunet.encoders.base import Features
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.networks.desam.network import DeSAM
from desam_nnunet.sam.prompts import Prompts
from measure import Report, compare
from reference import Subject, build, decode, stock_features


def run(device: torch.device, repeats: int) -> Report:
    report = Report("training", "A training step against the straightforward one", (
        "RANDOM weights, ViT-B, one tile, encoder without and decoder with gradients, forward and backward without "
        "the optimiser. Reference: segment_anything's encoder and transformer. The loss of both is equal within 1e-4, "
        "checked in float32 before timing."), device)
    for size in (512, 1024):
        subject = build("vit_b", size, device)
        network, encoder = subject.network, subject.network.encoder
        points = Prompts(points=torch.full((1, 1, 2), size / 2, device=device))

        def theirs(subject: Subject = subject, points: Prompts = points) -> float:
            images = subject.network.to_image(subject.tile)[:, 0]
            with torch.no_grad():
                features = stock_features(subject.stock, images)
            return backward(subject.network, *decode(subject.network, features, points))

        def mine(network: DeSAM = network, tile: Tensor = subject.tile, points: Prompts = points) -> float:
            features: Features = network.encode(tile)
            return backward(network, *network(features, points))

        encoder.dtype = torch.float32
        expected, found = theirs(), mine()
        assert abs(found - expected) < 1e-4 * abs(expected), f"loss {found}, reference {expected}"
        encoder.dtype = encoder_dtype(device)
        with torch.autocast("cuda", enabled=device.type == "cuda"):
            report.add("Time", compare(f"{size}, batch 1", theirs, mine, device=device, repeats=repeats))
    return report


def backward(network: DeSAM, masks: Tensor, scores: Tensor) -> float:
    network.zero_grad(set_to_none=True)
    loss = masks.float().square().mean() + scores.float().square().mean()
    loss.backward()
    return float(loss)
