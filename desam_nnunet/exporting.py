"""``desam weights export``: a trained SAMed in the published format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from desam_nnunet.importing import save
from desam_nnunet.networks.official_samed import official_samed_names

_SAMED = ("SAMedTrainer", "SAMedTrainerS")
# What nnU-Net's checkpoints hold beside tensors and plain Python values: numpy's numbers.
_NUMBERS: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, type(np.dtype("float32")), type(np.dtype("float64"))]


def export_samed(model: Path, fold: str, checkpoint_name: str, file: Path) -> None:
    """Writes one fold's weights by the published key names: low-rank matrices, prompt encoder, mask decoder.

    The image encoder is not in it, as in the published files.

    Args:
        model: nnU-Net's model folder, ``<trainer>__<plans>__<configuration>``.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        FileExistsError: `file` exists.
        ValueError: The checkpoint is not a SAMed, has updates without a published name, or can't be read.
    """
    path = model / f"fold_{fold}" / checkpoint_name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the model folder, -f and -chk of a trained fold.")
    if file.exists():
        raise FileExistsError(f"{file} exists: remove it or choose another name.")
    checkpoint = _read(path)
    if checkpoint.get("trainer_name") not in _SAMED:
        raise ValueError(f"{path} is of {checkpoint.get('trainer_name')}: only {' and '.join(_SAMED)} have a published "
                         "format.")
    save(official_samed_names(checkpoint["network_weights"]), file)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net's, without running code that it may hold."""
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise ValueError(f"{path} can't be read as a checkpoint of nnU-Net's ({type(error).__name__}).") from error
