"""From what a user types to what the parser gets: recipes by name, configs first, checkpoint and run folder found."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_sgm.io.checkpoint import foreign_name, hyper_parameters
from lightning_sgm.io.files import next_version
from lightning_sgm.recipes import chain, read

_RUN_DIR = "SGM_RUN_DIR"
_LAST = ("last", "best")
_PARTS = ("--model.", "--data.")
# What predict is to complete, without the name of the task.
_GIVEN = {"--prompt": "prompt", "--suffix": "suffix", "--template": "template", "--prompts": "file"}

GIVEN_HELP = {
    "--prompt": "how texts begin: short for --model.task Complete --model.task.prompt TEXT",
    "--suffix": "how they end",
    "--template": "a whole text in which each _ (--model.task.blank) is a token to find",
    "--prompts": "file of prompts, one per line, or .jsonl with prompt, suffix, template, length",
}
_FILES = "--data.path"  # sampling needs no data, so for predict these are the files to complete


class UsageError(ValueError):
    """The command was given wrong arguments; exit code 2."""


@dataclass
class Invocation:
    """One command, taken apart.

    Attributes:
        command: fit, validate, test or predict.
        configs: recipe files, in order, each behind those it builds on.
        recipe: the first of them that the user gave, after which runs are named.
        options: everything else, in order.
        checkpoint: checkpoint file to start from, if any.
        continues: whether the command goes on with the run that the checkpoint belongs to, or judges it. Then its
            stored model and data stand above the recipe's; a new run from a checkpoint follows the recipe.
        run_dir: folder of this run, unless the user names one.
        allow: modules whose classes a checkpoint may ask for beside the trusted ones: those the user names in recipes
            and options, and ``--allow``.
    """

    command: str
    configs: list[str] = field(default_factory=list)
    recipe: Path | None = None
    options: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    continues: bool = False
    run_dir: Path | None = None
    allow: list[str] = field(default_factory=list)

    def argv(self, checkpoint_config: str | None) -> list[str]:
        """Arguments for the parser, later ones winning: checkpoint and recipes in their order, then options."""
        stored = [checkpoint_config] if checkpoint_config else []
        configs = [*stored, *self.configs]
        if self.continues:
            configs = [*self.configs, *self._own_config(), *stored]
        given = [f"--config={path}" for path in configs]
        if self.run_dir is not None:
            given.append(f"--trainer.run_dir={self.run_dir}")
        if self.checkpoint is not None:
            given.append(f"--ckpt_path={self.checkpoint}")
        return [self.command, *given, *_with_nulls(self.options)]

    def _own_config(self) -> list[str]:
        """config.yaml of the run that a fit goes on with: trainer, seed and all."""
        assert self.checkpoint is not None
        path = self.checkpoint.parent.parent / "config.yaml"
        return [str(path)] if self.command == "fit" and path.is_file() else []

    @contextlib.contextmanager
    def checkpoint_config(self) -> Iterator[str | None]:
        """A temporary recipe with the classes and arguments stored in the checkpoint."""
        values = _stored_values(self) if self.checkpoint is not None else {}
        if not values:
            yield None
            return
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            yaml.safe_dump(values, file)
            file.flush()
            yield file.name


def prepare(argv: list[str]) -> Invocation:
    """Take a command line apart.

    Args:
        argv: arguments without the program, the command first; ``--config`` may stand anywhere and a bare ``x.yaml``
            counts as one.

    Raises:
        FileNotFoundError: no such recipe or checkpoint.
        UsageError: an option without its value, or evaluation without a checkpoint.
        RecipeError: a recipe that cannot be read.
    """
    invocation = Invocation(argv[0])
    checkpoint: str | None = None
    rest = iter(argv[1:])
    for argument in rest:
        key, has_value, value = argument.partition("=")
        if key in ("-c", "--config", "--ckpt_path", "--allow"):
            value = value if has_value else next(rest, "")
            if not value:
                raise UsageError(f"{key} needs a value after it")
            if key == "--ckpt_path":
                checkpoint = value
            elif key == "--allow":
                invocation.allow.append(value)
            else:
                _add_config(invocation, value)
        elif key in _GIVEN and argv[0] == "predict":
            value = value if has_value else next(rest, "")
            given = "" if value.startswith("--") and not has_value else value
            invocation.options.append(_task(_GIVEN[key], given))
        elif key == _FILES and argv[0] == "predict":
            value = value if has_value else next(rest, "")
            if not value or (value.startswith("--") and not has_value):
                raise UsageError(f"{key} needs a value after it: a picture or a folder of pictures to complete")
            invocation.options.append(f"--path={value}")
        elif (
            argument.endswith((".yaml", ".yml")) and not argument.startswith("-") and not _is_value(invocation.options)
        ):
            _add_config(invocation, argument)
        else:
            invocation.options.append(argument)
    invocation.allow += _named_packages([o for o in invocation.options if not o.startswith("--data")])
    if not any(o in ("-h", "--help") or o.endswith(".help") or ".help=" in o for o in invocation.options):
        _find_checkpoint(invocation, checkpoint)
        if not any(o.startswith("--print_config") for o in invocation.options):
            _choose_run_dir(invocation)
    return invocation


def _task(argument: str, text: str) -> str:
    """A text to complete as an inline recipe, in which it is not parsed any further."""
    if not text:
        name = "prompts" if argument == "file" else argument
        raise UsageError(
            f"--{name} needs a value after it (--{name}=TEXT if it begins with --); without it samples are from scratch"
        )
    task = {"class_path": "Complete", "init_args": {argument: text}}
    return f"--config={json.dumps({'model': {'init_args': {'task': task}}})}"


def _add_config(invocation: Invocation, name: str) -> None:
    """Add a recipe behind those that it builds on."""
    files = chain(name)
    invocation.recipe = invocation.recipe or files[-1]
    for path in files:
        values = read(path)
        invocation.configs.append(str(path))
        invocation.allow += _named_packages([yaml.safe_dump(values)])
        trainer = values.get("trainer")
        if isinstance(trainer, dict) and trainer.get("run_dir"):
            invocation.run_dir = Path(trainer["run_dir"])


def _named_packages(texts: list[str]) -> list[str]:
    """Modules of the dotted names that a user wrote: what they name themselves they trust."""
    return [
        name.rpartition(".")[0]
        for text in texts
        for name in re.findall(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w/.])", text)
    ]


def _is_value(options: list[str]) -> bool:
    """Whether the next argument is the value of the option before it."""
    return bool(options) and options[-1].startswith("--") and "=" not in options[-1]


def _with_nulls(options: list[str]) -> list[str]:
    """The options, with each that sets a value inside of a part to null as a recipe of its own in the same place.

    jsonargparse 4.53 takes null for text there: "Expected a <class 'float'>".
    """
    found: list[str] = []
    for option in options:
        if option == "null" and found and found[-1].startswith(_PARTS) and "=" not in found[-1]:
            option = f"{found.pop()}=null"
        key, _, value = option.partition("=")
        names = [name for name in key.removeprefix("--").split(".") if name != "init_args"]
        if value == "null" and key.startswith(_PARTS) and len(names) > 2:
            recipe: Any = None
            for name in reversed(names[1:]):
                recipe = {"init_args": {name: recipe}}
            option = f"--config={json.dumps({names[0]: recipe})}"
        found.append(option)
    return found


def _option(options: list[str], name: str) -> str | None:
    """Value of an option among the rest, if given."""
    value = None
    for i, option in enumerate(options):
        if option == name and i + 1 < len(options):
            value = options[i + 1]
        elif option.startswith(f"{name}="):
            value = option.partition("=")[2]
    return value


def _family(invocation: Invocation) -> Path:
    """Folder of all runs of the recipe, or the one the user names."""
    given = _option(invocation.options, "--trainer.run_dir") or invocation.run_dir
    if given:
        return Path(given)
    recipe = invocation.recipe or Path("run")
    own = recipe.name == "config.yaml" and recipe.parent.name.startswith("version_")
    return recipe.parent.parent if own else Path("runs") / recipe.stem


def _find_checkpoint(invocation: Invocation, checkpoint: str | None) -> None:
    evaluates = invocation.command != "fit"
    if checkpoint is None and evaluates and not any(o.startswith("--print_config") for o in invocation.options):
        checkpoint = "last"
    if checkpoint is None:
        return
    invocation.continues = evaluates or checkpoint in _LAST
    if checkpoint in _LAST:
        invocation.checkpoint = _newest(_family(invocation), checkpoint, invocation.command)
        return
    invocation.checkpoint = Path(checkpoint)
    if not invocation.checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint {checkpoint!r}; give a file, or `last` for the newest")


def _choose_run_dir(invocation: Invocation) -> None:
    if _option(invocation.options, "--trainer.run_dir") or invocation.run_dir is not None:
        return
    if (child := os.environ.get(_RUN_DIR)) and "LOCAL_RANK" in os.environ:
        invocation.run_dir = Path(child)
        return
    invocation.run_dir = next_version(_family(invocation))
    if (
        invocation.checkpoint is not None
        and invocation.continues
        and invocation.checkpoint.parent.name == "checkpoints"
    ):
        invocation.run_dir = invocation.checkpoint.parent.parent
    # Processes that Lightning starts for further devices run this file again and must agree.
    os.environ[_RUN_DIR] = str(invocation.run_dir)


def _newest(family: Path, name: str, command: str) -> Path:
    """The newest last.ckpt or best.ckpt below a run folder or a folder of runs."""
    files = [*family.glob(f"checkpoints/{name}.ckpt"), *family.glob(f"version_*/checkpoints/{name}.ckpt")]
    if not files:
        raise FileNotFoundError(
            f"no {name}.ckpt under {family}; "
            + (
                "run `fit` first, or give --ckpt_path FILE"
                if command != "fit"
                else "leave out --ckpt_path to start a new run, or give a file"
            )
        )
    return max(files, key=lambda path: path.stat().st_mtime)


def _stored_values(invocation: Invocation) -> dict[str, Any]:
    """Class paths and arguments of a checkpoint's model and data, as a recipe has them."""
    assert invocation.checkpoint is not None
    stored = hyper_parameters(invocation.checkpoint)
    _check_trust([stored.model_class, stored.model], invocation)
    values: dict[str, Any] = {}
    if stored.model_class:
        _check_same_method(stored.model_class, invocation)
        values["model"] = {"class_path": stored.model_class, "init_args": dict(stored.model)}
    # Sampling needs no data, so that it works where the data set is not; their spec is in the checkpoint.
    if invocation.command != "predict":
        if stored.data_class:
            _check_trust(stored.data_class, invocation)
            values["data"] = {"class_path": stored.data_class, "init_args": stored.data}
        if stored.data_class or invocation.configs or any(o.startswith("--data") for o in invocation.options):
            values.get("model", {}).get("init_args", {}).pop("spec", None)
    return values


def _check_same_method(stored: str, invocation: Invocation) -> None:
    """A checkpoint of one method cannot go on under the recipe of another."""
    wanted = _option(invocation.options, "--model")
    for config in invocation.configs:
        model = read(Path(config)).get("model")
        if wanted is None and isinstance(model, dict):
            wanted = model.get("class_path")
    if wanted and wanted.rpartition(".")[2] != stored.rpartition(".")[2]:
        raise UsageError(
            f"{invocation.checkpoint} is a checkpoint of {stored.rpartition('.')[2]}, but the recipe asks for {wanted}"
        )


def _check_trust(stored: Any, invocation: Invocation) -> None:
    """Refuse a checkpoint that names classes or functions of other packages: importing one runs its code."""
    if name := foreign_name(stored, invocation.allow):
        package = name.partition(".")[0]
        raise UsageError(
            f"{invocation.checkpoint} asks for {name}; if you trust it, add --allow {package} to the command"
        )
