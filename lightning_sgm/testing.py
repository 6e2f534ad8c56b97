"""Checks for parts you wrote yourself: call them in your own tests, as ours do for every part we ship.

Each raises AssertionError with a sentence that says what is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sgm.denoiser import GaussianMixtureDenoiser
from lightning_sgm.networks.base import Network, Spec, TokenNetwork, build
from lightning_sgm.processes.gaussian import CLEAN, VP, GaussianProcess, Level
from lightning_sgm.random import Draw
from lightning_sgm.samplers.grids import LogUniform
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.rules import Rule


def check_process(process: GaussianProcess) -> None:
    """Check that a Gaussian process is one: schedules, inverse, SDE, transition and posterior fit together.

    Raises:
        AssertionError: if alpha or sigma are not smooth float64 functions with sigma / alpha increasing, lose digits
            near t = 0 or do not keep the shape of t; if ``t_from_log_snr`` is not the inverse of ``log_snr``; if drift
            and diffusion do not carry the marginals; if transitions do not compose or posteriors are not Bayes' rule;
            if the prior is not N(0, sigma(1)^2).
    """
    name = type(process).__name__
    _check_schedules(process, name)
    _check_inverse(process, name)
    _check_sde(process, name)
    _check_transitions(process, name)
    _check_posterior(process, name)
    _check_prior(process, name)


def check_network(
    network: Network | Callable[[Spec], Network], spec: Spec, conditions: dict[str, Tensor] | None = None
) -> None:
    """Check that a network answers a batch of this kind of data, example by example, and that all of it can learn.

    Args:
        network: a finished network (a copy of it is checked) or a factory that receives ``spec``.
        spec: of the data, kind "image", "text", "graph" or "molecule".
        conditions: three rows of each condition the network asks for; not needed for the class ``label`` and the
            ``node_mask`` of graphs.

    Raises:
        AssertionError: if outputs have a wrong shape or are not finite, if an example's output depends on the rest of
            the batch in eval mode, if logits at ``positions`` are not those of the full answer, or if a parameter
            gets no gradient. For graphs also if nodes in another order or more padding change more than the order,
            if ``adj`` is not symmetric with zero diagonal, or if outputs are not zero outside the mask.
        ValueError: if a condition is missing or the kind of data unknown.
    """
    checked = copy.deepcopy(build(network, spec))
    draw = Draw(0)
    with torch.no_grad():
        # Layers that start at zero would hide what is behind them.
        for parameter in checked.parameters():
            parameter.add_(0.02 * draw.normal(parameter.shape).to(parameter))
    if spec.get("kind") in ("graph", "molecule"):
        _check_graphs(checked, spec, conditions or {}, draw)
        return
    arguments, shape = _inputs(checked, spec, draw)
    given = _conditions(checked, spec, conditions or {})
    checked.eval()
    output = checked(*arguments, **given)
    name = type(checked).__name__
    assert output.shape == shape, f"{name} returned shape {tuple(output.shape)} where {tuple(shape)} was expected"
    assert output.isfinite().all(), f"{name} returned numbers that are not finite"
    for row in range(len(output)):
        alone = checked(*(a[row : row + 1] for a in arguments), **{k: v[row : row + 1] for k, v in given.items()})
        _close(
            alone[0],
            output[row],
            1e-4,
            f"{name}: example {row} alone gives another answer than in a batch (eval mode)",
            1.0,
        )
    if isinstance(checked, TokenNetwork):
        positions = torch.tensor([1, output.shape[1], output.shape[0] * output.shape[1] - 1])
        some = checked(*arguments, positions=positions, **given)
        _close(
            some,
            output.flatten(0, 1)[positions],
            1e-4,
            f"{name}: logits at positions are not those of the full answer",
            1.0,
        )
    (output * draw.normal(output.shape)).sum().backward()
    _check_gradients(checked, name)


def check_rule(rule: Rule, process: GaussianProcess = VP(), steps: int = 200, tolerance: float = 0.03) -> None:
    """Check that a rule turns noise into data: samples of a correlated Gaussian in 2 D with its exact denoiser.

    A rule that makes no noise of its own must follow the probability-flow ODE, whose map is known; one that does must
    reproduce mean and covariance.

    Args:
        rule: the rule, run on a log-uniform grid of sigma / alpha from 80 (or the process's largest) to 0.002.
        process: how the data became noise.
        steps: of the sampler; an accurate rule needs fewer.
        tolerance: error allowed for so many steps, in standard deviations of the data.

    Raises:
        AssertionError: if samples are wrong or not finite, if the rule changes its input in place, remembers anything
            from an earlier run, or treats a sample differently in another batch under a Draw with keys.
    """
    name = f"{type(rule).__name__} on {type(process).__name__}"
    mean, covariance = torch.tensor([0.3, -0.2]).double(), torch.tensor([[0.25, 0.12], [0.12, 0.16]]).double()
    denoiser = GaussianMixtureDenoiser(process, mean[None], covariance[None])
    sampler = Sampler(rule, steps, LogUniform(ratio_max=80.0))
    keys = torch.arange(20000)
    start = sampler.prior(process, (len(keys), 2), Draw(1, keys))
    assert isinstance(start, Tensor)
    start = start.double()

    def run(rows: int, seed: int) -> Tensor:
        return sampler(denoiser, None, Draw(seed, keys[:rows]), start=start[:rows])

    before = start.clone()
    x, few = run(len(keys), 2), run(5, 2)
    assert torch.equal(start, before), f"{name} changes its input in place"
    assert x.isfinite().all(), f"{name} returns samples that are not finite"
    assert torch.equal(run(5, 2), few), f"{name}: two equal runs differ; a rule keeps its memory in what it returns"
    _close(few, x[:5], 1e-9, f"{name}: a sample depends on its batch")
    if torch.equal(run(5, 3), few):
        _check_map(name, denoiser, sampler, start, x, tolerance)
    else:
        _check_law(name, x, mean, covariance, tolerance)


def _close(actual: Tensor, expected: Tensor, tolerance: float, text: str, floor: float = 1e-3) -> None:
    """Assert |actual - expected| <= tolerance * max(|expected|, floor * largest |expected|)."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"{text}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    size = expected.abs().clamp_min(floor * float(expected.abs().max()))
    wrong = ~((actual - expected).abs() <= tolerance * size)
    if wrong.any():
        worst = int(((actual - expected).abs() / size).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{text}: found {float(actual.flatten()[worst]):.8g}, expected {float(expected.flatten()[worst]):.8g}"
        )


def _check_map(
    name: str, denoiser: GaussianMixtureDenoiser, sampler: Sampler, start: Tensor, x: Tensor, tolerance: float
) -> None:
    """Samples against the map of the probability-flow ODE, a scale sqrt(v / (v + r^2)) of each principal axis."""
    level = sampler.levels(denoiser.process)[0]
    assert isinstance(level, Level)
    variances, basis, mean = denoiser.variances[0], denoiser.basis[0], denoiser.means[0]
    shrink = torch.sqrt(variances / (variances + level.ratio**2))
    expected = ((start / level.alpha - mean) @ basis * shrink) @ basis.T + mean
    error = float(((x - expected) / variances.max().sqrt()).square().mean().sqrt())
    assert error <= tolerance, f"{name} leaves the probability-flow ODE: samples off by {error:.3g} standard deviations"


def _check_law(name: str, x: Tensor, mean: Tensor, covariance: Tensor, tolerance: float) -> None:
    """Mean and covariance of samples, with four standard errors for chance."""
    size = covariance.diagonal().sqrt()
    chance = 4 / len(x) ** 0.5
    error = float(((x.mean(0) - mean) / size).abs().max())
    assert error <= tolerance + chance, f"{name}: mean of the samples is off by {error:.3g} standard deviations"
    error = float(((x.T.cov() - covariance) / torch.outer(size, size)).abs().max())
    assert error <= 2 * tolerance + 1.5 * chance, f"{name}: covariance of the samples is off by a share of {error:.3g}"


def _inside(count: int = 33) -> Tensor:
    """Times at which every derivative of a schedule is finite."""
    return torch.linspace(0.01, 0.99, count, dtype=torch.float64)


def _check_schedules(process: GaussianProcess, name: str) -> None:
    t = torch.linspace(process.t_min, 1.0, 2001, dtype=torch.float64)
    for symbol, function in (("alpha", process.alpha), ("sigma", process.sigma)):
        value = function(t)
        assert value.dtype == torch.float64, f"{name}.{symbol} of float64 times is {value.dtype}, not float64"
        for times in (t[5], t[:6].reshape(2, 3)):
            shape = function(times).shape
            assert shape == times.shape, (
                f"{name}.{symbol} of times of shape {tuple(times.shape)} has shape {tuple(shape)}"
            )
        ends = function(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert ends.isfinite().all(), f"{name}.{symbol} is not finite at t = 0 or 1: {ends.tolist()}"
        assert (value >= 0).all(), f"{name}.{symbol} is negative at t = {float(t[value.argmin()]):.4g}"
        single = torch.logspace(-5, 0, 101, dtype=torch.float32)
        text = f"{name}.{symbol} loses digits in float32 (use expm1, log1p or a factored form)"
        _close(function(single).double(), function(single.double()), 1e-5, text)
    assert process.t_min >= 0, f"{name}.t_min is negative: {process.t_min}"
    assert (process.sigma(t) > 0).all(), f"{name}.sigma must be positive from t_min = {process.t_min} on"
    assert (process.alpha(t).diff() <= 0).all(), f"{name}.alpha increases somewhere; it must decrease or stay"
    log_snr = process.log_snr(t)
    assert (log_snr.diff() < 0).all(), f"{name}: sigma / alpha does not increase everywhere"


def _check_inverse(process: GaussianProcess, name: str) -> None:
    t = torch.cat([torch.logspace(-4, -2, 21, dtype=torch.float64), _inside(99)])
    text = f"{name}.t_from_log_snr is not the inverse of log_snr"
    _close(process.t_from_log_snr(process.log_snr(t)), t, 1e-6, text)
    _close(
        process.t_from_ratio(process.level(t).ratio),
        t,
        1e-6,
        f"{name}.t_from_ratio is not the inverse of sigma / alpha",
    )
    outside = process.t_from_log_snr(torch.tensor([-200.0, 200.0], dtype=torch.float64))
    text = f"{name}.t_from_log_snr must stay in [0, 1] for levels the process does not have, found {outside.tolist()}"
    assert ((outside >= 0) & (outside <= 1)).all(), text


def _check_sde(process: GaussianProcess, name: str) -> None:
    t, step = _inside(), 1e-5
    before, at, after = process.level(t - step), process.level(t), process.level(t + step)
    f, g = process.drift(t), process.diffusion(t)
    d_alpha = (after.alpha - before.alpha) / (2 * step)
    d_variance = (after.sigma**2 - before.sigma**2) / (2 * step)
    _close(f * at.alpha, d_alpha, 1e-5, f"{name}.drift does not carry the mean: f alpha is not d alpha / dt")
    text = f"{name}.diffusion does not carry the variance: 2 f sigma^2 + g^2 is not d sigma^2 / dt"
    _close(2 * f * at.sigma**2 + g**2, d_variance, 1e-5, text)


def _check_transitions(process: GaussianProcess, name: str) -> None:
    for s, u, t in ((0.01, 0.02, 0.03), (0.1, 0.4, 0.9), (0.5, 0.98, 0.99), (0.3, 0.3001, 0.3002)):
        at_s, at_u, at_t = process.level(s), process.level(u), process.level(t)
        scale, std = process.transition(at_s, at_t)
        _close(scale * at_s.alpha, at_t.alpha, 1e-9, f"{name}.transition does not carry alpha from t = {s} to {t}")
        total = scale**2 * at_s.sigma**2 + std**2
        _close(total, at_t.sigma**2, 1e-9, f"{name}.transition does not carry sigma from t = {s} to {t}")
        (first, first_std), (second, second_std) = process.transition(at_s, at_u), process.transition(at_u, at_t)
        _close(first * second, scale, 1e-9, f"{name}: transitions {s} -> {u} -> {t} do not compose")
        variance = second**2 * first_std**2 + second_std**2
        _close(variance, std**2, 1e-6, f"{name}: variances of transitions {s} -> {u} -> {t} do not compose")
        scale, std = process.transition(CLEAN, at_t)
        _close(torch.stack([scale, std]), torch.stack(at_t[1:]), 1e-9, f"{name}.transition from clean data to t = {t}")
        text = f"{name}.transition from t = {t} to itself must be the identity"
        _close(torch.stack(process.transition(at_t, at_t)), torch.tensor([1.0, 0.0]).double(), 1e-9, text)


def _check_posterior(process: GaussianProcess, name: str) -> None:
    x0, x = torch.tensor([[-0.7, 0.2]]).double(), torch.tensor([[1.1, -0.4]]).double()
    for s, t in ((0.01, 0.03), (0.1, 0.9), (0.5, 0.99), (0.3, 0.3001)):
        at_s, at_t = process.level(s), process.level(t)
        scale, std = process.transition(at_s, at_t)
        precision = at_s.sigma**-2 + (scale / std) ** 2
        expected = (at_s.alpha * x0 / at_s.sigma**2 + scale * x / std**2) / precision
        mean, posterior_std = process.posterior(x0, x, at_t, at_s)
        _close(mean, expected, 1e-6, f"{name}.posterior mean of t = {s} given {t} is not Bayes' rule")
        _close(posterior_std, precision**-0.5, 1e-6, f"{name}.posterior std of t = {s} given {t} is not Bayes' rule")
    mean, std = process.posterior(x0, x, at_t, CLEAN)
    _close(mean, x0, 1e-9, f"{name}.posterior of the clean level must be the data themselves")
    assert float(std) == 0, f"{name}.posterior of the clean level must have std 0, found {float(std):.4g}"


def _check_prior(process: GaussianProcess, name: str) -> None:
    noise = process.prior((20000, 5), Draw(0, keys=torch.arange(20000)))
    sigma = float(process.level(1.0).sigma)
    assert noise.shape == (20000, 5), f"{name}.prior returned shape {tuple(noise.shape)} where (20000, 5) was asked for"
    assert noise.dtype == torch.float32, f"{name}.prior must be float32, found {noise.dtype}"
    found = (float(noise.double().mean()), float(noise.double().std()))
    text = f"{name}.prior must be N(0, {sigma:.4g}^2), found mean {found[0]:.4g}, std {found[1]:.4g}"
    assert abs(found[0]) < 0.015 * sigma, text
    assert abs(found[1] - sigma) < 0.01 * sigma, text


def _check_graphs(network: nn.Module, spec: Spec, conditions: dict[str, Tensor], draw: Draw) -> None:
    """:func:`check_network` for graphs of three sizes, the second in a random order of nodes and padding."""
    name, nodes = type(network).__name__, spec["nodes"]
    order = draw.normal((3, nodes)).argsort(1)
    order[0] = torch.arange(nodes)
    mask = (torch.arange(nodes) < torch.tensor([nodes, (nodes + 1) // 2, 1])[:, None]).gather(1, order)
    noise = draw.normal((3, nodes, nodes)).triu(1)
    graphs = {"x": draw.normal((3, nodes, spec["features"])) * mask[..., None], "adj": _masked(noise + noise.mT, mask)}
    given = _conditions(network, spec, conditions | {"node_mask": mask})
    network.eval()

    def run(state: dict[str, Tensor], mask: Tensor, rows: slice = slice(None)) -> dict[str, Tensor]:
        others = {key: value[rows] for key, value in given.items() if key != "node_mask"}
        return network(state, torch.tensor([0.1, 1.0, 5.0])[rows], node_mask=mask, **others)

    output = run(graphs, mask)
    assert set(output) == {"x", "adj"}, f"{name} must return x and adj, found {', '.join(map(str, output))}"
    for key, value in output.items():
        shape = tuple(graphs[key].shape)
        assert value.shape == shape, f"{name} returned {key} of shape {tuple(value.shape)} where {shape} was expected"
        assert value.isfinite().all(), f"{name} returned numbers that are not finite"
    assert torch.equal(output["adj"], output["adj"].mT), f"{name} returned an adj that is not symmetric"
    assert not output["adj"].diagonal(dim1=1, dim2=2).any(), f"{name} returned an adj with a diagonal that is not zero"
    outside = output["x"][~mask].any() or (output["adj"] - _masked(output["adj"], mask)).any()
    assert not outside, f"{name} returned numbers that are not zero outside the mask"
    for row in range(3):
        rows = slice(row, row + 1)
        alone = run({key: value[rows] for key, value in graphs.items()}, mask[rows], rows)
        text = f"{name}: graph {row} alone gives another answer than in a batch (eval mode)"
        _close_graphs(alone, {key: value[rows] for key, value in output.items()}, text)
    padded = {"x": F.pad(graphs["x"], (0, 0, 0, 5)), "adj": F.pad(graphs["adj"], (0, 5, 0, 5))}
    found = run(padded, F.pad(mask, (0, 5)))
    found = {"x": found["x"][:, :nodes], "adj": found["adj"][:, :nodes, :nodes]}
    _close_graphs(found, output, f"{name}: more padding gives another answer")
    order = draw.normal((3, nodes)).argsort(1)
    text = f"{name}: nodes in another order give more than the answer in that order"
    _close_graphs(run(_permuted(graphs, order), mask.gather(1, order)), _permuted(output, order), text)
    torch.stack([(value * draw.normal(value.shape)).sum() for value in output.values()]).sum().backward()
    _check_gradients(network, name)


def _masked(adj: Tensor, mask: Tensor) -> Tensor:
    return adj * mask[:, :, None] * mask[:, None, :]


def _permuted(graphs: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Graphs with node ``order[b, i]`` at place i."""
    rows = torch.arange(len(order))[:, None]
    return {"x": graphs["x"][rows, order], "adj": graphs["adj"][rows[:, None], order[:, :, None], order[:, None, :]]}


def _close_graphs(actual: dict[str, Tensor], expected: dict[str, Tensor], text: str) -> None:
    for key in ("x", "adj"):
        _close(actual[key], expected[key], 1e-4, f"{text} ({key})", 1.0)


def _inputs(network: nn.Module, spec: Spec, draw: Draw) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Three rows of positional arguments for a network, and the shape its output must have."""
    if spec.get("kind") == "text":
        length, vocabulary = spec["length"], spec["vocabulary"]
        x = draw.integers(vocabulary + 1, (3, length))
        x[:, 0], x[:, -1] = vocabulary, 0
        return (x,), (3, length, vocabulary)
    if spec.get("kind") == "image":
        x = draw.normal((3, *spec["shape"]))
        return (x, torch.tensor([0.1, 1.0, 5.0])), (3, *spec["shape"])
    raise ValueError(f"check_network knows data of kind image, text, graph and molecule, got {spec.get('kind')!r}")


def _conditions(network: nn.Module, spec: Spec, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Three rows of each condition; the last class label is the null class."""
    found = dict(given)
    for name in getattr(network, "conditions", ()):
        if name == "label" and name not in found:
            found[name] = torch.tensor([0, spec["classes"] - 1, spec["classes"]])
        if name not in found:
            raise ValueError(f"{type(network).__name__} asks for the condition {name!r}: give three rows of it")
    return found


def _check_gradients(network: nn.Module, name: str) -> None:
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            reached = parameter.grad is not None and bool(parameter.grad.ne(0).any())
            assert reached, f"{name}: no gradient reaches the parameter {key}; use it, or set requires_grad = False"
