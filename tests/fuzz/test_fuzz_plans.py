"""Plans with keys and values that nobody would write."""

from __future__ import annotations

import copy
import json
from typing import Any

from fuzzing import JSON, outcome
from hypothesis import given
from hypothesis import strategies as st
from test_config import DATASET, make_plans
from test_plan import FINGERPRINT, ORGAN, PLANS_OF_AN_UNET

from desam_nnunet.planning.facts import read_facts
from desam_nnunet.settings.resolve import resolve_plans
from desam_nnunet.settings.sections import SECTIONS
from desam_nnunet.training.registry import TRAINERS

METHODS = sorted({trainer.method.name: trainer.method for trainer in TRAINERS.values()}.values(),
                 key=lambda method: method.name)
OWN = {method.name: list(method.section.__dataclass_fields__) for method in METHODS}
SAM = ["encoder", "identity", "image_size", "intensity", "regions", "features", "views", "augmentation",
       "view_geometry", "cache_dtype", "epochs", "iterations_per_epoch", "val_iterations_per_epoch"]
STOCK = ["batch_size", "patch_size", "normalization_schemes", "architecture", "inherits_from"]


SECTIONS_AS_THEY_ARE = set(SECTIONS)


def all_spellings(name: str) -> set[str]:
    """As :func:`spelt` draws them."""
    places = range(len(name))
    return {name, name.upper(), name.capitalize(), *(name[:i] + name[i + 1 :] for i in places),
            *(name[:i] + name[i] + name[i:] for i in places), *(name[:i] + "x" + name[i + 1 :] for i in places)}


MISSPELT = set().union(*map(all_spellings, SECTIONS))


def spelt(name: str) -> st.SearchStrategy[str]:
    """A section's name as it is, and with one letter changed, left out, doubled or in capitals."""
    return st.sampled_from(sorted(all_spellings(name)))


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, Any], Any]:
    """Valid plans with up to three changes, and the method that is trained on them."""
    method = draw(st.sampled_from(METHODS))
    made = make_plans(sam={"encoder": "vit_tiny"})
    configuration = made["configurations"]["2d"]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["sam", "own", "stock", "lost", "top", "section", "level", "anything"]))
        if kind == "sam":
            configuration.setdefault("sam", {})[draw(st.sampled_from(SAM))] = draw(JSON)
        elif kind == "own":
            configuration.setdefault(method.name, {})[draw(st.sampled_from(OWN[method.name]))] = draw(JSON)
        elif kind == "stock":
            configuration[draw(st.sampled_from(STOCK))] = draw(JSON)
        elif kind == "lost":
            configuration.pop(draw(st.sampled_from(STOCK)), None)
        elif kind == "top":
            place = draw(st.sampled_from([made, made["configurations"]]))
            place[draw(st.sampled_from([key for key in place if key not in ("2d", "configurations")]))] = draw(JSON)
        elif kind == "section":
            name = draw(st.sampled_from(SECTIONS).flatmap(spelt))
            configuration[name] = draw(st.one_of(JSON, st.just({"encoder": "vit_tiny"}), st.just({"lr": 1e-3})))
        elif kind == "level":
            place = draw(st.sampled_from([made, made["configurations"]]))
            place[draw(st.sampled_from(SECTIONS).flatmap(spelt))] = {"epochs": 3}
        else:
            section = configuration.setdefault(draw(st.sampled_from(["sam", method.name])), {})
            section[draw(st.text(max_size=6))] = draw(JSON)
        if not all(isinstance(configuration.get(name, {}), dict) for name in ("sam", method.name)):
            break  # nothing more can be put into it
    return made, method


@given(plans())
def test_plans_mean_what_they_say_or_are_refused(drawn: tuple[dict[str, Any], Any]) -> None:
    """Accepted is only what every key of ours has been read of, with the value that was given."""
    given_plans, method = drawn
    resolved = copy.deepcopy(given_plans)
    if outcome(lambda: resolve_plans(resolved, "2d", DATASET, method) or True) is None:
        return
    said, means = given_plans["configurations"]["2d"], resolved["configurations"]["2d"]
    filled_in = {"identity"} if method.frozen_features else {"identity", "features", "views"}
    for name in ("sam", method.name):
        for key, value in said.get(name, {}).items():
            assert key in filled_in or json.dumps(means[name][key]) == json.dumps(value), key
    assert not (set(said) - SECTIONS_AS_THEY_ARE) & MISSPELT
    assert not [key for key in (*given_plans, *given_plans["configurations"]) if key in MISSPELT]


NUMBERS = st.one_of(JSON, st.lists(st.lists(st.one_of(st.integers(-2, 10**6), st.floats()), min_size=3, max_size=3),
                                   min_size=1, max_size=2))
LABELS = st.one_of(JSON, st.dictionaries(st.sampled_from(["background", "organ", "ignore", "x"]), st.one_of(
    st.integers(-1, 3), JSON, st.lists(st.integers(0, 3), max_size=3)), max_size=4))


@given(st.fixed_dictionaries({}, optional={"shapes_after_crop": NUMBERS, "spacings": NUMBERS}),
       st.fixed_dictionaries({}, optional={"labels": LABELS, "channel_names": JSON, "regions_class_order": JSON}))
def test_what_the_planner_reads_of_nnunets_files(fingerprint: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Facts are those of the files, in few steps whatever they say."""
    given_fingerprint, given_dataset = FINGERPRINT | fingerprint, ORGAN | dataset
    facts = outcome(lambda: read_facts(copy.deepcopy(PLANS_OF_AN_UNET), given_dataset, given_fingerprint))
    if facts is None:
        return
    assert [shape[0] for shape in facts.shapes] == [shape[0] for shape in given_fingerprint["shapes_after_crop"]]
    assert facts.channels == len(given_dataset["channel_names"])
    assert facts.tiles((64, 64)) >= sum(shape[0] for shape in facts.shapes)
