import errno
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_sgm.methods import solutions
from lightning_sgm.methods.solutions import SolutionCache, Solutions, fingerprint_of
from lightning_sgm.processes.gaussian import VP, Level
from lightning_sgm.random import Draw

SHAPE = (3, 4, 2)


def cache(folder=None, size=20, fingerprint="a", dtype="float32", shape=SHAPE):
    return SolutionCache(size, shape, None if folder is None else str(folder), fingerprint, dtype)


def values(rows, seed=0):
    return Draw(seed).normal((rows, *SHAPE))


@pytest.fixture(params=["memory", "disk"])
def place(request, tmp_path):
    return tmp_path / "cache" if request.param == "disk" else None


# Round trips.


def test_nothing_is_known_at_first_and_all_that_was_put_comes_back(place):
    kept, x = cache(place), values(4)
    found, known = kept.get(torch.arange(20))
    assert (found.shape, found.dtype, known.any().item()) == ((20, *SHAPE), torch.float32, False)
    kept.put(torch.tensor([7, 0, 19, 3]), x)
    found, known = kept.get(torch.tensor([3, 4, 7, 7, 19, 0]))
    assert known.tolist() == [True, False, True, True, True, True]
    assert torch.equal(found[known], x[[3, 0, 0, 2, 1]])
    assert not found[1].any()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(st.integers(0, 19), max_size=6, unique=True), max_size=5), disk=st.booleans())
def test_the_cache_is_a_dictionary(tmp_path_factory, batches, disk):
    kept = cache(tmp_path_factory.mktemp("cache") if disk else None)
    expected: dict[int, torch.Tensor] = {}
    for step, batch in enumerate(batches):
        x = values(len(batch), step)
        kept.put(torch.tensor(batch, dtype=torch.long), x)
        expected |= dict(zip(batch, x, strict=True))
    found, known = kept.get(torch.arange(20))
    assert set(known.nonzero().flatten().tolist()) == set(expected)
    for number, value in expected.items():
        assert torch.equal(found[number], value)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2.0**-11), ("float32", 0.0)])
def test_what_is_kept_is_rounded_to_the_type_and_read_as_float32(place, dtype, error):
    kept, x = cache(place, dtype=dtype), values(6)
    kept.put(torch.arange(6), x.double())
    found, _ = kept.get(torch.arange(6))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x, rtol=error, atol=1e-7 if error else 0)
    if error:
        assert not torch.equal(found, x)
    if place is not None:
        assert (place / "values.bin").stat().st_size == 20 * 24 * (2 if dtype == "float16" else 4)


def test_a_later_run_finds_what_an_earlier_one_put(tmp_path):
    x = values(3)
    cache(tmp_path).put(torch.tensor([1, 2, 5]), x)
    found, known = cache(tmp_path).get(torch.tensor([5, 1, 6]))
    assert known.tolist() == [True, True, False]
    assert torch.equal(found[:2], x[[2, 0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marks.bin", "solutions.json", "values.bin"]


def test_settings_open_a_cache(tmp_path):
    kept = Solutions(folder=str(tmp_path), dtype="float16").open(5, SHAPE, "a")
    kept.put(torch.tensor([2]), values(1))
    assert cache(tmp_path, 5, dtype="float16").get(torch.arange(5))[1].tolist() == [False, False, True, False, False]


# What may go wrong.


@pytest.mark.parametrize("torn", ["no mark", "half a row", "one bit", "file cut off", "values lost"])
def test_a_row_that_was_not_written_whole_is_missing(tmp_path, torn):
    kept, x = cache(tmp_path), values(2)
    kept.put(torch.tensor([4, 19]), x)
    width, file, marks = 24 * 4, tmp_path / "values.bin", tmp_path / "marks.bin"
    content = bytearray(file.read_bytes())
    if torn == "no mark":
        content_of_marks = bytearray(marks.read_bytes())
        content_of_marks[19 * 8 : 20 * 8] = bytes(8)
        marks.write_bytes(content_of_marks)
    elif torn == "half a row":
        content[19 * width : 19 * width + width // 2] = bytes(width // 2)
    elif torn == "one bit":
        content[19 * width + 50] ^= 1
    elif torn == "file cut off":
        content = content[: 19 * width + 7]
    else:
        content = bytearray(width * 5 - width) + content[4 * width : 5 * width]
    file.write_bytes(content)
    for reader in (kept, cache(tmp_path)):
        found, known = reader.get(torch.tensor([4, 19, 0]))
        assert known.tolist() == [True, False, False]
        assert torch.equal(found[0], x[0])
        assert not found[1].any()
    kept.put(torch.tensor([19]), x[1:])
    assert torch.equal(kept.get(torch.tensor([19]))[0], x[1:])


# The file alone: the package of all methods takes seconds to import.
ALONE = f"""
import importlib.util, os, sys, torch
spec = importlib.util.spec_from_file_location("solutions", {solutions.__file__!r})
solutions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(solutions)
"""
KILLED = """
kept = solutions.SolutionCache(20, (3, 4, 2), sys.argv[1], "a", "float32")
kept.put(torch.tensor([0, 1]), torch.ones(2, 3, 4, 2))
write = solutions._Files._write
def dies(path, width, numbers, rows):
    if path.name == "marks.bin":
        write(path, width, numbers[:1], rows[:1])
        os.kill(os.getpid(), 9)
    write(path, width, numbers, rows)
solutions._Files._write = staticmethod(dies)
kept.put(torch.tensor([2, 3]), torch.full((2, 3, 4, 2), 2.0))
"""


def test_a_kill_between_values_and_marks_loses_only_what_has_no_mark(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE + KILLED, str(tmp_path)], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == -9
    found, known = cache(tmp_path).get(torch.arange(5))
    assert known.tolist() == [True, True, True, False, False]
    assert found[:3, 0, 0, 0].tolist() == [1.0, 1.0, 2.0]


WRITER = """
kept, rank = solutions.SolutionCache(200, (64,), sys.argv[1], "a", "float32"), int(sys.argv[2])
for start in range(0, 200, 8):
    number = torch.arange(start, start + 8)
    if rank:
        number = 199 - number
    kept.put(number, number[:, None].float().expand(8, 64))
    found, known = kept.get(torch.arange(200))
    right = found == torch.arange(200.0)[:, None] * known[:, None]
    assert right.all() and known[number].all()
"""


def test_two_processes_write_the_same_files(tmp_path):
    folder, root = tmp_path / "new", Path(__file__).parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", ALONE + WRITER, str(folder), rank], cwd=root) for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    found, known = SolutionCache(200, (64,), str(folder), "a", "float32").get(torch.arange(200))
    assert known.all()
    assert torch.equal(found, torch.arange(200.0)[:, None].expand(200, 64))
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "other",
    [{"fingerprint": "b"}, {"size": 21}, {"shape": (4, 3, 2)}, {"dtype": "float16"}],
    ids=lambda other: "".join(other),
)
def test_solutions_of_something_else_are_refused_and_kept(tmp_path, other):
    cache(tmp_path).put(torch.tensor([1]), values(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{tmp_path} holds solutions of another teacher.* choose another folder"):
        cache(tmp_path, **other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_description_is_refused(tmp_path):
    cache(tmp_path)
    (tmp_path / "solutions.json").write_text('{"fingerprint"')
    with pytest.raises(ValueError, match=r"solutions\.json is damaged: remove the folder"):
        cache(tmp_path)


def test_the_process_that_is_late_keeps_the_description_of_the_first(tmp_path, monkeypatch):
    # Both saw no description; the other's appears before ours.
    first = {"fingerprint": "b", "size": 20, "shape": list(SHAPE), "dtype": "float32"}
    unseen = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "solutions.json" and unseen(path))
    (tmp_path / "solutions.json").write_text(json.dumps(first))
    with pytest.raises(ValueError, match="holds solutions of another"):
        cache(tmp_path)
    assert json.loads((tmp_path / "solutions.json").read_text()) == first
    assert [path.name for path in tmp_path.iterdir()] == ["solutions.json"]


class Full:
    """A file on a disk with room for ``room`` bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def seek(self, place):
        self.file.seek(place)

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = min(len(data), self.room)
        self.room -= part
        return self.file.write(data[:part])


def test_a_full_disk_says_so_and_leaves_what_is_there(tmp_path, monkeypatch):
    kept, x = cache(tmp_path), values(3)
    kept.put(torch.tensor([0]), x[:1])
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda path, mode, **how: Full(opened(path, mode, **how), 96 + 40) if "+" in mode else None
        )
        with pytest.raises(OSError, match=f"in {tmp_path}: No space left on device; make room or choose another"):
            kept.put(torch.tensor([1, 2]), x[1:])
    found, known = kept.get(torch.arange(4))
    assert known.tolist() == [True, False, False, False]
    assert torch.equal(found[0], x[0])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot keep the teacher's solutions in .*file: .*choose another folder"):
        cache(tmp_path / "file")


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    kept = cache(tmp_path)
    (tmp_path / "values.bin").unlink()
    for use in (lambda: kept.get(torch.tensor([1])), lambda: kept.put(torch.tensor([1]), values(1))):
        with pytest.raises(OSError, match=r"cannot keep the teacher's solutions .* No such file"):
            use()


def test_bad_arguments(place):
    kept = cache(place, dtype="float16")
    with pytest.raises(ValueError, match=r"examples 3 to 20 asked of a SolutionCache of 20"):
        kept.get(torch.tensor([20, 3]))
    with pytest.raises(ValueError, match=r"examples -1 to -1"):
        kept.put(torch.tensor([-1]), values(1))
    with pytest.raises(ValueError, match=r"shape \(1, 5\) for 1 examples of shape \(3, 4, 2\)"):
        kept.put(torch.tensor([1]), torch.zeros(1, 5))
    for bad in (torch.inf, torch.nan, 1e5):
        with pytest.raises(ValueError, match="not finite in float16: keep float32, or see"):
            kept.put(torch.tensor([1, 2]), values(2).index_fill(0, torch.tensor([1]), bad))
    assert not kept.get(torch.tensor([1, 2]))[1].any()
    with pytest.raises(ValueError, match="at least one example"):
        cache(place, size=0)
    with pytest.raises(ValueError, match="float16 or float32"):
        Solutions(dtype="bfloat16")  # type: ignore[arg-type]


def test_more_than_the_memory_can_hold():
    with pytest.raises(ValueError, match=r"no memory for 10000000000000 solutions .* give Solutions a folder"):
        cache(size=10**13)


# The name of what solutions depend on.

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
LEVELS = [VP().level(t) for t in (1.0, 0.5)]
ABOUT: dict[str, Any] = {"solver": "Euler", "data": "photographs", "seed": 0}


def test_a_fingerprint_is_the_same_for_the_same_and_another_for_anything_else():
    base = fingerprint_of(WEIGHTS, LEVELS, **ABOUT)
    assert base == fingerprint_of(dict(reversed(WEIGHTS.items())), LEVELS, **ABOUT)
    assert base == fingerprint_of({**WEIGHTS, "a": WEIGHTS["a"].T.contiguous().T}, LEVELS, **ABOUT)
    others = [
        fingerprint_of(weights, LEVELS, **ABOUT)
        for weights in (
            {**WEIGHTS, "a": WEIGHTS["a"] + 2**-20},
            {**WEIGHTS, "a": WEIGHTS["a"].reshape(3, 2)},
            {**WEIGHTS, "b": torch.tensor(3, dtype=torch.int32)},
            {**WEIGHTS, "d": torch.zeros(0)},
            {"b": WEIGHTS["b"], "c": WEIGHTS["c"], "aa": WEIGHTS["a"]},
        )
    ]
    others += [fingerprint_of(WEIGHTS, LEVELS, **{**ABOUT, **change}) for change in ({"solver": "Heun"}, {"data": ""})]
    others += [fingerprint_of(WEIGHTS, LEVELS, **{**ABOUT, "seed": 1}), fingerprint_of(WEIGHTS, LEVELS[:1], **ABOUT)]
    others += [fingerprint_of(WEIGHTS, [VP().level(1.0), VP().level(0.5 + 1e-15)], **ABOUT)]
    assert len({base, *others}) == len(others) + 1


def test_a_fingerprint_is_the_same_in_every_run():
    # Solutions that an earlier version kept must still be found: worked out by hand from the bytes.
    level = Level(*torch.tensor([1.0, 0.25, 2.0], dtype=torch.float64))
    text = "('w', (2,), 'torch.float32')", "[[1.0, 0.25, 2.0]]", "('Euler', 'd', 3)"
    content = text[0].encode() + struct.pack("<2f", 1.0, 2.0) + text[1].encode() + text[2].encode()
    found = fingerprint_of({"w": torch.tensor([1.0, 2.0])}, [level], solver="Euler", data="d", seed=3)
    assert found == hashlib.sha256(content).hexdigest()
