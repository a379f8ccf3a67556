"""A volume predicted on slabs against slice by slice, and slices encoded together against one by one."""

from __future__ import annotations

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from desam_nnunet.encoders.weights import is_here, load_encoder
from desam_nnunet.networks.desam.pdmm_alone import PDMMAlone
from desam_nnunet.networks.desam.pdmm_section import PdmmSection
from desam_nnunet.networks.frame import FrozenSamNetwork, Outline
from desam_nnunet.sam.tiles import TileToImage
from measure import Report, compare
from reference import smooth_noise

SIZE, TILE, SLICES, DEPTH = 256, 160, 20, 5


def run(device: torch.device, repeats: int) -> Report:
    report = Report("slabs", "Slabs against single slices", (
        f"PDMM alone, random, at its width of 64, a volume of {SLICES} slices of {TILE} x {TILE}, encoder at {SIZE}, "
        "nnU-Net's predictor without mirroring, from preprocessed data to logits. Reference: slice by slice. Ours: "
        f"slabs of {DEPTH} slices, which overlap, the same weights, neighbours not trained. Before timing the logits "
        "were compared, and the encoder saw each slice once in both."), device)
    for encoder in ("vit_tiny", "lite_medsam"):
        if not is_here(encoder):
            report.fact(encoder, "not installed")
            continue
        flat, deep = (network_of(encoder, depth, device) for depth in (1, DEPTH))
        deep.load_state_dict(flat.state_dict(), strict=False)
        volume = smooth_noise(SLICES)[..., :TILE, :TILE].transpose(0, 1)
        notes = {"slabs": str(check(flat, deep, volume, device))}
        report.add("A volume", compare(
            encoder, lambda n=flat, v=volume: predict(n, v, device), lambda n=deep, v=volume: predict(n, v, device),
            device=device, repeats=repeats, notes=notes))
        tiles = volume.transpose(0, 1)[:DEPTH].to(device)
        with torch.inference_mode():
            report.add(f"{DEPTH} slices encoded", compare(
                f"{encoder}, together", lambda n=flat, t=tiles: [n.encode(tile) for tile in t.split(1)],
                lambda n=flat, t=tiles: n.encode(t), device=device, repeats=repeats))
    return report


def network_of(encoder: str, depth: int, device: torch.device) -> FrozenSamNetwork:
    torch.manual_seed(0)
    loaded = load_encoder(encoder, SIZE)
    to_image = TileToImage(loaded.encoder.spec.image, SIZE, "percentile")
    return PDMMAlone(Outline(loaded, to_image, 1, 2, True, PdmmSection(), depth)).to(device).eval()


def predict(network: FrozenSamNetwork, volume: Tensor, device: torch.device) -> Tensor:
    predictor = nnUNetPredictor(device=device, allow_tqdm=False, perform_everything_on_device=device.type == "cuda")
    predictor.network, predictor.allowed_mirroring_axes = network, None
    patch = [TILE, TILE] if network.depth == 1 else [network.depth, TILE, TILE]
    predictor.configuration_manager = type("Configuration", (), {"patch_size": patch})()
    predictor.label_manager = LabelManager({"background": 0, "organ": 1}, None)
    predictor.list_of_parameters = [network.state_dict()]
    network.memory.clear()
    return predictor.predict_logits_from_preprocessed_data(volume)


def check(flat: FrozenSamNetwork, deep: FrozenSamNetwork, volume: Tensor, device: torch.device) -> int:
    """The number of slabs; both networks give the same logits of a slab, and encode each slice of the volume once."""
    slab = volume[None, :, :DEPTH].to(device)
    with torch.inference_mode():
        one_by_one = torch.cat([flat(slab[:, :, z]) for z in range(DEPTH)])
        error = (deep(slab)[0].transpose(0, 1) - one_by_one).abs().max()
    assert error <= 1e-4 * one_by_one.abs().max(), "the logits differ"
    seen: list[int] = []
    for network in (flat, deep):
        hook = network.encoder.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
        predict(network, volume, device)
        hook.remove()
        assert sum(seen) == SLICES, f"{sum(seen)} images encoded for {SLICES} slices"
        seen.clear()
    return len(compute_steps_for_sliding_window((SLICES, TILE, TILE), (DEPTH, TILE, TILE), 0.5)[0])
