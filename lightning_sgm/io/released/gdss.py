"""Weights of GDSS's code (Jo et al. 2022, 2202.02514): its ``.pth`` files, or .safetensors beside a .json.

A ``.pth`` holds the configuration (as EasyDict, which is read as a plain dict), the constructor arguments and weights
of both networks, and of graph sets also their averages, as lists in the order of the parameters.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_sgm.io.checkpoint import read_file
from lightning_sgm.io.released.gdss_sizes import node_counts
from lightning_sgm.io.released.gdss_weights import from_released
from lightning_sgm.io.released.model import Imported, State
from lightning_sgm.io.tensors import read_json, read_safetensors
from lightning_sgm.networks import GraphScore

_KIND = "weights of GDSS"
_PARTS = ("x", "adj")
_ATOMS = {4: ["C", "N", "O", "F"], 9: ["C", "N", "O", "F", "P", "S", "Cl", "Br", "I"]}
# What their molecules' files leave out, from the authors' configurations: snr and scale_eps by set and network.
_MOLECULE_SAMPLERS = {
    ("QM9", "gcn"): (0.2, 0.7),
    ("ZINC250k", "gcn"): (0.2, 0.9),
    ("ZINC250k", "attention"): (0.2, 0.8),
}
_MOLECULES = (0.2, 0.7)  # of other sets
_PROCESSES = {"VP": ("VP", "beta"), "subVP": ("SubVP", "beta"), "VE": ("VE", "sigma")}


class _Found(NamedTuple):
    """What a file holds: settings, arguments and weights of both networks by part."""

    settings: dict[str, Any]
    arguments: dict[str, dict[str, Any]]
    raw: State
    averaged: State
    updates: int


def import_gdss(path: Path, model: str | None = None) -> Imported:
    """The weights of a .pth file, or of a .safetensors file with its .json beside it.

    Sampling uses the averages where the authors do. The numbers of nodes to sample are those of their training sets;
    with ``--data`` of your own, ``test`` and ``fit`` take those of your graphs.

    Args:
        path: the file.
        model: not used: the files tell everything.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or something else, or has an architecture that is unknown here.
    """
    if model is not None:
        raise ValueError("files of GDSS tell what model they are of: leave out --model")
    found = _safetensors(path) if path.suffix == ".safetensors" else _pth(path)
    try:
        section, approximate = _section(found)
        spec, arguments = section["init_args"]["spec"], section["init_args"]["network"]["init_args"]
        # Files of molecules say nothing about sampling; their configurations for it have use_ema false.
        average = bool(found.averaged) and bool(found.settings.get("sample", {}).get("use_ema", False))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not {_KIND} or is damaged: its settings lack {error}") from error
    network = GraphScore(spec, **arguments)
    raw = from_released(found.raw, network)
    weights = from_released(found.averaged, network) if average else raw
    about = [
        f"read: {path}, {found.settings['data']['data']}, weights "
        + (
            "averaged over training, as the authors sample"
            if average
            else "as training left them, as the authors sample"
        )
    ]
    if approximate:
        about.append("numbers of nodes: approximate, as the authors' training set is not at hand; --data tells them")
    named = [{f"network.{name}": tensor for name, tensor in state.items()} for state in (weights, raw)]
    return Imported(section, None, named[0], named[1] if average else {}, found.updates if average else 0, about)


def _pth(path: Path) -> _Found:
    trusted = [(collections.OrderedDict, "easydict.EasyDict")]
    held = read_file(path, _KIND, trusted, map_location="cpu")
    wanted = ("model_config", "params_x", "params_adj", "x_state_dict", "adj_state_dict")
    if missing := [key for key in wanted if not isinstance(held, dict) or not isinstance(held.get(key), dict)]:
        raise ValueError(f"{path} is not {_KIND}: it has no {' and no '.join(missing)}")
    states = {part: _plain(held[f"{part}_state_dict"]) for part in _PARTS}
    averaged, updates = {}, 0
    if "ema_x" in held:
        try:
            shadows = {part: list(held[f"ema_{part}"]["shadow_params"]) for part in _PARTS}
            updates = int(held["ema_adj"]["num_updates"] or 0)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not {_KIND} or is damaged: its averages lack {error}") from error
        for part, shadow in shadows.items():
            if [tensor.shape for tensor in shadow] != [tensor.shape for tensor in states[part].values()]:
                raise ValueError(f"{path} is damaged: the average of {part} has other shapes than its weights")
            averaged[part] = dict(zip(states[part], shadow, strict=True))
    arguments = {part: dict(held[f"params_{part}"]) for part in _PARTS}
    return _Found(dict(held["model_config"]), arguments, _joined(states), _joined(averaged), updates)


def _safetensors(path: Path) -> _Found:
    tensors = read_safetensors(path, _KIND)
    values = read_json(path.with_suffix(".json"), f"the settings belong beside {path.name}")
    groups: dict[str, State] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        groups[group][key] = tensor
    averaged = {part: groups[f"ema_{part}"] for part in _PARTS if f"ema_{part}" in groups}
    try:
        arguments = {part: dict(values[f"params_{part}"]) for part in _PARTS}
        updates = int(values["ema"]["adj"]["num_updates"]) if averaged else 0
        return _Found(values["model_config"], arguments, _joined(dict(groups)), _joined(averaged), updates)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.with_suffix('.json')} is not of {_KIND}: it lacks {error}") from error


def _plain(state: dict[str, Tensor]) -> State:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _joined(states: dict[str, State]) -> State:
    """Both networks' weights behind "x." and "adj."; none where there are none."""
    return {f"{part}.{name}": tensor for part in _PARTS for name, tensor in states.get(part, {}).items()}


def _section(found: _Found) -> tuple[dict[str, Any], bool]:
    """A recipe's model section, and whether its node counts are approximate."""
    settings, network = found.settings, _network(found.arguments)
    data, train = settings["data"], settings["train"]
    counts, approximate = node_counts(data["data"], int(data["max_node_num"]))
    atoms = _atoms(data) if data["init"] == "atom" else None
    spec = {
        "kind": "graph" if atoms is None else "molecule",
        "nodes": int(data["max_node_num"]),
        "features": int(data["max_feat_num"]),
        "bonds": 1 if atoms is None else 3,
        "node_counts": counts,
        **({} if atoms is None else {"atoms": atoms}),
    }
    processes = {part: _process(settings["sde"][part]) for part in _PARTS}
    arguments = {
        "spec": spec,
        "network": {"class_path": "GraphScore", "init_args": network},
        "process": {"class_path": "GraphProcess", "init_args": processes},
        **{f"{part}_preconditioning": _preconditioning(settings["sde"][part]["type"]) for part in _PARTS},
        "objective": {
            "class_path": "JointObjective",
            "init_args": {"reduction": "mean" if train["reduce_mean"] else "half_sum"},
        },
        "sampler": _sampler(settings, network["nodes"]),
        "optimizer": {
            "class_path": "torch.optim.Adam",
            "init_args": {"lr": float(train["lr"]), "weight_decay": float(train["weight_decay"])},
        },
        "decay": float(train["lr_decay"]) if train["lr_schedule"] else "constant",
    }
    return {"class_path": "GDSS", "init_args": arguments}, approximate


def _atoms(data: dict[str, Any]) -> list[str]:
    """Elements of the channels, which the files do not name."""
    count = int(data["max_feat_num"])
    if count not in _ATOMS:
        raise ValueError(
            f"molecules of {data['data']} have {count} types of atoms, and the file does not say which: only those of "
            "QM9 (4) and ZINC250k (9) are known"
        )
    return _ATOMS[count]


def _network(arguments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Arguments of GraphScore; the parts that its two networks have in common must be equal."""
    x, adj = (arguments[part] for part in _PARTS)
    kinds = {"ScoreNetworkX": "gcn", "ScoreNetworkX_GMH": "attention"}
    if x["model_type"] not in kinds or adj["model_type"] != "ScoreNetworkA":
        raise ValueError(
            f"there are no networks {x['model_type']} and {adj['model_type']} here, only those of the paper"
        )
    shared = [key for key in x if key in adj and key != "model_type"]
    if other := [key for key in shared if x[key] != adj[key]]:
        raise ValueError(f"the two networks differ in {', '.join(other)}, which GraphScore has in common for both")
    return {
        "depth": int(x["depth"]),
        "width": int(x["nhid"]),
        "nodes": kinds[x["model_type"]],
        "layers": int(adj["num_layers"]),
        "linears": int(adj["num_linears"]),
        "attention_width": int(adj["adim"]),
        "heads": int(adj["num_heads"]),
        "channels": [int(adj[key]) for key in ("c_init", "c_hid", "c_final")],
        "attention_conv": str(adj["conv"]).lower(),
    }


def _process(sde: dict[str, Any]) -> dict[str, Any]:
    name, symbol = _PROCESSES[sde["type"]]
    values = {f"{symbol}_{end}": float(sde[f"beta_{end}"]) for end in ("min", "max")}
    return {"class_path": name, "init_args": values}


def _preconditioning(sde: str) -> dict[str, Any]:
    """Their networks give sigma times the negative score, but under VE the score itself."""
    prediction = "score" if sde == "VE" else "noise"
    return {"class_path": "Preconditioning", "init_args": {"prediction": prediction}}


def _sampler(settings: dict[str, Any], nodes: str) -> dict[str, Any]:
    """Rule and corrector; S4 has its own correction whatever is called the corrector."""
    if "sampler" in settings:
        given = settings["sampler"]
        predictor, corrector = given["predictor"], given["corrector"]
        snr, noise_scale = float(given["snr"]), float(given["scale_eps"])
    else:
        predictor, corrector = "Reverse", "Langevin"
        snr, noise_scale = _MOLECULE_SAMPLERS.get((settings["data"]["data"], nodes), _MOLECULES)
    langevin = {"class_path": "Langevin", "init_args": {"snr": snr, "noise_scale": noise_scale}}
    rule: Any = {"Euler": "EulerMaruyama", "Reverse": "ReverseDiffusion", "S4": "S4"}[predictor]
    before = [langevin] if corrector == "Langevin" and rule != "S4" else []
    if rule == "S4":
        rule = {"class_path": "S4", "init_args": {"corrector": langevin}}
    return {
        "class_path": "Sampler",
        "init_args": {
            "rule": rule if isinstance(rule, dict) else {"class_path": rule},
            "steps": int(settings["sde"]["adj"]["num_scales"]),
            "grid": {"class_path": "lightning_sgm.samplers.UniformTime", "init_args": {"t_min": 1e-4}},
            "before": before,
        },
    }
