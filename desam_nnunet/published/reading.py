"""What a published checkpoint is, read by its official key names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from desam_nnunet.encoders.weights import State, read_weights
from desam_nnunet.published.keys import (
    IMAGE_ENCODER,
    adapts_decoder,
    is_official,
    is_official_samed,
    rename_official,
    rename_official_samed,
)

_COMMON = """The published image preparation differs from nnU-Net's, which this model folder uses:
{}
Expect scores to differ from published ones; fine-tune with -pretrained_weights where they matter."""
_DESAM = _COMMON.format(
    """  published: percentiles 0.5 / 99.5 of the volume to 0-255 (zeros stay 0); here: of each tile, after nnU-Net's
             normalisation, by the plans' rule
  published: every slice squeezed to 256 x 256 and enlarged to 1024 x 1024; here: resampled to the plans'
             spacing, cut into tiles, aspect kept, padded
  published: no mirroring at prediction; here: the same
  published: small islands and holes cleaned before a mask is chosen; here: nnU-Net's postprocessing""")
_SAMED = _COMMON.format(
    """  published: CT clipped to -125 to 275 and scaled to 0-1; here: by the plans' rule, from nnU-Net's normalisation
  published: every slice reduced to 224 x 224 and enlarged to 512 x 512; here: resampled to the plans' spacing,
             cut into tiles, aspect kept, padded
  published: no mirroring at prediction; here: the same""")


_PROCEDURE = {"grid": 9, "iou_threshold": 0.5, "grid_offset": 0.0, "through_input": True}


class Published(NamedTuple):
    """A checkpoint of one of the methods.

    Attributes:
        method: Name of the plans' section.
        trainers: Which can use it; the first unless another is asked for.
        state: By our key names.
        width: Of the image encoder that it was trained on.
        own: What it fixes in the method's section.
        procedure: How it was published to predict, in the method's section, unless the plans say otherwise.
        image_encoder: SAM's part of the file, by SAM's key names; empty where there is none.
        preparation: In what the published image preparation differs.
        background: Whether the first output is the background, so that the outputs are no regions.
    """

    method: str
    trainers: tuple[str, ...]
    state: State
    width: int
    own: dict[str, Any]
    procedure: dict[str, Any]
    image_encoder: State
    preparation: str
    background: bool


def read_published(file: Path) -> Published:
    """A file's checkpoint by our names. Raises: ValueError: It is not of a known kind."""
    state = read_weights(file)
    if is_official(state):
        return _desam(state, file)
    if is_official_samed(state):
        return _samed(state)
    raise ValueError(f"{file} is not a published DeSAM or SAMed checkpoint: it has neither a key mask_decoder.pimm nor "
                     "w_a_000.")


def _desam(state: State, file: Path) -> Published:
    ours = rename_official(state)
    key = "pdmm.contexts.0.block_init.conv1.weight"
    if key not in ours:
        raise ValueError(f"{file}: {key} is missing.")
    encoder = {name: value for name, value in state.items() if name.startswith(IMAGE_ENCODER)}
    return Published("desam", ("DeSAMTrainer", "DeSAMTrainerWholeBox"), ours, ours[key].shape[1], {}, _PROCEDURE,
                     encoder, _DESAM, background=False)


def _samed(state: State) -> Published:
    trainer = "SAMedTrainerS" if adapts_decoder(state) else "SAMedTrainer"
    rank, width = state["w_a_000"].shape
    return Published("samed", (trainer,), rename_official_samed(state), width, {"rank": rank, "targets": "qv"}, {},
                     {}, _SAMED, background=True)
