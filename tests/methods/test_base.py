"""What every method shares, on methods small enough to know the answers."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules import ImageDataModule, TextDataModule
from lightning_sgm.denoiser import EDMPreconditioning, Preconditioning
from lightning_sgm.methods import RADD, ScoreSDE
from lightning_sgm.metrics import FrechetDistance
from lightning_sgm.networks import MLP, MaskedTransformer, UNet
from lightning_sgm.processes import VE, Cosine, Flow
from lightning_sgm.random import Draw
from lightning_sgm.samplers import LogUniform, Sampler, UniformTime
from lightning_sgm.trainer import Trainer

SPEC = {"kind": "image", "shape": [1, 8, 8], "classes": 10, "levels": 17, "range": [-1.0, 1.0]}


def tiny_sde(**arguments) -> ScoreSDE:
    torch.manual_seed(0)
    return ScoreSDE(MLP, SPEC, warmup=4, sampler=Sampler(steps=3), **arguments)


def trainer(folder: Path, **arguments) -> Trainer:
    options: dict = {"max_steps": 4, "enable_progress_bar": False, "limit_val_batches": 1, "log_every_n_steps": 1}
    return Trainer(run_dir=str(folder), **{**options, **arguments})


@pytest.fixture(scope="module")
def digits() -> ImageDataModule:
    data = ImageDataModule("digits", batch_size=32)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("decay", "falling"),
    [
        ("constant", lambda share: 1.0),
        ("cosine", lambda share: 0.5 * (1 + math.cos(share * math.pi))),
        ("linear", lambda share: 1 - share),
        ("trapezoid", lambda share: min(1.0, (1 - share) / 0.2)),
    ],
)
def test_the_learning_rate_rises_linearly_and_falls(tmp_path: Path, digits: ImageDataModule, decay, falling):
    module, seen = tiny_sde(decay=decay), []

    class Watch(type(module)):  # type: ignore[misc]
        def on_before_optimizer_step(self, optimizer) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    module.__class__ = Watch
    trainer(tmp_path, max_steps=20).fit(module, digits)
    assert seen == pytest.approx([2e-4 * min(1, (n + 1) / 4) * falling(n / 20) for n in range(20)], rel=1e-5)


def test_optimisers_that_do_not_take_names_are_told_so(tmp_path: Path, digits: ImageDataModule):
    def own(parameters: list) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in parameters if p.ndim > 1], lr=0.1)

    with pytest.raises(ValueError, match=r"must take \(name, parameter\) pairs.*no attribute 'ndim'"):
        trainer(tmp_path, max_steps=1).fit(tiny_sde(optimizer=own), digits)


def test_cosine_decay_needs_an_end(tmp_path: Path, digits: ImageDataModule):
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(tiny_sde(decay="cosine"), digits)


def test_evaluation_noise_belongs_to_the_example(digits: ImageDataModule):
    module = tiny_sde().eval()
    batch = digits.examples("val", 12)
    whole = module.losses(batch, module.evaluation_draw(batch))["loss"]
    part = {k: v[5:9] for k, v in batch.items()}
    torch.testing.assert_close(module.losses(part, module.evaluation_draw(part))["loss"], whole[5:9])
    again = module.losses(batch, module.evaluation_draw(batch, repeat=1))["loss"]
    assert not torch.allclose(again, whole)


def _weights_after(folder: Path, data, **arguments) -> Tensor:
    module = tiny_sde(**arguments)
    trainer(folder).fit(module, data)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_training_is_reproducible_and_depends_on_the_seed(
    tmp_path: Path, digits: ImageDataModule, monkeypatch: pytest.MonkeyPatch
):
    first = _weights_after(tmp_path / "a", digits)
    torch.randn(7)  # hidden state plays no part
    assert torch.equal(first, _weights_after(tmp_path / "b", digits))
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.equal(first, _weights_after(tmp_path / "c", digits))


def test_exact_mode_ties_training_noise_to_the_example(tmp_path: Path, digits: ImageDataModule):
    draws: list[Draw] = []

    class Watch(ScoreSDE):
        def losses(self, batch, draw):
            draws.append(draw)
            return super().losses(batch, draw)

    for exact in (False, True):
        module = tiny_sde(exact=exact)
        module.__class__ = Watch
        trainer(tmp_path / str(exact), max_steps=1, limit_val_batches=0).fit(module, digits)
    assert draws[0].keys is None
    assert draws[1].keys is not None


def test_conditions_are_dropped_only_in_training():
    module = ScoreSDE(
        lambda spec: UNet(spec, channels=[8, 8], conditional=True), SPEC, drop={"label": 0.5}, sampler=Sampler(steps=1)
    )
    batch = {"x": torch.zeros(4000, 1, 8, 8), "label": torch.arange(4000) % 10, "index": torch.arange(4000)}
    kept = module.conditions(batch)["label"]
    assert torch.equal(kept, batch["label"])
    dropped = module.conditions(batch, Draw(0))["label"]
    share = (dropped == 10).double().mean()
    assert abs(share - 0.5) < 0.03
    assert torch.equal(dropped[dropped != 10], batch["label"][dropped != 10])


@pytest.mark.parametrize(("exact", "dropout"), [(True, 0.1), (True, 0.0), (False, 0.1)])
def test_exact_steps_do_not_go_with_dropout(tmp_path: Path, digits: ImageDataModule, exact: bool, dropout: float):
    """Its noise is drawn for a whole batch: said, with the name of the part."""
    torch.manual_seed(0)
    module = ScoreSDE(
        lambda spec: UNet(spec, channels=[8, 8], layers_per_block=1, dropout=dropout),
        SPEC, exact=exact, sampler=Sampler(steps=1),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, digits)
    found = [str(warning.message) for warning in said if "exact is true" in str(warning.message)]
    if not (exact and dropout):
        assert found == []
        return
    (message,) = found
    assert "set dropout to 0" in message
    name = message.removeprefix("exact is true, but ").partition(" ")[0]
    part = module.get_submodule(name)
    assert part.p == dropout if isinstance(part, torch.nn.Dropout) else part.dropout == dropout


def test_exact_steps_with_a_dropout_inside_attention_are_told_too(tmp_path: Path, digits: ImageDataModule):
    class Attending(MLP):
        def __init__(self, spec) -> None:
            super().__init__(spec)
            self.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.2)

    module = ScoreSDE(Attending, SPEC, exact=True, sampler=Sampler(steps=1))
    with pytest.warns(UserWarning, match=r"exact is true, but network\.attention draws its dropout"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, digits)


def test_samples_are_numbered_and_generate_leaves_the_mode_alone():
    module = tiny_sde().train()
    whole = module.generate(6, batch_size=4)["x"]
    torch.testing.assert_close(module.sample(torch.tensor([4, 1]))["x"].detach(), whole[[4, 1]], atol=1e-5, rtol=1e-5)
    assert module.training
    assert not whole.requires_grad


def test_text_samples_hold_no_mask_and_keep_the_prompt():
    spec = TextDataModule(length=16).spec
    module = RADD(lambda s: MaskedTransformer(s, width=8, blocks=1, heads=2), spec).eval()
    prompt = torch.full((3, 16), 256)
    prompt[:, :4] = torch.tensor([72, 105, 33, 10])
    x = module.sample(torch.arange(3), prompt=prompt)["x"]
    assert torch.equal(x[:, :4], prompt[:, :4])
    assert x.max() < 256


def test_the_floor_is_the_metric_of_training_data(tmp_path: Path, digits: ImageDataModule):
    module = tiny_sde(metrics=[FrechetDistance()], test_samples=200)
    numbers = trainer(tmp_path).test(module, digits, verbose=False)[0]
    direct = FrechetDistance()
    for batch in digits.eval_loader("test"):
        direct.update(batch["x"], real=True)
    direct.update(digits.examples("train", 200)["x"], real=False)
    assert numbers["test/floor/frechet_pixels"] == pytest.approx(direct.compute().item(), rel=1e-5)
    assert numbers["test/samples/frechet_pixels"] > 2 * numbers["test/floor/frechet_pixels"]
    assert numbers["test/samples/evaluations"] == 5


def test_python_checkpoints_say_what_they_lack(tmp_path: Path, digits: ImageDataModule):
    from lightning_sgm import load

    module = tiny_sde()
    trainer(tmp_path).fit(module, digits)
    path = tmp_path / "checkpoints" / "last.ckpt"
    again = load(path, network=MLP, sampler=Sampler(steps=3))
    assert isinstance(again, ScoreSDE)
    torch.testing.assert_close(again.generate(2)["x"], module.generate(2)["x"])


@pytest.mark.parametrize("process", [Cosine(), Flow()])
def test_noise_prediction_where_no_data_is_left(process):
    with pytest.raises(ValueError, match="LogUniform"):
        ScoreSDE(MLP, SPEC, process, sampler=Sampler(grid=UniformTime()))
    ScoreSDE(MLP, SPEC, process, sampler=Sampler(grid=LogUniform()))
    ScoreSDE(MLP, SPEC, process, Preconditioning("v"), sampler=Sampler(grid=UniformTime()))


@pytest.mark.parametrize(
    ("process", "preconditioning"),
    [
        (VE(0.01, 50.0), Preconditioning("score", "sigma")),
        (Flow(), Preconditioning("velocity")),
        (Cosine(), EDMPreconditioning()),
    ],
)
def test_every_process_trains_and_samples(tmp_path: Path, digits: ImageDataModule, process, preconditioning):
    torch.manual_seed(0)
    module = ScoreSDE(MLP, SPEC, process, preconditioning, sampler=Sampler(steps=4), warmup=1)
    trainer(tmp_path).fit(module, digits)
    assert module.generate(3)["x"].isfinite().all()


def test_a_loss_that_is_no_number_stops(tmp_path: Path, digits: ImageDataModule):
    module = tiny_sde()

    class Broken(ScoreSDE):
        def losses(self, batch, draw):
            return {"loss": super().losses(batch, draw)["loss"] * float("nan")}

    module.__class__ = Broken
    with pytest.raises(FloatingPointError, match="not a number"):
        trainer(tmp_path, limit_val_batches=0).fit(module, digits)


def test_evaluation_and_training_in_turns(tmp_path: Path, digits: ImageDataModule):
    module, tool = tiny_sde(metrics=[FrechetDistance()], test_samples=70), trainer(tmp_path)
    tool.validate(module, digits, verbose=False)
    tool.fit(module, digits)
    tool.test(module, digits, verbose=False)
    tool = trainer(tmp_path / "again", max_steps=6)
    tool.fit(module, digits)
    assert tool.global_step == 6


def test_metrics_are_no_part_of_the_checkpoint(tmp_path: Path, digits: ImageDataModule):
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
    module = tiny_sde(metrics=[FrechetDistance(features)])
    trainer(tmp_path).fit(module, digits)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {key.partition(".")[0] for key in saved} == {"network"}


def test_drop_names_must_be_conditions(tmp_path: Path, digits: ImageDataModule):
    with pytest.raises(ValueError, match="labl"):
        trainer(tmp_path).fit(tiny_sde(drop={"labl": 0.1}), digits)


def test_models_do_not_share_a_default_sampler():
    assert tiny_sde().sampler is not tiny_sde().sampler
    one, two = (RADD(MaskedTransformer, TextDataModule(length=16).spec) for _ in range(2))
    assert one.sampler is not two.sampler
