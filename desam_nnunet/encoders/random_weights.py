"""Random weights that are the same on every machine, for an encoder without published weights.

They are no pretrained weights and do not pretend to be: every place that shows an encoder says "random".
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from desam_nnunet.encoders.registry import Variant, build_sam

SEED = 0
RANDOM_IDENTITY = f"random:RandomState:1:seed{SEED}"  # generator, version of the recipe below, seed


def random_state(variant: Variant) -> dict[str, Tensor]:
    """All of SAM in the size of `variant`, drawn from numpy's frozen ``RandomState``.

    The recipe: layers in the order of SAM's modules; weights and biases uniform within
    1/sqrt(fan-in), norms at one and zero, embeddings and position tables normal (0.02 for tables
    that are added to tokens, 1 for the prompts' frequencies and tokens).
    """
    generator = np.random.RandomState(SEED)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in build_sam(variant).state_dict().items()}
    return {key: _draw(key, shape, shapes, generator) for key, shape in shapes.items()}


def _draw(
    key: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]], generator: np.random.RandomState
) -> Tensor:
    owner, _, kind = key.rpartition(".")
    if kind in ("pos_embed", "rel_pos_h", "rel_pos_w"):
        values = generator.normal(0, 0.02, shape)
    elif kind == "positional_encoding_gaussian_matrix" or (key.startswith("prompt_encoder.") and "embed" in key):
        values = generator.normal(0, 1, shape)
    elif len(shapes[f"{owner}.weight"]) == 1:  # a norm
        values = np.full(shape, 1.0 if kind == "weight" else 0.0)
    else:
        bound = np.prod(shapes[f"{owner}.weight"][1:]) ** -0.5
        values = generator.uniform(-bound, bound, shape)
    return torch.from_numpy(values.astype(np.float32))
