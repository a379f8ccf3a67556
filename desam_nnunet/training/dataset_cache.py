"""``desam cache``: builds the store of a data set, as training would, before it."""

from __future__ import annotations

import os

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cache.build import Share
from desam_nnunet.cache.store import Store
from desam_nnunet.cache.views import not_started
from desam_nnunet.networks.frame import FrozenSamNetwork
from desam_nnunet.nnunet.datasets import dataset_folder, read_preprocessed
from desam_nnunet.nnunet.model_folder import build_network, trained_plans
from desam_nnunet.nnunet.names import STOCK_PLANS, TRIAL
from desam_nnunet.settings.resolve import read_sam, resolve_plans
from desam_nnunet.system.machine import limit_threads
from desam_nnunet.training.frozen import FrozenSamTrainer, build_missing, builder_of
from desam_nnunet.training.registry import find_trainer


def planned_for(trainer_name: str, dataset: str) -> str:
    """The name of the plans that ``desam plan`` wrote for a trainer, those of a trial last, or nnU-Net's own."""
    name, folder = find_trainer(trainer_name).method.plans_name, dataset_folder(dataset)
    return next((given for given in (name, name + TRIAL) if (folder / f"{given}.json").is_file()), STOCK_PLANS)


def build_dataset(
    dataset: str, plans_name: str, configuration_name: str, trainer_name: str, device: torch.device, num_parts: int,
    part_id: int,
) -> Store:
    """Encodes all cases of a data set, or every `num_parts`-th of them; under ``torchrun`` each process its share.

    Args:
        trainer_name: Whose augmentation the views show, where there is more than one.

    Raises:
        ValueError: Bad parts, or plans that are not valid.
        FileNotFoundError: The data set is not preprocessed, or the weights are not here.
        OSError: The disk can't hold it.
    """
    if num_parts == 1 and os.environ.keys() >= {"WORLD_SIZE", "RANK", "LOCAL_RANK"}:  # torchrun's
        num_parts, part_id = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)  # else every process also opens the first GPU, and asks it what it can do
    if not 0 <= part_id < num_parts:
        raise ValueError(f"-part_id {part_id} of -num_parts {num_parts} does not exist: parts count from 0.")
    plans, dataset_json, folder = read_preprocessed(dataset, plans_name)
    trainer = find_trainer(trainer_name)
    if not issubclass(trainer, FrozenSamTrainer):
        raise ValueError(f"-tr {trainer_name} does not train on a frozen encoder's features, so it has nothing to "
                         "cache.")
    resolve_plans(plans, configuration_name, dataset_json, trainer.method,
                  trained=trained_plans(plans, configuration_name, trainer_name))
    configuration = PlansManager(plans).get_configuration(configuration_name)
    data_folder = folder / configuration.data_identifier
    if not data_folder.is_dir():
        raise FileNotFoundError(f"{data_folder} does not exist: run nnUNetv2_preprocess -d {dataset} -plans_name "
                                f"{plans_name} -c {configuration_name} first.")
    limit_threads(device)
    network = build_network(plans, dataset_json, configuration_name, trainer_name).to(device).eval()
    assert isinstance(network, FrozenSamNetwork)
    data = infer_dataset_class(str(data_folder))(str(data_folder))
    sam = read_sam(configuration.configuration)
    builder = builder_of(not_started(trainer, configuration, sam), data, sam, network, device)
    build_missing(builder, Share(part_id, num_parts))
    return builder.store
