"""The models of Song et al. 2021 (2011.13456) whose weights can be imported, as recipes and what differs from them.

Their names are those of the authors' configuration files and download folders. Standard library only: the command
line's help lists them.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from lightning_sgm.recipes import content, overlay

NETWORKS = ("NCSNpp", "DDPM")
_SIDES = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "cifar10": 32}


class Configuration(NamedTuple):
    """A recipe, what is laid over its sections, and the images' side where the recipe's data are not the model's."""

    recipe: str
    changes: dict[str, Any]
    size: int | None = None

    def values(self) -> dict[str, Any]:
        """The sections model, data and ema of the whole recipe; no data where only their ``size`` is known."""
        values = overlay(content(self.recipe), self.changes)
        if self.size is not None:
            values.pop("data", None)
        return values


def _changes(network: Any = None, ema: float | None = None, **arguments: Any) -> dict[str, Any]:
    """Changes of the model's arguments, of the network's among them, and of the EMA's decay."""
    if network:
        arguments["network"] = network
    changes: dict[str, Any] = {"model": {"init_args": arguments}}
    return changes if ema is None else {**changes, "ema": {"decay": ema}}


def _arguments(**arguments: Any) -> dict[str, Any]:
    return {"init_args": arguments}


_VE, _VP, _SUBVP = (f"paper/score_sde_cifar10_{name}" for name in ("ncsnpp_ve", "ddpmpp_vp", "ddpmpp_subvp"))
_DDPM, _CELEBA = "paper/score_sde_cifar10_ddpm", "paper/score_sde_celeba_ncsnpp_ve"


def _cifar(class_path: str, layers_per_block: int, **arguments: Any) -> dict[str, Any]:
    """A whole network for CIFAR-10, in place of a recipe's of another class."""
    sizes = {"channels": [128, 256, 256, 256], "layers_per_block": layers_per_block, "attention": [16], "dropout": 0.1}
    return {"class_path": class_path, **_arguments(**sizes, **arguments)}


_RESIDUAL: dict[str, Any] = {"fir": True, "input_pyramid": "residual"}
_DEEP, _NCSNPP = _arguments(layers_per_block=8), _arguments(**_RESIDUAL)
_DEEP_NCSNPP = overlay(_DEEP, _NCSNPP)
_OLD = _cifar("DDPM", 2)
_DDPM_256 = _changes(_arguments(channels=[128, 128, 256, 256, 512, 512], dropout=0.0), optimizer=_arguments(lr=2e-5))
_SMLD: dict[str, Any] = {
    "process": {"class_path": "SMLDChain", **_arguments(sigma_min=0.02, sigma_max=100)},
    "preconditioning": _arguments(label="index"),
    "objective": _arguments(times="ChainTimes"),
    "sampler": _arguments(grid="ChainGrid", finish="clean"),
}
_SKIP = _arguments(
    channels=[128, 128, 256, 256, 256, 256, 256],
    layers_per_block=2,
    dropout=0.0,
    input_pyramid="input_skip",
    output_pyramid="output_skip",
)
_SKIP_1024 = overlay(_SKIP, _arguments(channels=[16, 32, 64, 128, 256, 512, 512, 512], layers_per_block=1))


def _large(sigma_max: float, network: Any = _SKIP, snr: float = 0.075, ema: float = 0.999) -> dict[str, Any]:
    """A VE model of large images; ``sigma_max`` for images in [0, 1], as they name it."""
    return _changes(
        network,
        ema,
        process=_arguments(sigma_max=2 * sigma_max),
        sampler=_arguments(steps=2000, before=[{"class_path": "Langevin", **_arguments(snr=snr)}]),
    )


CONFIGURATIONS: dict[str, Configuration] = {
    "ve/cifar10_ncsnpp": Configuration(_VE, _changes(_arguments(embedding="positional"), **_SMLD)),
    "ve/cifar10_ncsnpp_continuous": Configuration(_VE, {}),
    "ve/cifar10_ncsnpp_deep_continuous": Configuration(_VE, _changes(_DEEP)),
    "ve/cifar10_ddpm": Configuration(_VE, _changes(_OLD, **_SMLD)),
    "ve/celeba_ncsnpp": Configuration(_CELEBA, {}),
    "ve/bedroom_ncsnpp_continuous": Configuration(_VE, _large(378), 256),
    "ve/church_ncsnpp_continuous": Configuration(_VE, _large(380), 256),
    "ve/ffhq_256_ncsnpp_continuous": Configuration(_VE, _large(348), 256),
    "ve/celebahq_256_ncsnpp_continuous": Configuration(_VE, _large(348), 256),
    "ve/ffhq_1024_ncsnpp_continuous": Configuration(
        _VE, overlay(_large(1348, _SKIP_1024, 0.15, 0.9999), _changes(objective=_arguments(reduction="mean"))), 1024
    ),
    "vp/cifar10_ddpm": Configuration(_DDPM, {}),
    "vp/cifar10_ddpm_continuous": Configuration(_VP, _changes(_OLD)),
    "vp/cifar10_ddpmpp": Configuration(_DDPM, _changes(_cifar("NCSNpp", 4))),
    "vp/cifar10_ddpmpp_continuous": Configuration(_VP, {}),
    "vp/cifar10_ddpmpp_deep_continuous": Configuration(_VP, _changes(_DEEP)),
    "vp/cifar10_ncsnpp": Configuration(
        _DDPM, _changes(_cifar("NCSNpp", 4, **_RESIDUAL), sampler=_arguments(rule="ReverseDiffusion"))
    ),
    "vp/cifar10_ncsnpp_continuous": Configuration(_VP, _changes(_NCSNPP)),
    "vp/cifar10_ncsnpp_deep_continuous": Configuration(_VP, _changes(_DEEP_NCSNPP)),
    **{f"vp/ddpm/{name}": Configuration(_DDPM, _DDPM_256, 256) for name in ("bedroom", "church", "celebahq")},
    "subvp/cifar10_ddpm_continuous": Configuration(_SUBVP, _changes(_OLD)),
    "subvp/cifar10_ddpmpp_continuous": Configuration(_SUBVP, {}),
    "subvp/cifar10_ddpmpp_deep_continuous": Configuration(_SUBVP, _changes(_DEEP)),
    "subvp/cifar10_ncsnpp_continuous": Configuration(_SUBVP, _changes(_NCSNPP)),
    "subvp/cifar10_ncsnpp_deep_continuous": Configuration(_SUBVP, _changes(_DEEP_NCSNPP)),
}
"""By name."""


def named(name: str) -> dict[str, Any]:
    """Sections of a model in ``CONFIGURATIONS``, or of a recipe of the user's own with a network of this family.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the recipe has another network.
    """
    if name in CONFIGURATIONS:
        return CONFIGURATIONS[name].values()
    try:
        values = content(name)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(name, CONFIGURATIONS, n=3, cutoff=0.4)
        raise FileNotFoundError(
            f"there is no model and no recipe {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else "`import --help` lists the models")
        ) from error
    if network_class(values) not in NETWORKS:
        raise ValueError(
            f"weights of the score SDE code fit {' or '.join(NETWORKS)}, but the network of {name} is "
            f"{network_class(values) or 'not given'}"
        )
    return values


def network_class(values: dict[str, Any]) -> str:
    """Short name of the network's class; "" where there is none."""
    try:
        return str(values["model"]["init_args"]["network"]["class_path"]).rpartition(".")[2]
    except (KeyError, TypeError):
        return ""


def side(name: str, values: dict[str, Any]) -> int:
    """Side of the images of a model, or of the data of a recipe.

    Raises:
        ValueError: the recipe does not say.
    """
    if name in CONFIGURATIONS and (size := CONFIGURATIONS[name].size):
        return size
    data = values.get("data", {}).get("init_args", {})
    found = data.get("size") or (None if data.get("path") else _SIDES.get(data.get("dataset", "digits")))
    if found is None:
        raise ValueError(f"{name} does not say how large the images are: set data.size")
    return int(found)
