"""What every encoder of this package is: maps of an image, and how these maps look before it runs.

Source of the idea that a decoder reads intermediate maps and a neck: Gao et al., DeSAM, MICCAI 2024 (SAM's blocks with
global attention); Kirillov et al., Segment Anything, ICCV 2023 (the neck).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from desam_nnunet.encoders.precision import encoder_dtype
from desam_nnunet.encoders.random_weights import drawn

State = dict[str, Tensor]
_PRODUCTS = (nn.Linear, nn.Conv2d)
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 64, 4096


class Level(NamedTuple):
    """A map of an encoder, and its stride: pixels of the input along a side of one of its own, a power of two."""

    channels: int
    stride: int


@dataclass(frozen=True)
class ImageSpec:
    """How an encoder wants its images: square, RGB, padded with zeros at the bottom and right after normalisation.

    Attributes:
        multiple: Of which the input's side is one, in pixels.
        highest: Of the intensities, which begin at 0; `mean` and `std` are in the same units.
        resize: ``bilinear`` (with a filter where images shrink), or ``area``.
        rescale: Whether each image is stretched to its own minimum and maximum once it has been resized.
    """

    multiple: int
    highest: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: str = "bilinear"
    rescale: bool = False


@dataclass(frozen=True)
class FeatureSpec:
    """What an encoder gives for one input size: intermediate maps, shallow to deep, and the neck's, for the prompts."""

    levels: tuple[Level, ...]
    neck: Level
    image: ImageSpec

    def __post_init__(self) -> None:
        odd = [level.stride for level in self.maps if level.stride < 1 or level.stride & (level.stride - 1)]
        if odd:
            raise ValueError(f"An encoder has a map at a stride of {odd[0]} pixels, which doubling does not bring to "
                             "the masks: strides must be powers of two.")

    @property
    def maps(self) -> tuple[Level, ...]:
        """Levels and neck in one row."""
        return (*self.levels, self.neck)

    @property
    def channels(self) -> int:
        """Of all maps together."""
        return sum(level.channels for level in self.maps)

    def values(self, image_size: int) -> int:
        """How many numbers all maps of one image have together."""
        return sum(level.channels * (image_size // level.stride) ** 2 for level in self.maps)


class Features(NamedTuple):
    """The maps that a :class:`FeatureSpec` names, each (B, channels, S / stride, S / stride), S the input's side."""

    levels: tuple[Tensor, ...]
    neck: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Levels and neck in one row."""
        return (*self.levels, self.neck)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Every tensor changed alike."""
        return Features(tuple(map(change, self.levels)), change(self.neck))

    def part(self, number: int, samples: int = 1) -> Features:
        """The `number`-th group of so many samples of a batch, as a batch."""
        return self.map(lambda x: x[number * samples : (number + 1) * samples])

    @staticmethod
    def joined(parts: Sequence[Features]) -> Features:
        """Batches of features as one."""
        if len(parts) == 1:
            return parts[0]
        *levels, neck = (torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True))
        return Features(tuple(levels), neck)

    def sample(self, number: int) -> Features:
        """One sample of a batch, as views without the batch dimension."""
        return self.map(lambda x: x[number])


class Projection(NamedTuple):
    """An attention's linear layer for queries, keys and values: which of its outputs are ``q``, ``k`` and ``v``."""

    attention: nn.Module
    name: str
    rows: Mapping[str, slice | Tensor]


class PlainViT(NamedTuple):
    """A vision transformer taken apart, for methods that work between its blocks.

    Attributes:
        embed: Images (B, 3, S, S) to tokens (B, h, w, D), with D `dim`; blocks keep this shape.
        neck: (B, D, h, w) to the neck's map.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: nn.ModuleList
    neck: nn.Module
    dim: int
    heads: int


class Encoder(nn.Module):
    """A network with frozen weights, always in eval mode. Families say how it is run and what it can be asked for.

    Args:
        identity: Names the weights beyond doubt, see :func:`desam_nnunet.encoders.weights.identify`.

    Attributes:
        dtype: Precision of the matrix products; None, from the start, for what suits the device of the images. What
            comes out is float32 in any case.
    """

    def __init__(self, network: nn.Module, spec: FeatureSpec, identity: str) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.spec = spec
        self.identity = identity
        self.dtype: torch.dtype | None = None
        self._cast: list[Encoder] = []  # at most one, and no submodule
        self.eval()

    def run(self, images: Tensor, *, levels: bool = True, recompute: bool = False) -> Features:
        """Runs the network under the autocast that is in force, with gradients where these are enabled, to float32.

        Args:
            images: (B, 3, S, S), as the spec's image says.
            levels: Whether the intermediate maps are wanted.
            recompute: Whether to save memory by computing again in the backward pass, as far as the network can.
        """
        raise NotImplementedError

    def projections(self) -> list[Projection]:
        """Of every attention, in order; only where the architecture offers ``projections``."""
        raise NotImplementedError

    def plain_vit(self) -> PlainViT:
        """Only where the architecture offers ``plain ViT``."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode, whatever the network around it does."""
        super().train(False)
        return self

    @torch.compiler.disable(recursive=False)  # the choice of the precision is no graph; the blocks are
    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Encodes images (B, 3, S, S) without gradients."""
        with self.autocast(images.device):
            return (self.cast() if images.is_cuda else self).run(images)

    @torch.compiler.disable
    def cast(self) -> Encoder:
        """This encoder with a copy of its products' weights in their precision, which is kept until it moves.

        Autocast keeps the copies of trained weights alone. Of frozen ones it would make them at every call.
        """
        device, stored = self.place
        dtype = self.precision(device)
        if dtype == stored:
            return self
        if not self._cast or self._cast[0].dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._cast[:] = [_with_cast_weights(self, dtype)]
        return self._cast[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        self._cast.clear()
        super()._apply(fn, recurse)
        return self

    def neck(self, images: Tensor, *, recompute: bool = False) -> Tensor:
        """The neck's map alone, in float32, for methods that adapt the encoder; arguments as :meth:`run`."""
        with self.autocast(images.device):
            return self.run(images, levels=False, recompute=recompute).neck

    def autocast(self, device: torch.device) -> torch.autocast:
        """In which the network is computed on `device`."""
        dtype = self.precision(device)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def precision(self, device: torch.device) -> torch.dtype:
        """In which the matrix products are computed on `device`."""
        return self.dtype or encoder_dtype(device)

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and type of the weights."""
        weight = next(self.network.parameters())
        return weight.device, weight.dtype


def _with_cast_weights(encoder: Encoder, dtype: torch.dtype) -> Encoder:
    """Shares everything with `encoder` but the weights of its linear layers and convolutions, the same as autocast's.

    Layers of other types, also derived ones, may compute with their weights before they multiply.
    """
    layers = list(encoder.network.modules())
    products, others = (
        {id(weight): weight for layer in layers if (type(layer) in _PRODUCTS) == is_product
         for weight in layer.parameters(recurse=False)} for is_product in (True, False))
    shared = {id(tensor): tensor for tensor in (*others.values(), *encoder.network.buffers())}
    cast = {key: nn.Parameter(weight.to(dtype), requires_grad=False) for key, weight in products.items()}
    twin = copy.copy(encoder)
    twin._modules = {"network": copy.deepcopy(encoder.network, cast | shared)}
    twin.dtype, twin._cast = dtype, []
    return twin


class LoadedEncoder(NamedTuple):
    """An encoder for one input size, with SAM's prompt encoder and mask decoder; fresh ones where it came without.

    Attributes:
        neck: Fresh, to be trained, where the encoder has none of its own: brings its last map to the prompts' width.
        trained: Whether prompt encoder and mask decoder hold pretrained weights.
    """

    encoder: Encoder
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder
    neck: nn.Module | None = None
    trained: bool = True

    @property
    def prompt_dim(self) -> int:
        """Channels of the prompts and the mask decoder."""
        return self.prompt_encoder.embed_dim


class Architecture(ABC):
    """A network in one size, known before any weights are read; one class per family, which tables name.

    What it `offers` is what adapting methods can ask of it: ``projections``, ``plain ViT``.
    """

    family: ClassVar[str]
    offers: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def spec(self, image_size: int) -> FeatureSpec:
        """What it gives for an input of `image_size` pixels a side."""

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Every key of a weights file, with its shape."""

    @abstractmethod
    def blank(self, image_size: int, identity: str = "") -> LoadedEncoder:
        """With values that mean nothing, on the device and in the mode of tensors that are in force."""

    @abstractmethod
    def load(self, state: State, image_size: int, identity: str) -> LoadedEncoder:
        """With the values of a weights file that has been checked against :meth:`shapes`."""

    def random_state(self) -> State:
        """Random weights, the same on every machine."""
        return drawn(self.shapes())

    def unused(self, key: str) -> bool:
        """Whether files may hold `key`, which nothing here uses."""
        return False

    @property
    def multiple(self) -> int:
        """Of which the input's side is one, in pixels."""
        return self.spec(MIN_IMAGE_SIZE).image.multiple

    def check_image_size(self, size: int) -> None:
        """Refuses a size that it does not take, with a ValueError."""
        if not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE or size % self.multiple:
            raise ValueError(f"The plans' key sam.image_size is {size!r}, but must be a multiple of {self.multiple}, "
                             f"between {MIN_IMAGE_SIZE} and {MAX_IMAGE_SIZE} (attention grows with the fourth power of "
                             "the side).")

    def operations(self, image_size: int) -> int:
        """Of encoding one image, counted on a network without values; a product and its sum are two."""
        with torch.device("meta"):
            encoder = self.blank(image_size).encoder
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            encoder.to_empty(device="cpu").run(torch.empty(1, 3, image_size, image_size))
        return counter.get_total_flops()
