"""Label maps of nothing in particular: cut-up grounds, bodies with a shell, and solids, shells and tubes in them.

After Billot et al., SynthSeg, Medical Image Analysis 86, 2023, and Hoffmann et al., SynthMorph, IEEE TMI 41, 2022,
who learn to segment from images of random shapes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from desam_nnunet.augmentation.randomness import Randomness

AIR, SHELL = 0, 1  # around a body, and its outermost layer
_TISSUES = 4  # the ground is cut into
GROUNDS = 2 + _TISSUES
_DRAWN = 10  # objects, at most, one over the other
OBJECTS = 2 * _DRAWN  # an object may have a twin on the other side
LABELS = GROUNDS + OBJECTS
_KINDS = (0.6, 0.2, 0.2)  # how often solid, shell and tube


def draw_labels(random: Randomness, number: int, size: int) -> Tensor:
    """(B, S, S), from 0: :data:`AIR`, :data:`SHELL`, the other grounds, then objects from :data:`GROUNDS` on."""
    line = (torch.arange(size, device=random.device) + 0.5) / size * 2 - 1
    places = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(number, -1, -1, -1)  # y and x, -1 to 1
    body = random.chance(0.6, number, 1, 1)
    labels = _ground(random, number, size)
    mild = random.uniform(0, 0.08, number, 1, 1, 1) * random.smooth(number, 2, size, coarsest=2, finest=4)
    labels = _with_body(random, labels, places + mild, body)
    strength = 0.2 * random.uniform(0, 1, number, 1, 1, 1) * random.uniform(0, 1, number, 1, 1, 1)
    strong = strength * random.smooth(number, 2, size, coarsest=2, finest=16)
    return _with_objects(random, labels, places + strong, body)


def _ground(random: Randomness, number: int, size: int) -> Tensor:
    """(B, S, S): a partition into tissues, which may each lie in several places."""
    fields = random.smooth(number, _TISSUES, size, coarsest=2, finest=8)
    fields = fields + random.uniform(-1.5, 1.5, number, _TISSUES, 1, 1)
    labels, highest = torch.full_like(fields[:, 0], 2, dtype=torch.long), fields[:, 0]
    for tissue in range(1, _TISSUES):  # several times as fast as argmax over so few
        labels = torch.where(fields[:, tissue] > highest, 2 + tissue, labels)
        highest = highest.maximum(fields[:, tissue])
    return labels


def _with_body(random: Randomness, labels: Tensor, places: Tensor, body: Tensor) -> Tensor:
    """Air around a large ellipse, and a layer of one tissue under its surface."""
    number = len(labels)
    centre = random.uniform(-0.15, 0.15, 2, number, 1, 1)
    radius = random.uniform(0.6, 1.3, 2, number, 1, 1)
    distance = _ellipse(places - centre.transpose(0, 1), radius, random.uniform(0, 0.7, number, 1, 1))
    thickness = random.uniform(0, 0.25, number, 1, 1)
    labels = torch.where(body & (distance > 1 - thickness), SHELL, labels)
    return torch.where(body & (distance > 1), AIR, labels)


def _with_objects(random: Randomness, labels: Tensor, places: Tensor, body: Tensor) -> Tensor:
    number = len(labels)
    count = random.uniform(1, _DRAWN + 1, number, 1, 1)
    inside = ~body | (labels > SHELL)
    previous, previous_radius = places.new_zeros(number, 2, 1, 1), places.new_ones(number, 2, 1, 1)
    for index in range(_DRAWN):
        near = random.chance(0.3, number, 1, 1, 1)  # to the object before, perhaps in it
        centre = torch.where(near, previous + 0.7 * previous_radius * random.uniform(-1, 1, number, 2, 1, 1),
                             random.uniform(-0.8, 0.8, number, 2, 1, 1))
        smaller = torch.where(near, 0.6, 1.0)
        radius = smaller * random.log_uniform(0.06, 0.6, number, 2, 1, 1)
        twin = random.chance(0.25, number, 1, 1)
        shape, apart = _object(random, places, centre, radius, twin)
        number_of_object = GROUNDS + index + _DRAWN * (apart & (places[:, 1] < 0))
        labels = torch.where(shape & inside & (index < count), number_of_object, labels)
        previous, previous_radius = centre, radius
    return labels


def _object(random: Randomness, places: Tensor, centre: Tensor, radius: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
    """A solid, a shell or a tube in each image, (B, S, S) bool, some of them mirrored.

    And whether the two mirrored halves are apart, (B, 1, 1); else they are one object.
    """
    number = len(places)
    angle = random.uniform(0, math.pi, number, 1, 1)
    y = places[:, 0] - centre[:, 0]
    x = torch.where(twin, places[:, 1].abs() - centre[:, 1].abs(), places[:, 1] - centre[:, 1])
    along, across = y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()
    distance = _ellipse(torch.stack([along, across], 1), radius.transpose(0, 1), random.uniform(0, 1, number, 1, 1))
    rim = random.uniform(0.08, 0.35, number, 1, 1)
    bend, start = random.uniform(1, 5, number, 1, 1), random.uniform(0, 2 * math.pi, number, 1, 1)
    swing = random.uniform(0, 0.3, number, 1, 1) * torch.sin(bend * along + start)
    width, length = random.uniform(0.02, 0.08, number, 1, 1), random.uniform(0.3, 2, number, 1, 1)
    kind = random.uniform(0, 1, number, 1, 1)
    solid, shell = distance < 1, (distance - 1).abs() < rim
    tube = ((across - swing).abs() < width) & (along.abs() < length)
    is_solid, is_tube = kind < _KINDS[0], kind >= _KINDS[0] + _KINDS[1]
    reach = torch.where(is_tube, length + 0.4, 2**0.5 * radius.amax(1) * (1 + rim))
    shape = torch.where(is_solid, solid, torch.where(is_tube, tube, shell))
    return shape, twin & (centre[:, 1].abs() > reach)


def _ellipse(offsets: Tensor, radius: Tensor, squareness: Tensor) -> Tensor:
    """1 on the border: an ellipse (squareness 0), a rounded rectangle (1), or between.

    Args:
        offsets: From the centre, (B, 2, S, S).
        radius: (2, B, 1, 1).
    """
    first, second = offsets[:, 0] / radius[0], offsets[:, 1] / radius[1]
    first, second = first * first, second * second
    round_, square = first + second, (first * first + second * second).sqrt()
    return (round_ + squareness * (square - round_)).sqrt()
