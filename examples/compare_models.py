"""Which encoder, decoder and recipe? Models of your choice, compared at the source alone and on unseen hospitals.

    python examples/compare_models.py DATA WORK MODELS.json --source RUNMC -f 0 1 2 3 4

DATA holds one folder per site, as ``desam cross-site`` reads them. MODELS.json names the models: each has a trainer and
whatever its plans say otherwise than nnU-Net's, as in

    {"strong": {"trainer": "PDMMTrainer", "sam": {"encoder": "lite_medsam", "views": 2, "augmentation": "strong"}},
     "nnU-Net": {"trainer": "nnUNetTrainer", "sam": {"epochs": 10, "iterations_per_epoch": 50}},
     "slabs": {"trainer": "PDMMTrainer", "slices": 5, "batch_size": 2, "sam": {"encoder": "lite_medsam"}},
     "both": {"ensemble": ["strong", "nnU-Net"]}}

(nnU-Net's own trainers take their number of iterations from ``sam`` as well; ``slices`` makes it the configuration
``2d_slab``, whose batches count slabs.) Everything runs by nnU-Net's commands.
Each case of the source is segmented by the fold that has not seen it, as it is and through
``desam_nnunet.evaluation.shift``, an intensity recipe that no training uses: **choose by these two**. The folds
together segment the other sites, which are there to be reported. Whole volumes, all slices. What is done already is not
done again, so a comparison that was stopped goes on, and models can be added; cached features are shared by all models
that read the same ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from desam_nnunet.evaluation.scores import read_rows, score_cases, write_rows
from desam_nnunet.evaluation.statistics import Summary, summarise
from desam_nnunet.nnunet.leftovers import (
    clear_preprocessed,
    is_preprocessed,
    is_trained,
    put_damaged_aside,
    remove_stale_predictions,
)
from desam_nnunet.nnunet.model_folder import epoch_seconds, read_checkpoint
from desam_nnunet.nnunet.names import CHECKPOINT, CONFIGURATION, FOLDERS, ITERATIONS, SPLITS, STOCK_PLANS
from desam_nnunet.nnunet.sites import Case, check_sites, ending_of, read_sites
from desam_nnunet.sam.slabs import SLABS
from desam_nnunet.system.files import replace_file
from desam_nnunet.training.methods import method_of

HELD_OUT, SIMULATED = "held out", "simulated shift"
TOLERANCE = 2.0  # of the surface Dice, in mm


class Comparison(NamedTuple):
    """What is compared, and where it lies."""

    work: Path
    sites: dict[str, list[Case]]
    source: str
    folds: list[str]
    models: dict[str, dict[str, Any]]
    label: str
    device: str
    targets: list[str]
    shifts: int
    mirrored: bool

    @property
    def dataset(self) -> str:
        return f"Dataset{700 + sorted(self.sites).index(self.source)}_{self.source}"

    @property
    def number(self) -> str:
        return self.dataset[7:10]

    @property
    def preprocessed(self) -> Path:
        return self.work / "nnUNet_preprocessed" / self.dataset

    @property
    def ending(self) -> str:
        return ending_of(self.sites[self.source][0].label)

    @property
    def ensembles(self) -> dict[str, list[str]]:
        """Names of models by the name of what averages their probabilities."""
        return {name: model["ensemble"] for name, model in self.models.items() if "ensemble" in model}

    @property
    def trained(self) -> list[str]:
        return [name for name in self.models if name not in self.ensembles]

    def model(self, name: str) -> Path:
        return self.work / "nnUNet_results" / self.dataset / self._folder(name)

    def predicted(self, name: str, tested: str, folds: list[str]) -> Path:
        """A folder of segmentations, of the images that are called `tested`."""
        return self.work / "predictions" / self.source / self._folder(name) / self._made_by(tested, folds)

    def scores(self, name: str, tested: str) -> Path:
        return self.work / "scores" / self.source / self._folder(name) / f"{self._made_by(tested, self.folds)}.json"

    def _folder(self, name: str) -> str:
        trainer = self.models[name].get("trainer", "ensemble")
        return f"{trainer}__{plans_of(name)}__{self.configuration(name)}"

    def configuration(self, name: str) -> str:
        return SLABS if "slices" in self.models[name] else CONFIGURATION

    def _made_by(self, tested: str, folds: list[str]) -> str:
        return f"{tested}__{'_'.join(folds)}{'' if self.mirrored else '__not_mirrored'}"


def plans_of(name: str) -> str:
    """The name of a model's plans."""
    return "Compared_" + re.sub(r"\W+", "_", name)


def main() -> None:
    comparison = parse()
    os.environ |= {name: str(comparison.work / name) for name in FOLDERS}
    prepare(comparison)
    for name in comparison.models:
        if name in comparison.ensembles:
            write_members(comparison, name)
        else:
            write_plans(comparison, name)
            for fold in comparison.folds:
                train(comparison, name, fold)
        score_all(comparison, name)
    text = report(comparison)
    replace_file(comparison.work / f"{comparison.source}__{'_'.join(comparison.folds)}.md", [text.encode()])
    print(text)


def parse() -> Comparison:
    """What was asked for, checked before hours are spent on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with a folder per site")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder to work in")
    parser.add_argument("models", type=Path, metavar="MODELS.json", help="models by name")
    parser.add_argument("--source", required=True, help="site to train at")
    parser.add_argument("-f", nargs="+", default=["0"], choices=list("01234"), metavar="FOLD",
                        help="folds, 0 to 4 (default: 0)")
    parser.add_argument("--targets", nargs="*", metavar="SITE", help="to report on (default: all other sites)")
    parser.add_argument("--shifts", type=int, default=1, help="simulated shifts of each held-out case (default: 1)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring, but in nnU-Net's own validation")
    parser.add_argument("--label", default="prostate", help="of value 1 (default: prostate)")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    options = parser.parse_args()
    try:
        sites = read_sites(options.data.resolve())
        check_sites(sites)
        if options.source not in sites:
            raise ValueError(f"--source {options.source}: {options.data} has {', '.join(sites)}.")
        models = json.loads(options.models.read_text())
        if lacking := [name for name, model in models.items() if not model.keys() & {"trainer", "ensemble"}]:
            raise ValueError(f"{options.models}: {lacking[0]} has no trainer.")
        trained = [name for name, model in models.items() if "ensemble" not in model]
        if unknown := [name for model in models.values() for name in model.get("ensemble", []) if name not in trained]:
            raise ValueError(f"{options.models}: {unknown[0]} is in an ensemble, but no model of that name is trained.")
        if len({plans_of(name) for name in models}) < len(models):
            raise ValueError(f"{options.models}: names must differ in more than signs: {', '.join(models)}.")
        for name, model in models.items():
            method = method_of(model["trainer"]) if "slices" in model else None
            if "slices" in model and (method is None or not method.slabs):
                raise ValueError(f"{options.models}: {model['trainer']} of {name} sees one slice at a time: take out "
                                 "'slices'.")
        if several := [case.name for rows in sites.values() for case in rows if len(case.images) > 1]:
            raise ValueError(f"{several[0]} has several channels, but only one is compared here.")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.shifts < 1:
        parser.error(f"--shifts {options.shifts}: at least one draw, because choices are made by it.")
    others = [site for site in sites if site != options.source]
    targets = others if options.targets is None else options.targets
    if unknown := [site for site in targets if site not in others]:
        parser.error(f"--targets {unknown[0]}: choose from {', '.join(others)}")
    return Comparison(options.work.resolve(), sites, options.source, options.f, models, options.label, options.device,
                      targets, options.shifts, not options.disable_tta)


def prepare(comparison: Comparison) -> None:
    """The data set of the source, planned and preprocessed by nnU-Net, and images to predict."""
    cases = comparison.sites[comparison.source]
    raw = comparison.work / "nnUNet_raw" / comparison.dataset
    raw.mkdir(parents=True, exist_ok=True)
    description = {
        "channel_names": {"0": "T2"}, "labels": {"background": 0, comparison.label: 1}, "numTraining": len(cases),
        "file_ending": comparison.ending,
        "dataset": {case.name: {"images": list(map(str, case.images)), "label": str(case.label)} for case in cases}}
    replace_file(raw / "dataset.json", [json.dumps(description, indent=1).encode()])
    for site, rows in comparison.sites.items():
        for case in rows:
            link(images(comparison, site) / f"{case.name}_0000{comparison.ending}", case.images[0])
    if not is_preprocessed(comparison.preprocessed, STOCK_PLANS, comparison.ending, [case.name for case in cases]):
        clear_preprocessed(comparison.preprocessed)
        (comparison.preprocessed / SPLITS).unlink(missing_ok=True)  # perhaps of some cases: nothing is trained yet
        call("nnUNetv2_plan_and_preprocess", "-d", comparison.number, "-c", CONFIGURATION, "-np", 2, "-npfp", 2)
    shifted = images(comparison, f"{comparison.source}_shifted")
    wanted = [shifted / f"{case.name}_draw{draw}_0000{comparison.ending}"
              for case in cases for draw in range(comparison.shifts)]
    if not all(path.is_file() for path in wanted):
        call(sys.executable, "-m", "desam_nnunet.evaluation.shift", images(comparison, comparison.source), shifted,
             "--draws", comparison.shifts)


def images(comparison: Comparison, site: str) -> Path:
    return comparison.work / "images" / site


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(to)


def write_plans(comparison: Comparison, name: str) -> None:
    """nnU-Net's plans with what the model says; refused where it was trained with something else."""
    plans = json.loads((comparison.preprocessed / f"{STOCK_PLANS}.json").read_text())
    given = {key: value for key, value in comparison.models[name].items() if key not in ("trainer", "slices")}
    plans["configurations"][CONFIGURATION] |= given
    if slices := comparison.models[name].get("slices"):
        patch = [slices, *plans["configurations"][CONFIGURATION]["patch_size"]]
        plans["configurations"][SLABS] = {"inherits_from": CONFIGURATION, "patch_size": patch}
    plans["plans_name"] = plans_of(name)
    path = comparison.preprocessed / f"{plans_of(name)}.json"
    if path.is_file() and json.loads(path.read_text()) != plans and comparison.model(name).is_dir():
        sys.exit(f"'{name}' was trained with other settings in {comparison.work}: give it another name.")
    replace_file(path, [json.dumps(plans, indent=1).encode()])


def write_members(comparison: Comparison, name: str) -> None:
    """Whom an ensemble averages; refused where it was made of others."""
    path = comparison.predicted(name, "", []).with_name("members.json")
    members = comparison.ensembles[name]
    if path.is_file() and json.loads(path.read_text()) != members:
        sys.exit(f"'{name}' was made of other models in {comparison.work}: give it another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [json.dumps(members).encode()])


def train(comparison: Comparison, name: str, fold: str) -> None:
    """One fold, with its validation; nnU-Net's own trainers for as many iterations as ``sam`` says."""
    folder = comparison.model(name) / f"fold_{fold}"
    if is_trained(folder):
        return
    put_damaged_aside(folder)
    model = comparison.models[name]
    common = ("-tr", model["trainer"], "-p", plans_of(name), "-device", comparison.device)
    if method_of(model["trainer"]) is None:
        call(sys.executable, "-m", "desam_nnunet.training.budget", comparison.number, fold, *common,
             *(f"--{key}={value}" for key, value in model.get("sam", {}).items() if key in ITERATIONS))
    else:
        call("nnUNetv2_train", comparison.number, comparison.configuration(name), fold, *common, "--c")


def score_all(comparison: Comparison, name: str) -> None:
    source = comparison.source
    splits = json.loads((comparison.preprocessed / SPLITS).read_text())
    held_out = {fold: splits[int(fold)]["val"] for fold in comparison.folds}
    files = {HELD_OUT: {}, SIMULATED: {}}
    for fold, cases in held_out.items():
        draws = [f"{case}_draw{draw}" for case in cases for draw in range(comparison.shifts)]
        files[SIMULATED] |= predict_chosen(comparison, name, f"{source}_shifted", draws, fold)
        if name in comparison.ensembles:
            files[HELD_OUT] |= predict_chosen(comparison, name, source, cases, fold)
        else:
            validated = comparison.model(name) / f"fold_{fold}" / "validation"
            files[HELD_OUT] |= {case: validated / f"{case}{comparison.ending}" for case in cases}
    for site in comparison.targets:
        cases = [case.name for case in comparison.sites[site]]
        files[site] = predict(comparison, name, images(comparison, site), cases, comparison.folds)
    for tested, predictions in files.items():
        path = comparison.scores(name, tested)
        site = tested if tested in comparison.targets else source
        labels = {case.name: case.label for case in comparison.sites[site]}
        references = {case: labels[case.partition("_draw")[0]] for case in predictions}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, score_cases(predictions, references, {comparison.label: (1,)}, None, TOLERANCE))


def predict_chosen(comparison: Comparison, name: str, folder: str, cases: list[str], fold: str) -> dict[str, Path]:
    """As :func:`predict`, of some of a folder's images, by one fold."""
    chosen = images(comparison, f"{folder}_{fold}")
    for case in cases:
        file = f"{case}_0000{comparison.ending}"
        link(chosen / file, images(comparison, folder) / file)
    return predict(comparison, name, chosen, cases, [fold])


def predict(comparison: Comparison, name: str, folder: Path, cases: list[str], folds: list[str]) -> dict[str, Path]:
    """Segmentations of a folder's images by these folds together, made where they are not there."""
    out = comparison.predicted(name, folder.name, folds)
    files = {case: out / f"{case}{comparison.ending}" for case in cases}
    if name in comparison.ensembles:
        members = comparison.ensembles[name]
        for member in members:
            predict(comparison, member, folder, cases, folds)
        if not all(file.is_file() for file in files.values()):
            call("nnUNetv2_ensemble", "-i", *(comparison.predicted(member, folder.name, folds) for member in members),
                 "-o", out, "-np", 1)
        return files
    remove_stale_predictions(out, [comparison.model(name) / f"fold_{fold}" / CHECKPOINT for fold in folds])
    averaged = any(name in members for members in comparison.ensembles.values())
    wanted = [out / f"{case}{end}" for case in cases for end in (comparison.ending, *([".npz"] if averaged else []))]
    if not all(file.is_file() for file in wanted):
        begin, missing = time.monotonic(), sum(not file.is_file() for file in files.values())
        call("nnUNetv2_predict", "-i", folder, "-o", out, "-d", comparison.number, "-c",
             comparison.configuration(name), "-f", *folds,
             "-tr", comparison.models[name]["trainer"], "-p", plans_of(name), "-device", comparison.device,
             "-npp", 1, "-nps", 1, "--continue_prediction", *(["--save_probabilities"] if averaged else []),
             *([] if comparison.mirrored else ["--disable_tta"]))
        if missing:
            seconds = (time.monotonic() - begin) / missing
            replace_file(out / "seconds.json", [json.dumps(seconds).encode()])
    return files


def call(*command: object) -> None:
    words = [str(word) for word in command]
    if not words[0].startswith("/"):
        words[0] = str(Path(sys.executable).with_name(words[0]))
    print("+", *(Path(word).name if number == 0 else word for number, word in enumerate(words)), flush=True)
    if code := subprocess.run(words).returncode:
        sys.exit(code)  # it said why


def report(comparison: Comparison) -> str:
    """Markdown: a row per model, then every case."""
    tested = [HELD_OUT, SIMULATED, *comparison.targets]
    scores = {(name, where): pd.DataFrame(read_rows(comparison.scores(name, where)))
              for name in comparison.models for where in tested}
    volume = {key: of_cases(rows[rows.protocol == "volume"]) for key, rows in scores.items()}
    lines = [f"Trained at {comparison.source}, folds {', '.join(comparison.folds)}. Dice of whole volumes with its 95 "
             "% bootstrap interval over cases, surface Dice at 2 mm, HD95 in mm; minutes without encoding.", "",
             *table(["model", "min a fold", "s a volume",
                     *(f"{where}: {what}" for where in tested for what in ("Dice", "surface", "HD95"))],
                    [[name, *(f"{value:.1f}" for value in costs(comparison, name)),
                      *(cell for where in tested for cell in cells(volume[name, where]))]
                     for name in comparison.models])]
    for where in tested:
        cases = pd.DataFrame({name: volume[name, where].dice for name in comparison.models})
        lines += ["", f"Dice of every case, {where}:", "", *table(
            ["case", *cases.columns],
            [[case, *(f"{value:.3f}" for value in values)] for case, *values in cases.itertuples()])]
    return "\n".join(lines) + "\n"


def of_cases(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per case: the mean over the draws of a simulated shift."""
    return rows.groupby(rows.case.str.partition("_draw")[0])[["dice", "nsd", "hd95"]].mean()


def costs(comparison: Comparison, name: str) -> tuple[float, float]:
    """Minutes of a fold from its checkpoint's log, and seconds of a held-out volume by one fold, start to file.

    An ensemble costs what its models do.
    """
    if name in comparison.ensembles:
        every = [costs(comparison, member) for member in comparison.ensembles[name]]
        return sum(minutes for minutes, _ in every), sum(seconds for _, seconds in every)
    minutes = [epoch_seconds(read_checkpoint(comparison.model(name), fold, CHECKPOINT)) / 60
               for fold in comparison.folds]
    parts = [comparison.predicted(name, f"{comparison.source}_shifted_{fold}", [fold]) for fold in comparison.folds]
    seconds = [json.loads(file.read_text()) if (file := part / "seconds.json").is_file() else math.nan  # it was stopped
               for part in parts]
    return sum(minutes) / len(minutes), sum(seconds) / len(seconds)


def cells(rows: pd.DataFrame) -> list[str]:
    return [said(summarise(rows.dice)), f"{rows.nsd.mean():.3f}", f"{rows.hd95.mean():.1f}"]


def said(summary: Summary) -> str:
    return f"{summary.mean:.3f} ({summary.low:.3f} to {summary.high:.3f})"


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
