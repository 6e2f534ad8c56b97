"""PaD-TS: the paper's method by default, the population term where the data live, moments that are learnt once."""

from __future__ import annotations

import copy
import math
import os
import socket
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import spawn

import lightning_sgm
from datamodules.loaders import EvalLoader
from lightning_sgm.denoiser import EDMPreconditioning
from lightning_sgm.guidance.clipping import InRange
from lightning_sgm.linear_denoiser import LinearPreconditioning
from lightning_sgm.methods import Forecast, PaDTS
from lightning_sgm.networks import DualChannel
from lightning_sgm.objectives import Population, PopulationObjective, SharedTime, UniformTime
from lightning_sgm.objectives.discrepancy import VARIANCES
from lightning_sgm.processes import VP, CosineChain
from lightning_sgm.random import Draw, mix
from lightning_sgm.samplers import Sampler
from lightning_sgm.samplers.grids import ChainGrid
from lightning_sgm.samplers.rules import Ancestral
from tests.callbacks.test_resume import Interrupt, differences, final
from tests.callbacks.test_resume import run as resumable
from tests.callbacks.tiny import trainer
from tests.methods.series_models import (
    D,
    L,
    Watched,
    data,
    discrepancy,
    dropping,
    model,
    named,
    rows,
    scaled,
    spec,
    table,
    tiny,
    values,
)

CHAIN = CosineChain(20)


def cosine_table(steps):
    """pad_ts.md section 2 in float64: betas, abar, abar of the step before."""
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    betas = torch.tensor([min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)], dtype=torch.float64)
    bars = (1 - betas).cumprod(0)
    return betas, bars, torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])


def watched(of=None, population=None, steps=20, **arguments):
    """A model whose network remembers what it was asked, in training mode."""
    module = model(
        of,
        Watched,
        process=CosineChain(steps),
        objective=PopulationObjective(population=population),
        **arguments,
    )
    return module.train()


def linear(of=None, network=tiny, **arguments):
    """A model whose network corrects the best linear denoiser of data that it is still to see."""
    return model(of, network, preconditioning=LinearPreconditioning(), **{"process": CHAIN, **arguments})


# The paper.


def test_defaults_are_the_papers():
    module = PaDTS({**spec(), "shape": [24, 6]})
    assert isinstance(module.network, DualChannel)
    # pad_ts.md section 3, less the positions that nothing reads.
    assert sum(p.numel() for p in module.network.parameters()) == 2_289_438 - 24 * 128
    process = module.process
    assert isinstance(process, CosineChain)
    assert process.steps == 250
    assert module.denoiser.preconditioning.prediction == "x0"
    assert process.label(process.time(17)) == 17
    population = module.objective.population
    assert population is not None
    assert (population.alpha, population.fade, population.variances) == (5e-4, 0.0, VARIANCES)
    assert isinstance(module.objective.times, SharedTime)
    optimizer: Any = module.optimizer(module.parameters())
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-4, 0.0, (0.9, 0.999), 1e-8)
    assert (module.decay, module.warmup) == ("linear", 0)
    assert isinstance(module.sampler.rule, Ancestral)
    assert (module.sampler.rule.noise, module.sampler.steps, module.sampler.finish) == ("transition", 250, "clean")
    assert isinstance(module.sampler.grid, ChainGrid)
    assert module.moments is None
    assert PaDTS.ema_parts == ("network",)


def test_estimates_are_kept_in_range_where_the_range_is_known():
    assert isinstance(model().guided, InRange)
    for module in (model(spec("standard")), model(clip=False)):
        assert module.guided is module.denoiser
    assert isinstance(model(spec("standard"), clip=True).guided, InRange)
    assert isinstance(linear().guided, InRange)


def test_sampler_is_the_references_chain():
    """Large variances, estimates clipped, no noise at t = 0."""
    module = watched().eval()
    network = module.network
    indices = torch.tensor([3, 0, 12])
    with torch.no_grad():
        found = module.sample(indices)["x"]
    betas, bars, before = cosine_table(20)
    draw = module.sample_draw(indices)
    x, clipped = draw.normal((3, L, D)).double() * (1 - bars[-1]).sqrt(), 0
    for t in range(19, -1, -1):
        with torch.no_grad():
            answer = network.answer(x, torch.tensor(float(t)))
        x0 = answer.clamp(-1, 1)
        clipped += int((x0 != answer).sum())
        first = betas[t] * before[t].sqrt() / (1 - bars[t])
        second = (1 - before[t]) * (1 - betas[t]).sqrt() / (1 - bars[t])
        x = first * x0 + second * x
        if t:
            x = x + torch.exp(0.5 * betas[t].log()) * draw.normal((3, L, D)).double()
    assert 0 < clipped < 20 * x.numel()
    torch.testing.assert_close(found.double(), x, rtol=0, atol=2e-5)
    assert module.sampler_evaluations == 20
    assert [label.unique().tolist() for _, label in network.asked] == [[t] for t in range(19, -1, -1)]


def test_a_constant_estimate_comes_back():
    """pad_ts.md section 10: F = c in [-1, 1] gives c."""

    class Constant(Watched):
        def answer(self, x, label):
            return torch.full_like(x, 0.37)

    torch.testing.assert_close(model(network=Constant, process=CHAIN).generate(4)["x"], torch.full((4, L, D), 0.37))


def test_all_windows_of_a_batch_share_an_index_and_all_indices_come():
    steps, batches = 5, 600
    module = watched(steps=steps)
    batch = {"x": scaled(module.spec, 3)}
    with torch.no_grad():
        for number in range(batches):
            module.losses(batch, Draw(mix(3, number)))
    labels = torch.stack([label for _, label in module.network.asked])
    assert labels.shape == (batches, 3)
    assert (labels == labels[:, :1]).all()
    counts = torch.bincount(labels[:, 0].long(), minlength=steps)
    assert len(counts) == steps
    # chi^2 of 4 degrees of freedom is above 18.5 with probability 0.001.
    assert float(((counts - batches / steps) ** 2 / (batches / steps)).sum()) < 18.5
    # The noise is each window's own, of the size that the chain says.
    _, bars, _ = cosine_table(steps)
    bar = bars[labels.long()][..., None, None]
    noise = (torch.stack([x for x, _ in module.network.asked]) - bar.sqrt() * batch["x"]) / (1 - bar).sqrt()
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 0.03


class Recorder(pl.Callback):
    """Batches, learning rates."""

    def __init__(self):
        self.batches, self.rates = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["x"].clone())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_five_updates_are_those_of_an_independent_computation(tmp_path: Path):
    module = watched(data().spec, Population(0.05))
    network = module.network
    start = {name: p.detach().double() for name, p in network.named_parameters()}
    recorder = Recorder()
    trainer(tmp_path, recorder, max_steps=5, limit_val_batches=0).fit(module, data())
    assert recorder.rates == pytest.approx([1e-4 * (1 - s / 5) for s in range(5)])
    own = copy.deepcopy(network).double()
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(start[name])
    first = {name: torch.zeros_like(p) for name, p in own.named_parameters()}
    second = copy.deepcopy(first)
    for step, (x0, (x, label)) in enumerate(zip(recorder.batches, network.asked, strict=True)):
        answer = own.answer(x.double(), label)
        loss = (answer - x0.double()).square().mean() + 0.05 * discrepancy(x0.double(), answer)
        own.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in own.named_parameters():
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.999 * second[name] + 0.001 * p.grad**2
                mean, power = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p -= 1e-4 * (1 - step / 5) * mean / (power.sqrt() + 1e-8)
    for name, p in network.named_parameters():
        moved, expected = p.detach().double() - start[name], dict(own.named_parameters())[name].detach() - start[name]
        assert expected.abs().min() > 1e-6, name
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6, msg=named(name))


# The population term.


def gradients(module, batch, draw):
    terms = module.losses(batch, draw)
    return terms, torch.autograd.grad(terms["loss"].mean(), list(module.network.parameters()))


def corrected(module, seen, label, output):
    """x_0 from what a network was shown and said, by matrices: m + alpha C T^-1/2 seen + sigma (C / T)^1/2 output."""
    _, bars, _ = cosine_table(module.process.steps)
    bar = bars[round(float(label[0]) / 999 * module.process.steps) - 1]  # index i is at time (i + 1) / T
    kept = module.moments
    total = bar * kept.variances + 1 - bar
    gain = kept.basis @ torch.diag(bar.sqrt() * kept.variances / total.sqrt()) @ kept.basis.T
    error = kept.basis @ torch.diag((kept.variances / total * (1 - bar)).sqrt()) @ kept.basis.T
    return (kept.mean + seen.flatten(1) @ gain + output.flatten(1) @ error).view(seen.shape)


@pytest.mark.parametrize("case", ["minmax", "standard", "log", "quantile", "window", "linear", "linear log"])
def test_population_term_sees_windows_in_original_units(case: str):
    of = spec(case if case in ("standard", "quantile", "window") else "minmax", log="log" in case)
    module = watched(of, Population(1.0), **({"preconditioning": LinearPreconditioning()} if "linear" in case else {}))
    if module.moments is not None:
        module.moments.fit(scaled(of, 200))
    batch = {"x": scaled(of, 12, seed=4)}
    terms, found = gradients(module, batch, Draw(2))
    dims = {"loss": 1, "error": 1, "population": 0, "population_unbiased": 0}
    assert {name: term.ndim for name, term in terms.items()} == dims
    ((x, label),) = module.network.asked
    x0 = batch["x"].double()
    answer = module.network.answer(x.double(), label)
    if module.moments is not None:
        answer = corrected(module, x.double(), label, answer)
    error = (answer - x0).square().mean()

    original = module.scaling.unscale
    term = discrepancy(original(x0), original(answer))
    expected = torch.autograd.grad(error + term, list(module.network.parameters()), retain_graph=True)
    assert float(terms["population"]) == pytest.approx(float(term.detach()), rel=2e-5)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4
    torch.testing.assert_close(original(x0), values(12, seed=4), rtol=1e-5, atol=1e-5)
    if case not in ("minmax", "standard", "window", "linear"):  # an affine change is not seen, others are
        apart = discrepancy(x0, answer).detach()
        assert abs(float(apart - term.detach())) > 1e-3 * float(term.detach())


def test_without_weight_it_is_the_squared_error_alone():
    batch = {"x": scaled(spec(), 12)}
    with_, without = (gradients(watched(population=each), batch, Draw(2)) for each in (Population(0.0), None))
    assert torch.equal(with_[0]["loss"], without[0]["loss"])
    assert without[0].keys() == {"loss", "error"}
    for one, other in zip(with_[1], without[1], strict=True):
        assert torch.equal(one, other)
    weighted = gradients(watched(population=Population(1.0)), batch, Draw(2))
    assert not torch.equal(weighted[1][0], without[1][0])


def test_models_share_no_memory_of_batch_sizes():
    one, other = model(), model()
    assert one.objective.population is not other.objective.population
    given = Population(0.1)
    assert PopulationObjective(population=given).population is not given


def test_validation_has_no_population_term_and_knows_no_batches():
    module = watched(population=Population(10.0)).eval()
    batch = {"x": scaled(module.spec, 11), "index": torch.arange(11)}
    with torch.no_grad():
        whole = module.losses(batch, module.evaluation_draw(batch))
        parts = []
        for part in (slice(0, 4), slice(4, 11)):
            one = {name: value[part] for name, value in batch.items()}
            parts.append(module.losses(one, module.evaluation_draw(one))["loss"])
    assert whole.keys() == {"loss"}
    torch.testing.assert_close(torch.cat(parts), whole["loss"])
    x, label = module.network.asked[0]
    assert len(label.unique()) > 3
    expected = (module.network.answer(x, label) - batch["x"]).square().mean((1, 2)).detach()
    torch.testing.assert_close(whole["loss"], expected)


# Odd data.


def numbers(module, of):
    """A few updates on ``of``; everything that is learnt."""
    pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    ).fit(module, of)
    return torch.cat([p.detach().flatten() for p in module.network.parameters()])


@pytest.mark.parametrize("make", [model, linear])
@pytest.mark.parametrize("kind", ["minmax", "standard", "quantile", "window"])
def test_a_constant_column_trains_finitely_and_stays(kind: Any, make: Any, tmp_path: Path):
    x = rows(80)
    x[:, 1] = 4.25
    with pytest.warns(UserWarning, match="constant in training"):
        of = data(table(tmp_path / "a.csv", x), scaling=kind)
    module = make(of.spec, process=CHAIN)
    assert numbers(module, of).isfinite().all()
    made = module.scaling.unscale(module.generate(4)["x"])
    assert made.shape == (4, L, D)
    assert made.isfinite().all()
    assert (made[..., 1] == 4.25).all()
    assert (made[..., 0].std() > 0).all()


def test_one_dimension_trains_finitely():
    of = data(dims=1)
    module = model(of.spec, process=CHAIN)
    before = module.network.fc_time.weight.detach().clone()
    assert numbers(module, of).isfinite().all()
    assert not torch.equal(module.network.fc_time.weight, before)
    assert module.generate(2)["x"].shape == (2, L, 1)


# Moments that are learnt, checkpoints.


def fitted(tmp_path: Path, module, of, **options: Any) -> pl.Trainer:
    run = trainer(tmp_path, **{"max_steps": 2, "limit_val_batches": 0, **options})
    run.fit(module, of)
    return run


def load_linear(path: Path) -> Any:
    return lightning_sgm.load(path, network=tiny, process=CHAIN, preconditioning=LinearPreconditioning())


def test_moments_are_those_of_training_windows_and_go_with_the_checkpoint(tmp_path: Path):
    of = data(table(tmp_path / "a.csv", rows()))
    module = linear(of.spec)
    with pytest.raises(RuntimeError, match="does not know the data yet"):
        module.losses(of.examples("train", 4), Draw(0))
    run = fitted(tmp_path, module, of)
    x = of.examples("train", 20000)["x"].flatten(1).double()
    kept = module.moments
    torch.testing.assert_close(kept.mean, x.mean(0))
    covariance = kept.basis @ torch.diag(kept.variances) @ kept.basis.T
    torch.testing.assert_close(covariance, torch.cov(x.T), rtol=0, atol=1e-8)
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(stored["state_dict"]["moments.basis"], kept.basis)
    loaded = load_linear(tmp_path / "a.ckpt")
    assert loaded.moments.fitted
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.generate(3)["x"], module.generate(3)["x"])


@pytest.mark.parametrize("way", ["resume", "load"])
def test_moments_that_are_known_are_learnt_no_more(way: str, tmp_path: Path):
    """Otherwise the network would be shown another thing than it learnt from."""
    first = data(table(tmp_path / "a.csv", rows()))
    module = linear(first.spec)
    fitted(tmp_path, module, first).save_checkpoint(tmp_path / "a.ckpt")
    known = {name: value.clone() for name, value in module.moments.state_dict().items()}
    low, high = (torch.tensor(first.spec["scaling"][end], dtype=torch.float64) for end in ("low", "high"))
    others = torch.as_tensor(rows(seed=9)).clamp(low, high)
    others[0], others[1] = low, high  # other windows of the same range
    other = data(table(tmp_path / "b.csv", others))
    if way == "resume":
        again = linear(first.spec)
        trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(again, other, ckpt_path=str(tmp_path / "a.ckpt"))
    else:
        again = load_linear(tmp_path / "a.ckpt")
        assert not again.training
        fitted(tmp_path, again, other)
    for name, value in known.items():
        assert torch.equal(again.moments.state_dict()[name], value), name
    assert again.training  # with the population term
    assert again.network.training
    fresh = linear(first.spec)
    fitted(tmp_path, fresh, other)
    assert not torch.allclose(fresh.moments.mean, known["mean"])


def test_moments_without_a_data_module_say_what_they_need(tmp_path: Path):
    module = linear()
    x = scaled(module.spec)
    loader = EvalLoader(lambda index, epoch: {"x": x[index]}, len(x), 8, ranks=(0, 1))
    with pytest.raises(ValueError, match="learns the covariance from a DataModule: fit with one"):
        fitted(tmp_path, module, loader)
    module.moments.fit(x)
    fitted(tmp_path, module, loader)
    assert all(p.isfinite().all() for p in module.parameters())


def test_low_precision_leaves_the_moments_alone(tmp_path: Path):
    of = data()
    module = linear(of.spec)
    fitted(tmp_path, module, of, precision="bf16-true")
    assert module.network.fc_time.weight.dtype == torch.bfloat16
    x = of.examples("train", 20000)["x"].flatten(1).double()
    kept = module.moments
    assert {value.dtype for value in kept.buffers()} == {torch.float64}
    covariance = kept.basis @ torch.diag(kept.variances) @ kept.basis.T
    torch.testing.assert_close(covariance, torch.cov(x.T), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("how", "at"), [("signal", 2), ("error", 5)])
def test_interrupted_runs_end_where_others_do(tmp_path: Path, how: str, at: int):
    """In mid-epoch, with dropout, a falling learning rate and moments to be learnt."""

    def start(folder, seed, *callbacks):
        torch.manual_seed(seed)
        module = PaDTS(data().spec, dropping, process=CHAIN, preconditioning=LinearPreconditioning())
        return module, resumable(folder, module, *callbacks, steps=8)

    module, run = start(tmp_path / "straight", 0)
    run.fit(module, data())
    module, run = start(tmp_path / "resumed", 0, Interrupt(how, at))
    with pytest.raises(RuntimeError if how == "error" else SIGTERMException):
        run.fit(module, data())
    module, run = start(tmp_path / "resumed", 1)
    run.fit(module, data(), ckpt_path=str(tmp_path / "resumed" / "last.ckpt"))
    ends = [final(tmp_path / name) for name in ("straight", "resumed")]
    assert ends[0]["global_step"] == 8
    assert ends[0]["state_dict"]["moments.variances"].any()
    assert differences(ends[0], ends[1]) == []


# Processes.

WORLD = 2


def _one_update(folder: Path, devices: int) -> dict[str, torch.Tensor]:
    """Weights before less weights after a step of gradient descent: the gradient."""
    of = data(batch_size=16 // devices)
    module = model(
        of.spec,
        process=CHAIN,
        objective=PopulationObjective(population=Population(1.0)),
        optimizer=lambda parameters: torch.optim.SGD([p for _, p in parameters], lr=1.0),
        exact=True,
        decay="constant",
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    options: dict[str, Any] = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    trainer(folder, max_steps=1, limit_val_batches=0, **options).fit(module, of)
    return {name: before[name] - p.detach() for name, p in module.named_parameters()}


def _process(rank: int, folder: str, port: int) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ.update(where)
    torch.save(_one_update(Path(folder), WORLD), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_the_joined_batch(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_process, (str(tmp_path), port), nprocs=WORLD)
    expected = _one_update(tmp_path, 1)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=named(name))


# Samples, pictures, mistakes.


def test_samples_are_their_numbers(monkeypatch: pytest.MonkeyPatch):
    module = model(process=CHAIN)
    whole = module.generate(6)["x"]
    assert whole.shape == (6, L, D)
    torch.testing.assert_close(module.generate(6, batch_size=4)["x"], whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not torch.allclose(module.generate(6)["x"], whole)


@pytest.mark.parametrize("make", [model, linear])
def test_pictures_compare_samples_with_data(make: Any, tmp_path: Path):
    of = data(scaling="window")
    module = make(of.spec, process=CHAIN, compared=5)
    fitted(tmp_path, module, of)
    with torch.no_grad():
        found: dict[str, Any] = module.eval().pictures()
    assert {"windows", "values", "correlations", "autocorrelation"} < found.keys()
    for view in ("windows", "values", "correlations", "autocorrelation"):
        assert found[view]["view"] == view
        assert found[view]["x"].shape == found[view]["real"].shape == (5, L + 2, D)
    module.task = Forecast(2)
    assert not {"windows", "values"} & module.pictures().keys()


def test_the_task_is_not_kept(tmp_path: Path):
    of = data()
    module = model(of.spec, process=CHAIN, task=Forecast(2))
    assert "task" not in module.hparams
    fitted(tmp_path, module, of)
    assert module.hparams["compared"] == 256


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model({"kind": "image", "shape": [1, 8, 8]}), "scaling"),
        (lambda: model(compared=1), "compared must be at least 2 windows, got 1"),
        (lambda: model(process=VP()), "taken without model.sampler, needs a discrete chain, and VP is none"),
        (lambda: model(process=CHAIN, sampler=Sampler(steps=21, grid=ChainGrid())), "at most 20 steps"),
        (lambda: model(optimizer=torch.optim.Adam, decay="falling"), "decay is a number or one of"),
        (lambda: model(network=lambda spec: DualChannel(spec, width=7)), "multiple of the number of heads"),
        (lambda: model().inputs("a.csv"), "--model.task Impute or --model.task Forecast"),
        (lambda: model(task=Forecast(2)).generate(1), "Forecast completes windows, give some: --data.path"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_processes_and_predictions_train():
    """The parts are exchangeable."""
    module = model(
        process=VP(),
        preconditioning=EDMPreconditioning(0.5),
        objective=PopulationObjective(SharedTime(UniformTime())),
        sampler=Sampler(steps=3),
        optimizer=torch.optim.SGD,
    )
    module.train().losses({"x": scaled(module.spec)}, Draw(0))["loss"].mean().backward()
    assert all(p.grad.isfinite().all() for p in module.network.parameters() if p.grad is not None)
    assert module.generate(2)["x"].isfinite().all()
