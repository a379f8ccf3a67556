"""What users get is the built wheel in an environment of their own: that is what is tested here."""

import json
import os
import pkgutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from build import ProjectBuilder
from pyproject_hooks import quiet_subprocess_runner

from desam_nnunet import _startup

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "nnUNet_extTrainer"

LOOK_UP = """
import json, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
trainer = recursive_find_trainer_class_by_name(sys.argv[1])
module = sys.modules.get(trainer.__module__)  # nnU-Net forgets modules from the folders that it searched
identical = getattr(module, sys.argv[1], None) is trainer
print(json.dumps([trainer.__module__, getattr(module, "__file__", None), identical]))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # The tested environment may itself have set the variable when this very process started.
    inherited = {k: v for k, v in os.environ.items() if k not in {VARIABLE, "PYTHONPATH"}}
    result = subprocess.run(command, cwd=cwd, env=inherited | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@dataclass(frozen=True)
class Environment:
    """A virtual environment, used from a working directory outside the checkout."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Environment":
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        environment = cls(folder)
        # Lends it nnU-Net and torch. Python reads no .pth file in a folder that is listed in a .pth file, so
        # start-up files over there (an editable install's, say) stay without effect here.
        lent = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
        (environment.packages / "lent.pth").write_text("\n".join(lent))
        return environment

    @property
    def executables(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def packages(self) -> Path:
        return Path(self.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    @property
    def trainers(self) -> Path:
        return self.packages / "desam_nnunet" / "trainers"

    def python(self, *arguments: str, **variables: str) -> str:
        return run(self.executables / "python", *arguments, cwd=self.folder.parent, **variables).stdout

    def pip(self, *arguments: str | Path) -> None:
        python = self.executables / "python"
        run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=self.folder.parent)

    def find_trainer(self, name: str, **variables: str) -> list:
        """Module, its file, and whether that module holds the class that nnU-Net found."""
        return json.loads(self.python("-c", LOOK_UP, name, **variables).splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    builder = ProjectBuilder(ROOT, runner=quiet_subprocess_runner)
    return Path(builder.build("wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.create(tmp_path_factory.mktemp("installed") / "venv")
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


def test_wheel_top_level_is_the_package_and_its_startup_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {
        "desam_nnunet", "desam_nnunet.pth", "desam_nnunet.start", metadata,
    }
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"} <= set(names)
    assert {"desam_nnunet/encoders/vit_tiny.safetensors", "desam_nnunet/cross_site/Snakefile",
            "desam_nnunet/evaluation/page.html"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.parametrize("folder", ["plans", "trainers"])
def test_wheel_ships_the_root_folder_whole(wheel: Path, folder: str) -> None:
    files = [file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file()]
    expected = {f"desam_nnunet/{file.as_posix()}" for file in files if "__pycache__" not in file.parts}
    shipped = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith(f"desam_nnunet/{folder}/")}
    assert expected
    assert shipped == expected


def test_nnunet_finds_the_installed_trainer(installed: Environment) -> None:
    module, file, identical = installed.find_trainer("DeSAMTrainer")
    assert module.startswith("desam_nnunet.training")
    assert Path(file).is_relative_to(installed.packages)
    assert identical


def test_nnunet_searches_the_users_own_folder_first(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "my_trainers.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class DeSAMTrainer(nnUNetTrainer): pass\n"
    )
    module, *_ = installed.find_trainer("DeSAMTrainer", **{VARIABLE: str(tmp_path)})
    assert module == "my_trainers"


def test_variable_reaches_child_processes_once(installed: Environment) -> None:
    child = f"import os; print(os.environ[{VARIABLE!r}])"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert installed.python("-c", parent).strip() == str(installed.trainers)


def test_python_starts_without_heavy_imports(installed: Environment) -> None:
    loaded = set(installed.python("-c", "import sys; print(*sys.modules)").split())
    assert {name for name in loaded if name.startswith("desam_nnunet")} == {
        "desam_nnunet", "desam_nnunet._startup",
    }
    assert not loaded & {"torch", "nnunetv2", "numpy", "importlib.util"}


def test_command_prints_the_folder_for_those_without_startup_file(installed: Environment) -> None:
    printed = run(installed.executables / "desam", "trainers", cwd=installed.folder.parent).stdout
    assert printed == f"{installed.trainers}\n"
    # Listed by hand and by the start-up file, it is there once.
    by_hand = {VARIABLE: printed.strip()}
    assert installed.python("-c", f"import os; print(os.environ[{VARIABLE!r}])", **by_hand) == printed


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "venv")
    before = set(environment.folder.rglob("*"))
    environment.pip("install", "--no-deps", "--no-index", wheel)
    assert environment.trainers.is_dir()
    environment.pip("uninstall", "--yes", "desam-nnunet")
    assert set(environment.folder.rglob("*")) == before


def test_startup_line_is_silent_once_the_package_is_gone(tmp_path: Path) -> None:
    (tmp_path / "desam_nnunet.pth").write_bytes((ROOT / "startup" / "desam_nnunet.pth").read_bytes())
    read_as_site_packages = f"import site; site.addsitedir({str(tmp_path)!r})"
    assert run(sys.executable, "-I", "-S", "-c", read_as_site_packages, cwd=tmp_path).stderr == ""


def test_start_entry_names_what_the_pth_line_calls() -> None:
    entry = (ROOT / "startup" / "desam_nnunet.start").read_text().strip()
    assert pkgutil.resolve_name(entry) is _startup.register


OWN, OURS = os.path.join(os.sep, "own"), _startup.shipped_folder("trainers")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, [OURS]),
        ([], [OURS]),
        ([OURS], [OURS]),
        ([OWN], [OWN, OURS]),
        ([OWN, ""], [OWN, OURS]),
        ([OURS, OWN], [OURS, OWN]),
    ],
)
def test_register_appends_once(
    monkeypatch: pytest.MonkeyPatch, before: list[str] | None, after: list[str]
) -> None:
    monkeypatch.setenv(VARIABLE, os.pathsep.join(before or []))
    if before is None:
        monkeypatch.delenv(VARIABLE)
    _startup.register()
    _startup.register()
    assert os.environ[VARIABLE].split(os.pathsep) == after


def test_register_without_the_folder_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, OWN)
    monkeypatch.setattr(_startup, "__file__", str(tmp_path / "desam_nnunet" / "_startup.py"))
    _startup.register()
    assert os.environ[VARIABLE] == OWN


def test_register_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setenv(VARIABLE, OWN)
    with monkeypatch.context() as broken:
        broken.setattr(os, "putenv", refuse)
        _startup.register()
    assert os.environ[VARIABLE] == OWN
