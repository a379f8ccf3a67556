"""nnU-Net's own trainers with as many iterations as ours, for comparisons."""

from __future__ import annotations

import argparse

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from desam_nnunet.nnunet.names import CONFIGURATION, ITERATIONS
from desam_nnunet.settings.sections import SamSection
from desam_nnunet.system.cores import usable_cores


def main() -> None:
    """Trains one fold, going on where it was stopped, and validates it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("fold")
    parser.add_argument("-tr", required=True)
    parser.add_argument("-p", required=True)
    parser.add_argument("-device", default="cuda")
    for key in ITERATIONS:
        parser.add_argument(f"--{key}", type=int, default=getattr(SamSection, key))
    options = parser.parse_args()
    torch.set_num_threads(usable_cores() if options.device == "cpu" else 1)  # as our trainers and nnUNetv2_train do
    torch.backends.cudnn.benchmark = True
    fold = options.fold if options.fold == "all" else int(options.fold)
    trainer = get_trainer_from_args(options.dataset, CONFIGURATION, fold, options.tr, options.p,
                                    continue_training=True, device=torch.device(options.device))
    for key in ITERATIONS:
        setattr(trainer, f"num_{key}", getattr(options, key))
    trainer.save_every = 1
    maybe_load_checkpoint(trainer, True, False)
    trainer.run_training()
    trainer.perform_actual_validation()


if __name__ == "__main__":
    main()
