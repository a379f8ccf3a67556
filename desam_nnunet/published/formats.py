"""The published formats: what a checkpoint is, and its keys by ours; SAMed's way back.

Source: the key names of the published implementations. A DeSAM (Gao et al., MICCAI 2024) is a model's state dict with
SAM's image and prompt encoder and a mask decoder that holds PRIM and, under ``pimm``, PDMM. A SAMed (Zhang and Liu,
2023) holds the low-rank matrices in the order of the blocks, q before v (``w_a_000``, ``w_b_000``, ...), the prompt
encoder and the mask decoder; SAMed_s has low-rank matrices of the decoder's attentions instead of its transformer.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from desam_nnunet.encoders.base import State
from desam_nnunet.encoders.state import read_weights

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

_RENAMES = (
    (r"mask_decoder\.(transformer|iou_token|mask_tokens)\.", r"prim.\1."),
    (r"mask_decoder\.iou_prediction_head\.layers\.([01])\.", r"prim.iou_head.layers.\1."),
    (r"mask_decoder\.iou_prediction_head\.layers\.2\.", "prim.iou_head.seg_layers."),
    (r"mask_decoder\.pimm\.conv_blocks_context\.(\d)\.block_init\.", r"pdmm.contexts.\1.block_init."),
    (r"mask_decoder\.pimm\.conv_blocks_context\.(\d)\.residual_block\.(\d)\.0\.conv\.", r"pdmm.contexts.\1.ups.\2.0."),
    (r"mask_decoder\.pimm\.conv_blocks_context\.(\d)\.residual_block\.(\d)\.1\.", r"pdmm.contexts.\1.ups.\2.1."),
    (r"mask_decoder\.pimm\.conv_blocks_localization\.(\d)\.transp_conv\.conv\.", r"pdmm.ups.\1.up."),
    (r"mask_decoder\.pimm\.conv_blocks_localization\.(\d)\.res_block\.", r"pdmm.ups.\1.block."),
    (r"mask_decoder\.pimm\.mask_embedding_fusion\.", "pdmm.fusion."),
    (r"mask_decoder\.pimm\.seg_outputs\.1\.", "pdmm.seg_layers."),
    (r"\.conv([12])\.conv\.", r".conv\1."),
    (r"\.conv3\.conv\.", ".shortcut."),
)
# SAM's own heads and deep supervision's output: in the files, used by none.
_UNUSED = re.compile(r"mask_decoder\.(output_upscaling|output_hypernetworks_mlps|pimm\.seg_outputs\.0)\.")
_SHORTCUT = "conv3.conv.weight"
IMAGE_ENCODER = "image_encoder."

_PAIR = "qv"
_SEQUENCES = {"w": "updates", "sa": "decoder_updates.self", "cti": "decoder_updates.token_to_image",
              "cit": "decoder_updates.image_to_token"}
_MATRICES = {"a": "down", "b": "up"}
_MODULES = {
    "mask_decoder.mask_tokens.": "decoder.seg_layers.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.": "decoder.seg_layers.hypernetworks.",
    "mask_decoder.iou_prediction_head.": "decoder.seg_layers.iou_head.",
    "mask_decoder.": "decoder.",
}
_NUMBERED = re.compile(rf"({'|'.join(_SEQUENCES)})_([ab])_(\d{{3}})")
_FINAL = re.compile(r"fati_([qv])([ab])")


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
        return _samed(state, file)
    raise ValueError(f"{file} is not a published DeSAM or SAMed checkpoint: it has neither a key mask_decoder.pimm nor "
                     "w_a_000.")


def _desam(state: State, file: Path) -> Published:
    ours = rename_official(state)
    key = "pdmm.contexts.0.block_init.conv1.weight"
    if key not in ours:
        raise ValueError(f"{file}: {key} is missing.")
    if ours[key].dim() != 4:
        raise ValueError(f"{file}: {key} is {tuple(ours[key].shape)}, but must be a convolution.")
    encoder = {name: value for name, value in state.items() if name.startswith(IMAGE_ENCODER)}
    return Published("desam", ("DeSAMTrainer", "DeSAMTrainerWholeBox"), ours, ours[key].shape[1], {}, _PROCEDURE,
                     encoder, _DESAM, background=False)


def _samed(state: State, file: Path) -> Published:
    trainer = "SAMedTrainerS" if adapts_decoder(state) else "SAMedTrainer"
    if state["w_a_000"].dim() != 2:
        raise ValueError(f"{file}: w_a_000 is {tuple(state['w_a_000'].shape)}, but must be a matrix.")
    rank, width = state["w_a_000"].shape
    return Published("samed", (trainer,), rename_official_samed(state), width, {"rank": rank, "targets": "qv"}, {},
                     {}, _SAMED, background=True)


def is_official(state: State) -> bool:
    """Whether `state` has the keys of a published DeSAM checkpoint."""
    return any(key.startswith("mask_decoder.pimm.") for key in state)


def rename_official(state: State) -> State:
    """A published checkpoint's state under this package's keys, for one class and without the image encoder.

    Raises:
        ValueError: A key that no published checkpoint has.
    """
    renamed = {_rename(key): value for key, value in state.items()
               if not (key.startswith(IMAGE_ENCODER) or _is_unused(key, value))}
    return {key: value[:1] if key.startswith("prim.iou_head.seg_layers.") else value  # index 0 is used
            for key, value in renamed.items()}


def _is_unused(key: str, value: Tensor) -> bool:
    """Also the shortcut of a block that keeps its width, which the files have and the published code passes by."""
    is_square = value.dim() > 1 and value.shape[0] == value.shape[1]
    return bool(_UNUSED.search(key)) or (key.endswith(_SHORTCUT) and is_square)


def _rename(key: str) -> str:
    name = key
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    if not name.startswith(("prim.", "pdmm.", "prompt_encoder.")):
        raise ValueError(f"{key!r} is no key of a published DeSAM checkpoint.")
    return name


def is_official_samed(state: State) -> bool:
    """Whether `state` has the keys of a published SAMed checkpoint."""
    return "w_a_000" in state


def adapts_decoder(state: State) -> bool:
    """Whether a published checkpoint is of SAMed_s."""
    return any(key.startswith("sa_") for key in state)


def rename_official_samed(state: State) -> State:
    """A published SAMed's state under this package's keys."""
    return {_ours(key): value for key, value in state.items()}


def official_samed_names(state: State) -> State:
    """The state of one of our networks by the published names.

    Raises:
        ValueError: Low-rank updates of other projections than q and v, or a neck of our own, have no published name.
    """
    letters = {key.split(".")[-3] for key in state if key.startswith(("updates.", "decoder_updates."))}
    if foreign := [key for key in state if key.startswith("neck.")]:
        raise ValueError(f"SAMed's format has no place for {foreign[0]}: it is for encoders that come with SAM.")
    if letters != set(_PAIR):
        raise ValueError(f"SAMed's format has updates of q and v, but these are of {', '.join(sorted(letters))}.")
    updates = [f"{sequence}_{matrix}_{number:03d}" for sequence, matrix, number in
               product(_SEQUENCES, _MATRICES, range(len(state)))]
    updates += [f"fati_{letter}{matrix}" for letter, matrix in product(_PAIR, _MATRICES)]
    published = {_ours(name): name for name in updates}
    theirs = {ours: theirs for theirs, ours in _MODULES.items()}
    return {published.get(key) or _with_prefix(key, theirs): value for key, value in state.items()}


def _ours(key: str) -> str:
    if match := _NUMBERED.fullmatch(key):
        sequence, matrix, number = match.groups()
        place, letter = divmod(int(number), len(_PAIR))
        return f"{_SEQUENCES[sequence]}.{place}.{_PAIR[letter]}.{_MATRICES[matrix]}.weight"
    if match := _FINAL.fullmatch(key):
        return f"decoder_updates.final.0.{match[1]}.{_MATRICES[match[2]]}.weight"
    return _with_prefix(key, _MODULES)


def _with_prefix(key: str, prefixes: dict[str, str]) -> str:
    """The key with the first prefix that it has replaced."""
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
