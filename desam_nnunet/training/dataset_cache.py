"""``desam cache``: builds the store of a data set, as training would, before it."""

from __future__ import annotations

import os

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.cache.build import Share
from desam_nnunet.cache.store import Store
from desam_nnunet.cache.views import not_started
from desam_nnunet.networks.frame import FrozenSamNetwork
from desam_nnunet.nnunet.datasets import dataset_folder, open_cases, read_preprocessed
from desam_nnunet.nnunet.model_folder import build_network, trained_plans
from desam_nnunet.nnunet.names import STOCK_PLANS, TRIAL
from desam_nnunet.settings.resolve import read_sam, resolve_plans
from desam_nnunet.system.machine import limit_threads
from desam_nnunet.training.frozen import FrozenSamTrainer, build_missing, builder_of
from desam_nnunet.training.registry import TRAINERS, find_trainer


def planned_for(trainer_name: str, dataset: str) -> str:
    """The name of the plans that ``desam plan`` wrote for a trainer, those of a trial last, or nnU-Net's own.

    Raises:
        ValueError: It wrote some for other trainers only, whose features they are that training will read.
    """
    folder, own = dataset_folder(dataset), find_trainer(trainer_name).method.plans_name
    known = [own, *(trainer.method.plans_name for trainer in TRAINERS.values() if trainer.method.frozen_features)]
    names = [name + trial for name in dict.fromkeys(known) for trial in ("", TRIAL)]
    others = [name for name in names if (folder / f"{name}.json").is_file()]
    if others and others[0] in (own, own + TRIAL):
        return others[0]
    if others:
        raise ValueError(f"{folder.name} is planned as {', '.join(others)}, but not for {trainer_name}: say whose "
                         f"features are wanted with -p {others[0]} and the trainer, -tr, or plan for {trainer_name}.")
    return STOCK_PLANS


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
    if not isinstance(name := configuration.configuration.get("data_identifier"), str) or not name:
        raise ValueError(f"The plans' key data_identifier of the configuration '{configuration_name}' is {name!r}, but "
                         "must be the name of a folder: restore it, or let nnU-Net plan again.")
    data_folder = folder / configuration.data_identifier
    try:
        data = open_cases(data_folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Run nnUNetv2_preprocess -d {dataset} -plans_name {plans_name} -c "
                                f"{configuration_name} first.") from error
    limit_threads(device)
    network = build_network(plans, dataset_json, configuration_name, trainer_name).to(device).eval()
    assert isinstance(network, FrozenSamNetwork)
    sam = read_sam(configuration.configuration)
    builder = builder_of(not_started(trainer, configuration, sam), data, sam, network, device)
    build_missing(builder, Share(part_id, num_parts))
    return builder.store
