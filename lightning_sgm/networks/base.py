"""What a network is: an ``nn.Module`` that knows shapes, not schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

Spec = dict[str, Any]
"""What the data tell a model: plain numbers, strings and lists, e.g. ``{"kind": "image", "shape": [1, 8, 8], ...}``."""


class Network(nn.Module):
    """Base of all networks: ``network(x, label, **conditions)`` returns a tensor shaped like ``x``.

    ``x`` (B, *) and the noise label (B,) float (whatever the denoiser's preconditioning makes of the time) are
    positional-only, so that a condition may itself be called ``label`` (the class). A subclass takes the ``spec`` of
    the data as first constructor argument and everything else as keywords with defaults; it may then be named on the
    command line without repeating a number.

    Attributes:
        conditions: names of the batch entries which are passed on as keywords; set on the class, or on the instance
            where it depends on constructor arguments.
        classes: K of a network that takes the class ``label``, whose null class is K; 0 otherwise.
    """

    conditions: tuple[str, ...] = ()
    classes: int = 0


class TokenNetwork(Network):
    """Base of the networks for tokens: ``network(x, positions=None, **conditions)``.

    ``x`` is (B, L) long in [0, V], where V is the mask. The answer is the logits of the V real tokens, (B, L, V), or
    (N, V) where ``positions`` (N,) int64, flat indices into B * L, says where they are wanted. There is no noise label:
    the masks tell the network all there is to know about the time (RADD, Theorem 1).
    """


def build(network: Network | Callable[[Spec], Network], spec: Spec) -> Network:
    """The network itself if it is finished, else what the factory makes of ``spec``."""
    return cast(Network, network) if isinstance(network, nn.Module) else network(spec)


def entry(spec: Spec, key: str, user: str) -> Any:
    """``spec[key]``, or a ValueError that names the network ``user`` and the kind of data it was given."""
    if key not in spec:
        raise ValueError(
            f"{user} needs {key!r} in the data's spec, but data of kind {spec.get('kind', 'unknown')!r} have no such "
            f"entry: choose other data or another network"
        )
    return spec[key]


def image_sides(spec: Spec, levels: int, user: str) -> list[tuple[int, int]]:
    """(height, width) of the data's images at each level of a pyramid, every level half of the one before.

    Raises:
        ValueError: if the data are no images or a side cannot be halved as often.
    """
    shape, factor = entry(spec, "shape", user), 2 ** (levels - 1)
    if len(shape) != 3:
        raise ValueError(f"a {user} is for images (C, H, W), got data of shape {list(shape)}: choose MLP, or your own")
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"a {user} of {levels} levels needs image sides divisible by {factor}, got shape {list(shape)}: "
            f"give channels for fewer levels or resize the images"
        )
    return [(shape[1] >> i, shape[2] >> i) for i in range(levels)]


def attended(sides: Sequence[tuple[int, int]], attention: Sequence[int], user: str) -> list[bool]:
    """Whether each level of a pyramid is as high as one of ``attention``; warns of a height that no level has."""
    heights = [height for height, _ in sides]
    if missing := [height for height in attention if height not in heights]:
        warnings.warn(
            f"{user} has no level of height {missing[0]}, so there is no attention for it: its levels are "
            f"{', '.join(map(str, heights))} high",
            stacklevel=3,
        )
    return [height in attention for height in heights]


def class_count(spec: Spec, conditional: bool) -> int:
    """Number of classes a network is to know: that of the data, or 0 without ``conditional``."""
    classes = int(spec.get("classes", 0)) if conditional else 0
    if conditional and not classes:
        raise ValueError("conditional is true but the data have no classes: drop it or choose labelled data")
    return classes
