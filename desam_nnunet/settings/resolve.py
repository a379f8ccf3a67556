"""The plans' sections parsed, checked and resolved once, before anything else happens.

Everything that we choose and that changes a result stands in these sections of the 2D configuration, and so
in the ``plans.json`` of the model folder.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar, get_type_hints

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from desam_nnunet.encoders.registry import VARIANTS
from desam_nnunet.encoders.weights import check_identity, identify
from desam_nnunet.sam.tiles import intensity_rule
from desam_nnunet.settings.sections import (
    DEFAULT_ENCODER,
    METHODS,
    SECTIONS,
    DbsamSection,
    DesamSection,
    Method,
    SamedSection,
    SamSection,
)

_MAX_WARMUP = 250  # iterations, as published

Section = TypeVar("Section", SamSection, DesamSection, SamedSection, DbsamSection)
_NAMES = {kind: name for name, kind in SECTIONS.items()}


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


def parse_section(kind: type[Section], given: dict[str, Any]) -> Section:
    """Checks every key and type of a fully resolved section.

    Raises:
        ValueError: An unknown, missing or ill-typed key; the message lists the valid ones.
    """
    name = _NAMES[kind]
    check_keys(name, kind, given)
    missing = [row.name for row in fields(kind) if row.default is MISSING and row.name not in given]
    if missing:
        raise ValueError(
            f"The plans' section '{name}' lacks {', '.join(missing)}: these plans were not resolved by training "
            "with this package."
        )
    return kind(**given)


def read_section(configuration: dict[str, Any], kind: type[Section]) -> Section:
    """A resolved section of a model's configuration."""
    return parse_section(kind, given_section(configuration, _NAMES[kind]))


def resolve_plans(
    plans: dict[str, Any],
    configuration_name: str,
    dataset_json: dict[str, Any],
    method: str,
    default_encoder: str = DEFAULT_ENCODER,
) -> None:
    """Fills the sections ``sam`` and `method` of one configuration with everything that is not given.

    They are written into `plans`. On stock plans (no section ``sam``) the batch size is lowered as
    well, see :class:`~desam_nnunet.settings.sections.Method`.

    Args:
        plans: nnU-Net's plans, changed in place.
        method: ``desam``, ``samed`` or ``dbsam``.
        default_encoder: For plans that name none.

    Raises:
        ValueError: A 3D configuration, or a section that is not valid.
        FileNotFoundError: The encoder's weights are not on this machine.
    """
    manager = PlansManager(plans)
    configuration = manager.get_configuration(configuration_name).configuration
    _refuse_3d(manager, configuration_name)
    own = plans["configurations"][configuration_name]
    if "sam" not in configuration:
        own["batch_size"] = min(configuration["batch_size"], METHODS[method].batch_size)
    regions = manager.get_label_manager(dataset_json).has_regions
    schemes = configuration["normalization_schemes"]
    given = {"encoder": default_encoder} | given_section(configuration, "sam")
    sam = _resolve_sam(given, schemes, regions, METHODS[method])
    own["sam"] = asdict(sam)
    own[method] = asdict(parse_section(
        METHODS[method].section, _method_defaults(method, sam) | given_section(configuration, method)))


def _resolve_sam(given: dict[str, Any], normalization_schemes: list[str], regions: bool, method: Method) -> SamSection:
    known = VARIANTS.get(given["encoder"]) if isinstance(given["encoder"], str) else None
    own_size = (known or VARIANTS[DEFAULT_ENCODER]).image_size
    defaults = {
        "identity": "",
        "image_size": min(own_size, method.image_size or own_size),
        "intensity": intensity_rule(normalization_schemes),
        "regions": regions,
    }
    section = parse_section(SamSection, defaults | given)
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
    resolved = asdict(section) | {"identity": identity}
    if not method.frozen_features:
        resolved |= {"features": "online", "views": 1}
    return parse_section(SamSection, resolved)


def _method_defaults(method: str, sam: SamSection) -> dict[str, Any]:
    """What a method's defaults take from the shared section."""
    return {"warmup": min(_MAX_WARMUP, sam.iterations // 10)} if method == "samed" else {}


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
    section = configuration.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"The plans' section '{name}' is {section!r}, but must be an object with keys.")
    return section


def _has_type(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
