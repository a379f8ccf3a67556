"""The words of ``desam plan``."""

from __future__ import annotations

import argparse

from desam_nnunet.commands.words import Commands, add_command, columns
from desam_nnunet.nnunet.names import TRIAL

_QUICK = "quick"


def add(commands: Commands) -> None:
    """Adds the command."""
    plan = add_command(commands, "plan", _run, "fit nnU-Net's plans to the data set and this machine")
    plan.add_argument("-d", metavar="DATASET", help="number or name of the data set")
    plan.add_argument("-tr", "--trainer", default="DeSAMTrainer", metavar="NAME",
                      help="to plan for (default: DeSAMTrainer)")
    plan.add_argument("-gpu_memory_target", type=float, metavar="GB",
                      help="memory that training may take (default: from this machine)")
    plan.add_argument("-disk_target", type=float, metavar="GB",
                      help="what the embedding cache may take (default: half of what is free)")
    plan.add_argument("--encoder", metavar="NAME",
                      help="a name, see desam weights list, timm/<model> or a file (default: what is here and fits)")
    start = plan.add_mutually_exclusive_group()
    start.add_argument("--preset", metavar="NAME", help="settings to start from, see --list")
    start.add_argument("--quick", action="store_true",
                       help="a trial: the preset quick, in plans of that name")
    plan.add_argument("-overwrite_plans_name", metavar="NAME",
                      help="default: DeSAMPlans, PDMMPlans, SAMedPlans or DBSAMPlans, by the trainer")
    plan.add_argument("-device", choices=["cuda", "cpu", "mps"], help="to train on (default: cuda where there is one)")
    plan.add_argument("--list", action="store_true", help="list the presets")


def _run(options: argparse.Namespace) -> None:
    from desam_nnunet.planning.presets import preset_names, read_preset

    if options.list:
        print(*columns([(name, read_preset(name)["description"]) for name in preset_names()]), sep="\n")
        return
    if options.d is None:
        raise ValueError("Which data set? Give its number or name with -d.")
    import torch

    from desam_nnunet.planning.plan import plan_dataset
    from desam_nnunet.planning.request import Request
    from desam_nnunet.system.machine import limit_threads
    from desam_nnunet.training.registry import find_trainer

    trainer = find_trainer(options.trainer)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    limit_threads(device)  # it is timed
    preset = _QUICK if options.quick else options.preset
    name = trainer.method.plans_name + (TRIAL if options.quick else "")
    request = Request(options.gpu_memory_target, options.disk_target, options.encoder, preset, trainer)
    planned = plan_dataset(options.d, options.overwrite_plans_name or name, request, device)
    print(*columns([(line.key, line.value, line.reason) for line in planned.lines]), sep="\n")
    print(f"\nWritten to {planned.path}. Next:")
    for command in planned.commands:
        print(f"    {command}")
