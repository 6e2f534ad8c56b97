"""The one place where randomness is made: counters instead of hidden state.

Every random number of the framework is a function of (run seed, counters), never of how many numbers were drawn
before. That makes resuming exact, ranks independent and samples reproducible one by one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_SEED = "PL_GLOBAL_SEED"  # Lightning's, which child processes inherit
_COMMON = -1  # no counter of a fork
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def run_seed() -> int:
    """Seed of this run: what ``seed_everything`` announced to all processes, 0 without it."""
    return int(os.environ.get(_SEED, 0))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block in which the run's seed is ``seed``."""
    before = os.environ.get(_SEED)
    os.environ[_SEED] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEED]
        else:
            os.environ[_SEED] = before


def mix(*counters: int) -> int:
    """Hash integers into one 63-bit seed (SplitMix64 finaliser, Steele et al. 2014, applied counter by counter)."""
    state = 0
    for counter in counters:
        state = (state + _GOLDEN + (counter & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_step(*counters: int) -> None:
    """Seed torch's default generators (dropout and friends) for one step; far cheaper than ``torch.manual_seed``."""
    seed = mix(*counters)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _signed(value: int) -> int:
    """Two's complement int64 with the bits of ``value``."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(x: Tensor) -> Tensor:
    """SplitMix64 of an int64 tensor, elementwise."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


class Draw:
    """A source of noise, passed to everything that draws.

    Without ``keys`` it wraps one generator on ``device``: fast, and the numbers depend on the whole batch. With
    ``keys`` (exact mode) row i of every result depends on (seed, keys[i], number of earlier calls) alone, so it
    does not matter which batch, process or device a row is in; all rows are made by one vectorised hash.

    Args:
        seed: any integer; use ``mix(run_seed(), ...)``.
        keys: (B,) int64, one per row of everything that will be drawn; None for one shared generator.
        device: where results live; with ``keys`` it is theirs.
        common: seed of what all rows on all processes have in common, for a ``seed`` of one process; None for ``seed``.
    """

    def __init__(
        self,
        seed: int,
        keys: Tensor | None = None,
        device: torch.device | str = "cpu",
        common: int | None = None,
    ) -> None:
        self.seed = seed
        self.common = seed if common is None else common
        self.keys = keys
        self.device = torch.device(device) if keys is None else keys.device
        self._calls = 0
        self._shared: Draw | None = None
        self._generator: torch.Generator | None = None
        if keys is None:
            self._generator = torch.Generator(self.device)
            self._generator.manual_seed(mix(seed))

    def fork(self, *counters: int) -> Draw:
        """An independent source for another purpose (same rows), a function of this one's seed and ``counters``."""
        return Draw(mix(self.seed, *counters), self.keys, self.device, mix(self.common, *counters))

    @property
    def shared(self) -> Draw:
        """The source of numbers that all rows on all processes share, such as one time for a batch; without keys."""
        if self._shared is None:
            self._shared = Draw(mix(self.common, _COMMON), device=self.device)
        return self._shared

    def rows(self, index: Tensor) -> Draw:
        """The source of the rows ``index`` (int64 or bool), fresh from its first call; needs ``keys``."""
        if self.keys is None:
            raise ValueError("rows of a Draw without keys are not defined: give keys, one per row")
        return Draw(self.seed, self.keys[index], common=self.common)

    def split(self, count: int) -> Draw:
        """The source for ``count`` rows in place of each one, in order; itself without ``keys``."""
        if self.keys is None:
            return self
        parts = torch.arange(count, device=self.device)
        return Draw(self.seed, (self.keys[:, None] * count + parts).flatten(), common=self.common)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1) of ``shape``, with as many random bits as ``dtype`` has digits (float64 53)."""
        if self.keys is None:
            return torch.rand(tuple(shape), generator=self._generator, device=self.device, dtype=dtype)
        # More bits than digits would round up to 1.
        digits = 1 - round(math.log2(torch.finfo(dtype).eps))
        return _shift(self._bits(shape), 64 - digits).to(dtype) * 2.0**-digits

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of ``shape`` (exact mode: Box-Muller on one 64-bit hash)."""
        if self.keys is None:
            return torch.randn(tuple(shape), generator=self._generator, device=self.device, dtype=dtype)
        bits = self._bits(shape)
        # One hash gives both uniforms: 40 bits for the radius (tails to 7.4 standard deviations), 24 for the angle.
        radius = torch.sqrt(-2.0 * torch.log((_shift(bits, 24).to(torch.float64) + 0.5) * 2.0**-40))
        angle = (bits & ((1 << 24) - 1)).to(torch.float64) * (2.0 * torch.pi * 2.0**-24)
        return (radius * torch.cos(angle)).to(dtype)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Uniform int64 in [0, high), high >= 1."""
        if high < 1:
            raise ValueError(f"integers are drawn from [0, high) with high at least 1, got {high}")
        return (self.uniform(shape, torch.float64) * high).long().clamp_(max=high - 1)

    def strata(self, count: int) -> Tensor:
        """(count,) float64, each uniform in [0, 1), together spread evenly: lower variance of a batch mean.

        Without keys one per stratum [i / B, (i + 1) / B) in random order. With keys row i is u + keys[i] times the
        golden ratio modulo 1 with one u from the seed (a Kronecker sequence), so it is independent of the batch and any
        run of consecutive keys is spread evenly.
        """
        if self.keys is None:
            order = torch.randperm(count, generator=self._generator, device=self.device)
            # The sum rounds: a number just below 1 in the last stratum would become 1.
            return ((order + self.uniform((count,), torch.float64)) / count).clamp_(max=1.0 - 2.0**-53)
        self._check_rows((count,))
        self._calls += 1
        # In 64-bit integers, where the golden ratio is 2^64 times its fraction: exact for keys of any size.
        bits = self.keys.long() * _signed(_GOLDEN) + _signed(2 * mix(self.seed, self._calls))
        return _shift(bits, 11).to(torch.float64) * 2.0**-53

    def _bits(self, shape: Sequence[int]) -> Tensor:
        assert self.keys is not None
        self._check_rows(shape)
        per_row = 1
        for size in shape[1:]:
            per_row *= size
        self._calls += 1
        state = _hash(_hash(self.keys.long() ^ _signed(mix(self.seed))) + self._calls)
        element = torch.arange(per_row, device=self.keys.device, dtype=torch.int64)
        return _hash(state[:, None] + element * _signed(_GOLDEN)).reshape(*shape)

    def _check_rows(self, shape: Sequence[int]) -> None:
        assert self.keys is not None
        rows = len(self.keys)
        if not shape or shape[0] != rows:
            raise ValueError(f"a Draw with {rows} keys cannot fill shape {tuple(shape)}: the first size must be {rows}")
