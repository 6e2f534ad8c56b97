"""Writing files so that a kill, a full disk or an error never leaves half of one under its final name."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write into; it appears as ``path`` only when the block ends without an error.

    The bytes go to a hidden temporary file in the same folder (a rename is atomic only within one file system; see
    Lightning issue 19970), are flushed to the disk, then renamed. After an error the temporary file is removed and an
    older file of that name is untouched; SIGKILL can leave a ``.NAME.*.tmp`` behind. Missing folders are made.

    Args:
        path: the file to write, replaced if it exists.

    Yields:
        A file opened for writing bytes (``torch.save`` and ``PIL.Image.save`` take it too).

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror} ({error.filename}); choose a folder you may write to"
        ) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically.

    Args:
        path: the file.
        value: dicts with string keys, lists, strings, numbers, None. Infinities and NaN, which JSON does not know,
            become null.

    Raises:
        TypeError: something else is inside (call ``.item()`` on tensors first).
        ValueError: the folder cannot be written to.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def next_version(folder: Path) -> Path:
    """``folder/version_N`` with N one above all that exist."""
    numbers = [int(p.name[8:]) for p in folder.glob("version_*") if p.name[8:].isdigit()]
    return folder / f"version_{max(numbers, default=-1) + 1}"
