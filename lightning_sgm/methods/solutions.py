"""A teacher's results, kept by the number of the example: what a student regresses to is then solved for only once."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sgm.processes.gaussian import GaussianProcess, Level

Kept = Literal["float16", "float32"]
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_COUNTERS = ("cost", "evaluations")  # attributes that say what was done last, not what something is
_MARK = struct.Struct("<Q")  # of a row: 2^32 + CRC-32 of its bytes; 0, as files begin, where it is not known


class Solutions:
    """Where a teacher's results are kept, as a recipe says it.

    Args:
        folder: of files that later runs and other processes share; None for the memory of this process, which is lost
            with it. With several processes give a folder: shuffling hands an example to another one every epoch.
        dtype: "float16", whose rounding of 5e-4 is far below what a student learns, or "float32".
    """

    def __init__(self, folder: str | None = None, dtype: Kept = "float16") -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype of Solutions must be float16 or float32, got {dtype!r}")
        self.folder, self.dtype = folder, dtype

    def open(self, size: int, shape: Sequence[int], fingerprint: str) -> SolutionCache:
        """The cache for ``size`` examples; see :class:`SolutionCache`."""
        return SolutionCache(size, shape, self.folder, fingerprint, self.dtype)


class SolutionCache:
    """Tensors of one shape by the number of the example; what is missing is up to the caller.

    A folder has three files: ``solutions.json`` says what they belong to, ``values.bin`` holds the values, which take
    room on the disk as they come, and ``marks.bin`` a checksum of each. A row whose checksum is wrong counts as
    missing, so a kill, a full disk or two processes that write the same row never show half of one. No file stays open.

    Args:
        size: examples are numbered 0 to size - 1.
        shape: of one of them, without the batch.
        folder: see :class:`Solutions`.
        fingerprint: of all that the values depend on, see :func:`fingerprint_of`.
        dtype: see :class:`Solutions`.

    Raises:
        ValueError: the folder holds solutions of something else, or cannot be written to; there is not enough memory.
    """

    def __init__(
        self, size: int, shape: Sequence[int], folder: str | None, fingerprint: str, dtype: Kept = "float16"
    ) -> None:
        if size < 1:
            raise ValueError(f"a SolutionCache needs at least one example, got size {size}")
        self.size, self.shape = size, tuple(int(side) for side in shape)
        self._dtype = _DTYPES[dtype]
        width = int(torch.Size(self.shape).numel()) * self._dtype.itemsize
        self._rows: _Memory | _Files
        if folder is None:
            self._rows = _Memory(size, width)
        else:
            about = {"fingerprint": fingerprint, "size": size, "shape": list(self.shape), "dtype": dtype}
            self._rows = _Files(Path(folder), size, width, about)

    def get(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions of the examples ``index`` (B,), as far as they are known.

        Returns:
            (B, *) float32, 0 where not known, and (B,) bool, whether it is; both on the device of ``index``.
        """
        found = self._rows.read(self._numbers(index))
        values = torch.zeros(len(found), *self.shape)
        for value, row in zip(values, found, strict=True):
            if row is not None:
                value.copy_(torch.frombuffer(bytearray(row), dtype=self._dtype).reshape(self.shape))
        known = torch.tensor([row is not None for row in found], dtype=torch.bool)
        return values.to(index.device), known.to(index.device)

    def put(self, index: Tensor, values: Tensor) -> Tensor:
        """Keep ``values`` (B, *) of the examples ``index`` (B,).

        Returns:
            (B, *) what :meth:`get` will give, rounded, on the device of ``values``: a run that goes on from a
            checkpoint with an empty cache then learns the same.

        Raises:
            ValueError: values of another shape, or not finite in the type that is kept.
            OSError: the disk is full or the like; what was kept before is still there.
        """
        if values.shape != (len(index), *self.shape):
            raise ValueError(
                f"solutions of shape {tuple(values.shape)} for {len(index)} examples of shape {self.shape}: all "
                "examples of a SolutionCache have one shape"
            )
        kept = values.detach().to("cpu", self._dtype).contiguous()
        if not kept.isfinite().all():
            name = str(self._dtype).removeprefix("torch.")
            raise ValueError(
                f"a solution of the teacher is not finite in {name}: "
                + ("keep float32, or " if name == "float16" else "")
                + "see whether the teacher's own samples are"
            )
        rows = [row.flatten().view(torch.uint8).numpy().tobytes() for row in kept]
        self._rows.write(self._numbers(index), rows)
        return kept.to(values.device, torch.float32)

    def _numbers(self, index: Tensor) -> list[int]:
        numbers: list[int] = index.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.size:
            raise ValueError(f"examples {min(numbers)} to {max(numbers)} asked of a SolutionCache of {self.size}")
        return numbers


class _Memory:
    """Rows of ``width`` bytes in this process; the system gives a page when it is first written to."""

    def __init__(self, size: int, width: int) -> None:
        try:
            self._values = torch.empty(size, width, dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(
                f"no memory for {size} solutions of {width / 1e6:.3g} MB: give Solutions a folder, or fewer examples"
            ) from error
        self._known = torch.zeros(size, dtype=torch.bool)

    def read(self, numbers: list[int]) -> list[bytes | None]:
        return [self._values[i].numpy().tobytes() if self._known[i] else None for i in numbers]

    def write(self, numbers: list[int], rows: list[bytes]) -> None:
        for number, row in zip(numbers, rows, strict=True):
            self._values[number] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
            self._known[number] = True


class _Files:
    """Rows of ``width`` bytes in a folder, written and read by any number of processes."""

    def __init__(self, folder: Path, size: int, width: int, about: dict[str, Any]) -> None:
        self._folder, self._width = folder, width
        self._values, self._marks = folder / "values.bin", folder / "marks.bin"
        with _explained(folder, ValueError):
            folder.mkdir(parents=True, exist_ok=True)
            _claim(folder, about)
            for path, length in ((self._values, size * width), (self._marks, size * _MARK.size)):
                with path.open("ab") as file:
                    if file.tell() < length:
                        file.truncate(length)

    def read(self, numbers: list[int]) -> list[bytes | None]:
        with _explained(self._folder, OSError):
            marks = self._read(self._marks, _MARK.size, numbers)
            rows = self._read(self._values, self._width, numbers)
        return [row if mark == _mark(row) else None for mark, row in zip(marks, rows, strict=True)]

    def write(self, numbers: list[int], rows: list[bytes]) -> None:
        with _explained(self._folder, OSError):
            self._write(self._values, self._width, numbers, rows)
            self._write(self._marks, _MARK.size, numbers, [_mark(row) for row in rows])

    @staticmethod
    def _read(path: Path, width: int, numbers: list[int]) -> list[bytes]:
        rows = []
        with path.open("rb", buffering=0) as file:
            for number in numbers:
                file.seek(number * width)
                rows.append(file.read(width))
        return rows

    @staticmethod
    def _write(path: Path, width: int, numbers: list[int], rows: list[bytes]) -> None:
        with path.open("r+b", buffering=0) as file:
            for number, row in zip(numbers, rows, strict=True):
                file.seek(number * width)
                rest = memoryview(row)
                # A disk that is nearly full takes a part and refuses the rest at the next attempt.
                while rest:
                    rest = rest[file.write(rest) :]


def _mark(row: bytes) -> bytes:
    return _MARK.pack(2**32 + zlib.crc32(row))


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Say what a new folder is for, or see that an old one is for the same."""
    path = folder / "solutions.json"
    if not path.exists():
        temporary = folder / f".solutions.{uuid.uuid4().hex[:12]}.tmp"
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        try:
            # A link appears whole and, unlike a rename, never in place of another process's.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: remove the folder {folder}, or choose another one") from error
    if found != about:
        raise ValueError(
            f"{folder} holds solutions of another teacher, sampler, seed, data set or type than this run's: choose "
            "another folder for Solutions, or remove this one"
        )


@contextmanager
def _explained(folder: Path, kind: type[Exception]) -> Iterator[None]:
    """Errors of the system as one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"cannot keep the teacher's solutions in {folder}: {error.strerror}; make room or choose another folder "
            "for Solutions (those that are there stay valid)"
        ) from error


def fingerprint_of(weights: Mapping[str, Tensor], levels: Iterable[Level], *, solver: str, data: str, seed: int) -> str:
    """A name, SHA-256 in hexadecimal, for all that solutions depend on: another value of any gives another name.

    Args:
        weights: of the teacher, its ``state_dict``; in any order.
        levels: that the solver visits.
        solver: its rule, and whatever else tells it from others; see :func:`outline`.
        data: the data set's own fingerprint.
        seed: of the starts.
    """
    digest = _digest(weights)
    digest.update(repr([[float(part) for part in level] for level in levels]).encode())
    digest.update(repr((solver, data, seed)).encode())
    return digest.hexdigest()


def outline(part: Any) -> Any:
    """Class and values of a sampler, a denoiser or the like and of all its parts, as plain lists and strings.

    Of a process there is the class only, as the levels of the solver say the rest.
    """
    if callable(part) and hasattr(part, "__qualname__"):
        return f"{part.__module__}.{part.__qualname__}"
    if isinstance(part, nn.Module):
        return [outline(type(part)), _digest(part.state_dict()).hexdigest()]
    if isinstance(part, GaussianProcess):
        return outline(type(part))
    if isinstance(part, list | tuple):
        return [outline(entry) for entry in part]
    if isinstance(part, Tensor):
        return part.tolist()
    if not hasattr(part, "__dict__"):
        return repr(part)
    values = sorted((name, value) for name, value in vars(part).items() if name not in _COUNTERS)
    return [outline(type(part)), *([name, outline(value)] for name, value in values)]


def _digest(weights: Mapping[str, Tensor]) -> hashlib._Hash:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        value = value.detach().cpu().contiguous()
        digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest
