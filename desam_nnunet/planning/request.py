"""What the user has asked the planner for, with flags and presets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from desam_nnunet.encoders.weights import absolute_encoder
from desam_nnunet.planning.presets import read_preset
from desam_nnunet.settings.sections import Method
from desam_nnunet.training.base import SamTrainer
from desam_nnunet.training.desam import DeSAMTrainer

_MOST = 1_000_000  # GB


@dataclass(frozen=True)
class Request:
    """What the user has asked for; None leaves the choice to the planner.

    Attributes:
        memory_target: GB that training may take.
        disk_target: GB that the cache may take.
        encoder: A name or the path of a weights file.
        preset: A name of :func:`~desam_nnunet.planning.presets.preset_names`.
        trainer: Whose method is planned for.
    """

    memory_target: float | None = None
    disk_target: float | None = None
    encoder: str | None = None
    preset: str | None = None
    trainer: type[SamTrainer] = DeSAMTrainer

    def check(self) -> None:
        """Refuses sizes that no machine has.

        Raises:
            ValueError: Naming the flag.
        """
        for flag, size in (("-gpu_memory_target", self.memory_target), ("-disk_target", self.disk_target)):
            if size is not None and not 0 < size <= _MOST:
                raise ValueError(f"{flag} is {size}, but must be above 0 and at most {_MOST} GB (a million, more than "
                                 "any machine has).")

    @property
    def method(self) -> Method:
        return self.trainer.method

    @cached_property
    def fragment(self) -> dict[str, Any]:
        """The preset's keys.

        Raises:
            ValueError: There is no such preset, or it is another method's.
        """
        if not self.preset:
            return {}
        fragment = read_preset(self.preset)
        if fragment.get("method", self.method.name) != self.method.name:
            raise ValueError(f"The preset '{self.preset}' is for the method {fragment['method']}, but "
                             f"{self.trainer.__name__} trains {self.method.name}: choose another, see desam plan "
                             "--list.")
        return fragment

    @property
    def sam(self) -> dict[str, Any]:
        """What preset and flags say of the section ``sam``; flags go before the preset."""
        given = {"encoder": absolute_encoder(self.encoder)} if self.encoder else {}
        return dict(self.fragment.get("sam", {})) | given
