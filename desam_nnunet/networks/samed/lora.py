"""Low-rank updates of frozen linear layers.

Source: Hu et al., LoRA, ICLR 2022, section 4; which layers, and how they start, Zhang and Liu, SAMed, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    """Takes the place of a linear layer whose outputs fall into equal parts, some of which are updated.

    Weight and bias keep their names, and are frozen. The updates are no submodules: who trains them registers them,
    and who freezes the layer keeps it aside.

    Args:
        base: The layer.
        updates: By the number of the part. A fused ``qkv`` has the parts 0, 1 and 2.
        parts: How many there are.
    """

    def __init__(self, base: nn.Linear, updates: Mapping[int, LowRank], parts: int = 1) -> None:
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias.requires_grad_(False)
        self.parts = parts
        self._updates = (dict(updates),)
        self._merged: Tensor | None = None
        self._versions: tuple[tuple[int, int], ...] = ()  # of the weights that were merged

    def forward(self, x: Tensor) -> Tensor:
        if self._merged is not None and not torch.is_grad_enabled():
            return F.linear(x, self._merged, self.bias)
        (updates,) = self._updates
        outputs = F.linear(x, self.weight, self.bias).chunk(self.parts, dim=-1)
        changed = [y + updates[k](x) if k in updates else y for k, y in enumerate(outputs)]
        return changed[0] if self.parts == 1 else torch.cat(changed, dim=-1)

    def merge(self) -> None:
        """Without gradients the layer is one product from now on. Done again only where a weight has changed since.

        Weights that were made in inference mode don't tell: who loads others into them calls :meth:`release`.
        """
        (updates,) = self._updates
        weights = [self.weight, *(layer.weight for update in updates.values() for layer in (update.down, update.up))]
        versions = tuple(
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
        if self._merged is not None and versions == self._versions:
            return
        rows = self.weight.chunk(self.parts)
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):  # rounded once, in the product
            self._merged = torch.cat([row + updates[k].weight if k in updates else row for k, row in enumerate(rows)])
        self._versions = versions

    def release(self) -> None:
        """Gives the merged weight's memory back."""
        self._merged = None


def low_rank_updates(inputs: int, outputs: int, rank: int, targets: str) -> dict[str, LowRank]:
    """One update for each of the `targets`, letters of ``qkv``."""
    return {letter: LowRank(inputs, outputs, rank) for letter in targets}
