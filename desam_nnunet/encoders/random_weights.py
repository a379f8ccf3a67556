"""Random weights that are the same on every machine, for an encoder without published weights.

They are no pretrained weights and do not pretend to be: every place that shows an encoder says "random".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

SEED = 0
RANDOM_IDENTITY = f"random:RandomState:1:seed{SEED}"  # generator, version of the recipe below, seed
Shapes = Mapping[str, tuple[int, ...]]


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    """Every weight of a network, drawn from numpy's frozen ``RandomState`` in the order of `shapes`.

    The recipe: weights and biases uniform within 1/sqrt(fan-in), norms at one and zero, statistics of batches at
    those of standardised values, embeddings and position tables normal (0.02 for tables that are added to tokens,
    1 for the prompts' frequencies and tokens).
    """
    generator = np.random.RandomState(SEED)
    return {key: _draw(key, shape, shapes, generator) for key, shape in shapes.items()}


def _draw(key: str, shape: tuple[int, ...], shapes: Shapes, generator: np.random.RandomState) -> Tensor:
    owner, _, kind = key.rpartition(".")
    weight = shapes.get(f"{owner}.weight", ())
    if kind == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if kind == "positional_encoding_gaussian_matrix" or (key.startswith("prompt_encoder.") and "embed" in key):
        values = generator.normal(0, 1, shape)
    elif kind in ("weight", "bias") and len(weight) > 1:
        bound = np.prod(weight[1:]) ** -0.5
        values = generator.uniform(-bound, bound, shape)
    elif len(shape) > 1:  # pos_embed, rel_pos, class and register tokens, biases of an attention
        values = generator.normal(0, 0.02, shape)
    else:  # norms, scales of a layer, statistics of batches
        values = np.full(shape, 0.0 if kind in ("bias", "running_mean") else 1.0)
    return torch.from_numpy(values.astype(np.float32))
