"""The plans' sections parsed, checked and resolved once, before anything else happens.

Everything that we choose and that changes a result stands in these sections of the 2D configuration, and so
in the ``plans.json`` of the model folder.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar, get_type_hints

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.encoders.base import Architecture
from desam_nnunet.encoders.registry import ENCODERS, row_by_name
from desam_nnunet.encoders.sam_vit import SamViT
from desam_nnunet.encoders.weights import check_identity, find_row, identify
from desam_nnunet.sam.tiles import intensity_rule
from desam_nnunet.settings.sections import AS_BEFORE, DEFAULT_ENCODER, Method, SamSection

SAM = Method("sam", SamSection, "")
Section = TypeVar("Section")


def check_keys(name: str, kind: type, given: dict[str, Any]) -> None:
    """Checks the names and types of the keys that are given.

    Raises:
        ValueError: An unknown or ill-typed key; the message lists the valid ones.
    """
    hints = get_type_hints(kind)
    valid = ", ".join(f"{key} ({hints[key].__name__})" for key in hints)
    for key, value in given.items():
        if key not in hints:
            raise ValueError(f"The plans' section '{name}' has an unknown key '{key}'. Valid keys: {valid}.")
        if not _has_type(value, hints[key]):
            raise ValueError(
                f"The plans' key {name}.{key} is {value!r}, but must be of type {hints[key].__name__}. "
                f"Valid keys: {valid}."
            )


def parse_section(name: str, kind: type[Section], given: dict[str, Any]) -> Section:
    """Checks every key and type of a section that is complete but for defaults.

    Raises:
        ValueError: An unknown, missing or ill-typed key; the message lists the valid ones.
    """
    check_keys(name, kind, given)
    missing = [row.name for row in fields(kind)  # type: ignore[arg-type]
               if row.default is MISSING and row.name not in given]
    if missing:
        raise ValueError(
            f"The plans' section '{name}' lacks {', '.join(missing)}: these plans were not resolved by training "
            "with this package."
        )
    return kind(**given)


def read_sam(configuration: dict[str, Any]) -> SamSection:
    """The shared section of a model's configuration."""
    return parse_section(SAM.name, SamSection, given_section(configuration, SAM.name))


def read_own(configuration: dict[str, Any], method: Method) -> Any:
    """The method's section of a model's configuration, of the method's own type."""
    return parse_section(method.name, method.section, as_trained(method, given_section(configuration, method.name)))


def as_trained(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """A section of a trained model: keys that did not exist yet mean what happened before they did."""
    before = {row.name: row.metadata[AS_BEFORE] for row in fields(method.section) if AS_BEFORE in row.metadata}
    return before | given


def resolve_plans(
    plans: dict[str, Any],
    configuration_name: str,
    dataset_json: dict[str, Any],
    method: Method,
    default_encoder: str = DEFAULT_ENCODER,
    trained: dict[str, Any] | None = None,
) -> None:
    """Fills the sections ``sam`` and the method's of one configuration with everything that is not given.

    They are written into `plans`. On stock plans (no section ``sam``) the batch size is lowered as
    well, see :class:`~desam_nnunet.settings.sections.Method`.

    Args:
        plans: nnU-Net's plans, changed in place.
        default_encoder: For plans that name none.
        trained: The plans of a model that these go on with: what they leave open of the keys that are younger than that
            model is as in the model.

    Raises:
        ValueError: A 3D configuration, a section that is not valid, or an encoder that the method can't work on.
        FileNotFoundError: The encoder's weights are not on this machine.
    """
    manager = PlansManager(plans)
    configuration = manager.get_configuration(configuration_name).configuration
    _refuse_3d(manager, configuration_name)
    own = plans["configurations"][configuration_name]
    if "sam" not in configuration:
        own["batch_size"] = min(configuration["batch_size"], method.batch_size)
    regions = manager.get_label_manager(dataset_json).has_regions
    schemes = configuration["normalization_schemes"]
    given = {"encoder": default_encoder} | given_section(configuration, "sam")
    sam = _resolve_sam(given, schemes, regions, method)
    own["sam"] = asdict(sam)
    defaults = method.defaults(sam) | _younger_keys(trained, configuration_name, method)
    own[method.name] = asdict(parse_section(
        method.name, method.section, defaults | given_section(configuration, method.name)))


def _younger_keys(trained: dict[str, Any] | None, configuration_name: str, method: Method) -> dict[str, Any]:
    """What a trained model has for the keys that it may be older than."""
    if trained is None:
        return {}
    section = as_trained(method, given_section(trained["configurations"][configuration_name], method.name))
    return {row.name: section[row.name] for row in fields(method.section) if AS_BEFORE in row.metadata}


def _resolve_sam(given: dict[str, Any], normalization_schemes: list[str], regions: bool, method: Method) -> SamSection:
    own_size = _own_image_size(given["encoder"])
    defaults = {
        "identity": "",
        "image_size": min(own_size, method.image_size or own_size),
        "intensity": intensity_rule(normalization_schemes),
        "regions": regions,
    }
    section = parse_section(SAM.name, SamSection, defaults | given)
    if section.intensity == "window" and intensity_rule(normalization_schemes) != "window":
        raise ValueError(
            f"sam.intensity is 'window', which needs CTNormalization in every channel, but the plans have "
            f"{', '.join(normalization_schemes)}: use 'percentile'."
        )
    if section.regions != regions:
        raise ValueError(f"sam.regions is {section.regions}, but the data set's labels say {regions}: leave it out.")
    identity = identify(section.encoder, section.identity)
    if section.identity:
        check_identity(section.encoder, identity, section.identity)
    architecture = find_row(section.encoder).architecture
    architecture.check_image_size(section.image_size)
    check_offers(section.encoder, architecture, method)
    resolved = asdict(section) | {"identity": identity}
    if not method.frozen_features:
        resolved |= {"features": "online", "views": 1}
    return parse_section(SAM.name, SamSection, resolved)


def _own_image_size(encoder: Any) -> int:
    """The input side that an encoder was trained with; of a file like SAM's, that of SAM, as it always was."""
    row = row_by_name(encoder) if isinstance(encoder, str) else None
    if row is not None or not isinstance(encoder, str):
        return (row or ENCODERS[DEFAULT_ENCODER]).image_size
    try:
        shaped = find_row(encoder)
    except (ValueError, OSError):  # said again, and with what to do, once the section has been checked
        return ENCODERS[DEFAULT_ENCODER].image_size
    return ENCODERS[DEFAULT_ENCODER].image_size if isinstance(shaped.architecture, SamViT) else shaped.image_size


def check_offers(encoder: str, architecture: Architecture, method: Method) -> None:
    """Raises: ValueError: The method asks of the encoder what it does not have; those that have it are named."""
    if method.needs and method.needs not in architecture.offers:
        able = ", ".join(row.name for row in ENCODERS.values() if method.needs in row.architecture.offers)
        raise ValueError(f"The method {method.name} works inside the encoder and needs {method.needs} of it, which "
                         f"'{encoder}' does not have: set sam.encoder to one of {able}.")


def _refuse_3d(manager: PlansManager, name: str) -> None:
    if len(manager.get_configuration(name).patch_size) == 2:
        return
    flat = [other for other in manager.available_configurations
            if len(manager.get_configuration(other).patch_size) == 2]
    raise ValueError(
        f"The configuration '{name}' is 3D, but SAM works on slices: use "
        f"{' or '.join(flat) or 'a 2D configuration (the plans have none)'}."
    )


def given_section(configuration: dict[str, Any], name: str) -> dict[str, Any]:
    """What the plans give of a section, as it stands there."""
    section = configuration.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"The plans' section '{name}' is {section!r}, but must be an object with keys.")
    return section


def _has_type(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
