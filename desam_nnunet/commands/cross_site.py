"""The words of ``desam cross-site``. Importing this module imports nothing heavy."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from desam_nnunet.commands.words import Commands, add_command, add_device, device_named

EXTRA = {"monai": (1, 5), "scipy": (1, 15), "snakemake": (9,)}  # some come with other packages, perhaps too old


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "cross-site", _run, "train at each site, test at the others, report")
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA",
                        help="folder with a folder per site, or a manifest (CSV or JSON: case, site, image, label)")
    parser.add_argument("-d", nargs="+", default=[], metavar="SITE=DATASET",
                        help="instead of DATA: data sets in nnU-Net's folders, such as RUNMC=501 UCL=502")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder of the study, new or to go on with")
    parser.add_argument("-tr", nargs="+", default=[], metavar="TRAINER",
                        help="ours and nnU-Net's (default: DeSAMTrainer nnUNetTrainer)")
    parser.add_argument("--sources", nargs="+", default=[], metavar="SITE", help="to train at (default: every site)")
    parser.add_argument("--targets", nargs="+", default=[], metavar="SITE", help="to test at (default: every site)")
    parser.add_argument("-f", nargs="+", default=["0"], metavar="FOLD", help="folds to train, or all (default: 0)")
    parser.add_argument("-p", default="", metavar="PLANS",
                        help="plans for all trainers (default: desam plan's for ours, nnUNetPlans for nnU-Net's)")
    parser.add_argument("--settings", type=Path, metavar="FILE",
                        help="JSON with keys of the plans' 2D configuration for all trainers, such as batch_size and "
                             "sam; the iterations in it hold for nnU-Net's trainers too")
    parser.add_argument("--labels", nargs="+", default=[], metavar="NAME=VALUE",
                        help="classes (default: the values in the references, if all sites have the same)")
    parser.add_argument("--channels", nargs="+", default=[], metavar="NAME",
                        help="as in nnU-Net's dataset.json; CT is normalised as CT (default: image)")
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="MM", help="of the surface Dice (default: 2)")
    add_device(parser)
    parser.add_argument("--cores", type=int, metavar="N", help="to use at once (default: all that there are)")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and do nothing")
    parser.add_argument("--executor", metavar="NAME", help="Snakemake's, such as slurm (default: this machine)")
    parser.add_argument("--profile", metavar="NAME", help="Snakemake's, a name or a folder")
    parser.add_argument("--snakemake", nargs=argparse.REMAINDER, default=[], metavar="...",
                        help="all that follows is for Snakemake, such as --jobs 20")


def _run(options: argparse.Namespace) -> None:
    from desam_nnunet.cross_site.executor import is_local

    given = {"--executor": options.executor, "--profile": options.profile}
    more = [word for flag, value in given.items() if value for word in (flag, value)] + options.snakemake
    if options.device != "cpu" and is_local(more):  # others may send jobs to where the device is
        device_named(options.device)
    if options.cores is not None and options.cores < 1:
        raise ValueError(f"--cores is {options.cores}, but must be at least 1.")
    if missing := [name for name, least in EXTRA.items() if not _is_installed(name, least)]:
        raise ValueError(f"desam cross-site needs {' and '.join(missing)}, perhaps newer than installed: pip install "
                         "'desam-nnunet[cross-site]'.")
    from desam_nnunet.cross_site.engine import describe_study, run_study
    from desam_nnunet.cross_site.opening import open_study

    study = open_study(
        options.data, options.d, options.o, trainers=options.tr, sources=options.sources, targets=options.targets,
        folds=options.f, plans=options.p, settings=options.settings, labels=options.labels,
        channels=options.channels, tolerance=options.tolerance)
    if options.dry_run:
        print("\n".join(describe_study(study, options.device, options.cores, more)))
    else:
        print(f"The report: {run_study(study, options.device, options.cores, more)}")


def _is_installed(name: str, least: tuple[int, ...]) -> bool:
    try:
        return tuple(map(int, version(name).split(".")[:len(least)])) >= least
    except PackageNotFoundError:
        return False
