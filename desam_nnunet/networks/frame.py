"""What all networks here share: a tile or slab of nnU-Net's in, logits of its size out, the encoder held aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from desam_nnunet.encoders.base import Encoder, Features, LoadedEncoder
from desam_nnunet.encoders.memory import FeatureMemory, content_key
from desam_nnunet.sam.prompts import Prompts
from desam_nnunet.sam.slabs import slabs_of, slices_of
from desam_nnunet.sam.tiles import MASK_STRIDE, Geometry, TileToImage, logits_to_tile

# nnU-Net sums logits times ten in float16 and gives a volume up where they overflow. No decision changes.
MAX_LOGIT = 100.0
# An absent class gets this logit everywhere in the tile: low enough to lose against a background of 0,
# high enough that other tiles, mirrors and folds can outvote it.
ABSENT_LOGIT = -10.0
# torch.compile leaves these methods as they are, since they decide on values, and compiles what they call.
uncompiled = torch.compiler.disable(recursive=False)


class Outline(NamedTuple):
    """What a method's network is built from, whatever the method.

    Attributes:
        num_channels: Of the tiles.
        num_outputs: Channels of the logits: foreground classes and background, or regions.
        background: Whether the first output is the background.
        section: The method's settings, resolved; the method knows their type.
        depth: Slices of a slab; 1 where tiles are shown one by one.
    """

    loaded: LoadedEncoder
    to_image: TileToImage
    num_channels: int
    num_outputs: int
    background: bool
    section: Any
    depth: int = 1

    @property
    def num_classes(self) -> int:
        """Foreground classes or regions."""
        return self.num_outputs - self.background


class SamNetwork(nn.Module):
    """Maps tiles (B, C, H, W) to logits of their size, no nonlinearity applied.

    Args:
        held: Frozen modules, the encoder first. They are no submodules, so that no checkpoint, optimiser or DDP bucket
            ever sees them, but they move along to another device.
        background: Whether a background channel, which is 0 by definition, is put in front of the masks' logits.
        mask_stride: Pixels of the encoder's input along a side of a mask's pixel.
    """

    def __init__(
        self, *, held: Iterable[nn.Module], to_image: TileToImage, num_channels: int, background: bool,
        mask_stride: int = MASK_STRIDE,
    ) -> None:
        super().__init__()
        self.held = tuple(held)
        self.to_image = to_image
        self.num_channels = num_channels
        self.background = background
        self.mask_stride = mask_stride

    @property
    def encoder(self) -> Encoder:
        encoder = self.held[0]
        assert isinstance(encoder, Encoder)
        return encoder

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SamNetwork:
        super()._apply(fn, recurse)
        for module in self.held:
            module._apply(fn, recurse)
        return self

    def geometry(self, tiles: Tensor) -> Geometry:
        return Geometry((tiles.shape[-2], tiles.shape[-1]), self.to_image.image_size, self.mask_stride)

    def tile_logits(self, masks: Tensor, geometry: Geometry) -> Tensor:
        """Mask logits (B, K, S / stride, S / stride) as nnU-Net wants them: at tile size, with the background's 0."""
        return self.with_background(logits_to_tile(masks, geometry))

    def with_background(self, logits: Tensor) -> Tensor:
        if not self.background:
            return logits
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)

    def images(self, tiles: Tensor) -> Tensor:
        """Images (B, G, 3, S, S) of tiles (B, C, H, W), G groups of channels each.

        Raises:
            ValueError: The tiles have another number of channels than planned, or hold NaN or infinity.
        """
        if tiles.shape[1] != self.num_channels:
            raise ValueError(f"The image has {tiles.shape[1]} channel(s), but the model was planned for "
                             f"{self.num_channels}: give one file per planned channel (_0000, _0001, ...).")
        if not torch.isfinite(tiles).all():
            raise ValueError("The image holds NaN or infinite values after preprocessing: repair or remove it.")
        return self.to_image(tiles)


class FrozenSamNetwork(SamNetwork):
    """Decodes features that training does not change: a method adds :meth:`decode` and :meth:`predict`.

    ``network(tiles)`` predicts, ``network(features, prompts)`` is what training calls, because DDP and torch.compile
    see nothing but ``forward``. Of slabs, methods see their slices, those of one slab in a row: B is then B·D.

    Args:
        neck: Trained, where the encoder has none of its own.
        depth: Slices of a slab, D; 1 for tiles.
    """

    def __init__(
        self, *, encoder: Encoder, to_image: TileToImage, num_channels: int, background: bool,
        neck: nn.Module | None = None, mask_stride: int = MASK_STRIDE, depth: int = 1,
    ) -> None:
        super().__init__(held=[encoder], to_image=to_image, num_channels=num_channels, background=background,
                         mask_stride=mask_stride)
        self.neck = neck or nn.Identity()
        self.depth = depth
        self.memory = FeatureMemory(overlapping=depth > 1)

    def decode(self, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor | None]:
        """Mask logits (B, K, S / stride, S / stride) of one prompt per image, and scores (B, K) if there are any."""
        raise NotImplementedError

    def predict(self, features: Features, geometry: Geometry) -> Tensor:
        """Logits (B, outputs, H, W) of tiles, from their features."""
        raise NotImplementedError

    def forward(self, x: Tensor | Features, prompts: Prompts | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """What :meth:`predict` gives for tiles (B, C, H, W), or :meth:`decode` for features and a prompt per image.

        Slabs (B, C, D, H, W) are predicted as slabs.

        Raises:
            ValueError: As :meth:`images`.
        """
        if isinstance(x, Tensor):
            logits = self._predict(slices_of(x)).clamp(-MAX_LOGIT, MAX_LOGIT)
            return slabs_of(logits, self.depth) if x.dim() == 5 else logits
        return self.decode(self.with_neck(x), prompts or Prompts())

    def with_neck(self, features: Features) -> Features:
        """Features as the decoder reads them."""
        return features._replace(neck=self.neck(features.neck))

    @uncompiled
    def encode(self, tiles: Tensor) -> Features:
        """Frozen features of (B, C, H, W) tiles; channel groups are encoded one by one and averaged."""
        images = self.images(tiles)  # B G 3 S S
        features = self.encoder(images.flatten(0, 1))
        return features.map(lambda x: mean_over_groups(x, images.shape[1]))

    def encode_in_parts(self, tiles: Tensor) -> Features:
        """As :meth:`encode`; in halves where a GPU's memory is too small for all at once."""
        try:
            return self.encode(tiles)
        except torch.OutOfMemoryError:
            if len(tiles) == 1:
                raise
        return Features.joined([self.encode_in_parts(half) for half in tiles.tensor_split(2)])

    @uncompiled
    def encode_slices(self, tiles: Tensor) -> Features:
        """As :meth:`encode_in_parts`; of slabs, a slice of zeros is missing, as nnU-Net pads: its features are zero."""
        if self.depth > 1 and not (there := tiles.flatten(1).any(1)).all():
            return self._with_gaps(tiles, there)
        return self.encode_in_parts(tiles)

    def there(self, features: Features) -> Tensor | None:
        """Which slices of slabs are not missing, (B·D,) bool; None where there are no slabs."""
        return None if self.depth == 1 else features.tensors[0].flatten(1).any(1)

    def _with_gaps(self, tiles: Tensor, there: Tensor) -> Features:
        spec, size = self.encoder.spec, self.to_image.image_size
        *levels, neck = (tiles.new_zeros(len(tiles), level.channels, size // level.stride, size // level.stride)
                         for level in spec.maps)
        features = Features(tuple(levels), neck)
        if there.any():
            for whole, part in zip(features.tensors, self.encode_in_parts(tiles[there]).tensors, strict=True):
                whole[there] = part.to(whole.dtype)
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenSamNetwork:
        """Forgets the features that lie on another device."""
        before = self.encoder.place
        super()._apply(fn, recurse)
        if before != self.encoder.place:
            self.memory.clear()
        return self

    def train(self, mode: bool = True) -> FrozenSamNetwork:
        if mode:
            self.memory.clear()
        super().train(mode)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """nnU-Net's predictor calls this for every fold of every volume."""
        self.memory.weights_loaded(next((value.data_ptr() for value in state_dict.values()), 0))
        return super().load_state_dict(state_dict, *args, **options)

    @uncompiled
    def _predict(self, tiles: Tensor) -> Tensor:
        """Predicts, without the features of other tiles if a device's memory is too small for both."""
        try:
            return self.predict(self.with_neck(self._remembered(tiles)), self.geometry(tiles))
        except torch.OutOfMemoryError:
            if len(self.memory) == 0:
                raise
        self.memory.clear()
        self.memory.budget = 0
        return self._predict(tiles)

    @uncompiled
    def _remembered(self, tiles: Tensor) -> Features:
        """Features of `tiles`, each encoded once per volume. Training draws its tiles anew: nothing to remember."""
        if self.training or torch.is_grad_enabled() or not self.memory.is_open:
            return self.encode_slices(tiles)
        settings = self.encoder.identity, self.encoder.precision(tiles.device), self.to_image.settings
        keys = [content_key(tile, *settings) for tile in tiles.split(1)]
        known = {key: found for key in keys if (found := self.memory.find(key)) is not None}
        new = {key: number for number, key in enumerate(keys) if key not in known}
        if new:
            encoded = self.encode_slices(tiles if len(new) == len(tiles) else tiles[list(new.values())])
            for number, key in enumerate(new):
                part = encoded.part(number)
                known[key] = part if len(new) == 1 else part.map(torch.clone)  # a view would keep its whole batch
                self.memory.keep(key, known[key])
        return Features.joined([known[key] for key in keys])


def mean_over_groups(features: Tensor, groups: int) -> Tensor:
    """Averages what was encoded group by group: (B·G, ...) -> (B, ...)."""
    return features if groups == 1 else features.unflatten(0, (-1, groups)).mean(1)
