"""What a slice may know of its neighbours in a slab."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from desam_nnunet.sam.slabs import slabs_of, slices_of


class Neighbours(nn.Module):
    """Adds to each slice's map what its neighbours say; nothing before training, since the last weights begin at zero.

    A convolution over three slices and 3 x 3 pixels, then one over three slices, so that a slice sees two on either
    side. Beyond the slab and where slices are missing there is nothing: zero, after each convolution. The keys hold
    ``.seg_layers.``, so that nnU-Net's ``-pretrained_weights`` takes a model that has been trained without it.

    Args:
        width: Channels.
        depth: Slices of a slab, D.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        last = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False)
        nn.init.zeros_(last.weight)
        self.seg_layers = nn.ModuleList([nn.Conv3d(width, width, 3, padding=1, bias=False), last])

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """Maps (B·D, C, h, w) of slices, of which `there` (B·D,) says with True that they are not missing."""
        weight = slabs_of(there[:, None, None, None].to(x.dtype), self.depth)
        seen = slabs_of(x, self.depth) * weight
        seen = F.relu(self.seg_layers[0](seen)) * weight
        return x + slices_of(self.seg_layers[1](seen))
