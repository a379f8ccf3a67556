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
        updates: What is added to the layer, with the outputs that each is added to: None for all of them.
    """

    def __init__(self, base: nn.Linear, updates: Sequence[tuple[LowRank, slice | Tensor | None]]) -> None:
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)
        everything = slice(0, base.out_features)
        self._updates = ([(update, everything if rows is None else rows) for update, rows in updates],)
        for number, (_, rows) in enumerate(updates):
            if isinstance(rows, Tensor):
                self.register_buffer(f"rows{number}", rows, persistent=False)
        self._merged: Tensor | None = None
        self._versions: tuple[tuple[int, int], ...] = ()  # of the weights that were merged

    def forward(self, x: Tensor) -> Tensor:
        if self._merged is not None and not torch.is_grad_enabled():
            return F.linear(x, self._merged, self.bias)
        y = F.linear(x, self.weight, self.bias)
        for update, rows in self._parts():
            y = _added(y, rows, update(x), dim=-1)
        return y

    def merge(self) -> None:
        """Without gradients the layer is one product from now on. Done again only where a weight has changed since.

        Weights that were made in inference mode don't tell: :meth:`release` must be called when others are loaded.
        """
        weights = [self.weight, *(weight for update, _ in self._parts() for weight in update.parameters())]
        versions = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
        if self._merged is not None and versions == self._versions:
            return
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):  # rounded once, in the product
            merged = self.weight.clone()
            for update, rows in self._parts():
                merged = _added(merged, rows, update.weight, dim=0)
            self._merged = merged
        self._versions = versions

    def release(self) -> None:
        """Gives the merged weight's memory back."""
        self._merged = None

    def _parts(self) -> list[tuple[LowRank, slice | Tensor]]:
        """The updates with their rows, which have come along to the layer's device."""
        (updates,) = self._updates
        return [(update, getattr(self, f"rows{number}", rows)) for number, (update, rows) in enumerate(updates)]


def _added(whole: Tensor, rows: slice | Tensor, part: Tensor, dim: int) -> Tensor:
    """`whole`, which nobody else holds, with `part` added to some of its rows along `dim`; in place for a slice."""
    if isinstance(rows, Tensor):
        return whole.index_add(dim, rows, part)
    whole.narrow(dim, rows.start, rows.stop - rows.start).add_(part)
    return whole
