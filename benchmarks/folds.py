"""An ensemble of folds in nnU-Net's predictor, against as many predictions of one fold."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.networks.desam.network import DeSAM
from measure import Report, compare
from reference import TILE, build, let_points_pass, smooth_noise


def run(device: torch.device, repeats: int) -> Report:
    report = Report("folds", "An ensemble of folds against single predictions", (
        "RANDOM weights, ViT-B, slices of one tile each (one slice at 1024, else four), nnU-Net's predictor without "
        "mirroring, whole prediction from preprocessed data to logits. Reference: one prediction per fold, added up. "
        "The logits of both are identical and the encoder saw each tile once in the ensemble, checked before timing."
    ), device)
    exact = encoder_dtype(device) == torch.float32
    modes = (("whole box", None, 1 / 0.3 if exact else 1 / 0.45), ("grid of 81 points", 9, 1 / 0.6))
    for mode, grid, required in modes:
        for size, folds in ((256, 1), (256, 2), (256, 5), (512, 5), (1024, 5)):
            predictor = make_predictor(size, grid, folds, device)
            volume = smooth_noise(1 if size == 1024 else 4).transpose(0, 1)
            tiles = check(predictor, volume)
            report.add("Time", compare(
                f"{size}, {mode}, {folds} fold(s)", lambda p=predictor, v=volume: one_by_one(p, v),
                lambda p=predictor, v=volume: together(p, v), device=device, repeats=repeats,
                required=required if (size, folds) == (1024, 5) else None,
                notes={"tiles encoded": str(tiles), "precision of the encoder": str(encoder_dtype(device))[6:]}))
    return report


def make_predictor(size: int, grid: int | None, folds: int, device: torch.device) -> nnUNetPredictor:
    subject = build("vit_b", size, device, grid=grid)
    network = subject.network
    if grid is not None:
        with torch.inference_mode():
            let_points_pass(network, network.encode(subject.tile), subject.tile)
    predictor = nnUNetPredictor(device=device, allow_tqdm=False, perform_everything_on_device=device.type == "cuda")
    predictor.network, predictor.allowed_mirroring_axes = network, None
    predictor.configuration_manager = type("Configuration", (), {"patch_size": [TILE, TILE]})()
    predictor.label_manager = LabelManager({"background": 0, "organ": 1}, None)
    state = network.state_dict()
    predictor.list_of_parameters = [
        {key: value.cpu() * (1 + 1e-3 * fold) for key, value in state.items()} for fold in range(folds)
    ]
    return predictor


def together(predictor: nnUNetPredictor, volume: Tensor) -> Tensor:
    predictor.network.memory.clear()
    return predictor.predict_logits_from_preprocessed_data(volume)


def one_by_one(predictor: nnUNetPredictor, volume: Tensor) -> Tensor:
    folds = predictor.list_of_parameters
    total: Any = None
    try:
        for weights in folds:
            predictor.list_of_parameters = [weights]
            logits = together(predictor, volume)
            total = logits.clone() if total is None else total.add_(logits)
    finally:
        predictor.list_of_parameters = folds
    return total.div_(len(folds))


def check(predictor: nnUNetPredictor, volume: Tensor) -> int:
    """The number of tiles that the encoder sees in an ensemble: each once, with the same logits as one by one."""
    network: DeSAM = predictor.network
    seen: list[int] = []
    hook = network.encoder.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    mine = together(predictor, volume)
    hook.remove()
    assert sum(seen) == volume.shape[1], f"{sum(seen)} encoder calls for {volume.shape[1]} tiles"
    assert torch.equal(mine, one_by_one(predictor, volume)), "the logits differ"
    return sum(seen)
