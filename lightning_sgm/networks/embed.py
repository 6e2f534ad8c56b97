"""The only embeddings of times and positions."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

EmbeddingKind = Literal["positional", "fourier"]


class SinusoidalEmbedding(nn.Module):
    """Sines, then cosines of a label at geometric frequencies from 1 down to 1/``period`` (Ho et al. 2020, sec. B).

    Frequency j is ``period ** (-j / (width / 2 - shift))``. Labels may be fractional; they should span tens to
    thousands, as 999 t does. Nothing is stored, so that a module cast to half precision keeps exact frequencies.

    Args:
        width: even number of features.
        period: the largest period, in units of the label over 2 pi.
        shift: 1 makes the last frequency exactly 1/period (score_sde, EDM), 0 is the transformers' form.
        cosines_first: the cosines before the sines, as in ADM's code and what grew from it (ResShift).
    """

    def __init__(self, width: int, period: float = 10000.0, shift: int = 0, cosines_first: bool = False) -> None:
        super().__init__()
        if width % 2 or width // 2 <= shift:
            raise ValueError(f"a sinusoidal embedding needs an even width above {2 * shift}, got {width}")
        self.width, self.period, self.shift, self.cosines_first = width, period, shift, cosines_first

    def forward(self, label: Tensor) -> Tensor:
        """(B,) to (B, width)."""
        steps = torch.arange(self.width // 2, dtype=torch.float64, device=label.device)
        embedded = sin_cos(label, torch.exp(-math.log(self.period) / (self.width // 2 - self.shift) * steps))
        return embedded.roll(self.width // 2, -1) if self.cosines_first else embedded


class FourierEmbedding(nn.Module):
    """Sines, then cosines of 2 pi W label, W fixed and drawn from N(0, scale^2) (Tancik et al. 2020; Song et al. 2021).

    For labels of a few units such as ln sigma or ln(sigma) / 4. The frequencies are a buffer of the state dict.

    Args:
        width: even number of features.
        scale: standard deviation of the frequencies, in cycles per unit of the label. 16 is score_sde's; smaller is
            smoother, and faster to learn from few examples.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"a Fourier embedding needs an even width, got {width}")
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) to (B, width)."""
        return sin_cos(label, 2 * torch.pi * self.frequencies)


def label_embedding(kind: EmbeddingKind, width: int, fourier_scale: float = 1.0) -> nn.Module:
    """The embedding of a noise label that networks offer as an option.

    Args:
        kind: "positional" for labels that span hundreds (999 t, step numbers), "fourier" for labels of a few units
            (ln(sigma) / 4 of EDM).
        width: even number of features.
        fourier_scale: see :class:`FourierEmbedding`; only used by "fourier".
    """
    if kind == "positional":
        return SinusoidalEmbedding(width, shift=1)
    if kind == "fourier":
        return FourierEmbedding(width, fourier_scale)
    raise ValueError(f"embedding is 'positional' or 'fourier', got {kind!r}")


class Rotary(nn.Module):
    """Rotary position tables, NeoX half-split form (Su et al. 2021): halves (x1, x2) of a head are rotated together.

    ``forward(length, device)`` returns float32 (length, head_width) tables ``cos`` = [c, c] and ``sin`` = [-s, s], so
    that a rotation is ``x * cos + roll(x, head_width / 2) * sin``. Tables are made once per length and device and are
    not part of the state dict; an ``inv_freq`` found in a checkpoint is compared with ours.

    Args:
        head_width: even number of features of one head, all of which are rotated.
        base: frequency j is ``base ** (-2 j / head_width)``.
    """

    def __init__(self, head_width: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"rotary positions need an even head width, got {head_width}")
        self.head_width, self.base = head_width, base
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self.register_load_state_dict_pre_hook(_check_frequencies)

    def frequencies(self, device: torch.device) -> Tensor:
        """Angle per position of each pair of features, (head_width / 2,) float64."""
        return self.base ** (-torch.arange(0, self.head_width, 2, dtype=torch.float64, device=device) / self.head_width)

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables (cos, sin) for positions 0 .. length - 1."""
        if torch.compiler.is_compiling():
            return self._make(length, device)
        key = (length, device)
        if key not in self._tables:
            # Tables first made in Lightning's validation must still serve training, which inference tensors cannot.
            with torch.inference_mode(False):
                self._tables[key] = self._make(length, device)
        return self._tables[key]

    def _make(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * self.frequencies(device)
        cos, sin = angles.cos().float(), angles.sin().float()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def sin_cos(label: Tensor, frequencies: Tensor) -> Tensor:
    """Sines, then cosines of the products, (B, 2 F), of labels (B,) and frequencies (F,).

    Computed in float32 or better and returned in a floating label's type.
    """
    dtype = torch.promote_types(label.dtype, torch.float32)
    angles = label.to(dtype)[:, None] * frequencies.to(dtype)
    return torch.cat([angles.sin(), angles.cos()], -1).to(label.dtype if label.is_floating_point() else dtype)


def _check_frequencies(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Take ``inv_freq`` out of a checkpoint's state; released weights store it, ours do not (radd.md 11)."""
    stored = state.pop(prefix + "inv_freq", None)
    if stored is None:
        return
    assert isinstance(module, Rotary)
    ours = module.frequencies(stored.device).to(stored.dtype)
    if stored.shape != ours.shape or not torch.allclose(stored, ours, rtol=1e-3):
        args[-1].append(f"{prefix}inv_freq of the checkpoint is not that of rotary base {module.base}")
