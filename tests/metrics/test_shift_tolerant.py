"""ST-LPIPS on both networks: the distance written out, and values of the package's own code where it is installed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_sgm.metrics import STLPIPS, perceptual

Net = Literal["alex", "vgg"]
State = dict[str, Tensor]
both = pytest.mark.parametrize("net", ["alex", "vgg"])
installed = pytest.mark.skipif(not find_spec("stlpips_pytorch"), reason="stlpips-pytorch is not installed")

# Per slice: released number, channels in and out, kernel and padding of the convolutions; released blurs.
CONVOLUTIONS = {
    "alex": [
        [(0, 3, 64, 11, 2)],
        [(5, 64, 192, 5, 2)],
        [(9, 192, 384, 3, 1)],
        [(11, 384, 256, 3, 1)],
        [(13, 256, 256, 3, 1)],
    ],
    "vgg": [
        [(0, 3, 64, 3, 1), (2, 64, 64, 3, 1)],
        [(6, 64, 128, 3, 1), (8, 128, 128, 3, 1)],
        [(12, 128, 256, 3, 1), (14, 256, 256, 3, 1), (16, 256, 256, 3, 1)],
        [(20, 256, 512, 3, 1), (22, 512, 512, 3, 1), (24, 512, 512, 3, 1)],
        [(28, 512, 512, 3, 1), (30, 512, 512, 3, 1), (32, 512, 512, 3, 1)],
    ],
}
BLURS = {
    "alex": {"slice1.1": 64, "slice2.4": 64, "slice3.8": 192},
    "vgg": {"slice2.5": 64, "slice3.11": 128, "slice4.19": 256, "slice5.27": 512},
}
ROW = torch.tensor([1.0, 2, 1]) / 4


def images(count: int, seed: int, *sides: int) -> Tensor:
    """8-bit images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *sides), generator=generator) / 127.5 - 1


def near(truth: Tensor, seed: int = 9) -> Tensor:
    """Images with 30 levels of noise, in 8 bits."""
    noise = torch.randint(-30, 31, truth.shape, generator=torch.Generator().manual_seed(seed))
    return (truth + noise / 127.5).clamp(-1, 1)


def smooth(height: int, width: int, seed: int) -> Tensor:
    """One image of 8 x 8 random colours between which it is linear."""
    return functional.interpolate(images(1, seed, 8, 8), (height, width), mode="bilinear")


def released(net: Net) -> State:
    """Random weights with the names and shapes of the released file."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "scaling_layer.shift": torch.tensor([-0.03, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.45]).view(1, 3, 1, 1),
    }
    for place, convolutions in enumerate(CONVOLUTIONS[net]):
        for number, before, after, kernel, _ in convolutions:
            weight = torch.randn(after, before, kernel, kernel, generator=generator)
            state[f"net.slice{place + 1}.{number}.weight"] = weight * (2 / (before * kernel**2)) ** 0.5
            state[f"net.slice{place + 1}.{number}.bias"] = 0.1 * torch.randn(after, generator=generator)
        state[f"lin{place}.model.1.weight"] = torch.rand(1, convolutions[-1][2], 1, 1, generator=generator)
    for name, width in BLURS[net].items():
        state[f"net.{name}.filt"] = torch.outer(ROW, ROW).expand(width, 1, 3, 3).clone()
    return state


def by_hand(net: Net, state: State, x: Tensor, truth: Tensor) -> Tensor:
    """The distances written out, in float64."""
    state = {name: value.double() for name, value in state.items()}

    def blur(h: Tensor) -> Tensor:
        kernel = torch.outer(ROW, ROW).double().expand(h.shape[1], 1, 3, 3)
        padded = functional.pad(h, (2, 2, 2, 2), mode="reflect")
        return functional.conv2d(padded, kernel, groups=h.shape[1])[:, :, ::2, ::2]

    def features(h: Tensor) -> Iterator[Tensor]:
        h = (h.double() - state["scaling_layer.shift"]) / state["scaling_layer.scale"]
        for place, convolutions in enumerate(CONVOLUTIONS[net], 1):
            if place in ((2, 3) if net == "alex" else (2, 3, 4, 5)):
                h = blur(functional.max_pool2d(h, 3 if net == "alex" else 2, 1))
            for number, _, _, _, padding in convolutions:
                name = f"net.slice{place}.{number}"
                h = functional.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)
                h = (blur(h) if (net, place) == ("alex", 1) else h).relu()
            yield h / h.norm(dim=1, keepdim=True)

    total = torch.zeros(len(x)).double()
    for place, (one, other) in enumerate(zip(features(x), features(truth), strict=True)):
        total += functional.conv2d((one - other) ** 2, state[f"lin{place}.model.1.weight"]).mean((1, 2, 3))
    return total


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed stlpips-pytorch without weights, whose code must not run."""
    folder = tmp_path / "stlpips_pytorch"
    path(folder, "alex").parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stlpips_pytorch", raising=False)
    yield folder
    shutil.rmtree(folder)  # up to 60 MB


def path(package: Path, net: str) -> Path:
    return package / perceptual._WEIGHTS.format(net=net)


# ---- random weights


@both
def test_it_is_the_distance_written_out_and_its_gradient(package: Path, net: Net):
    state = released(net)
    torch.save(state, path(package, net))
    metric = STLPIPS(net)
    for sides in ((40, 33), (32, 47)):
        truth = images(2, 0, *sides)
        x = near(truth).requires_grad_()
        expected = by_hand(net, state, x, truth)
        (wanted,) = torch.autograd.grad(expected.sum(), x)
        found = metric.distances(x, truth)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        metric.reset()
        metric.update(x.detach(), truth)
        assert float(metric.compute()) == pytest.approx(expected.mean().item(), rel=1e-4)
        metric.reset()
        metric.update(truth, truth)
        assert float(metric.compute()) == 0
    x = truth.clone().requires_grad_()
    metric.distances(x, truth).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_it_leaves_checkpoints_precision_and_random_numbers_alone(package: Path):
    state = released("alex")
    torch.save(state, path(package, "alex"))
    before = torch.get_rng_state()
    metric = STLPIPS()
    assert torch.equal(torch.get_rng_state(), before)
    holder = nn.ModuleList([metric]).to(torch.bfloat16)
    assert not holder.state_dict()
    assert not list(holder.parameters())
    truth, x = images(2, 0, 32, 32), images(2, 1, 32, 32)
    expected = by_hand("alex", state, x, truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(x, truth)
        torch.testing.assert_close(metric.distances(x, truth).double(), expected, rtol=1e-4, atol=0)
    assert metric.compute().dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(expected.mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="at least 32 x 32 pixels"):
        metric.update(images(1, 0, 24, 40), images(1, 0, 24, 40))


def test_pixels_without_features_count_nothing_and_have_gradients(package: Path):
    state = released("alex")
    state["net.slice5.13.bias"] -= 1e3  # ReLU leaves nothing of the last feature
    torch.save(state, path(package, "alex"))
    truth = images(1, 0, 32, 32)
    x = near(truth).requires_grad_()
    with_dead = STLPIPS().distances(x, truth)
    with_dead.sum().backward()
    state["lin4.model.1.weight"] *= 0
    state["net.slice5.13.bias"] += 1e3
    torch.testing.assert_close(with_dead.double(), by_hand("alex", state, x, truth), rtol=1e-4, atol=0)
    assert x.grad is not None
    assert x.grad.isfinite().all()


# ---- what can be missing


@both
def test_without_its_package(monkeypatch: pytest.MonkeyPatch, net: Net):
    monkeypatch.setattr("lightning_sgm.metrics.perceptual.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lightning_sgm\[restoration\]'"):
        STLPIPS(net)


def test_files_and_networks_that_are_not_there(package: Path):
    with pytest.raises(ValueError, match=r"has no .*vgg_shift_tolerant.pth: pip install"):
        STLPIPS("vgg")
    unknown: Any = "squeeze"
    with pytest.raises(ValueError, match="net must be alex or vgg, got 'squeeze'"):
        STLPIPS(unknown)


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_another_file(package: Path, change: str):
    state = released("alex")
    bias = state.pop("net.slice2.5.bias")
    if change != "missing":
        state["net.slice2.5.bias"] = bias[:5] if change == "shape" else bias
    if change == "more":
        state["lin5.model.1.weight"] = torch.ones(1, 512, 1, 1)
    torch.save(state, path(package, "alex"))
    with pytest.raises(ValueError, match="not the weights of the shift-tolerant alex"):
        STLPIPS()


# ---- released weights

# Sides and seed of an image, and what stlpips_pytorch 0.0.2's LPIPS(net=net, variant="shift_tolerant") says of its
# noisy copy and of another image.
KNOWN = {
    "alex": {
        (32, 32, 0): [0.011111, 0.145789],
        (45, 70, 1): [0.081681, 0.469983],
        (64, 51, 2): [0.073432, 0.343020],
    },
    "vgg": {
        (32, 32, 0): [0.084723, 0.301690],
        (45, 70, 1): [0.518135, 0.497856],
        (64, 51, 2): [0.511878, 0.483154],
    },
}


@installed
@both
def test_values_of_the_package(net: Net):
    metric = STLPIPS(net)
    assert metric.name == {"alex": "st_lpips", "vgg": "st_lpips_vgg"}[net]
    for (height, width, seed), expected in KNOWN[net].items():
        truth = smooth(height, width, seed)
        pairs = torch.cat([near(truth), smooth(height, width, seed + 1)])
        assert metric.distances(pairs, truth.expand(2, -1, -1, -1)).tolist() == pytest.approx(expected, abs=1e-5)
