"""What a user reads after a mistake: one clear message instead of usage walls and tracebacks."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

_NOISE = (
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value",
    "Problem with given class_path",
)
_QUIET_WARNINGS = (
    ".*LeafSpec.*",
    ".*skip_none.*",
    ".*LightningCLI's args parameter is intended.*",
    ".*does not have many workers.*",
    ".*`training_step` returned `None`.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*was configured so validation will run at the end of the training epoch.*",
    ".*The dirpath has changed from.*",
    ".*lr_scheduler.step.*optimizer.step.*",
    ".*in eval mode at the start of training.*",
    ".*You have overridden `on_before_batch_transfer`.*",
)


# Exceptions whose own text is meant for people.
_TOLD = (MisconfigurationException, ValueError, OSError, ImportError, FloatingPointError, RuntimeError)


class Parser(LightningArgumentParser):
    """The parser of the command line: no abbreviations, short errors with the nearest valid name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and the nearest name that would be right; exit code 2."""
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        self.exit(2, f"error: {explain(message, self)}\n")


def explain(message: str, parser: LightningArgumentParser | None = None) -> str:
    """Reduce a jsonargparse message to the lines that say what is wrong, and suggest the nearest name."""
    lines = [line.strip(" -") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    text = "; ".join(dict.fromkeys(line.rstrip(":.") for line in kept)) or message.strip()
    hint = _suggestion(message, parser)
    return f"{text}. {hint}" if hint else text


def _suggestion(message: str, parser: LightningArgumentParser | None) -> str:
    if re.search(r"required: network", message):
        return "A checkpoint made in Python does not hold its parts: give the recipe, or use lightning_sgm.load."
    if re.search(r"required.*\bmodel\b|\bmodel\b.*required", message):
        return "Give a recipe: --config NAME; `python -m lightning_sgm recipes` lists them."
    if unknown := re.search(r"Expected a dot import path string: (\w+)", message):
        near = difflib.get_close_matches(unknown.group(1), _class_names(), n=2)
        return f"Did you mean {' or '.join(near)}?" if near else "Give a class of this package, or my_module.MyClass."
    wrong = re.search(r"(?:Option|option) '([\w.]+)'(?: is not accepted)?", message)
    wrong = wrong or re.search(r"[Uu]nrecognized arguments?: -*([\w.]+)", message)
    wrong = wrong or re.search(r"Key '([\w.]+)' is not expected", message) or re.search(r"key '([\w.]+)'", message)
    if wrong is None:
        return ""
    name = wrong.group(1)
    candidates: set[str] = set()
    for path in re.findall(r"class_path '([\w.]+)'", message):
        candidates |= set(_parameters(path))
    if parser is not None:
        names = {n for n in _destinations(parser) if n.rpartition(".")[2] not in ("help", "config", "print_config")}
        prefix = name.rpartition(".")[0]
        candidates |= {n for n in names if n.rpartition(".")[0] == prefix} or names
    near = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=0.5)
    near = near or [c for c in sorted(candidates) if c.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"Did you mean {near[0]}?" if near else ""


def _destinations(parser: LightningArgumentParser) -> set[str]:
    subcommands = getattr(parser, "_subcommands_action", None)
    parsers: Iterable[Any] = [parser, *(subcommands.choices.values() if subcommands is not None else [])]
    return {action.dest for each in parsers for action in each._actions if action.dest}


def _class_names() -> list[str]:
    """Short names that the command line knows: the public classes of the rooms and of the data modules."""
    rooms = [m for name, m in sys.modules.items() if re.fullmatch(r"lightning_sgm\.\w+|datamodules", name)]
    return sorted({name for room in rooms for name in getattr(room, "__all__", ()) if name[0].isupper()})


def _parameters(class_path: str) -> Iterable[str]:
    """Names of a class's constructor arguments, the class being imported already."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return inspect.signature(found).parameters if inspect.isclass(found) else ()


def one_line(error: BaseException) -> str:
    """The message of an exception without the layers that parsers and loaders wrap around it."""
    cause = error
    while cause.__cause__ is not None and any(noise in str(cause) for noise in _NOISE):
        cause = cause.__cause__
    text = str(cause) or str(error) or type(cause).__name__
    if isinstance(cause, OSError) and cause.filename and cause.strerror:
        return f"cannot use {cause.filename} ({cause.strerror}): choose another with --trainer.run_dir or --data.path"
    if isinstance(cause, KeyError):
        text = f"missing entry {text}"
    if "Error(s) in loading state_dict" in text:
        lines = [line.strip() for line in text.splitlines()[1:3]]
        text = (
            "the checkpoint does not fit this model: your data (their width: of graphs --data.features) or settings of "
            f"the network are others than in training. {' '.join(lines)[:300]}"
        )
    elif "\n" in text:
        text = explain(text)
    return text if isinstance(cause, _TOLD) else f"{type(cause).__name__}: {text} (add --debug for the traceback)"


def quiet() -> None:
    """Silence warnings and tips that are no news to a user of this package."""
    for pattern in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(
            lambda record: "Tip" not in record.getMessage() and "💡" not in record.getMessage()
        )
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
