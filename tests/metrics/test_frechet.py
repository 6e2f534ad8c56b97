import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_sgm.metrics import FrechetDistance


def images(count, seed, shape=(2, 3, 2)):
    """Correlated pixels."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[0] * shape[1] * shape[2]
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing).view(count, *shape)


def distance(real, generated, **arguments):
    metric = FrechetDistance(**arguments)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_positive_linear_maps_are_optimal_transport(seed):
    """From N(m, S) to its image under x -> A x + b, A symmetric positive: |(A - 1) m + b|^2 + tr (A - 1) S (A - 1)."""
    real = images(40, seed).flatten(1)
    generator = torch.Generator().manual_seed(seed + 1)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, shift = root @ root.T / 12, torch.randn(12, generator=generator, dtype=torch.float64)
    change = matrix - torch.eye(12)
    mean = change @ real.mean(0) + shift
    expected = (mean.square().sum() + (change @ torch.cov(real.T) @ change).trace()) / 4
    found = distance(real.view(-1, 2, 3, 2), (real @ matrix + shift).view(-1, 2, 3, 2))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_gaussians_with_known_moments():
    generator = torch.Generator().manual_seed(0)
    real = 0.2 + 0.5 * torch.randn(200_000, 1, 1, 2, generator=generator)
    generated = torch.tensor([-0.1, 0.4]) + torch.tensor([0.5, 1.5]) * torch.randn(
        200_000, 1, 1, 2, generator=generator
    )
    assert distance(real, generated) == pytest.approx((0.3**2 + 0.2**2 + 1.0**2) / 4, rel=0.02)


def test_invariances():
    real, generated = images(50, 1), images(60, 2)
    value = distance(real, generated)
    rotation = torch.linalg.qr(images(12, 3).flatten(1)).Q
    turned = [(x.flatten(1) @ rotation).view(x.shape) for x in (real, generated)]
    assert distance(*turned) == pytest.approx(value, rel=1e-9)
    assert distance(generated, real) == pytest.approx(value, rel=1e-10)
    assert distance(3 * real + 1, 3 * generated + 1) == pytest.approx(9 * value, rel=1e-10)
    assert distance(real.flip(0), generated) == pytest.approx(value, rel=1e-10)


def test_a_set_is_at_distance_zero_of_itself_even_when_pixels_are_constant():
    real = images(30, 4, (1, 8, 8))
    real[:, :, :, :3] = -1
    assert 0 <= distance(real, real) < 1e-10


def test_processes_merge_to_the_result_of_one():
    real, generated = images(50, 5), images(40, 6)
    parts = []
    for rank in range(3):
        metric = FrechetDistance()
        for batch in real[rank::3].split(7):
            metric.update(batch, real=True)
        for batch in generated[rank::3].split(5):
            metric.update(batch, real=False)
        parts.append(metric)
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2])
    assert float(parts[0].compute()) == pytest.approx(distance(real, generated), rel=1e-10)


def test_reset_empties_it():
    metric = FrechetDistance()
    metric.update(images(50, 5), real=True)
    metric.update(images(40, 6), real=False)
    metric.reset()
    metric.update(images(50, 1), real=True)
    metric.update(images(60, 2), real=False)
    assert float(metric.compute()) == pytest.approx(distance(images(50, 1), images(60, 2)), rel=1e-12)


def digits():
    """The split of score_sde.md section 10, dequantised to 17 levels in [-1, 1]."""
    from sklearn.datasets import load_digits

    levels = torch.from_numpy(load_digits().images).view(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(levels), generator=generator)
    x = (levels + torch.rand(levels.shape, generator=generator, dtype=torch.float64)) / 17 * 2 - 1
    return x[order[:1500]], x[order[1500:]]


def test_floor_of_the_digits():
    train, test = digits()
    assert len(test) == 297
    # One draw of 300 gives 0.15 to 0.22; score_sde.md quotes this one.
    assert distance(test, train[:300]) == pytest.approx(0.214, abs=0.006)
    assert distance(test, torch.rand(300, 1, 8, 8) * 2 - 1) > 5


class Flat(nn.Module):
    num_features = 5

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 5), nn.Tanh())

    def forward(self, x):
        assert x.dtype == torch.float32
        return self.net(x)


def test_features_agree_with_torchmetrics():
    network = Flat()
    real, generated = images(80, 7), images(90, 8)
    found = distance(real, generated, features=network)
    theirs = FrechetInceptionDistance(feature=network.eval(), normalize=True)
    theirs.update(real.float(), real=True)
    theirs.update(generated.float(), real=False)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_the_name_says_what_was_compared():
    assert FrechetDistance().name == "frechet_pixels"
    assert FrechetDistance(Flat()).name == "frechet_Flat"
    assert FrechetDistance.inputs == ("x",)


def test_a_feature_network_inside_a_model_is_neither_trained_nor_noisy_nor_rounded():
    class Method(LightningModule):
        def __init__(self):
            super().__init__()
            self.metric = FrechetDistance(Flat())

    module = Method().train()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    real, generated = images(30, 9), images(30, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.metric.update(real, real=True)
        module.metric.update(generated, real=False)
    assert float(module.metric.compute()) == pytest.approx(
        distance(real, generated, features=module.metric.features), rel=1e-12
    )


def test_half_precision_of_the_model_leaves_the_sums_alone():
    real, generated = images(30, 9), images(30, 10)
    metric = FrechetDistance()
    metric.update(real, real=True)
    metric.reset()
    holder = nn.ModuleList([metric]).to(torch.bfloat16)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert len(holder) == 1
    assert float(metric.compute()) == pytest.approx(distance(real, generated), rel=1e-12)


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match=r"4107 x 4107.*features="):
        FrechetDistance().update(torch.zeros(2, 3, 37, 37), real=True)
    metric = FrechetDistance()
    metric.update(images(3, 0), real=True)
    with pytest.raises(ValueError, match="got 3 and 0"):
        metric.compute()
    with pytest.raises(ValueError, match="12 numbers per image and now got 4"):
        metric.update(torch.zeros(2, 1, 2, 2), real=False)
    with pytest.raises(ValueError, match=r"must give \(2, features\)"):
        FrechetDistance(nn.Identity()).update(torch.zeros(2, 1, 2, 2), real=True)
