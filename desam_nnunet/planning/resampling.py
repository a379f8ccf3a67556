"""Resampling of predicted logits to the image's own grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEY, _OPTIONS = "resampling_fn_probabilities", "resampling_fn_probabilities_kwargs"
_STOCK, _TORCH = "resample_data_or_seg_to_shape", "resample_torch_fornnunet"  # both nnU-Net's
_LINEAR = {"is_seg": False, "order": 1, "order_z": 0}


def faster_resampling(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that have nnU-Net resample logits with PyTorch, where its plans ask for what that computes too: linear
    interpolation, the nearest slice. Nothing where they ask for something else.

    The logits differ by rounding. One thread: nnU-Net exports several volumes at once.
    """
    options = configuration[_OPTIONS]
    if configuration[_KEY] != _STOCK or {key: value for key, value in options.items() if key in _LINEAR} != _LINEAR:
        return {}
    return {_KEY: _TORCH, _OPTIONS: {
        "is_seg": False, "force_separate_z": options.get("force_separate_z"), "num_threads": 1}}
