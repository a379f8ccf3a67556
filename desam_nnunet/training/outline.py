"""What a method's network is built from, as a model's plans name it."""

from __future__ import annotations

from collections.abc import Callable

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from desam_nnunet.encoders.base import ImageSpec
from desam_nnunet.encoders.registry import OURS, row_by_name
from desam_nnunet.encoders.weights import load_encoder
from desam_nnunet.networks.frame import Outline
from desam_nnunet.sam.tiles import TileToImage, ct_window
from desam_nnunet.settings.resolve import read_own, read_sam
from desam_nnunet.settings.sections import Method, SamSection


def outline_from_plans(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, num_input_channels: int,
    num_output_channels: int, method: Method, image_of: Callable[[ImageSpec], ImageSpec],
) -> Outline:
    """Reads the resolved sections and loads the encoder that they name.

    Args:
        image_of: The images that the method wants, from those that the encoder wants.

    Raises:
        ValueError, FileNotFoundError: Sections that are not resolved or not valid; weights that are not here or
            not those that the model was trained with.
    """
    configuration = configuration_manager.configuration
    section = read_sam(configuration)
    own = read_own(configuration, method)
    loaded = load_encoder(section.encoder, section.image_size, section.identity)
    _say_what_it_is(section)
    window: tuple[tuple[float, float], ...] = ()
    if section.intensity == "window":
        window = ct_window(plans_manager.foreground_intensity_properties_per_channel, num_input_channels)
    to_image = TileToImage(image_of(loaded.encoder.spec.image), section.image_size, section.intensity, window)
    return Outline(loaded, to_image, num_input_channels, num_output_channels, not section.regions, own)


def _say_what_it_is(section: SamSection) -> None:
    """Of encoders that are not what a user may take them for."""
    row = row_by_name(section.encoder)
    if section.identity.startswith("random:"):
        print(f"Encoder {section.encoder}: RANDOM weights ({section.identity}), not pretrained. Good for tests and "
              "comparisons.")
    elif row is not None and row.distribution == OURS and section.identity == f"md5:{row.md5}":
        print(f"Encoder {section.encoder}: pretrained on generated images, not SAM's own weights.")
