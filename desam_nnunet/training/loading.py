"""SAM as a model's plans name it, for every trainer's network."""

from __future__ import annotations

from typing import NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from desam_nnunet.encoders.weights import LoadedSam, load_sam
from desam_nnunet.sam.tiles import TileToImage, ct_window
from desam_nnunet.settings.resolve import read_section
from desam_nnunet.settings.sections import SamSection


class PlannedSam(NamedTuple):
    """Attributes: section: Resolved. sam: With the weights that the section names. to_image: By its rules."""

    section: SamSection
    sam: LoadedSam
    to_image: TileToImage


def sam_from_plans(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, num_input_channels: int, *,
    normalise: bool = True,
) -> PlannedSam:
    """Args:
        normalise: See :class:`~desam_nnunet.sam.tiles.TileToImage`.

    Raises:
        ValueError, FileNotFoundError: Sections that are not resolved or not valid; weights that are not here or
            not those that the model was trained with.
    """
    section = read_section(configuration_manager.configuration, SamSection)
    sam = load_sam(section.encoder, section.image_size, section.identity)
    if sam.random:
        print(f"Encoder {section.encoder}: RANDOM weights ({section.identity}), not pretrained. Good for tests and "
              "comparisons.")
    elif section.identity == f"md5:{sam.variant.md5}" and sam.variant.packaged:
        print(f"Encoder {section.encoder}: pretrained on generated images, not SAM's own weights.")
    window: tuple[tuple[float, float], ...] = ()
    if section.intensity == "window":
        window = ct_window(plans_manager.foreground_intensity_properties_per_channel, num_input_channels)
    return PlannedSam(section, sam, TileToImage(section.image_size, section.intensity, window, normalise=normalise))
