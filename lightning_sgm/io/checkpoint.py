"""Checkpoints: written whole or not at all, read without running any code in them, turned back into models."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters, _given_hyperparameters_context

from lightning_sgm.io.files import atomic_write
from lightning_sgm.io.folders import INSTANTIATOR, read_folder

TRUSTED = ("lightning_sgm", "datamodules", "torch.nn", "torch.optim", "torchmetrics")
"""Where the classes of a checkpoint may come from: nothing there runs foreign code when it is built; data and tasks
may read the files that they name."""


_allowed: ContextVar[tuple[str, ...]] = ContextVar("_allowed", default=())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writer and reader of checkpoints, made safe.

    A kill or a full disk while writing leaves the earlier file untouched (Lightning's own writes across file systems,
    which tears). Reading never unpickles anything but tensors and plain values, whatever the caller asks for.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to the local file ``path``.

        Raises:
            OSError: no space left or the like.
        """
        if storage_options is not None:
            raise ValueError("storage_options is not supported: checkpoints are written to local files")
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except (RuntimeError, OSError) as error:
            # torch answers a failed write with an error about positions, whose context is the reason.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            if not isinstance(reason, OSError):
                raise
            raise OSError(f"cannot write {path}: {reason.strerror or reason}; an earlier one is kept") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read ``path``; ``weights_only`` is True whatever is given."""
        return _read(path, map_location=map_location)


class HyperParameters(NamedTuple):
    """The classes a checkpoint was made with and their constructor arguments; "" and {} where it does not say."""

    model_class: str
    model: dict[str, Any]
    data_class: str
    data: dict[str, Any]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU and mapped from the file: only what is used is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, no checkpoint, or contains more than tensors and plain values.
    """
    return _read(path, map_location="cpu", mmap=True)


def hyper_parameters(path: str | Path) -> HyperParameters:
    """Classes and constructor arguments of the model and the data in a checkpoint, as a recipe has them.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_checkpoint`.
    """
    return _hyper_parameters(read_checkpoint(path))


def foreign_name(stored: Any, allow: Iterable[str] = ()) -> str | None:
    """The first dotted name among stored arguments that lies outside ``TRUSTED`` and ``allow``; None if there is none.

    Any string may become an import when arguments are turned into parts, also one inside YAML or JSON text.
    """
    if isinstance(stored, dict):
        stored = [*stored, *stored.values()]
    if isinstance(stored, list | tuple):
        return next((name for entry in stored if (name := foreign_name(entry, allow))), None)
    if not isinstance(stored, str):
        return None
    if re.fullmatch(r"\s*[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\s*", stored):
        name = stored.strip()
        known = any(name == package or name.startswith(f"{package}.") for package in (*TRUSTED, *allow))
        # A file such as classifier.ckpt is no import: there is no such package. (Looking for one runs nothing.)
        return None if known or importlib.util.find_spec(name.partition(".")[0]) is None else name
    try:
        inner = yaml.safe_load(stored)
    except yaml.YAMLError:
        return None
    return foreign_name(inner, allow) if isinstance(inner, dict | list) else None


def load(path: str | Path, allow: tuple[str, ...] = (), **overrides: Any) -> LightningModule:
    """Rebuild the model of a checkpoint with its averaged weights, on the CPU and in evaluation mode.

    Nothing but the file is needed. The checkpoint names classes; they are imported only from the packages allowed
    here, and the file itself cannot run code.

    Args:
        path: the checkpoint, or a folder that ``export`` wrote.
        allow: your own packages whose classes may be built too, beside ``TRUSTED``: ``allow=("my_package",)``.
        overrides: constructor arguments that replace stored ones, or give the parts of a model that was built in
            Python, which a file cannot hold: ``load(path, network=UNet(spec))``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint; a class that is not allowed or not there; arguments or weights do not fit.
    """
    with allowing(allow) as allowed:
        return _load(path, allowed, overrides)


@contextmanager
def allowing(packages: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Let every ``load`` in here build classes of these packages too, and those of the blocks around.

    A model may load another one, such as the teacher that it was distilled from.
    """
    allowed = tuple(dict.fromkeys((*_allowed.get(), *packages)))
    token = _allowed.set(allowed)
    try:
        yield allowed
    finally:
        _allowed.reset(token)


def _load(path: str | Path, allow: tuple[str, ...], overrides: dict[str, Any]) -> LightningModule:
    checkpoint = read_checkpoint(path)
    stored = _hyper_parameters(checkpoint)
    kind = _import_class(stored.model_class, allow, path)
    if name := foreign_name(stored.model, allow):
        raise ValueError(
            f"{path} asks for {name}, which load() may not import; if you trust it, add its package: "
            f"allow={(*allow, name.partition('.')[0])!r}"
        )
    from_recipe = "_instantiator" in checkpoint["hyper_parameters"]
    try:
        module = _build(kind, {**stored.model, **overrides}, allow, from_recipe)
    except Exception as error:
        hint = "" if from_recipe else "; parts built in Python are not in the file, give them: load(path, network=...)"
        raise ValueError(f"cannot rebuild {stored.model_class} from {path}: {_first_cause(error)}{hint}") from error
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {stored.model_class}: {_mismatch(error)}") from error
    return module.eval()


def _hyper_parameters(checkpoint: dict[str, Any]) -> HyperParameters:
    model, data = (dict(checkpoint.get(key) or {}) for key in ("hyper_parameters", "datamodule_hyper_parameters"))
    classes = [str(arguments.pop("_class_path", "")) for arguments in (model, data)]
    for arguments in (model, data):
        arguments.pop("_instantiator", None)
    return HyperParameters(classes[0], model, classes[1], data)


def read_file(path: str | Path, kind: str, trusted: Sequence[Any] = (), **how: Any) -> Any:
    """The content of a file of ``torch.save``, read without running any code in it.

    Args:
        path: the file.
        kind: what it should be, for messages: "a checkpoint of lightning_sgm".
        trusted: what it may contain beside tensors and plain values, as ``torch.serialization.safe_globals`` takes it.
        how: further arguments of ``torch.load``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, was not written by ``torch.save`` or contains other things.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    foreign = f"{path} is not {kind} or is damaged"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{foreign}: it is cut off or was not written by torch.save")
    try:
        with torch.serialization.safe_globals(list(trusted)):
            return torch.load(path, weights_only=True, **how)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = refused.group(1) if refused else "other things"
        raise ValueError(f"{foreign}: it contains {what}, but only tensors and plain values are read") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{foreign}: {str(error).partition(chr(10))[0]}") from error


def _read(path: str | Path, **how: Any) -> dict[str, Any]:
    if os.path.isdir(path):
        return read_folder(Path(path))
    kind = "a checkpoint of lightning_sgm"
    checkpoint = read_file(path, kind, **how)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is not {kind} or is damaged: it has no state_dict")
    return checkpoint


def _import_class(class_path: str, allow: tuple[str, ...], path: str | Path) -> type[LightningModule]:
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path} does not name the class of its model: use THE_CLASS.load_from_checkpoint")
    if not any(module_name == package or module_name.startswith(f"{package}.") for package in (*TRUSTED, *allow)):
        raise ValueError(
            f"{path} holds a {class_path}, which load() may not import; if you trust it, add its package: "
            f"allow={(*allow, module_name.partition('.')[0])!r}"
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} holds a {class_path}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ValueError(f"{path} holds a {class_path}, which is no LightningModule")
    return found


def _build(
    kind: type[LightningModule], arguments: dict[str, Any], allow: tuple[str, ...], from_recipe: bool
) -> LightningModule:
    """The model; a recipe's arguments are class paths and plain values, made into parts by Lightning's parser."""
    # The model keeps these arguments, also where it is loaded inside of another one's constructor, which has its own.
    if not from_recipe:
        token = _given_hyperparameters.set(None)
        try:
            return kind(**arguments)
        finally:
            _given_hyperparameters.reset(token)
    from lightning.pytorch.cli import instantiate_module

    # A copy of their own: the parser makes something else of those it is given.
    kept = {"_class_path": f"{kind.__module__}.{kind.__qualname__}", **copy.deepcopy(arguments)}
    with _imports_only((*TRUSTED, *allow)), _given_hyperparameters_context(kept, INSTANTIATOR):
        return instantiate_module(kind, arguments)


@contextmanager
def _imports_only(allow: tuple[str, ...]) -> Iterator[None]:
    """Let the parser import nothing else: importing a module runs it."""
    from jsonargparse import _common, set_parsing_settings

    before = dict(_common.parsing_settings)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(allow))
    try:
        yield
    finally:
        _common.parsing_settings.update(before)


def _first_cause(error: BaseException) -> str:
    """The message of the exception that started it, without the layers the parser adds."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _mismatch(error: RuntimeError) -> str:
    """The first complaint of a strict ``load_state_dict``."""
    lines = str(error).splitlines()
    return " ".join(" ".join(lines[1:2] or lines).split())[:300]
