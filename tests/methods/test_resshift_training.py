"""Training of ResShift: the perceptual loss, checkpoints, pictures, precisions, kinds of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import lightning_sgm
from lightning_sgm.callbacks import SampleLogger
from lightning_sgm.codecs import Autoencoder, PixelUnshuffle
from lightning_sgm.metrics import STLPIPS, PerceptualDistance
from lightning_sgm.networks import SRResNet
from lightning_sgm.random import Draw
from tests.methods.restoring import ancestral, images, model, pictures, ready, spec, tiny_vq, trainer


class Squares(nn.Module):
    """A distance of images that is known; keeps what it was given."""

    def forward(self, x: Tensor, truth: Tensor) -> Tensor:
        self.seen = x, truth
        return (x - truth).square().sum((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pictures(tmp_path_factory.mktemp("pictures")))


# The perceptual loss.


def test_the_perceptual_loss_is_the_error_and_the_weighted_distance():
    """An untrained network says that x_0 = y, whatever the noise."""
    batch = {"x": images(), "low": images(3, 4, 4, seed=1)}
    judge = PerceptualDistance("squares", Squares())
    module = model(perceptual=judge, perceptual_weight=0.5)
    terms = module.losses(batch, Draw(1))
    enlarged = module.enlarge(batch["low"])
    torch.testing.assert_close(terms["error"], (enlarged - batch["x"]).square().mean((1, 2, 3)))
    expected = (enlarged.clamp(-1, 1) - batch["x"]).square().sum((1, 2, 3))
    torch.testing.assert_close(terms["perceptual"], expected)
    torch.testing.assert_close(terms["loss"], terms["error"] + 0.5 * expected)
    assert enlarged.abs().max() > 1
    # Beside it the loss is that without it, noise and all.
    torch.nn.init.normal_(module.network.last.weight)
    other = model()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.losses(batch, Draw(1))["error"], other.losses(batch, Draw(1))["loss"])


@pytest.mark.parametrize("codec", ["Identity", "PixelUnshuffle", "Autoencoder"])
@pytest.mark.parametrize("judge", ["stand-in", "ST-LPIPS"])
def test_its_gradient_reaches_the_network_through_the_frozen_decoder(codec: str, judge: str):
    if judge == "ST-LPIPS":
        pytest.importorskip("stlpips_pytorch")
    made: Any = {"Identity": None, "PixelUnshuffle": PixelUnshuffle(4), "Autoencoder": tiny_vq()}[codec]
    distance = STLPIPS() if judge == "ST-LPIPS" else PerceptualDistance("squares", Squares())
    module = model(spec(4, 32), made, perceptual=distance).train()
    x, low = images(2, 32, 32), images(2, 8, 8, seed=1)
    module.losses({"x": x, "low": low}, Draw(1))["perceptual"].sum().backward()
    assert module.network.last.weight.grad.abs().max() > 0
    assert all(part.grad is None for part in module.codec.parameters())
    assert not any("perceptual" in name for name in module.state_dict())
    assert {name.partition(".")[0] for name, _ in module.named_parameters() if _.requires_grad} == {"network"}


def test_it_is_logged_by_its_name(folder: str, tmp_path: Path):
    module = model(perceptual=PerceptualDistance("squares", Squares()))
    run = trainer(tmp_path, val_check_interval=2)
    run.fit(module, ready(path=folder))
    values = run.callback_metrics
    assert values["val/loss"] == pytest.approx(float(values["val/error"] + values["val/perceptual"]), rel=1e-5)


# Checkpoints.


def saved(module: Any, folder: str, path: Path) -> dict[str, Any]:
    run = trainer(path, max_steps=1, limit_val_batches=0)
    run.fit(module, ready(path=folder))
    run.save_checkpoint(path / "a.ckpt")
    return torch.load(path / "a.ckpt", weights_only=True)


def network(spec: dict[str, Any]) -> SRResNet:
    return SRResNet(spec, channels=8, blocks=1, embedding="positional")


def test_weights_that_a_codec_finds_itself_stay_out_of_checkpoints(folder: str, tmp_path: Path):
    tiny_vq().model.save_pretrained(tmp_path / "vq")
    codec = Autoencoder("vq", str(tmp_path / "vq"))
    module = model(codec=codec)
    checkpoint = saved(module, folder, tmp_path)
    names = set(checkpoint["state_dict"])
    assert names == {f"network.{name}" for name in module.network.state_dict()}
    again = Autoencoder("vq", str(tmp_path / "vq"))
    loaded: Any = lightning_sgm.load(tmp_path / "a.ckpt", network=network, codec=again)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    del checkpoint["state_dict"]["network.last.bias"]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=r"Missing key.*network.last.bias"):
        lightning_sgm.load(tmp_path / "less.ckpt", network=network, codec=codec)


def test_weights_of_other_codecs_are_in_checkpoints(folder: str, tmp_path: Path):
    module = model(codec=tiny_vq())
    checkpoint = saved(module, folder, tmp_path)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()
    assert any(name.startswith("codec.model.decoder") for name in checkpoint["state_dict"])
    other = tiny_vq()
    torch.nn.init.zeros_(other.model.quantize.embedding.weight)
    loaded: Any = lightning_sgm.load(tmp_path / "a.ckpt", network=network, codec=other)
    assert torch.equal(loaded.codec.model.quantize.embedding.weight, module.codec.model.quantize.embedding.weight)
    del checkpoint["state_dict"]["codec.model.quantize.embedding.weight"]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=r"codec.model.quantize"):
        lightning_sgm.load(tmp_path / "less.ckpt", network=network, codec=tiny_vq())


def test_weights_for_another_factor_are_refused_though_they_fit(folder: str, tmp_path: Path):
    """Low images are enlarged to the grid of the model: the shapes do not tell."""
    saved(model(), folder, tmp_path)
    assert model(spec(2)).load_state_dict(model().state_dict())
    with pytest.raises(ValueError, match=r"trained for factor 4, but the data have 2: set data.factor"):
        lightning_sgm.load(tmp_path / "a.ckpt", network=network, spec=spec(2))


# Pictures.


def test_the_loss_over_the_levels_of_a_network_that_says_nothing_is_flat(folder: str, tmp_path: Path):
    module, data = model().eval(), ready(path=folder, eval_crops=64)
    module.trainer = trainer(tmp_path)
    module.trainer.datamodule = data
    with torch.no_grad():
        curve: Any = module.pictures()["loss_by_level"]
    batch = data.examples("val", 64)
    expected = float((batch["x"] - module.enlarge(batch["low"])).square().mean())
    assert curve.y.numpy() == pytest.approx(expected, rel=1e-4)
    assert curve.x[0] < 0.1 < 10 < curve.x[-1]


def test_fit_shows_restored_validation_images_beside_what_they_were_made_of(folder: str, tmp_path: Path):
    module, data = model(), ready(path=folder)
    trainer(tmp_path, callbacks=[SampleLogger(every=2, count=7)]).fit(module, data)
    module.trainer.datamodule = data
    found = module.generate(7)
    batch = data.examples("val", 5)
    rows = [0, 1, 2, 3, 4, 0, 1]  # there are five
    assert list(found) == ["before", "bicubic", "x", "truth", "index"]
    assert torch.equal(found["index"], batch["index"][rows])
    assert torch.equal(found["truth"], batch["x"][rows])
    assert torch.equal(found["before"], batch["low"][rows])
    torch.testing.assert_close(found["bicubic"], module.enlarge(batch["low"][rows]).clamp(-1, 1))
    assert torch.equal(found["x"][5], found["x"][0])
    with Image.open(tmp_path / "samples" / "00000002.png") as grid:
        # A panel is four images of 64 x 64 between five lines of 2.
        panel = np.asarray(grid)[8 : 8 + 68, 8 : 8 + 4 * 64 + 10]
    wanted = ((batch["x"][0] + 1) * 127.5).round().byte().repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert np.array_equal(panel[2:66, -66:-2], wanted.movedim(0, 2).numpy())
    assert (tmp_path / "samples" / "00000002_loss_by_level.png").exists()


# What it learns, and from what.


def test_pairs_of_one_size_are_learnt(tmp_path: Path):
    """Negatives: the damaged image is far from the true one, but not for a network that has seen a few."""
    for file in sorted(pictures(tmp_path / "gt").iterdir()):
        (tmp_path / "lq").mkdir(exist_ok=True)
        with Image.open(file) as image:
            ImageOps.invert(image).save(tmp_path / "lq" / file.name)
    data = ready(path=str(tmp_path), factor=1, batch_size=16)
    module: Any = model(
        spec(1), optimizer=lambda named: torch.optim.AdamW(named, lr=5e-3), sampler=ancestral(2), warmup=5
    )
    batch = data.examples("val", 5)

    def error() -> float:
        return float(
            (module.rivals_of({**batch, "index": torch.arange(5)})["samples"] - batch["x"]).detach().square().mean()
        )

    with torch.no_grad():
        start = error()
        loss = module.losses(batch, Draw(1))["loss"].mean()
        trainer(tmp_path / "run", max_steps=120, limit_val_batches=0).fit(module, data)
        assert module.losses(batch, Draw(1))["loss"].mean() < 0.1 * loss
        assert error() < 0.1 * start
    assert start == pytest.approx(float((batch["low"] - batch["x"]).square().mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "codec"),
    [
        ({"factor": 2}, PixelUnshuffle(2)),
        ({"factor": 3, "crop": 15, "eval_size": 15}, PixelUnshuffle(3)),
        ({"factor": 4}, PixelUnshuffle(2)),
        ({"factor": 2}, PixelUnshuffle(4)),
        ({"factor": 2, "degradation": "blind", "crop": 48, "eval_size": 48}, PixelUnshuffle(2)),
        ({"factor": 4}, None),
    ],
)
def test_factors_degradations_and_codecs(folder: str, tmp_path: Path, arguments: dict[str, Any], codec: Any):
    data = ready(path=folder, **arguments)
    module = model(data.spec, codec)
    trainer(tmp_path).fit(module, data)
    with torch.no_grad():
        found = module.eval().restore(images(1, 7, 5), torch.arange(1))
    factor = arguments["factor"]
    assert found.shape == (1, 3, 7 * factor, 5 * factor)
    assert module.last_loss is not None
    assert torch.isfinite(module.last_loss)


def test_half_precision(folder: str, tmp_path: Path):
    data = ready(path=folder)
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        module = model(codec=tiny_vq())
        run = trainer(tmp_path / precision, precision=precision, val_check_interval=2)
        run.fit(module, data)
        losses[precision] = float(run.callback_metrics["val/loss"])
        assert all(value.dtype == torch.float32 for value in module.state_dict().values() if value.is_floating_point())
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
    assert losses["bf16-mixed"] != losses["32-true"]
