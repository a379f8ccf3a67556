"""``desam weights export``: a trained SAMed in the published format."""

from __future__ import annotations

from pathlib import Path

from desam_nnunet.nnunet.model_folder import read_checkpoint
from desam_nnunet.published.importing import save
from desam_nnunet.published.samed_keys import official_samed_names

_SAMED = ("SAMedTrainer", "SAMedTrainerS")


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
    if file.exists():
        raise FileExistsError(f"{file} exists: remove it or choose another name.")
    checkpoint = read_checkpoint(model, fold, checkpoint_name)
    trainer = checkpoint.get("trainer_name")
    if trainer not in _SAMED:
        raise ValueError(f"{model} is of {trainer}: only {' and '.join(_SAMED)} have a published "
                         "format.")
    save(official_samed_names(checkpoint["network_weights"]), file)
