"""The user's whole wait: nnUNetv2_predict of one volume, from the start of the command to the file on disk.

    python benchmarks/whole.py WORK TRAINER

predicts with nnU-Net's command in this process and says where the time went; ``make bench`` calls it for each trainer.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from desam_nnunet.nnunet.names import FOLDERS
from watch import watch, watched

BEGIN = time.perf_counter()
PLAIN = "nnUNetTrainer"
SLICES, SIDE, SIZE = 20, 160, 256
TRAINERS = {"DeSAMTrainerWholeBox": 1.0, "DeSAMTrainer": 0.5, "PDMMTrainer": None, "SAMedTrainer": None,
            "DBSAMTrainer": None}  # how many times as fast as plain nnU-Net they must be
INTENSITIES = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "median": 0.0, "percentile_00_5": -1.0,
               "percentile_99_5": 1.0}
STEPS = ("start", "preprocessing", "encoder", "decoder", "resampling", "export and end")


def run(device: Any, repeats: int) -> Any:
    from measure import Report, compare

    report = Report("whole", "A volume from start to file", (
        f"nnUNetv2_predict of {SLICES} slices of {SIDE} x {SIDE}, mirrored along both axes, whatever else it does: the "
        f"process's start, reading, preprocessing, export. RANDOM decoders on vit_tiny at {SIZE}; every tile has the "
        "class. Reference: nnUNetTrainer's 2D network on the same volume, in turn. The steps are of one more run, of "
        "preprocessing and export in the same process. Seconds of all cores: reference, ours."), device)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        plain = command(work, PLAIN, device.type)
        for trainer, required in TRAINERS.items():
            ours = command(work, trainer, device.type)
            busy = [cpu_seconds(words, work) for words in (plain, ours)]
            row = compare(trainer, lambda: call(plain, work), lambda words=ours: call(words, work), device=device,
                          repeats=repeats, required=required,
                          notes={"seconds of all cores": ", ".join(f"{x:.1f}" for x in busy)})
            report.add("nnUNetv2_predict", row)
        for trainer in (PLAIN, *TRAINERS):
            words = [sys.executable, __file__, folder, trainer, device.type]
            spent = json.loads(call(words, work).splitlines()[-1])
            report.fact(trainer, ", ".join(f"{step} {spent[step]:.2f} s" for step in STEPS))
    return report


def call(words: list[str], work: Path) -> str:
    paths = {name: str(work / name) for name in FOLDERS}
    return subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ | paths).stdout


def cpu_seconds(words: list[str], work: Path) -> float:
    """What a command takes of all cores together, which other work on the machine changes little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call(words, work)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command(work: Path, trainer: str, device: str) -> list[str]:
    program = Path(sys.executable).with_name("nnUNetv2_predict")
    return [str(program), "-i", str(work / "in"), "-o", str(work / "out"), "-d", "501", "-c", "2d", "-f", "0", "-tr",
            trainer, "-p", "BenchPlans", "-device", device, "-npp", "1", "-nps", "1"]


def prepare(work: Path) -> None:
    """A volume, and a model folder of each trainer with random weights."""
    import SimpleITK as sitk
    import torch

    from trainers import DATASET, PLANS

    torch.manual_seed(0)
    (work / "in").mkdir()
    volume = sitk.GetImageFromArray(torch.randn(SLICES, SIDE, SIDE).cumsum(1).cumsum(2).numpy())
    volume.SetSpacing((1.0, 1.0, 3.0))
    sitk.WriteImage(volume, str(work / "in" / "case_0000.nii.gz"))
    plans = copy.deepcopy(PLANS)
    plans |= {"image_reader_writer": "SimpleITKIO", "original_median_spacing_after_transp": [3.0, 1.0, 1.0],
              "original_median_shape_after_transp": [SLICES, SIDE, SIDE], "label_manager": "LabelManager",
              "foreground_intensity_properties_per_channel": {"0": INTENSITIES}}
    settings: dict[str, Any] = plans["configurations"]["2d"]
    kwargs = settings["architecture"]["arch_kwargs"]
    stages = 6  # what nnU-Net plans for a patch of this size
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        kwargs[name] = kwargs[name][:stages]
    kwargs |= {"n_stages": stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    settings |= {"patch_size": [SIDE, SIDE], "use_mask_for_norm": [False],
                 "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
                 "resampling_fn_seg": "resample_data_or_seg_to_shape",
                 "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
                 "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                 "resampling_fn_probabilities_kwargs": resampling | {"order": 1}}
    data = work / "nnUNet_preprocessed" / str(plans["dataset_name"])
    (data / settings["data_identifier"]).mkdir(parents=True)
    (data / settings["data_identifier"] / "case.b2nd").touch()
    for folder in (data, work / "nnUNet_raw" / str(plans["dataset_name"])):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(DATASET))
    (work / "plans.json").write_text(json.dumps(plans))
    for trainer in (PLAIN, *TRAINERS):
        call([sys.executable, __file__, str(work), trainer, "save"], work)


def save(work: Path, trainer: str) -> None:
    """A model folder as training leaves it."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from desam_nnunet.training.registry import TRAINERS as OURS
    from trainers import DATASET

    plans = json.loads((work / "plans.json").read_text())
    plans["configurations"]["2d"]["sam"] = {"encoder": "vit_tiny", "image_size": SIZE}
    kind: Any = OURS.get(trainer, nnUNetTrainer)
    made = kind(plans | {"continue_training": False}, "2d", 0, DATASET, torch.device("cpu"))
    made.initialize()
    made.inference_allowed_mirroring_axes = (0, 1)
    network = made.network
    with torch.no_grad():
        if trainer == "DeSAMTrainer":
            network.prim.iou_head.seg_layers.bias += 100
    folder = Path(made.output_folder)
    made.save_checkpoint(str(folder / "checkpoint_final.pth"))
    for name, content in (("plans", made.plans_manager.plans), ("dataset", DATASET)):
        (folder.parent / f"{name}.json").write_text(json.dumps(content))


def timed(work: Path, trainer: str, device: str) -> dict[str, float]:
    """Predicts, and says how long each step took. What is not told apart belongs to the decoder, or to the end."""
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    from desam_nnunet.networks.frame import FrozenSamNetwork

    spent: dict[str, float] = dict.fromkeys(("start", "predict", *STEPS), 0.0)

    predictor: Any = predict_from_raw_data.nnUNetPredictor
    sequential = predictor.predict_from_files_sequential

    @functools.wraps(sequential)
    def begun(*args: Any, **options: Any) -> Any:
        spent["start"] = time.perf_counter() - BEGIN
        return sequential(*args, **options)

    predictor.predict_from_files_sequential = begun
    watch(DefaultPreprocessor, "run_case", spent, "preprocessing")
    watch(predictor, "predict_logits_from_preprocessed_data", spent, "predict")
    watch(FrozenSamNetwork, "encode", spent, "encoder")
    resampling: Any = ConfigurationManager.resampling_fn_probabilities.fget
    ConfigurationManager.resampling_fn_probabilities = property(
        lambda self: watched(resampling(self), spent, "resampling"))
    sys.argv = command(work, trainer, device)
    sys.argv[-3], sys.argv[-1] = "0", "0"
    predict_from_raw_data.predict_entry_point()
    total = time.perf_counter() - BEGIN
    spent["decoder"] = spent.pop("predict") - spent["encoder"]
    spent["export and end"] = total - sum(spent.values())
    return spent


if __name__ == "__main__":
    if sys.argv[3] == "save":
        save(Path(sys.argv[1]), sys.argv[2])
    else:
        print(json.dumps(timed(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))
