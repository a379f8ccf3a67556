"""Where the time of one tile goes, and the operations that each part needs at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from desam_nnunet.encoders.memory import content_key
from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.sam.tiles import logits_to_tile
from measure import Report, matmul_rate, seconds
from reference import build, let_points_pass


def run(device: torch.device, repeats: int) -> Report:
    report = Report("parts", "Where the time of one tile goes", (
        "RANDOM weights, ViT-B at 1024, one tile of 320 x 320, 81 points, one class; operations counted by "
        "torch.utils.flop_counter (matrix products and convolutions, two per multiplication and addition), and bytes "
        "that PyTorch's operations read and write, one by one; the floors are these numbers divided by the rate of a "
        "large matrix product and of a large copy in the same run. What stays in a processor's cache costs less than "
        "its floor in bytes."), device)
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
            "PRIM, scores of 81 points": (lambda: network.scores(features, geometry), torch.float32),
            "PDMM, image-only path": (lambda: network.pdmm.context(features.levels), torch.float32),
            "PDMM, path of one prompt": (lambda: network.pdmm(embedding, contexts), torch.float32),
            "logits to the tile": (lambda: logits_to_tile(masks, geometry), torch.float32),
        }
        for name, (work, precision) in parts.items():
            with FlopCounterMode(display=False) as counter, ByteCounterMode() as moved:
                work()
            median = sorted(seconds(work, device) for _ in range(repeats))[repeats // 2]
            flops, rate = counter.get_total_flops(), matmul_rate(device, precision)
            report.fact(name, (
                f"{median:.3g} s; {flops / 1e9:.3g} GFLOP, floor {flops / rate:.2g} s; "
                f"{moved.bytes / 1e9:.2g} GB, floor {moved.bytes / copy_rate(device):.2g} s"))
    return report


class ByteCounterMode(TorchDispatchMode):
    """Counts what the operations read and write, each tensor once an operation; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = (
            {x.untyped_storage().data_ptr(): x.numel() * x.element_size()
             for x in tree_leaves(values) if isinstance(x, torch.Tensor)} for values in ((args, kwargs), result))
        if not (written.keys() <= read.keys() and not func._schema.is_mutable):
            self.bytes += sum(read.values()) + sum(written.values())
        return result


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 256 MB, the best of five."""
    a = torch.randn(2**26, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.numel() * a.element_size() / min(seconds(lambda: b.copy_(a), device) for _ in range(5))

