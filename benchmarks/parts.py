"""Where the time of one tile goes, and the operations that each part needs at least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from desam_nnunet.sam.memory import content_key
from desam_nnunet.sam.precision import encoder_dtype
from desam_nnunet.sam.tiles import logits_to_tile
from measure import Report, matmul_rate, seconds
from reference import build, let_points_pass


def run(device: torch.device, repeats: int) -> Report:
    report = Report("parts", "Where the time of one tile goes", (
        "RANDOM weights, ViT-B at 1024, one tile of 320 x 320, 81 points, one class; operations counted by "
        "torch.utils.flop_counter (matrix products and convolutions, two per multiplication and addition); the floor "
        "is their number divided by the rate of a large matrix product in the same run."), device)
    with torch.inference_mode(), torch.autocast("cuda", enabled=device.type == "cuda"):
        _, network, tile = build("vit_b", 1024, device)
        features, geometry = network.encode(tile), network.geometry(tile)
        let_points_pass(network, features, tile)
        contexts = network.pdmm.context(features.levels)
        embedding = torch.randn_like(features.neck)
        masks = network.pdmm(embedding, contexts)
        images = network.to_image(tile)[:, 0]
        dtype = encoder_dtype(device)
        parts: dict[str, tuple[Callable[[], object], torch.dtype]] = {
            "tile to SAM image": (lambda: network.to_image(tile), torch.float32),
            "key of the feature memory": (lambda: content_key(tile), torch.float32),
            f"encoder, {str(dtype)[6:]}": (lambda: network.encoder(images), dtype),
            "PRIM, scores of 81 points": (lambda: network.grid_scores(features, geometry), torch.float32),
            "PDMM, image-only path": (lambda: network.pdmm.context(features.levels), torch.float32),
            "PDMM, path of one prompt": (lambda: network.pdmm(embedding, contexts), torch.float32),
            "logits to the tile": (lambda: logits_to_tile(masks, geometry), torch.float32),
        }
        for name, (work, precision) in parts.items():
            with FlopCounterMode(display=False) as counter:
                work()
            median = sorted(seconds(work, device) for _ in range(repeats))[repeats // 2]
            flops, rate = counter.get_total_flops(), matmul_rate(device, precision)
            report.fact(name, f"{median:.3g} s; {flops / 1e9:.3g} GFLOP, floor {flops / rate:.2g} s")
    return report

