"""The commands of README and how-tos as they are printed, on the phantom, without a GPU and without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FOLDERS, environment

import phantom

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
OURS = ("desam ", "nnUNetv2_", "torchrun ")
DOWNLOADS = "desam weights get"
SHORT = {"encoder": "vit_tiny", "image_size": 64, "views": 2, "epochs": 1, "iterations_per_epoch": 2,
         "val_iterations_per_epoch": 1}


def commands(page: str, *, section: str = "") -> list[str]:
    """The lines of a page's blocks of code that begin with a command of ours or nnU-Net's, without comments."""
    text = (ROOT / page).read_text().partition(section)[2] if section else (ROOT / page).read_text()
    lines = [re.split(r"\s{2,}#", line.strip())[0] for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(OURS) and not line.startswith(DOWNLOADS)]


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

    def run(self, command: str, *options: str) -> str:
        """What it prints. `options` are the words that the page says to add where there is no GPU."""
        words = " ".join((command, *options))
        result = subprocess.run(["bash", "-c", words], cwd=self.root, capture_output=True, text=True,
                                env=self.environment())
        assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
        return result.stdout

    def environment(self) -> dict[str, str]:
        programs = Path(sys.executable).parent
        return environment(self.root) | {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(self.root)}

    def shorten(self, plans: str, **sam: object) -> None:
        """A few seconds of training, where it would be hours: what the user types stays the same."""
        (path,) = (self.root / "nnUNet_preprocessed").glob(f"*/{plans}.json")
        content = json.loads(path.read_text())
        content["configurations"]["2d"]["sam"] |= SHORT | sam
        path.write_text(json.dumps(content))


def on_a_cpu(command: str) -> tuple[str, ...]:
    """What to add, as the pages say."""
    needs = command.startswith(("nnUNetv2_train", "nnUNetv2_predict")) and "-device" not in command
    return ("-device cpu",) if needs else ()


def test_a_first_run_without_a_gpu(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.run("nnUNetv2_plan_and_preprocess -d 501 -c 2d -np 1 -npfp 1")
    plan, train, predict, score = commands("README.md", section="Without a GPU and without another")[:4]
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
    """Who has read docs/howto/own_data.md; but for nnU-Net's own training, which takes a thousand epochs."""
    shell = Shell(tmp_path_factory.mktemp("shell"))
    for command in commands("docs/howto/own_data.md"):
        if "nnUNetTrainer" not in command:
            shell.run(command, *on_a_cpu(command))
        if command.startswith("desam plan"):
            shell.shorten("PDMMPlans" if "PDMMTrainer" in command else "DeSAMPlans")
    return shell


def test_a_data_set_of_ones_own(shell: Shell) -> None:
    assert len(list((shell.root / "out").glob("*.nii.gz"))) == 2
    assert (shell.root / "out" / "summary.json").is_file()


def test_a_model_is_shared(shell: Shell) -> None:
    export, install, predict = commands("docs/howto/share.md")
    for fold in range(1, 5):
        shell.run(f"nnUNetv2_train 501 2d {fold} -tr DeSAMTrainer -p DeSAMPlans -device cpu")
    shell.run(export)
    shutil.rmtree(shell.root / "nnUNet_results")
    (shell.root / "nnUNet_results").mkdir()
    shell.run(install)
    shutil.rmtree(shell.root / "out")
    shell.run(predict, *on_a_cpu(predict))
    assert len(list((shell.root / "out").glob("*.nii.gz"))) == 2


def test_several_machines_share_a_cache_and_it_is_looked_after(shell: Shell) -> None:
    _, whole, part, torchrun = commands("docs/howto/several_gpus.md")
    shell.shorten("DeSAMPlans", views=1)
    for number in range(4):
        shell.run(part.replace("-part_id 0", f"-part_id {number}"), "-device cpu")
    assert "to encode" not in shell.run(torchrun, "-device cpu") + shell.run(whole, "-device cpu")
    build, what, verify, delete = commands("docs/cache.md")
    shell.run(build.replace("MyPlans", "DeSAMPlans"), "-device cpu")
    assert "1 view(s)" in shell.run(what)
    assert "as they were written" in shell.run(verify)
    assert "Removed" in shell.run(delete.partition(" [")[0])


def test_slices_see_their_neighbours(shell: Shell) -> None:
    plan, train, predict, go_on, expand = commands("docs/slabs.md")
    shell.run(plan)
    shell.shorten("PDMMPlans", view_geometry="case")
    shell.run("nnUNetv2_train 501 2d 0 -tr PDMMTrainer -p PDMMPlans -device cpu")
    shell.run(go_on.replace("...", "$nnUNet_results/Dataset501_Phantom"), "-device cpu")
    shell.run(train, "-device cpu", "--c")
    shell.run(predict, "-device cpu")
    shell.run(expand.replace("501_X", "501_Phantom"))
    assert (shell.root / "nnUNet_results" / "Dataset501_Phantom" / "PDMMTrainer__PDMMPlans__2d_slab").is_dir()
