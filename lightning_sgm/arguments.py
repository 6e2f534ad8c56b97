"""From what a user types to what the parser gets: recipes by name, configs first, checkpoint and run folder found."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lightning_sgm.io.checkpoint import hyper_parameters
from lightning_sgm.recipes import find

_RUN_DIR = "SGM_RUN_DIR"
_LAST = ("last", "best")


class UsageError(ValueError):
    """The command was given wrong arguments; exit code 2."""


@dataclass
class Invocation:
    """One command, taken apart.

    Attributes:
        command: fit, validate, test or predict.
        configs: recipe files, in order.
        options: everything else, in order.
        recipe: the first recipe as the user wrote it.
        checkpoint: checkpoint file to start from, if any.
        run_dir: folder of this run, unless the options name one.
        allow: packages whose classes a checkpoint may ask for (``--allow`` adds one).
    """

    command: str
    configs: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    recipe: str | None = None
    checkpoint: Path | None = None
    run_dir: Path | None = None
    allow: list[str] = field(default_factory=lambda: ["lightning_sgm", "datamodules", "torch", "torchmetrics"])

    def argv(self, checkpoint_config: str | None) -> list[str]:
        """Arguments for the parser: the checkpoint's values, recipes, options, later ones winning."""
        first = [checkpoint_config] if checkpoint_config else []
        given = [f"--config={path}" for path in [*first, *self.configs]]
        if self.run_dir is not None:
            given.append(f"--trainer.run_dir={self.run_dir}")
        if self.checkpoint is not None:
            given.append(f"--ckpt_path={self.checkpoint}")
        return [self.command, *given, *self.options]

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
        elif (
            argument.endswith((".yaml", ".yml")) and not argument.startswith("-") and not _is_value(invocation.options)
        ):
            _add_config(invocation, argument)
        else:
            invocation.options.append(argument)
    if not any(o in ("-h", "--help") or o.startswith(("--print_config", "--model.help")) for o in invocation.options):
        _resolve_run(invocation, checkpoint)
    return invocation


def _add_config(invocation: Invocation, name: str) -> None:
    invocation.recipe = invocation.recipe or name
    invocation.configs.append(str(find(name)))


def _is_value(options: list[str]) -> bool:
    """Whether the next argument is the value of the option before it."""
    return bool(options) and options[-1].startswith("--") and "=" not in options[-1]


def _option(options: list[str], name: str) -> str | None:
    """Value of an option among the rest, if given."""
    value = None
    for i, option in enumerate(options):
        if option == name and i + 1 < len(options):
            value = options[i + 1]
        elif option.startswith(f"{name}="):
            value = option.partition("=")[2]
    return value


def _resolve_run(invocation: Invocation, checkpoint: str | None) -> None:
    """Find the checkpoint and choose the run folder."""
    given = _option(invocation.options, "--trainer.run_dir")
    name = Path(invocation.configs[0]).stem if invocation.configs else "run"
    family = Path(given) if given else Path("runs") / name
    continuing = checkpoint in _LAST
    if checkpoint is None and invocation.command != "fit":
        checkpoint, continuing = "last", True
    if checkpoint in _LAST:
        assert checkpoint is not None
        invocation.checkpoint = _newest(family, checkpoint, invocation.command)
    elif checkpoint is not None:
        invocation.checkpoint = Path(checkpoint)
        if not invocation.checkpoint.exists():
            raise FileNotFoundError(
                f"no checkpoint {checkpoint!r}; give a file, or `last` for the newest of the recipe"
            )
    if given:
        return
    if (child := os.environ.get(_RUN_DIR)) and "LOCAL_RANK" in os.environ:
        invocation.run_dir = Path(child)
        return
    if invocation.checkpoint is not None and (continuing or invocation.command != "fit"):
        folder = invocation.checkpoint.parent
        invocation.run_dir = folder.parent if folder.name == "checkpoints" else _next_version(family)
    else:
        invocation.run_dir = _next_version(family)
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


def _next_version(family: Path) -> Path:
    numbers = [int(m.group(1)) for p in family.glob("version_*") if (m := re.search(r"version_(\d+)$", p.name))]
    return family / f"version_{max(numbers, default=-1) + 1}"


def _stored_values(invocation: Invocation) -> dict[str, object]:
    """Class paths and arguments of a checkpoint's model and data, as a recipe has them."""
    assert invocation.checkpoint is not None
    stored = hyper_parameters(invocation.checkpoint)
    _check_classes([stored.model_class, stored.data_class, stored.model, stored.data], invocation)
    values: dict[str, object] = {}
    if stored.model_class:
        model = dict(stored.model)
        # Sampling needs no data, so that it works where the data set is not; their spec is in the checkpoint.
        if invocation.command != "predict" and stored.data_class:
            values["data"] = {"class_path": stored.data_class, "init_args": stored.data}
        if "data" in values or invocation.configs or any(o.startswith("--data") for o in invocation.options):
            model.pop("spec", None)
        values["model"] = {"class_path": stored.model_class, "init_args": model}
    return values


def _check_classes(stored: object, invocation: Invocation) -> None:
    """Refuse a checkpoint that names classes of other packages: importing one runs its code."""
    if isinstance(stored, dict):
        _check_classes(list(stored.values()), invocation)
    elif isinstance(stored, list | tuple):
        for entry in stored:
            _check_classes(entry, invocation)
    elif isinstance(stored, str) and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", stored):
        package = stored.partition(".")[0]
        if package not in invocation.allow and _is_module(package):
            raise UsageError(
                f"{invocation.checkpoint} asks for {stored}; if you trust it, add --allow {package} to the command"
            )


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
