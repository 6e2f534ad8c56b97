"""Files as Song et al.'s code writes them, with small networks and random weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from lightning_sgm.io.released import configurations
from lightning_sgm.networks import DDPM, NCSNpp
from lightning_sgm.networks.base import Network
from lightning_sgm.recipes import overlay

SMALL = {"channels": [8, 16], "layers_per_block": 1, "attention": [16], "dropout": 0.0}


def recipe(folder: Path, base: str = "paper/score_sde_cifar10_ncsnpp_ve", **arguments: Any) -> Path:
    """A recipe like ``base`` with a small network and few steps; ``arguments`` of the model are changed."""
    model = overlay({"network": {"init_args": SMALL}, "warmup": 2, "test_samples": 4, "metrics": []}, arguments)
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({"base": base, "model": {"init_args": model}}))
    return path


def network(values: dict[str, Any], side: int = 32) -> Network:
    """The network of a recipe's sections for coloured images."""
    part = values["model"]["init_args"]["network"]
    kind = {"NCSNpp": NCSNpp, "DDPM": DDPM}[part["class_path"]]
    return kind({"shape": [3, side, side]}, **part["init_args"])


def random_state(net: Network, seed: int) -> OrderedDict[str, Tensor]:
    """Weights that make every layer count; frequencies small enough for a smooth answer."""
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict((k, 0.2 * torch.randn(v.shape, generator=generator)) for k, v in net.state_dict().items())


def content(
    net: Network, sigma_max: float = 50.0, scales: int = 1000, decay: float = 0.999, seed: int = 0
) -> dict[str, Any]:
    """What such a file holds. Entries of a block stand in another order than ours."""
    raw, average = random_state(net, seed), random_state(net, seed + 1)
    names = [*[n for n in raw if ".0.W" in n], *reversed([n for n in raw if ".0.W" not in n])]
    sigmas = torch.tensor(np.exp(np.linspace(np.log(sigma_max), np.log(0.01), scales)))
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    trained = [name for name in names if name not in frozen]
    # Not a plain number: the warm-up multiplies the learning rate by one of numpy's.
    group = {"lr": 2e-4 * np.minimum(7 / 5000, 1.0), "betas": (0.9, 0.999), "params": list(range(len(names)))}
    return {
        "optimizer": {"state": {0: {"step": 7, "exp_avg": raw[trained[0]]}}, "param_groups": [group]},
        "model": OrderedDict([("module.sigmas", sigmas), *((f"module.{name}", raw[name]) for name in names)]),
        "ema": {"decay": decay, "num_updates": 7, "shadow_params": [average[name] for name in trained]},
        "step": 7,
    }


def write(path: Path, net: Network, **how: Any) -> dict[str, Any]:
    """Write such a file; returns what is in it."""
    held = content(net, **how)
    torch.save(held, path)
    return held


def shrunk(table: dict[str, configurations.Configuration]) -> dict[str, configurations.Configuration]:
    """The table of released models with all their differences, but narrow and shallow."""
    small = {}
    for name, one in table.items():
        given = one.values()["model"]["init_args"]["network"]
        arguments = dict(given["init_args"])
        arguments["channels"] = [max(4, channels // 16) for channels in arguments["channels"]]
        arguments["layers_per_block"] = 2 if arguments["layers_per_block"] == 8 else 1
        part = {"class_path": given["class_path"], "init_args": arguments}
        small[name] = one._replace(changes=overlay(one.changes, {"model": {"init_args": {"network": part}}}))
    return small
