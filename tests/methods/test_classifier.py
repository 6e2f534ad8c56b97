"""The classifier of noisy data: exact accuracy where Bayes' rule is known, the same under every process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datamodules import ImageDataModule
from lightning_sgm import load
from lightning_sgm.guidance import ClassifierGuidance, NoisyClassifier
from lightning_sgm.methods import Classifier, ScoreSDE
from lightning_sgm.networks import MLP, Network, WideResNet
from lightning_sgm.objectives import UniformLogSNR
from lightning_sgm.processes import CLEAN, EDM, VE, VP, Flow
from lightning_sgm.random import Draw
from lightning_sgm.trainer import Trainer

SPEC = {"kind": "image", "shape": [1, 8, 8], "classes": 10, "levels": 17, "range": [-1.0, 1.0]}
TWO = {"kind": "array", "shape": [1], "classes": 2}


class Bayes(Network):
    """Exact for classes at -1 and 1: the log-odds of x at ratio r are 2 x / r^2."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor, /) -> Tensor:
        square = torch.exp(2.0 * noise)
        odds = 2.0 * x[:, 0] * torch.sqrt(1.0 + square) / square
        return torch.stack([torch.zeros_like(odds), odds], 1)


def points(count: int) -> dict[str, Tensor]:
    label = torch.arange(count) % 2
    return {"x": 2.0 * label[:, None] - 1.0, "label": label, "index": torch.arange(count)}


def tiny(spec: dict = SPEC) -> Classifier:
    torch.manual_seed(0)
    return Classifier(lambda s: WideResNet(s, widths=[8], blocks_per_group=1, stem=4, embedding=8), spec, warmup=1)


@pytest.mark.parametrize("process", [VP(), VE(0.02, 20.0), EDM(), Flow()])
def test_log_probs_are_those_of_bayes_under_every_process(process):
    """Shown x_t, the network sees it as the variance-preserving process would, with ln(sigma / alpha)."""
    classifier = Classifier(Bayes(), TWO, VE(0.01, 100.0))
    level = process.level(process.t_from_ratio(0.7))
    x = torch.linspace(-3, 3, 13)[:, None]
    odds = 2.0 * float(level.alpha) * x[:, 0] / float(level.sigma) ** 2
    found = classifier.log_probs(x, level)
    torch.testing.assert_close(found[:, 1], nn.functional.logsigmoid(odds), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(13))


def test_the_accuracy_of_bayes_at_a_level():
    """Phi(1 / r) of the signs are right."""
    classifier, batch = Classifier(Bayes(), TWO, VE(0.01, 100.0)), points(40_000)
    for ratio in (0.5, 1.0, 3.0):
        level = classifier.process.level(classifier.process.t_from_ratio(ratio))
        x = classifier._noised(batch["x"], level, Draw(1))
        right = (classifier.log_probs(x, level).argmax(1) == batch["label"]).double().mean()
        assert right == pytest.approx(0.5 * (1 + math.erf(1 / ratio / 2**0.5)), abs=0.01)


def test_losses_are_cross_entropy_and_accuracy_at_the_levels_of_the_times():
    """The entropy of the class given x_t, averaged over ln r; by quadrature."""
    classifier = Classifier(Bayes(), TWO, VE(0.1, 10.0), UniformLogSNR())
    terms = classifier.losses(points(200_000), Draw(2))
    ratio = torch.logspace(-1, 1, 201, dtype=torch.float64)
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * 0.008
    odds = 2.0 * (1.0 + ratio[:, None] * z) / ratio[:, None] ** 2
    entropy = (weight * nn.functional.softplus(-odds)).sum(1).mean()
    assert terms["loss"].shape == terms["accuracy"].shape == (200_000,)
    assert terms["loss"].mean() == pytest.approx(float(entropy), rel=0.01)
    assert ((terms["accuracy"] == 0) | (terms["accuracy"] == 1)).all()


def test_levels_beyond_the_trained_ones_are_taken_for_the_last():
    classifier = Classifier(Bayes(), TWO, VE(0.5, 2.0))
    assert classifier.ratios == pytest.approx((0.5, 2.0), rel=0.01)
    process, x = VE(0.01, 100.0), torch.tensor([[1.0]])
    label = []
    classifier.network.register_forward_hook(lambda network, inputs, answer: label.append(float(inputs[1].exp())))
    for ratio in (50.0, 0.02):
        classifier.log_probs(x, process.level(process.t_from_ratio(ratio)))
    classifier.log_probs(x, CLEAN)
    assert label == pytest.approx([2.0, 0.5, 0.5], rel=0.01)


def test_learns_and_is_saved(tmp_path: Path):
    """A few updates on digits beat chance by far, and the checkpoint is what guidance takes."""
    data = ImageDataModule("digits", labels=True, batch_size=128)
    torch.manual_seed(0)
    network = WideResNet(SPEC, widths=[32], blocks_per_group=1, embedding=32, frequencies=8, fourier_scale=1.0)
    classifier = Classifier(network, SPEC, VE(0.05, 2.0), optimizer=lambda p: torch.optim.Adam(p, lr=5e-3), warmup=5)
    trainer = Trainer(
        run_dir=str(tmp_path), max_steps=120, enable_progress_bar=False, limit_val_batches=1, accelerator="cpu"
    )
    trainer.fit(classifier, data)
    numbers = trainer.test(classifier, data, verbose=False)[0]
    assert numbers["test/accuracy_clean"] > 0.8
    assert numbers["test/accuracy_clean"] > numbers["test/accuracy_sigma_1"] > 0.2
    assert "test/accuracy_sigma_3" not in numbers
    assert not list(tmp_path.glob("samples/*"))
    path = tmp_path / "checkpoints" / "last.ckpt"
    again = load(path, network=network, process=VE(0.05, 2.0))
    assert isinstance(again, NoisyClassifier)
    with pytest.raises(ValueError, match="does not sample"):
        trainer.predict(classifier)


def test_a_guided_model_takes_classes_and_counts_the_classifier():
    module = ScoreSDE(MLP, {**SPEC, "classes": 0}, guidance=lambda d: ClassifierGuidance(d, tiny().eval()), label=3)
    found = module.generate(4)
    assert found["label"].tolist() == [3] * 4
    assert module.sampler.evaluations == 2 * 35
    assert len(set(ScoreSDE(MLP, SPEC, label=None).generate(2))) == 1  # nothing takes a class there


def test_unusable_data_and_levels_are_refused():
    with pytest.raises(ValueError, match=r"data\.labels to true"):
        Classifier(Bayes(), {"kind": "array", "shape": [1], "classes": 0})
    with pytest.raises(ValueError, match="levels with an end"):
        Classifier(Bayes(), TWO, Flow(), times=_Ends())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data of shape \[1, 8, 8\], but sees \[1, 4, 4\]"):
        tiny().log_probs(torch.zeros(1, 1, 4, 4), CLEAN)


class _Ends:
    """A law of times that says nothing of its range."""

    def __call__(self, process, count, draw):
        return draw.uniform((count,), torch.float64)
