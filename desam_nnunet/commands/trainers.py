"""The words of ``desam trainers``."""

from __future__ import annotations

from desam_nnunet._startup import shipped_folder
from desam_nnunet.commands.words import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command."""
    add_command(commands, "trainers", lambda _: print(shipped_folder("trainers")),
                "print the folder for the environment variable nnUNet_extTrainer")
