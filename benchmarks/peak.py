"""Peak memory of one computation above what its network and inputs hold, each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from desam_nnunet.encoders.base import Features
from desam_nnunet.system.machine import peak_memory
from reference import build, let_points_pass, published_grid, stock_features


def measured_peak(what: str, who: str, device: torch.device) -> int:
    """Bytes. what: ``encoder`` or ``grid``. who: ``reference`` or ``ours``."""
    command = [sys.executable, __file__, what, who, "--device", device.type]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("encoder", "grid"))
    parser.add_argument("who", choices=("reference", "ours"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    with torch.inference_mode(), torch.autocast("cuda", enabled=device.type == "cuda"):
        work = _work(args.what, args.who, device)
        before = reset(device)
        work()
        print(peak_memory(device) - before)


def _work(what: str, who: str, device: torch.device) -> Callable[[], object]:
    subject = build("vit_b", 1024, device)
    network, tile = subject.network, subject.tile
    if what == "encoder":
        images = torch.randn(1, 3, 1024, 1024, device=device)
        if who == "ours":
            return lambda: network.encoder(images)
        return lambda: stock_features(subject.stock, images)
    features = Features(tuple(torch.randn(1, 768, 64, 64, device=device) for _ in range(3)),
                        torch.randn(1, 256, 64, 64, device=device))
    let_points_pass(network, features, tile)
    if who == "ours":
        return lambda: network.predict(features, network.geometry(tile))
    return lambda: published_grid(network, features, tile)


def reset(device: torch.device) -> int:
    """Forgets earlier peaks; returns what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    return peak_memory(device)


if __name__ == "__main__":
    main()
