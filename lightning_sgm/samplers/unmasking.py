"""Generation of tokens by iterative unmasking (Ou et al. 2024, 2406.03736, section 3 and appendix D).

The probability that a masked token is revealed in a step does not depend on the network, and the network does not see
the time. So the step in which each position is revealed is drawn before the first network call; afterwards only changes
cost something: a sequence is given to the network only when a token of it is about to be revealed, and the output
layer works on the revealed positions only. Revealing is decided apart from the token's value, and the token is drawn by
inverting its cumulative distribution in float64, so that no step count distorts the law (float32 draws over all
tokens and "stay masked" at once do: Zheng et al. 2024, 2409.02908).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.processes.absorbing import AbsorbingProcess, Schedule
from lightning_sgm.random import Draw

UnmaskingRule = Literal["tweedie", "euler", "any_order"]
Order = Literal["random", "forward", "backward"]

# Elements of one float64 workspace in draw_tokens (32 MiB): large vocabularies are drawn in blocks of rows.
_WORKSPACE = 1 << 22


class UnmaskingSampler:
    """Tau-leaping from all masks to tokens, or one token at a time.

    Args:
        steps: N >= 1 steps from t = 1 to ``eps``, all of them equally long; the last one reveals whatever is still
            masked. Cost grows with the number of tokens, not with N. Not used by "any_order".
        rule: how likely a masked token is to be revealed in a step: "tweedie" (exact for this process), "euler"
            (first order, the same for a log-linear schedule), or "any_order": one token per network call.
        order: which token comes next with "any_order": "random" (another order for each sequence, the limit of the
            other rules for N to infinity), "forward", "backward", or all positions 0 .. L-1 in the order wanted.
        top_p: draw each token from the smallest set of most likely tokens with at least this probability, in (0, 1].
        top_k: draw each token from the ``top_k`` most likely ones, >= 1; with ``top_p`` too, that acts on these.
        schedule: mask schedule to sample with; None for the one of the denoiser's process. Any model takes any.
        eps: time at the end of the last step, in (0, 1).

    Attributes:
        evaluations: network rows evaluated in the last call, per sequence.
    """

    def __init__(
        self,
        steps: int = 128,
        rule: UnmaskingRule = "tweedie",
        order: Order | list[int] = "random",
        top_p: float | None = None,
        top_k: int | None = None,
        schedule: Schedule | None = None,
        eps: float = 1e-5,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps of the unmasking sampler must be at least 1, got {steps}")
        if rule not in ("tweedie", "euler", "any_order"):
            raise ValueError(f"rule of the unmasking sampler must be tweedie, euler or any_order, got {rule!r}")
        listed = isinstance(order, list) and len(order) > 0 and set(order) == set(range(len(order)))
        if not listed and order not in ("random", "forward", "backward"):
            raise ValueError(
                "order of the unmasking sampler must be random, forward, backward or a list of the positions 0 to L-1, "
                f"each once, got {order!r}"
            )
        if order != "random" and rule != "any_order":
            raise ValueError(f"order is for rule: any_order, the rule {rule} has none")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if not 0 < eps < 1:
            raise ValueError(f"eps of the unmasking sampler must lie strictly between 0 and 1, got {eps}")
        self.steps = steps
        self.rule: UnmaskingRule = rule
        self.order: Order | list[int] = order
        self.top_p = top_p
        self.top_k = top_k
        self.schedule = schedule
        self.eps = eps
        self.evaluations = 0.0

    def __call__(
        self,
        denoiser: TokenDenoiser,
        x: Tensor,
        draw: Draw,
        wanted: Tensor | None = None,
        on_event: Callable[[int, int, Tensor], None] | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """Replace masks by tokens.

        With a keyed ``draw`` a sequence does not depend on the batch it is in, up to the network's rounding.

        Args:
            denoiser: the model.
            x: (B, L) int64, the mask id where a token is wanted; all other tokens stay (prompt, suffix, infilling).
            draw: source of randomness; two float64 uniforms per position.
            wanted: (B, L) bool, the masks to replace; all by default. The others stay and cost nothing: the answer is
                averaged over all that could be there.
            on_event: called as on_event(done, total, x) after each network call. The rows of a batch do not wait for
                one another: then every row has undergone ``done`` of its changes, or all it has.
            **conditions: (B, ...) each, handed to the network.

        Returns:
            (B, L) int64 without masks, but for those not wanted.

        Raises:
            ValueError: if ``x`` is no (B, L) int64, or a listed order is of another length.
        """
        if x.ndim != 2 or x.dtype != torch.int64:
            raise ValueError(f"the unmasking sampler needs tokens (B, L) of type int64, got {tuple(x.shape)} {x.dtype}")
        reveal = draw.uniform(x.shape, torch.float64).to(x.device)
        uniform = draw.uniform(x.shape, torch.float64).to(x.device).flatten()
        masked = x == denoiser.mask_id
        masked = masked if wanted is None else masked & wanted
        events = _events(self._reveal_steps(masked, reveal, denoiser.process))
        x = x.clone()
        tokens = x.view(-1)
        for done, event in enumerate(events, start=1):
            log_probs = denoiser.log_probs(
                x[event.rows], positions=event.local, **{name: value[event.rows] for name, value in conditions.items()}
            )
            tokens[event.flat] = draw_tokens(log_probs, uniform[event.flat], self.top_p, self.top_k)
            if on_event is not None:
                on_event(done, len(events), x)
        self.evaluations = sum(len(event.rows) for event in events) / max(len(x), 1)
        return x

    def reveal_law(self, process: AbsorbingProcess) -> Tensor:
        """r_k: probability that a position is revealed in step k = 1..N ("tweedie", "euler"); float64 (N,), sum 1."""
        if self.schedule is not None:
            process = AbsorbingProcess(self.schedule)
        grid = torch.linspace(1.0, self.eps, self.steps + 1, dtype=torch.float64)
        if self.rule == "euler":
            # A step that is long against the rate would give more than certainty.
            psi = (process.reveal_rate(grid[:-1]) * (1.0 - self.eps) / self.steps).clamp_max_(1.0)
        else:
            psi = process.reveal_probability(grid[:-1], grid[1:])
        psi[-1] = 1.0
        still_masked = torch.cat([torch.ones(1, dtype=torch.float64), (1.0 - psi[:-1]).cumprod(0)])
        return still_masked * psi

    def expected_evaluations(self, length: int, process: AbsorbingProcess) -> float:
        """Expected network rows per sequence for ``length`` tokens to generate: sum_k 1 - (1 - r_k)^length."""
        if self.rule == "any_order":
            return float(length)
        return float(-torch.expm1(length * torch.log1p(-self.reveal_law(process))).sum())

    def _reveal_steps(self, masked: Tensor, uniform: Tensor, process: AbsorbingProcess) -> Tensor:
        """Step in which each position is revealed, (B, L) int64; -1 where nothing is to be generated."""
        if self.rule != "any_order":
            cumulative = self.reveal_law(process).to(masked.device).cumsum(0)
            cumulative[-1] = 1.0
            step = torch.searchsorted(cumulative, uniform, right=True)
        elif self.order == "random":
            step = uniform.argsort(dim=1)
        elif isinstance(self.order, list):
            if len(self.order) != masked.shape[1]:
                raise ValueError(
                    f"order of the unmasking sampler has {len(self.order)} positions, sequences {masked.shape[1]}"
                )
            step = torch.tensor(self.order, device=masked.device).argsort().expand_as(masked)
        else:
            step = torch.arange(masked.shape[1], device=masked.device).expand_as(masked)
            step = step.flip(1) if self.order == "backward" else step
        return step.masked_fill(~masked, -1)


class _Event(NamedTuple):
    """One network call: the next change of each row that has one left.

    Attributes:
        rows: (R,) rows of the batch.
        flat: (P,) revealed positions, as indices into B * L.
        local: (P,) the same as indices into R * L.
    """

    rows: Tensor
    flat: Tensor
    local: Tensor


def _events(steps: Tensor) -> list[_Event]:
    """The network calls for given reveal steps (B, L).

    The network does not see the time and rows do not see each other, so the j-th changes of all rows go into one call,
    in whatever steps they happen: the calls are as many as one row's changes, not as the batch's distinct steps.
    """
    batch, length = steps.shape
    ordered, column = steps.sort(dim=1, stable=True)
    change = torch.cat([ordered[:, :1] >= 0, ordered[:, 1:] != ordered[:, :-1]], dim=1)
    number = change.cumsum(1) - 1
    wanted = number >= 0
    row = torch.arange(batch, device=steps.device)[:, None].expand_as(steps)[wanted]
    number, column = number[wanted], column[wanted]
    by_event = number.argsort(stable=True)
    row, number, column = row[by_event], number[by_event], column[by_event]
    calls, index = torch.unique_consecutive(number * max(batch, 1) + row, return_inverse=True)
    rows_per_event = torch.bincount(calls // max(batch, 1))
    local_row = index - (rows_per_event.cumsum(0) - rows_per_event)[number]
    sizes = torch.bincount(number).tolist()
    return [
        _Event(*parts)
        for parts in zip(
            (calls % max(batch, 1)).split(rows_per_event.tolist()),
            (row * length + column).split(sizes),
            (local_row * length + column).split(sizes),
            strict=True,
        )
    ]


def draw_tokens(log_probs: Tensor, uniform: Tensor, top_p: float | None = None, top_k: int | None = None) -> Tensor:
    """One token per row by inverting its cumulative distribution, summed in float64.

    Args:
        log_probs: (P, V) floating, log-probabilities up to a constant per row; -inf is never drawn.
        uniform: (P,) float64 in [0, 1), the only randomness.
        top_p: see :class:`UnmaskingSampler`; the token that crosses ``top_p`` is kept.
        top_k: see :class:`UnmaskingSampler`.

    Returns:
        (P,) int64 in 0..V-1.
    """
    rows = max(1, _WORKSPACE // log_probs.shape[1])
    if len(log_probs) > rows:
        blocks = zip(log_probs.split(rows), uniform.split(rows), strict=True)
        return torch.cat([draw_tokens(block, part, top_p, top_k) for block, part in blocks])
    probs = log_probs.exp()
    if top_k is not None and top_k < probs.shape[1]:
        probs, tokens = probs.topk(top_k, dim=1)
    elif top_p is not None and top_p < 1:
        probs, tokens = probs.sort(dim=1, descending=True, stable=True)
    else:
        return _invert(probs, uniform)
    if top_p is not None and top_p < 1:
        cumulative = probs.cumsum(1, dtype=torch.float64)
        probs = probs.masked_fill(cumulative - probs >= top_p * cumulative[:, -1:], 0.0)
    return tokens.gather(1, _invert(probs, uniform)[:, None])[:, 0]


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """Index (P,) at which the cumulative sum of unnormalised ``probs`` (P, V) passes ``uniform`` times the total."""
    cumulative = probs.cumsum(1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_max_(probs.shape[1] - 1)
    # Sums that are not made from left to right (GPU) may rise by a rounding error where the probability is 0.
    possible = probs.gather(1, index) > 0
    return torch.where(possible, index, probs.argmax(1, keepdim=True))[:, 0]
