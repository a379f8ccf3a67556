"""A training step of every trainer beside plain nnUNetTrainer's, and what their checkpoints weigh.

    python benchmarks/trainers.py TRAINER FOLDER REPEATS DEVICE

measures one trainer in a process of its own, which ``make bench`` calls for each.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch.nn import functional as F

from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.nnunet.names import FOLDERS
from desam_nnunet.system.machine import peak_memory
from desam_nnunet.training.registry import TRAINERS
from measure import Report, Row, compare, compute_exactly
from peak import reset
from reference import TILE, smooth_noise

SIZE, BATCH = 512, 2
CACHED = "cached"
PLAIN = "nnUNetTrainer"
MERGED = "merged"
WEIGHTS = "random_vit_b.pth"
# DBSAMTrainerBoxes differs from DBSAMTrainer in prompts alone.
SUBJECTS = (PLAIN, f"DeSAMTrainer {CACHED}", *(name for name in TRAINERS if name != "DBSAMTrainerBoxes"))
_STAGES = 7
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset501_Bench", "plans_name": "BenchPlans", "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2], "foreground_intensity_properties_per_channel": {},
    "configurations": {"2d": {
        "data_identifier": "bench_2d", "preprocessor_name": "DefaultPreprocessor", "batch_size": BATCH,
        "patch_size": [TILE, TILE], "spacing": [1.0, 1.0], "normalization_schemes": ["ZScoreNormalization"],
        "batch_dice": True, "architecture": {  # what nnU-Net plans for a patch of this size
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": _STAGES, "features_per_stage": [32, 64, 128, 256, 512, 512, 512],
                "conv_op": "torch.nn.modules.conv.Conv2d", "kernel_sizes": [[3, 3]] * _STAGES,
                "strides": [[1, 1], *[[2, 2]] * (_STAGES - 1)], "n_conv_per_stage": [2] * _STAGES,
                "n_conv_per_stage_decoder": [2] * (_STAGES - 1), "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True}},
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}}},
}
DATASET = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": 1,
           "file_ending": ".nii.gz"}


def run(device: torch.device, repeats: int) -> Report:
    report = Report("trainers", "A training step of every trainer beside plain nnU-Net's", (
        f"RANDOM weights, ViT-B at {SIZE}, {BATCH} tiles of {TILE} x {TILE}, one class: data on the device, forward, "
        "backward and optimiser, without loading and augmentation. Reference: nnUNetTrainer's 2D network on the same "
        "tiles, in turn in the same process. Memory is the peak of two steps, network and optimiser included. The "
        "checkpoint holds the optimiser's state; the weights are what it holds beside that. Neither holds SAM's "
        "encoder. 'cached' reads features instead of encoding tiles."), device)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for subject in SUBJECTS:
            report.add("Training step", in_a_process(subject, folder, repeats, device))
        report.add("Prediction", in_a_process(MERGED, folder, repeats, device))
    return report


def prepare(folder: Path) -> None:
    """Weights, and where nnU-Net looks for the kind of the preprocessed data when it makes a trainer."""
    torch.save(ENCODERS["vit_b"].architecture.random_state(), folder / WEIGHTS)
    data = folder / str(PLANS["dataset_name"]) / PLANS["configurations"]["2d"]["data_identifier"]
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()


def in_a_process(subject: str, folder: str, repeats: int, device: torch.device) -> Row:
    paths = dict.fromkeys(FOLDERS, folder)
    words = [sys.executable, __file__, subject, folder, str(repeats), device.type]
    answer = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | paths).stdout
    return Row(**json.loads(answer.splitlines()[-1]))


def main() -> None:
    subject, folder, repeats, device = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), torch.device(sys.argv[4])
    compute_exactly()
    if subject == MERGED:
        print(json.dumps(asdict(merged(folder, device, repeats))))
        return
    before = reset(device)
    trainer = make_trainer(subject, folder, device)
    batch = make_batch(trainer, cached=subject.endswith(CACHED))
    reset(device)
    for _ in range(2):
        trainer.train_step(batch)
    peak = peak_memory(device) - before
    plain = make_trainer(PLAIN, folder, device)
    tiles = make_batch(plain)
    plain.train_step(tiles)
    trained = sum(parameter.numel() for parameter in trainer.network.parameters() if parameter.requires_grad)
    checkpoint, weights = folder / "checkpoint.pth", folder / "weights.pth"
    trainer.save_checkpoint(str(checkpoint))
    torch.save(trainer.network.state_dict(), weights)
    row = compare(
        subject, lambda: plain.train_step(tiles), lambda: trainer.train_step(batch), device=device, repeats=repeats,
        notes={"peak memory": _megabytes(peak), "trained parameters": f"{trained / 1e6:.2f} M",
               "checkpoint": _megabytes(checkpoint.stat().st_size), "weights": _megabytes(weights.stat().st_size)})
    print(json.dumps(asdict(row)))


def make_trainer(subject: str, folder: Path, device: torch.device) -> Any:
    """Initialised, as nnU-Net makes it."""
    kind = TRAINERS.get(subject.split()[0], nnUNetTrainer)
    plans = copy.deepcopy(PLANS)
    plans["configurations"]["2d"]["sam"] = {"encoder": str(folder / WEIGHTS), "image_size": SIZE}
    trainer = kind(plans | {"continue_training": False}, "2d", 0, DATASET, device)
    trainer.initialize()
    return trainer


def make_batch(trainer: Any, *, cached: bool = False) -> dict[str, Any]:
    """Two tiles as nnU-Net's loader gives them to this trainer, or their features in float16."""
    tiles = smooth_noise(BATCH)
    target = (tiles > 1).to(torch.int16)
    if cached:
        features = trainer.bare_network.encode(tiles.to(trainer.device)).map(lambda x: x.half().cpu())
        return {"features": features, "target": target}
    if trainer.enable_deep_supervision:
        scales = [[1 / 2**step] * 2 for step in range(_STAGES - 1)]
        targets = [F.interpolate(target.float(), scale_factor=tuple(scale), mode="nearest") for scale in scales]
        return {"data": tiles, "target": targets, "keys": ["a"] * BATCH}
    return {"data": tiles, "target": target, "keys": ["a"] * BATCH}


def merged(folder: Path, device: torch.device, repeats: int) -> Row:
    """SAMed's prediction against the same without any update: the updates are merged, and must cost nothing."""
    trainer = make_trainer("SAMedTrainer", folder, device)
    network, tile = trainer.bare_network.eval(), smooth_noise(1).to(device)
    base = load_encoder(str(folder / WEIGHTS), SIZE).encoder.to(device)
    base.dtype = network.encoder.dtype

    def without() -> Tensor:
        images = network.images(tile)[:, 0]
        return network.tile_logits(network.decode(base(images).neck), network.geometry(tile))

    with torch.inference_mode():
        torch.testing.assert_close(network(tile), without(), rtol=0, atol=1e-5)  # updates start at zero
        return compare("SAMed's prediction of a tile, updates merged, against SAM's encoder without any", without,
                       lambda: network(tile), device=device, repeats=repeats)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
