"""What sources of released text models share: weights and settings of a ``MaskedTransformer`` become a RADD model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sgm.io.export import rotary_frequencies
from lightning_sgm.io.released.configurations import network_class
from lightning_sgm.io.released.model import Imported, State, differences, with_spec
from lightning_sgm.networks import MaskedTransformer
from lightning_sgm.recipes import content, overlay

SMALL, MEDIUM = "paper/radd_small_owt", "paper/radd_medium_owt"
FREQUENCIES = "rotary_emb.inv_freq"
_EMBEDDING = "vocab_embed.embedding"
_TOKENIZERS = {50257: "gpt2", 256: "bytes"}
_HEADS = {768: 12, 1024: 16}  # of the released sizes


class Settings(NamedTuple):
    """What the files say beside the weights; None and no entry where they do not.

    Attributes:
        vocabulary: real tokens, without the mask.
        length: tokens of a sequence.
        network: of ``width``, ``blocks``, ``heads`` and ``dropout`` those that are known.
        schedule: of the masks, a recipe's section.
        spec: of the data, from a folder that this package exported.
    """

    vocabulary: int | None = None
    length: int | None = None
    network: dict[str, Any] = {}
    schedule: dict[str, Any] | None = None
    spec: dict[str, Any] | None = None


class Found(NamedTuple):
    """Weights by their names in ``MaskedTransformer``, with the frequencies among them where they were stored.

    Attributes:
        path: where they were, for messages.
        weights: those to judge and to sample with.
        raw: the same before averaging; empty if they are not in the file.
        updates: of the average.
        settings: what else is known.
        about: where they come from, for the user.
    """

    path: Path
    weights: State
    raw: State
    updates: int
    settings: Settings
    about: str


def nested_settings(config: Mapping[str, Any], file: Path) -> Settings:
    """Settings from the training configuration of RADD, and of MDLM's and SEDD's code, which has the same names.

    Raises:
        ValueError: an entry is missing or is no number, or the noise is of an unknown kind.
    """
    try:
        part, tokens = config["model"], config.get("tokens")
        return Settings(
            vocabulary=None if tokens is None else int(tokens),
            length=int(part["length"]),
            network={
                "width": int(part["hidden_size"]),
                "blocks": int(part["n_blocks"]),
                "heads": int(part["n_heads"]),
                "dropout": float(part["dropout"]),
            },
            schedule=_schedule(config["noise"], file),
        )
    except KeyError as error:
        raise ValueError(f"{file} does not say what the model is: it has no {error.args[0]}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _schedule(noise: Mapping[str, Any], file: Path) -> dict[str, Any]:
    kind = noise["type"]
    if kind == "geometric":
        return {
            "class_path": "Geometric",
            "init_args": {"a": float(noise["sigma_min"]), "b": float(noise["sigma_max"])},
        }
    classes = {"loglinear": "Loglinear", "cosine": "Cosine", "cosinesqr": "CosineSquared"}
    if kind not in classes:
        raise ValueError(f"{file} has noise of type {kind!r}; known are {', '.join([*classes, 'geometric'])}")
    return {"class_path": classes[kind], "init_args": {"eps": 1e-3}}


def text_model(found: Found, recipe: str | None) -> Imported:
    """The RADD model of weights, whose sizes are read off their shapes.

    Args:
        found: weights and settings.
        recipe: name or YAML file of one that says what the files do not: heads, tokenizer, data, sampler.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: an entry is missing, unexpected or of another shape than the settings or the recipe say, or it is
            not known what the tokens are.
    """
    path, settings = found.path, found.settings
    vocabulary, sizes = _sizes(found.weights, settings, path)
    default = MEDIUM if (sizes["width"], sizes["blocks"]) == (1024, 24) else SMALL
    values = content(recipe or default)
    if network_class(values) != "MaskedTransformer":
        raise ValueError(
            f"weights of RADD fit a MaskedTransformer, but the network of {recipe} is "
            f"{network_class(values) or 'not given'}"
        )
    if recipe:
        given = values["model"]["init_args"]["network"].get("init_args", {})
        _same(sizes, given, path, recipe)
        sizes.setdefault("heads", given.get("heads", signature(MaskedTransformer).parameters["heads"].default))
    if "heads" not in sizes:
        sizes["heads"] = _usual_heads(sizes["width"], path)
    weights, raw = (_checked(state, vocabulary, sizes, path) for state in (found.weights, found.raw))
    network = {**sizes, **({"dropout": settings.network["dropout"]} if "dropout" in settings.network else {})}
    changes: dict[str, Any] = {"network": {"class_path": "MaskedTransformer", "init_args": network}}
    if settings.schedule:
        changes["process"] = {"class_path": "AbsorbingProcess", "init_args": {"schedule": settings.schedule}}
    values = overlay(values, {"model": {"init_args": changes}})
    spec = _spec(vocabulary, values, found, recipe)
    return Imported(
        model=with_spec(values["model"], spec),
        data=_data(values, spec, recipe),
        weights={f"network.{name}": tensor for name, tensor in weights.items()},
        raw={f"network.{name}": tensor for name, tensor in raw.items()},
        updates=found.updates,
        about=[
            found.about,
            f"model: RADD as in {recipe or default}, width {sizes['width']}, {sizes['blocks']} blocks, "
            f"{sizes['heads']} heads, "
            f"{vocabulary:,} tokens and the mask, length {spec['length']}, "
            f"{sum(tensor.numel() for tensor in weights.values()):,} parameters",
        ],
    )


def _sizes(weights: State, settings: Settings, path: Path) -> tuple[int, dict[str, int]]:
    """The vocabulary, and width, blocks and, where the files tell, heads, which agree with the settings."""
    table = weights.get(_EMBEDDING)
    blocks = {match.group(1) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    if table is None or table.ndim != 2 or not blocks:
        raise ValueError(f"{path} holds no weights of RADD: there is no {_EMBEDDING}, or there are no blocks")
    vocabulary, width = len(table) - 1, table.shape[1]
    sizes = {"width": width, "blocks": len(blocks)}
    if settings.vocabulary not in (None, vocabulary):
        raise ValueError(
            f"{path} says {settings.vocabulary} tokens, but {_EMBEDDING} has rows for {vocabulary} and the mask"
        )
    _same(sizes, settings.network, path, "its configuration")
    frequencies = weights.get(FREQUENCIES)
    if "heads" in settings.network:
        sizes["heads"] = settings.network["heads"]
    elif frequencies is not None and frequencies.numel():
        sizes["heads"] = max(1, width // (2 * frequencies.numel()))
    return vocabulary, sizes


def _same(sizes: Mapping[str, int], given: Mapping[str, Any], path: Path, source: str) -> None:
    wrong = [f"{key} {sizes[key]}, not {given[key]}" for key in sizes if key in given and given[key] != sizes[key]]
    if wrong:
        raise ValueError(f"the weights of {path} are not those of {source}: they have {', '.join(wrong)}")


def _usual_heads(width: int, path: Path) -> int:
    """Heads of the released sizes, else such that one is 64 wide."""
    if width in _HEADS or not width % 64:
        return _HEADS.get(width, width // 64)
    raise ValueError(
        f"the weights of {path} do not tell the number of attention heads: add --model with a recipe of the model"
    )


def _checked(state: State, vocabulary: int, sizes: dict[str, int], path: Path) -> State:
    """The entries of the network in float32; the stored frequencies are compared with ours and left out."""
    if not state:
        return {}
    width, heads = sizes["width"], sizes["heads"]
    with torch.device("meta"):
        wanted = MaskedTransformer({"vocabulary": vocabulary}, **sizes).state_dict()
    found = {name: tensor for name, tensor in state.items() if name != FREQUENCIES}
    if (wrong := differences(wanted, found)).number:
        raise ValueError(f"the weights of {path} are not those of a RADD model: {wrong} among the entries")
    if whole := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        raise ValueError(
            f"the weights of {path} are not those of a RADD model: {whole[0]} holds {found[whole[0]].dtype}"
        )
    if FREQUENCIES in state and not _is_ours(state[FREQUENCIES], width // heads):
        raise ValueError(
            f"{FREQUENCIES} of {path} is not 10000^(-2j/{width // heads}): the model has other rotary positions than "
            f"{heads} heads of width {width // heads} have here"
        )
    return {name: tensor.float() for name, tensor in found.items()}


def _is_ours(stored: Tensor, head_width: int) -> bool:
    if stored.shape != (head_width // 2,) or not stored.is_floating_point():
        return False
    rounding = max(1e-5, 2 * torch.finfo(stored.dtype).eps)
    return torch.allclose(stored.double(), rotary_frequencies(head_width).double(), rtol=rounding, atol=0.0)


def _spec(vocabulary: int, values: dict[str, Any], found: Found, recipe: str | None) -> dict[str, Any]:
    """The data's spec: of the exported folder or the recipe, else by the two vocabularies that have one meaning."""
    path, settings = found.path, found.settings
    spec = settings.spec or values["model"]["init_args"].get("spec")
    if spec is None:
        data = values.get("data", {}).get("init_args", {})
        tokenizer = _TOKENIZERS.get(vocabulary)
        if tokenizer is None:
            raise ValueError(
                f"{path} has {vocabulary} tokens, neither GPT-2's 50257 nor 256 bytes: say what they are in a "
                f"recipe and add it as --model: model.init_args.spec: {{kind: text, length: {settings.length or 1024}, "
                f'vocabulary: {vocabulary}, tokenizer: {{characters: "..."}}, bytes_per_token: null}}'
            )
        if recipe and data.get("tokenizer", tokenizer) != tokenizer:
            raise ValueError(f"the tokens of {path} are {tokenizer}, but those of {recipe} {data['tokenizer']}")
        folder = data.get("tokenizer_path") if recipe and tokenizer == "gpt2" else None
        spec = {
            "kind": "text",
            "length": settings.length or int(data.get("length", 1024)),
            "vocabulary": vocabulary,
            "tokenizer": {"gpt2": str(Path(folder).absolute())} if folder else tokenizer,
            "bytes_per_token": 1.0 if tokenizer == "bytes" else None,
        }
    if missing := [key for key in ("kind", "length", "vocabulary", "tokenizer") if key not in spec]:
        raise ValueError(f"the spec given for {path} has no {' and no '.join(missing)}")
    if spec["vocabulary"] != vocabulary:
        raise ValueError(f"{path} has {vocabulary} tokens, but the spec given for it says {spec['vocabulary']}")
    return spec


def _data(values: dict[str, Any], spec: dict[str, Any], recipe: str | None) -> dict[str, Any] | None:
    """The recipe's data; without a recipe of the user's, text in these tokens and of this length."""
    if recipe or spec["tokenizer"] not in ("gpt2", "bytes"):
        return values.get("data") if recipe else None
    changes = {"init_args": {"length": spec["length"], "tokenizer": spec["tokenizer"]}}
    data: dict[str, Any] = overlay(values["data"], {**changes, "class_path": values["data"]["class_path"]})
    return data
