"""nnU-Net's checkpoints, read without running code."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from desam_nnunet.nnunet.model_folder import read_checkpoint

CORE = np.float64(0).__reduce__()[0].__module__.encode()  # numpy._core.multiarray, before NumPy 2 numpy.core.multiarray


class Command:
    def __reduce__(self) -> tuple:
        return print, ("run",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "fold_0").mkdir()
    return tmp_path / "fold_0" / "checkpoint_final.pth"


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_either_numpy_are_read(path: Path, core: bytes) -> None:
    saved = {"weights": torch.arange(3), "best": np.float32(0.25), "losses": [np.float64(1.5)]}
    torch.save(saved, path.with_suffix(".now"))
    with zipfile.ZipFile(path.with_suffix(".now")) as now, zipfile.ZipFile(path, "w") as then:
        for name in now.namelist():
            content = now.read(name)
            then.writestr(name, content.replace(CORE, core) if name.endswith("data.pkl") else content)
    found = read_checkpoint(path.parents[1], "0", path.name)
    assert found["best"] == 0.25
    assert found["losses"] == [1.5]
    assert found["weights"].tolist() == [0, 1, 2]


def test_code_is_not_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"network_weights": Command()}, path)
    with pytest.raises(ValueError, match=r"checkpoint_final.pth can't be read as a checkpoint of nnU-Net's"):
        read_checkpoint(path.parents[1], "0", path.name)
    assert capsys.readouterr().out == ""
