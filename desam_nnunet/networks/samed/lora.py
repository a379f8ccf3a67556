"""Low-rank updates of frozen linear layers.

Source: Hu et al., LoRA, ICLR 2022, section 4; which layers, and how they start, Zhang and Liu, SAMed, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRank(nn.Module):
    """``up(down(x))``: `down` starts Kaiming-uniform with a = sqrt(5), `up` at zero, and so the update at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    @property
    def weight(self) -> Tensor:
        """The update as one matrix (outputs, inputs)."""
        return self.up.weight @ self.down.weight


class AdaptedLinear(nn.Module):
    """Takes the place of a linear layer, some of whose outputs are updated.

    Weight and bias keep their names, and are frozen. The updates are no submodules: the trainer's network registers
    them, and keeps the layer aside.

    Args:
        base: The layer.
        updates: What is added, with the outputs that each is added to: None for all of them.
    """

    def __init__(self, base: nn.Linear, updates: Sequence[tuple[LowRank, slice | Tensor | None]]) -> None:
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)
        self._updates = (tuple(updates),)
        self._merged: Tensor | None = None
        self._versions: tuple[tuple[int, int], ...] = ()  # of the weights that were merged

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self._merged is not None and not torch.is_grad_enabled():
            return F.linear(x, self._merged, self.bias)
        (updates,) = self._updates
        y = F.linear(x, self.weight, self.bias)
        for update, rows in updates:
            y = _added(y, rows, update(x), dim=-1)
        return y

    def merge(self) -> None:
        """Without gradients the layer is one product from now on. Done again only where a weight has changed since.

        Weights that were made in inference mode don't tell: :meth:`release` must be called when others are loaded.
        """
        (updates,) = self._updates
        weights = [self.weight, *(layer.weight for update, _ in updates for layer in (update.down, update.up))]
        versions = tuple(
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
        if self._merged is not None and versions == self._versions:
            return
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):  # rounded once, in the product
            merged = self.weight.clone()
            for update, rows in updates:
                merged = _added(merged, rows, update.weight, dim=0)
            self._merged = merged
        self._versions = versions

    def release(self) -> None:
        """Gives the merged weight's memory back."""
        self._merged = None


def _added(whole: Tensor, rows: slice | Tensor | None, part: Tensor, dim: int) -> Tensor:
    """`whole`, which nobody else holds, with `part` added to some of its rows along `dim`; in place for a slice."""
    if rows is None:
        return whole + part
    if isinstance(rows, Tensor):
        return whole.index_add(dim, rows.to(whole.device), part)
    whole.narrow(dim, rows.start, rows.stop - rows.start).add_(part)
    return whole


def low_rank_updates(inputs: int, outputs: int, rank: int, targets: str) -> dict[str, LowRank]:
    """One update for each of the `targets`, letters of ``qkv``."""
    return {letter: LowRank(inputs, outputs, rank) for letter in targets}
