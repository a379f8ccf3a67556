"""What `desam_nnunet.pth` (from Python 3.15 on, `desam_nnunet.start`) runs when Python starts.

nnU-Net looks for trainers in the folders listed in the environment variable nnUNet_extTrainer.
This adds our folder to that list, and does nothing else.
"""

import os

VARIABLE = "nnUNet_extTrainer"


def shipped_folder(name: str) -> str:
    """A folder of ours: inside the package when installed from a wheel, beside it in a checkout."""
    package = os.path.dirname(os.path.abspath(__file__))
    shipped = os.path.join(package, name)
    return shipped if os.path.isdir(shipped) else os.path.join(os.path.dirname(package), name)


def listed_folders() -> list[str]:
    """Those that nnU-Net looks into for trainers, beside its own."""
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def register() -> None:
    """Append our folder once, behind what the user has listed; never raises."""
    try:
        folder, listed = shipped_folder("trainers"), listed_folders()
        if os.path.isdir(folder) and folder not in listed:
            os.environ[VARIABLE] = os.pathsep.join([*listed, folder])
    except (OSError, ValueError):
        return  # an environment that cannot be written must not trouble every Python start
