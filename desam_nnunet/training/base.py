"""What every trainer of this package changes in nnU-Net's trainer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from desam_nnunet.augmentation.slabs import slice_by_slice
from desam_nnunet.augmentation.strong import strengthened
from desam_nnunet.encoders.base import Features, ImageSpec
from desam_nnunet.encoders.precision import dtype_name
from desam_nnunet.encoders.registry import OURS, row_by_name
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.networks.frame import Outline, SamNetwork
from desam_nnunet.nnunet.model_folder import trained_plans
from desam_nnunet.sam.slabs import depth_of, slices_of
from desam_nnunet.sam.tiles import TileToImage, ct_window
from desam_nnunet.settings.resolve import read_own, read_sam, resolve_plans
from desam_nnunet.settings.sections import Method, SamSection
from desam_nnunet.system.files import TEMPORARY, replacing
from desam_nnunet.system.machine import check_device, limit_threads
from desam_nnunet.training import checks
from desam_nnunet.training.losses import foreground_target

Batch = dict[str, Any]
Inputs = Tensor | Features | tuple[Tensor, Tensor]
Axes = tuple[int, ...] | None
Trainer = TypeVar("Trainer", bound=nnUNetTrainer)
_GRADIENT_NORM = 12  # nnU-Net's
_MAX_SKIPPED = 50  # in a row; more than CUDA's loss scaling needs to settle


class SamTrainer(nnUNetTrainer):
    """Trains a network on a foundation encoder inside nnU-Net. Subclasses give method, network and loss.

    The plans' sections are resolved before nnU-Net's own ``__init__`` copies them, so that bad settings and
    missing weights end the run at once, and checkpoint and model folder hold every setting.

    Attributes:
        method: What everything else finds of it: its section in the plans, the plans' name, its bounds.
        sam, own: The resolved sections, shared and the method's.
    """

    method: ClassVar[Method]
    own: Any  # of the type that the method says
    network: Any  # nnU-Net's, perhaps inside DDP and torch.compile

    def __init__(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        check_device(device)
        resolve_plans(plans, configuration, dataset_json, self.method,
                      trained=trained_plans(plans, configuration, type(self).__name__))
        super().__init__(plans, configuration, fold, dataset_json, device)
        limit_threads(device)
        resolved = self.configuration_manager.configuration
        self.sam: SamSection = read_sam(resolved)
        self.own = read_own(resolved, self.method)
        self.initial_lr = self.own.lr
        self.num_epochs = self.sam.epochs
        self.num_iterations_per_epoch = self.sam.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.sam.val_iterations_per_epoch
        self.enable_deep_supervision = False
        self.save_every = 1
        self._skipped = 0

    @classmethod
    def build_network(cls, outline: Outline) -> SamNetwork:
        """The method's network, from an encoder and the method's settings."""
        raise NotImplementedError

    @classmethod
    def image_of(cls, spec: ImageSpec) -> ImageSpec:
        """The images that the method wants, from those that the encoder wants: the same."""
        return spec

    @classmethod
    def build_network_architecture(
        cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager, num_input_channels: int,
        num_output_channels: int, enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """As nnU-Net asks for it, in training and in prediction; errors as :func:`outline_from_plans`."""
        return cls.build_network(outline_from_plans(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, cls.method, cls.image_of))

    def get_training_transforms(self, *patch: Any, **data: Any) -> BasicTransform:  # type: ignore[override]
        """nnU-Net's, which is a static method, or what the plans' ``sam.augmentation`` makes of them."""
        transforms = super().get_training_transforms(*patch, **data)
        if self.sam.augmentation == "strong":
            transforms = strengthened(transforms)
        return slice_by_slice(transforms) if self.depth > 1 else transforms

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(  # noqa: N802 - nnU-Net's name
        self,
    ) -> tuple[Any, bool, Any, Axes]:
        """nnU-Net's; a slab is turned, scaled and mirrored in its planes alone, as its slices are one by one."""
        if self.depth == 1:
            return super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        flat = flattened(self)
        rotation, _, plane, axes = flat.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = axes_of_slab(axes)
        return rotation, True, [self.depth, *plane], self.inference_allowed_mirroring_axes

    def compute_loss(self, inputs: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and logits at tile size for nnU-Net's pseudo Dice.

        Args:
            inputs: What :meth:`inputs_of` makes of the batch.
            target: (B, 1 or regions, H, W), as large as the tiles; of slabs, of their slices in a row.
        """
        raise NotImplementedError

    def inputs_of(self, batch: Batch) -> Inputs:
        """The tiles of a batch on the device, (B, C, H, W); of slabs, their slices in a row."""
        if not torch.isfinite(batch["data"]).all():
            raise ValueError(f"A batch from the cases {', '.join(batch['keys'])} holds NaN or infinite values: repair "
                             "or remove the image and preprocess again.")
        return slices_of(batch["data"]).to(self.device, non_blocking=True)

    @property
    def depth(self) -> int:
        """Slices that the network is shown together."""
        return depth_of(self.configuration_manager.patch_size)

    @property
    def target_labels(self) -> LabelManager:
        """What the target that the loss sees means."""
        return self.label_manager

    @property
    def bare_network(self) -> SamNetwork:
        """The network itself, out of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        if isinstance(network, OptimizedModule):
            network = network._orig_mod
        assert isinstance(network, SamNetwork)
        return network

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is no deep supervision to switch."""

    def _do_i_compile(self) -> bool:
        """Only where the user asks for it: nnU-Net's default would compile the data-dependent grid as well."""
        return "nnUNet_compile" in os.environ and super()._do_i_compile()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        folder = Path(self.output_folder)
        checks.check_model_folder(folder.parent, self.configuration_name, self._settings(), self.method)
        training, validation = self.get_tr_and_val_datasets()
        missing = checks.missing_labels(checks.check_cases(training, self.num_input_channels), self.label_manager)
        checks.check_cases(validation, self.num_input_channels)
        precision = dtype_name(self.bare_network.encoder.precision(self.device))
        self.print_to_log_file(f"The encoder {self.sam.encoder} computes in {precision} on {self.device.type}.")
        if missing:
            self.print_to_log_file(f"WARNING: the labels {missing} occur in no training case of this fold.")
        if self.local_rank == 0:
            for rest in folder.glob(f"*checkpoint_*{TEMPORARY}"):  # of a killed process
                rest.unlink(missing_ok=True)
        if self.is_ddp:  # PyTorch begins in every process with the same seed: all would draw the same points and boxes
            torch.manual_seed(torch.initial_seed() + self.local_rank)
        super().on_train_start()

    def train_step(self, batch: Batch) -> dict[str, np.ndarray]:
        self.optimizer.zero_grad(set_to_none=True)
        loss, _, _ = self._evaluate(batch)
        self._step(loss)
        return {"loss": loss.detach().cpu().numpy()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, np.ndarray]]) -> None:
        """Skipped iterations do not enter the epoch's mean loss."""
        losses = np.array([float(output["loss"]) for output in train_outputs])
        finite = np.isfinite(losses)
        if not finite.all():
            self.print_to_log_file(f"WARNING: skipped {(~finite).sum()} iteration(s) whose loss was not finite.")
            mean = losses[finite].mean() if finite.any() else np.nan
            train_outputs = [{"loss": np.asarray(loss)} for loss in np.where(finite, losses, mean)]
        super().on_train_epoch_end(train_outputs)

    def validation_step(self, batch: Batch) -> dict[str, np.ndarray]:
        loss, logits, target = self._evaluate(batch)
        truth, labelled = foreground_target(target, self.target_labels)
        predicted, mask = self._foreground(logits).float(), labelled[:, None].float()
        tp, fp, fn, _ = get_tp_fp_fn_tn(predicted, truth.float(), axes=[0, 2, 3], mask=mask)
        results = {"loss": loss, "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}
        return {key: value.cpu().numpy() for key, value in results.items()}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, out of DDP, whose first forward pass waits for every process: some may have no case."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            self.network = network.module
        super().perform_actual_validation(save_probabilities)
        self.network = network

    def save_checkpoint(self, filename: str) -> None:
        """Writes beside the file and renames, so that a kill never leaves half a checkpoint."""
        with replacing(Path(filename)) as temporary:  # nothing is written on other ranks, nor if that is switched off
            super().save_checkpoint(str(temporary))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Refuses a checkpoint that was trained with other settings than the plans give now."""
        checkpoint = torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False)
        given = checkpoint["init_args"]
        then = checks.settings_of(given["plans"], self.configuration_name, given["dataset_json"], self.method)
        checks.check_same_settings(self._settings(), then, str(filename_or_checkpoint))
        super().load_checkpoint(filename_or_checkpoint)

    def _settings(self) -> dict[str, Any]:
        return checks.settings_of(self.plans_manager.plans, self.configuration_name, self.dataset_json, self.method)

    def _on_device(self, batch: Batch) -> tuple[Inputs, Tensor]:
        return self.inputs_of(batch), slices_of(batch["target"]).to(self.device, non_blocking=True)

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits and target of a batch, under nnU-Net's autocast."""
        inputs, target = self._on_device(batch)
        with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
            return *self.compute_loss(inputs, target), target

    def _step(self, loss: Tensor) -> None:
        """One optimiser step, left out where the gradient is not finite.

        The decision rests on the gradient after DDP has averaged it, so that all ranks decide alike.
        """
        scaler = self.grad_scaler
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), _GRADIENT_NORM)
        finite = bool(torch.isfinite(norm))
        if scaler:
            scaler.step(self.optimizer)  # looks at the gradient itself
            scaler.update()
        elif finite:
            self.optimizer.step()
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped >= _MAX_SKIPPED:
            raise RuntimeError(f"The loss was not finite in {_MAX_SKIPPED} iterations in a row: lower the learning "
                               "rate in the plans, or look for extreme intensities in the data. The last checkpoint is "
                               "kept.")

    def _foreground(self, logits: Tensor) -> Tensor:
        """Predicted foreground classes or regions, (B, K, H, W) bool."""
        if self.target_labels.has_regions:
            return logits > 0
        classes = torch.arange(1, logits.shape[1], device=logits.device)
        return logits.argmax(1, keepdim=True) == classes[:, None, None]


def outline_from_plans(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, num_input_channels: int,
    num_output_channels: int, method: Method, image_of: Callable[[ImageSpec], ImageSpec],
) -> Outline:
    """What a method's network is built from, as resolved sections say; loads the encoder that they name.

    Raises:
        ValueError, FileNotFoundError: Sections that are not resolved or not valid; weights that are not here or
            not those that the model was trained with.
    """
    configuration = configuration_manager.configuration
    section = read_sam(configuration)
    own = read_own(configuration, method)
    loaded = load_encoder(section.encoder, section.image_size, section.identity)
    _warn_of_weights(section)
    window: tuple[tuple[float, float], ...] = ()
    if section.intensity == "window":
        window = ct_window(plans_manager.foreground_intensity_properties_per_channel, num_input_channels)
    to_image = TileToImage(image_of(loaded.encoder.spec.image), section.image_size, section.intensity, window)
    return Outline(loaded, to_image, num_input_channels, num_output_channels, not section.regions, own,
                   depth_of(configuration_manager.patch_size))


def flattened(trainer: Trainer) -> Trainer:
    """A trainer on slabs as it would be on their slices one by one; the rest of both is one."""
    flat = copy.copy(trainer)
    given = trainer.configuration_manager.configuration
    flat.configuration_manager = ConfigurationManager(given | {"patch_size": list(given["patch_size"][-2:])})
    return flat


def axes_of_slab(axes: Axes) -> Axes:
    """The axes of a plane, as axes of a slab."""
    return axes and tuple(axis + 1 for axis in axes)


def _warn_of_weights(section: SamSection) -> None:
    """Of encoders that are not what a user may take them for."""
    row = row_by_name(section.encoder)
    if section.identity.startswith("random:"):
        print(f"Encoder {section.encoder}: RANDOM weights ({section.identity}), not pretrained. Good for tests and "
              "comparisons.")
    elif row is not None and row.distribution == OURS and section.identity == f"md5:{row.md5}":
        print(f"Encoder {section.encoder}: pretrained on generated images, not SAM's own weights.")
