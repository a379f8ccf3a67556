"""Builds of a store that are killed at every point at which they change a file, and resumed."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DATASET, Workspace, tiny_sections
from killing import FIRST_BYTES
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from desam_nnunet.cache.store import FOLDER

PLANS = "KilledPlans"
DATA = "nnUNetPlans_2d"
CUT = {-signal.SIGKILL, -signal.SIGXFSZ}  # how a process ends that is killed, or whose writing is cut
NOTHING, OLDER = "nothing", "a store of other data"


class Builds:
    """Builds of one small store, one after the other, each in a process of its own.

    Attributes:
        folder: Holds the store.
        starts: What builds begin with, by name.
        whole: What a build without a kill makes.
    """

    def __init__(self, root: Path, workspace: Workspace) -> None:
        self.folder = root / "preprocessed" / DATASET / FOLDER
        write_data(workspace.preprocessed, self.folder.parent, [2, 1])
        command = [sys.executable, Path(__file__).with_name("killed_builds.py"), DATASET, PLANS, self.folder]
        environment = os.environ | {"nnUNet_preprocessed": str(root / "preprocessed"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment)
        self.starts = {NOTHING: root / "nothing", OLDER: root / "older"}
        self.starts[NOTHING].mkdir()
        assert self.build() == 0
        make_older(self.folder, self.starts[OLDER])
        write_data(workspace.preprocessed, self.folder.parent, [1, 1])
        self.begin(NOTHING)
        assert self.build() == 0
        self.whole = contents(self.folder)

    def begin(self, start: str) -> None:
        shutil.rmtree(self.folder)
        if start != NOTHING:
            shutil.copytree(self.starts[start], self.folder)

    def build(self, point: int = 0) -> int:
        """How a process ended that was to die at `point`; at 0 it is not to die."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{point}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0


def write_data(source: Path, folder: Path, slices: list[int]) -> None:
    """A data set with the first slices of so many cases; each slice is one tile."""
    shutil.rmtree(folder / DATA, ignore_errors=True)
    (folder / DATA).mkdir(parents=True)
    for path in source.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    cases = nnUNetDatasetBlosc2(str(source / DATA))
    for case, number in zip(cases.identifiers, slices, strict=False):
        data, seg, _, properties = cases.load_case(case)
        data, seg = data[:, :number], seg[:, :number]
        cases.save_case(data, seg, properties, str(folder / DATA / case), *4 * [data.shape])


def make_older(folder: Path, older: Path) -> None:
    """A store that lacks a case, and holds what another build left behind long ago."""
    shutil.copytree(folder, older)
    (store,) = older.iterdir()
    first, second = sorted(path for path in store.iterdir() if path.is_dir())
    shutil.rmtree(second)
    left = first / ".00000_0.tile.0123456789ab.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those under temporary names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")}


def sizes_of_temporary(folder: Path) -> set[int]:
    return {path.stat().st_size for path in folder.rglob(".*.tmp")}


@pytest.fixture(scope="module")
def builds(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    workspace.write_plans(PLANS, **tiny_sections(image_size=64))
    builds = Builds(tmp_path_factory.mktemp("kills"), workspace)
    yield builds
    builds.close()


@pytest.mark.parametrize("start", [NOTHING, OLDER])
def test_a_build_that_was_killed_anywhere_left_whole_files_alone_and_is_resumed(builds: Builds, start: str) -> None:
    """At every point: each file under a final name is that of the start or that of the end."""
    before, cut = contents(builds.starts[start]), set[int]()
    for point in itertools.count(1):
        builds.begin(start)
        if (end := builds.build(point)) == 0:
            break
        assert end in CUT
        for name, content in contents(builds.folder).items():
            assert content in (before.get(name), builds.whole.get(name)), (point, name)
        cut |= sizes_of_temporary(builds.folder)
        assert builds.build() == 0
        assert contents(builds.folder) == builds.whole, point
    assert contents(builds.folder) == builds.whole
    assert point > 5 * len(builds.whole)  # before, at the start of, within and after the writing of each, and others
    assert cut >= {0, FIRST_BYTES}


@pytest.mark.parametrize("start", [NOTHING, OLDER])
def test_builds_that_are_killed_one_after_the_other_come_to_the_same_end(builds: Builds, start: str) -> None:
    """Each goes on where the one before died, and dies one point later than that one did."""
    builds.begin(start)
    ends = list(itertools.takewhile(bool, map(builds.build, itertools.count(1))))
    assert set(ends) == CUT
    assert contents(builds.folder) == builds.whole
