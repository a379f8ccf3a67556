"""The commands of README and pages as they are printed, on the phantom, without a GPU and without a network."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FOLDERS, environment
from test_importing import publish

import phantom
from desam_nnunet.commands.__main__ import parser
from desam_nnunet.encoders.registry import ENCODERS
from desam_nnunet.encoders.sam_vit import SamViT

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
OURS = ("desam ", "nnUNetv2_", "torchrun ", "for fold in ", "python ", "make ", "CUDA_VISIBLE_DEVICES=")
NOT_HERE = {  # a command's beginning, and why none of the tests below runs it as it is printed
    "desam weights get ": "downloads; test_download.py has a server of its own",
    "desam cross-site ": "test_cross_site.py and test_data_sets.py run it",
    "desam doctor --self-test": "test_selftest.py runs it",
    "desam pretrain run/": "hours; test_pretraining.py runs it in small",
    "desam plan -d 501 --encoder run/weights.safetensors": "needs those hours",
    "python examples/compare_models.py": "test_compare_models.py runs it",
    "make fuzz": "hours; the same tests run in small",
    "nnUNetv2_predict -i unseen_site/": "with images/ in own_data.md",
    "nnUNetv2_train 501 2d 0 -tr nnUNetTrainer ": "a thousand epochs",
    "nnUNetv2_predict -i images/ -o out_nnunet/": "needs these thousand epochs",
    "nnUNetv2_train 501 2d 0 -tr DeSAMTrainer -p DeSAMPlans -num_gpus": "test_distributed.py has two processes",
    "CUDA_VISIBLE_DEVICES=": "two GPUs; test_cache_build.py has two processes that build one store",
    "desam weights import desam_vit_b.pth -d 501 -p MyPlans": "another file in published_checkpoints.md",
}
SHORT = {"encoder": "vit_tiny", "image_size": 64, "views": 2, "epochs": 1, "iterations_per_epoch": 2,
         "val_iterations_per_epoch": 1}


WITHOUT_GPU = "Without a GPU and without another"
RUN = [("README.md", WITHOUT_GPU), *((f"docs/{page}.md", "") for page in (
    "cache", "extend", "howto/own_data", "howto/published_checkpoints", "howto/several_gpus", "howto/share", "methods",
    "slabs", "vit_tiny"))]


def commands(page: str, section: str = "") -> list[str]:
    """The lines of a page's blocks of code that begin with a command, without comments and those of `NOT_HERE`."""
    text = (ROOT / page).read_text().partition(section)[2] if section else (ROOT / page).read_text()
    lines = [re.split(r"\s{2,}#", line.strip())[0] for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(OURS) and not line.startswith(tuple(NOT_HERE))]


def test_every_command_on_a_page_is_run_or_it_is_said_why_not() -> None:
    run = {command for page, section in RUN for command in commands(page, section)}
    assert [command for page in PAGES for command in commands(page) if command not in run] == []
    texts = [(ROOT / page).read_text() for page in PAGES]
    assert [start for start in NOT_HERE if not any(f"    {start}" in text for text in texts)] == []


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_types_is_understood(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every ``desam …`` in blocks and in sentences, also where only a part of it is printed."""
    text = (ROOT / page).read_text()
    printed = re.findall(r"`(desam\s[^`]+)`", text) + [
        re.split(r"\s{2,}#", line)[0] for line in re.findall(r"^ {4,}(desam .*)", text, re.MULTILINE)]
    for command in printed:
        words = shlex.split(re.sub(r"[\[\]…\\]|\.\.\.", " ", command))
        with contextlib.suppress(SystemExit):
            parser().parse_args(words[1:])
        said = capsys.readouterr().err
        assert "error" not in said or "arguments are required" in said, command


class Shell:
    """Someone's terminal, in a folder with images of an unseen site and their labels."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (*FOLDERS, "weights"):
            (root / name).mkdir()
        phantom.write_dataset(root / "nnUNet_raw", cases=5)
        phantom.write_unseen(root, sites=("SiteB",), cases=2)
        for name in ("images", "labels"):
            (root / "SiteB" / name).rename(root / name)

    def run(self, command: str) -> str:
        """What it prints; with the words that the pages say to add where there is no GPU."""
        words = on_a_cpu(command)
        result = subprocess.run(["bash", "-c", words], cwd=self.root, capture_output=True, text=True,
                                env=self.environment())
        assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
        return result.stdout

    def environment(self) -> dict[str, str]:
        programs = Path(sys.executable).parent
        nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # whoever asks the network fails
        return environment(self.root) | nowhere | {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(self.root)}

    def shorten(self, plans: str, **sam: object) -> None:
        """A few seconds of training, where it would be hours: what the user types stays the same."""
        (path,) = (self.root / "nnUNet_preprocessed").glob(f"*/{plans}.json")
        content = json.loads(path.read_text())
        content["configurations"]["2d"]["sam"] |= SHORT | sam
        path.write_text(json.dumps(content))


def on_a_cpu(command: str) -> str:
    """The command with ``-device cpu``, where it computes and says nothing of a device."""
    if "-device" in command or not re.search(r"nnUNetv2_(train|predict)|desam\)? (cache .*-(p|tr)|boxes) ", command):
        return command
    return re.sub(r"$|(?=; done)", " -device cpu", command, count=1)


@pytest.mark.slow
def test_a_first_run_without_a_gpu(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.run("nnUNetv2_plan_and_preprocess -d 501 -c 2d -np 1 -npfp 1")
    plan, train, predict, score = commands("README.md", WITHOUT_GPU)
    said = shell.run(plan)
    assert train in said
    assert predict in said
    assert "lite_medsam" in said
    for command in (train, predict, score):
        shell.run(command)
    scores = json.loads((shell.root / "out" / "summary.json").read_text())
    assert scores["foreground_mean"]["Dice"] > 0.5


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Who has done what docs/howto/own_data.md says."""
    shell = Shell(tmp_path_factory.mktemp("shell"))
    for command in commands("docs/howto/own_data.md"):
        shell.run(command)
        if command.startswith("desam plan"):
            shell.shorten("PDMMPlans" if "PDMMTrainer" in command else "DeSAMPlans")
    return shell


@pytest.mark.slow
def test_a_data_set_of_ones_own(shell: Shell) -> None:
    assert len(list((shell.root / "out").glob("*.nii.gz"))) == 2
    assert (shell.root / "out" / "summary.json").is_file()


@pytest.mark.slow
def test_a_model_is_shared(shell: Shell) -> None:
    export, install, predict = commands("docs/howto/share.md")
    shell.run(export)
    shutil.rmtree(shell.root / "nnUNet_results")
    (shell.root / "nnUNet_results").mkdir()
    shell.run(install)
    shutil.rmtree(shell.root / "out")
    shell.run(predict)
    assert len(list((shell.root / "out").glob("*.nii.gz"))) == 2


@pytest.mark.slow
def test_several_machines_share_a_cache_and_it_is_looked_after(shell: Shell) -> None:
    whole, part, torchrun = commands("docs/howto/several_gpus.md")
    shell.shorten("DeSAMPlans", views=1, augmentation="nnunet")
    for number in range(4):
        shell.run(part.replace("-part_id 0", f"-part_id {number}"))
    assert "to encode" not in shell.run(torchrun) + shell.run(whole)
    build, what, verify, delete = commands("docs/cache.md")
    shell.run(build.replace("MyPlans", "DeSAMPlans"))
    heads, *rows = shell.run(what).splitlines()
    assert heads.split()[-1] == "views"
    assert "1" in [row.split()[-1] for row in rows]
    assert "as they were written" in shell.run(verify)
    assert "Removed" in shell.run(delete.partition(" [")[0])


@pytest.mark.slow
def test_slices_see_their_neighbours(shell: Shell) -> None:
    plan, train, predict, go_on, expand = commands("docs/slabs.md")
    shell.run(plan)
    shell.shorten("PDMMPlans", view_geometry="case")
    shell.run("nnUNetv2_train 501 2d 0 -tr PDMMTrainer -p PDMMPlans")
    shell.run(go_on.replace("...", "$nnUNet_results/Dataset501_Phantom"))
    shell.run(f"{train} --c")
    shell.run(predict)
    model = shell.root / "nnUNet_results" / "Dataset501_Phantom" / "PDMMTrainer__PDMMPlans__2d_slab"
    shutil.rmtree(model)  # the other way to one
    shell.run(expand.replace("501_X", "501_Phantom"))
    assert model.is_dir()


@pytest.mark.slow
def test_a_model_is_scored_with_boxes_from_the_reference(shell: Shell) -> None:
    train, score = commands("docs/methods.md")
    shell.run("desam plan -d 501 -tr DBSAMTrainer")
    shell.shorten("DBSAMPlans")
    shell.run(train)
    shutil.rmtree(shell.root / "out", ignore_errors=True)
    shell.run(score.replace("nnUNet_results/DatasetXXX", "$nnUNet_results/Dataset501_Phantom"))
    assert (shell.root / "out" / "summary.json").is_file()


@pytest.mark.slow
def test_the_encoder_in_the_box_is_planned_with(shell: Shell) -> None:
    (plan,) = commands("docs/vit_tiny.md")
    assert "vit_tiny" in shell.run(plan)


@pytest.mark.slow
def test_an_encoder_and_a_method_of_ones_own(shell: Shell) -> None:
    lines = [line.strip() for line in (ROOT / "docs/extend.md").read_text().splitlines()
             if line.startswith("    ")]
    exports = [line.replace("/path/to", str(ROOT)) for line in lines if line.startswith("export ")]
    assert len(exports) == 2
    for command in commands("docs/extend.md"):
        shell.run("; ".join((*exports, command)))
        if named := re.search(r"desam plan .*-overwrite_plans_name (\w+)", command):
            shell.shorten(named[1], encoder="resnet_encoder:RESNET")
        elif command.startswith("desam plan"):
            shell.shorten("LinearProbePlans")
    results = shell.root / "nnUNet_results" / "Dataset501_Phantom"
    assert (results / "DeSAMTrainer__ResNetPlans__2d" / "fold_0" / "checkpoint_final.pth").is_file()
    assert (results / "LinearProbeTrainer__LinearProbePlans__2d" / "fold_0" / "checkpoint_final.pth").is_file()


@pytest.mark.slow
def test_checkpoints_come_in_and_go_out(shell: Shell) -> None:
    """A published DeSAM and a SAMed, in small and of random numbers: the encoder is a file's, not ViT-H."""
    tiny = ENCODERS["vit_tiny"].architecture
    assert isinstance(tiny, SamViT)
    made = publish(tiny, shell.root / "weights")
    made.checkpoint.rename(shell.root / "desam_vit_h.pth")
    small = {"encoder": str(made.sam_file), "features": "online"}
    plan, bring, predict, train, plan_samed, bring_samed, give = commands("docs/howto/published_checkpoints.md")
    results = shell.root / "nnUNet_results" / "Dataset501_Phantom"  # of the pages before, as are the plans
    shutil.rmtree(results / "DeSAMTrainer__DeSAMPlans__2d")
    (shell.root / "nnUNet_preprocessed" / "Dataset501_Phantom" / "DeSAMPlans.json").unlink()
    shell.run(plan)
    shell.shorten("DeSAMPlans", **small)
    said = shell.run(bring)
    shutil.rmtree(shell.root / "out", ignore_errors=True)
    shell.run(predict)
    assert len(list((shell.root / "out").glob("*.nii.gz"))) == 2
    (weights,) = re.findall(r"\S+/pretrained_weights\.pth", said)
    shell.run(train.replace("…/pretrained_weights.pth", weights))
    shell.run(plan_samed)
    shell.shorten("SAMedPlans", **small)
    shell.run("nnUNetv2_train 501 2d 0 -tr SAMedTrainer -p SAMedPlans")
    shell.run(give.replace("nnUNet_results/DatasetXXX", "$nnUNet_results/Dataset501_Phantom"))
    (shell.root / "samed.pth").rename(shell.root / "epoch_159.pth")
    shutil.rmtree(results / "SAMedTrainer__SAMedPlans__2d")
    assert "pretrained_weights.pth" in shell.run(bring_samed)
