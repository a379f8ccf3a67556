"""An epoch of nnUNetv2_train: how long it takes with each trainer, and how much of it waits for data.

    python benchmarks/epoch.py TRAINER DEVICE

trains fold 0 of data set 501 in this process, for two epochs, and prints the seconds of the second's parts; ``make
bench`` calls it for each trainer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from desam_nnunet.nnunet.names import STOCK_PLANS
from watch import watch
from whole import call

PLAIN = "nnUNetTrainer"
ITERATIONS, VALIDATIONS, SIZE = 20, 4, 256
PARTS = ("waiting", "training", "validation", "else")
SAM = {"encoder": "vit_tiny", "image_size": SIZE, "views": 1, "epochs": 2, "iterations_per_epoch": ITERATIONS,
       "val_iterations_per_epoch": VALIDATIONS}


def run(device: Any, repeats: int) -> Any:
    """Once each: an epoch repeats its iterations."""
    from desam_nnunet.training.registry import TRAINERS
    from measure import Report

    report = Report("epoch", "An epoch of nnUNetv2_train", (
        f"{ITERATIONS} iterations and {VALIDATIONS} of validation, the second epoch of two, on the phantom, with the "
        f"batch and patch that nnU-Net plans; vit_tiny at {SIZE}, cached where the method can. Waiting is for the next "
        "batch, else are logs, curve and checkpoint. One run of each."), device)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for trainer in (PLAIN, *TRAINERS):
            spent = json.loads(call([sys.executable, __file__, trainer, device.type], work).splitlines()[-1])
            whole = sum(spent.values())
            report.fact(trainer, f"{whole:.1f} s: " + ", ".join(f"{part} {spent[part]:.2f} s" for part in PARTS)
                        + f"; {100 * spent['waiting'] / whole:.1f} % of it waiting")
    return report


def prepare(work: Path) -> None:
    """The phantom, preprocessed by nnU-Net, and plans with our settings in them."""
    phantom = Path(__file__).parents[1] / "examples" / "phantom.py"
    programs = Path(sys.executable).parent
    call([sys.executable, str(phantom), str(work)], work)
    call([str(programs / "nnUNetv2_plan_and_preprocess"), "-d", "501", "-c", "2d", "-np", "1", "-npfp", "1"], work)
    (path,) = (work / "nnUNet_preprocessed").glob(f"Dataset501*/{STOCK_PLANS}.json")
    plans = json.loads(path.read_text())
    plans["configurations"]["2d"]["sam"] = SAM
    path.with_name("BenchPlans.json").write_text(json.dumps(plans | {"plans_name": "BenchPlans"}))


def timed(trainer: str, device: str) -> dict[str, float]:
    """Trains; seconds of the last epoch's parts."""
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
    from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from desam_nnunet.cache.loader import CachedLoader
    from desam_nnunet.training import budget
    from desam_nnunet.training.registry import TRAINERS

    spent: dict[str, float] = {}
    kind: Any = TRAINERS.get(trainer, nnUNetTrainer)

    for loader in (CachedLoader, NonDetMultiThreadedAugmenter, SingleThreadedAugmenter):
        watch(loader, "__next__", spent, "waiting")
    watch(kind, "train_step", spent, "training")
    watch(kind, "validation_step", spent, "validation")
    begun, ended = kind.on_epoch_start, kind.on_epoch_end
    epoch: dict[str, float] = {}

    def begin_epoch(self: Any) -> None:
        spent.clear()
        spent["began"] = time.perf_counter()
        begun(self)

    def end_epoch(self: Any) -> None:
        ended(self)
        epoch.update(spent)
        epoch["else"] = time.perf_counter() - epoch.pop("began") - sum(spent[part] for part in PARTS[:3])

    kind.on_epoch_start, kind.on_epoch_end = begin_epoch, end_epoch
    kind.perform_actual_validation = lambda self: None
    settings = [f"--{key}={SAM[key]}" for key in ("epochs", "iterations_per_epoch", "val_iterations_per_epoch")]
    sys.argv = [__file__, "501", "0", "-tr", trainer, "-p", "BenchPlans", "-device", device, *settings]
    budget.main()
    return epoch


if __name__ == "__main__":
    print(json.dumps(timed(sys.argv[1], sys.argv[2])))
