"""Published DeSAM checkpoints: their keys in ours.

Source: the key names of the published implementation (Gao et al., DeSAM, MICCAI 2024), a model state dict
with SAM's image and prompt encoder and a mask decoder that holds PRIM and, under ``pimm``, PDMM.
"""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]

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


def is_official(state: State) -> bool:
    """Whether `state` has the keys of a published DeSAM checkpoint."""
    return any(key.startswith("mask_decoder.pimm.") for key in state)


def rename_official(state: State) -> State:
    """A published decoder's state under this package's keys, for one class and without the image encoder.

    Args:
        state: A published checkpoint's model state dict.

    Raises:
        ValueError: A key that no published checkpoint has.
    """
    renamed = {}
    for key, value in state.items():
        if key.startswith(IMAGE_ENCODER) or _is_unused(key, value):
            continue
        name = _rename(key)
        renamed[name] = value[:1] if name.startswith("prim.iou_head.seg_layers.") else value  # index 0 is used
    return renamed


def _is_unused(key: str, value: Tensor) -> bool:
    """Also the shortcut of a block that keeps its width, which the files have and the published code passes by."""
    return bool(_UNUSED.search(key)) or (key.endswith(_SHORTCUT) and value.shape[0] == value.shape[1])


def _rename(key: str) -> str:
    name = key
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    if not name.startswith(("prim.", "pdmm.", "prompt_encoder.")):
        raise ValueError(f"'{key}' is no key of a published DeSAM checkpoint.")
    return name
