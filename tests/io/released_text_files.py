"""Files as the codes of RADD and MDLM write them, small and random, and the functions their networks compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
V, WIDTH, BLOCKS, HEADS, LENGTH = 256, 32, 3, 4, 24
CONFIG: dict[str, Any] = {
    "ngpus": 4,
    "tokens": V,
    "training": {"ema": 0.9999, "loss_type": "t_DCE"},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "model": {
        "name": "small_radd",
        "hidden_size": WIDTH,
        "cond_dim": 128,
        "length": LENGTH,
        "n_blocks": BLOCKS,
        "n_heads": HEADS,
        "dropout": 0.05,
        "dtype": "float16",
    },
}
MDLM_CONFIG: dict[str, Any] = {
    "model_type": "mdlm",
    "vocab_size": V + 1,
    "model_length": LENGTH,
    "hidden_dim": WIDTH,
    "cond_dim": 10,
    "n_blocks": BLOCKS,
    "n_heads": HEADS,
    "dropout": 0.1,
    "time_conditioning": False,
}


def state(seed: int = 0, timed: bool = False, width: int = WIDTH, vocabulary: int = V, condition: int = 10) -> State:
    """Random weights in the order in which they are registered; ``timed`` as MDLM has them."""
    generator = torch.Generator().manual_seed(seed)
    heads = max(1, width * HEADS // WIDTH)
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocabulary + 1, width)}
    if timed:
        shapes |= {"sigma_map.mlp.0.weight": (condition, 256), "sigma_map.mlp.0.bias": (condition,)}
        shapes |= {"sigma_map.mlp.2.weight": (condition, condition), "sigma_map.mlp.2.bias": (condition,)}
    shapes["rotary_emb.inv_freq"] = (width // heads // 2,)
    for block in (f"blocks.{i}." for i in range(BLOCKS)):
        shapes |= _norm(f"{block}norm1", width, timed)
        shapes |= {f"{block}attn_qkv.weight": (3 * width, width), f"{block}attn_out.weight": (width, width)}
        shapes |= _norm(f"{block}norm2", width, timed)
        shapes |= {f"{block}mlp.0.weight": (4 * width, width), f"{block}mlp.0.bias": (4 * width,)}
        shapes |= {f"{block}mlp.2.weight": (width, 4 * width), f"{block}mlp.2.bias": (width,)}
        if timed:
            shapes |= _layer(f"{block}adaLN_modulation", 6 * width, condition)
    shapes |= _norm("output_layer.norm_final", width, timed)
    shapes |= _layer("output_layer.linear", vocabulary + 1, width)
    if timed:
        shapes |= _layer("output_layer.adaLN_modulation", 2 * width, condition)
    made = {name: 0.25 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["rotary_emb.inv_freq"] = 10000.0 ** (-2 * torch.arange(width // heads // 2) / (width // heads))
    return made


def _norm(name: str, width: int, timed: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), **({} if timed else {f"{name}.bias": (width,)})}


def _layer(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def logits(weights: State, x: Tensor, heads: int = HEADS) -> Tensor:
    """What the network says of all V + 1 tokens, float64: written from the formulas, one head at a time.

    With a time input, sigma is 0: its embedding is 128 cosines of 0 and 128 sines of 0.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    timed = "sigma_map.mlp.0.weight" in w
    c = torch.tensor([1.0] * 128 + [0.0] * 128, dtype=torch.float64)
    if timed:
        c = F.silu(w["sigma_map.mlp.0.weight"] @ c + w["sigma_map.mlp.0.bias"])
        c = F.silu(w["sigma_map.mlp.2.weight"] @ c + w["sigma_map.mlp.2.bias"])

    def modulation(part: str, number: int) -> list[Tensor]:
        if not timed:
            return [torch.zeros(1), torch.zeros(1), torch.ones(1)] * 2
        return list((w[f"{part}adaLN_modulation.weight"] @ c + w[f"{part}adaLN_modulation.bias"]).chunk(number))

    def normed(name: str, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        return (h + w.get(f"{name}.bias", torch.zeros(1))) * (1 + scale) + shift

    h = w["vocab_embed.embedding"][x]
    for i in range(BLOCKS):
        block = f"blocks.{i}."
        shift, scale, gate, shift2, scale2, gate2 = modulation(block, 6)
        q, k, v = (normed(f"{block}norm1", h, shift, scale) @ w[f"{block}attn_qkv.weight"].T).chunk(3, -1)
        parts = []
        for query, key, value in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
            parts.append(_head(query, key, value, w["rotary_emb.inv_freq"]))
        h = h + gate * (torch.cat(parts, -1) @ w[f"{block}attn_out.weight"].T)
        inner = normed(f"{block}norm2", h, shift2, scale2) @ w[f"{block}mlp.0.weight"].T + w[f"{block}mlp.0.bias"]
        inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        h = h + gate2 * (inner @ w[f"{block}mlp.2.weight"].T + w[f"{block}mlp.2.bias"])
    shift, scale = modulation("output_layer.", 2)[:2]
    h = normed("output_layer.norm_final", h, shift, scale)
    return h @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def _head(q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor) -> Tensor:
    """Attention of one head; the halves of a query are real and imaginary parts that turn with the position."""
    turn = torch.exp(1j * torch.arange(q.shape[1])[:, None] * frequencies)

    def turned(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        z = torch.complex(t[..., :half], t[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    return (turned(q) @ turned(k).transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def hub(folder: Path, weights: State, config: Any = CONFIG) -> Path:
    """A folder as the hub has it."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(folder: Path, raw: State, average: State, config: Any = CONFIG, prefix: str = "") -> Path:
    """The folder of a training run of RADD's code; its optimiser also has the parameter of the noise."""
    (folder / "checkpoints-meta").mkdir(parents=True)
    held = {
        "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 3e-4, "params": [0, 1]}]},
        "model": {f"{prefix}{name}": tensor for name, tensor in raw.items()},
        "ema": {
            "decay": 0.9999,
            "num_updates": 9,
            "shadow_params": [tensor for name, tensor in average.items() if "inv_freq" not in name],
        },
        "step": 9,
    }
    torch.save(held, folder / "checkpoints-meta" / "checkpoint.pth")
    if config is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


def lightning_checkpoint(path: Path, raw: State, average: State | None, **changes: Any) -> Path:
    """A checkpoint of MDLM's code: the configuration in it is an object of omegaconf, the tokenizer one of theirs."""
    config = {
        **{key: CONFIG[key] for key in ("noise", "model")},
        **{"parameterization": "subs", "backbone": "dit", "time_conditioning": False, "subs_masking": False},
        **{"data": {"tokenizer_name_or_path": "gpt2"}, **changes},
    }
    shadow = [tensor for name, tensor in (average or {}).items() if "inv_freq" not in name]
    ema = {"decay": 0.9999, "num_updates": 5, "shadow_params": shadow}
    with Foreign("omegaconf", "DictConfig") as node, Foreign("transformers.gpt2", "Tokenizer") as tokenizer:
        torch.save(
            {
                "state_dict": {f"backbone.{name}": tensor for name, tensor in raw.items()},
                **({} if average is None else {"ema": ema}),
                "global_step": 5,
                "hyper_parameters": {"config": _nodes(config, node), "tokenizer": tokenizer({"vocabulary": [1]})},
            },
            path,
        )
    return path


def _nodes(value: Any, node: Any) -> Any:
    if isinstance(value, dict):
        return node({"_content": {key: _nodes(inner, node) for key, inner in value.items()}, "_metadata": node({})})
    return node({"_val": value})


class Foreign:
    """A class of a module that is there while a file is written, and is not there any more when it is read."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __enter__(self) -> Any:
        def build(self: Any, held: Any) -> None:
            self.__dict__.update(held)

        kind = type(self.name, (), {"__module__": self.module, "__init__": build, "__qualname__": self.name})
        self.before = sys.modules.get(self.module)
        sys.modules[self.module] = ModuleType(self.module)
        setattr(sys.modules[self.module], self.name, kind)
        return kind

    def __exit__(self, *exception: object) -> None:
        del sys.modules[self.module]
        if self.before is not None:
            sys.modules[self.module] = self.before
