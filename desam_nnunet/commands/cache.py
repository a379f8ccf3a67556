"""The words of ``desam cache``."""

from __future__ import annotations

import argparse

from desam_nnunet.commands.words import Commands, add_command, add_device, columns, device_named

_NO_STORE = "There is no store of this data set."


def add(commands: Commands) -> None:
    """Adds the command."""
    cache = add_command(commands, "cache", _run, "encode a data set once, so that training reads features from disk")
    cache.add_argument("-d", required=True, help="data set, name or id")
    cache.add_argument("-p", help="plans (default: those of desam plan for the trainer, or else nnUNetPlans)")
    cache.add_argument("-c", default="2d", help="configuration (default: 2d)")
    cache.add_argument("-tr", default="DeSAMTrainer", help="whose augmentation sam.views show (default: DeSAMTrainer)")
    add_device(cache)
    cache.add_argument("-num_parts", type=int, default=1, help="share the cases among so many machines or GPUs")
    cache.add_argument("-part_id", type=int, default=0, help="which share this is, from 0")
    other = cache.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="say which stores there are, and how large")
    other.add_argument("--verify", action="store_true", help="read every byte; remove what is damaged")
    other.add_argument("--delete", nargs="?", const="", metavar="STORE", help="remove one store, or all of them")


def _run(options: argparse.Namespace) -> None:
    from desam_nnunet.cache import manage

    if options.list:
        rows, heads = manage.describe_stores(options.d), [name.replace("_", " ") for name in manage.Row._fields]
        lines = [*manage.unreadable_stores(options.d), *(columns([heads, *rows]) if rows else [])]
        print("\n".join(lines) or _NO_STORE)
    elif options.verify:
        print("\n".join(manage.verify_stores(options.d)) or _NO_STORE)
    elif options.delete is not None:
        for folder in manage.delete_stores(options.d, options.delete or None):
            print(f"Removed {folder}")
    else:
        from desam_nnunet.training.dataset_cache import build_dataset, planned_for

        device = device_named(options.device)
        plans = options.p or planned_for(options.tr, options.d)
        store = build_dataset(options.d, plans, options.c, options.tr, device, options.num_parts, options.part_id)
        print(f"{store.folder}: {store.size() / 1e9:.2f} GB, {len(store.cases())} case(s)")
