"""Released weights: read safely, recognised, and the score of the imported model is theirs."""

from __future__ import annotations

import functools
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_sgm.callbacks import EMA
from lightning_sgm.io.checkpoint import hyper_parameters, load, read_checkpoint
from lightning_sgm.io.released import configurations, score_sde
from lightning_sgm.io.released.configurations import CONFIGURATIONS, named, side
from lightning_sgm.io.released.model import image_spec, save
from lightning_sgm.io.released.score_sde import identify, import_score_sde, read
from lightning_sgm.methods import ScoreSDE
from lightning_sgm.samplers import Sampler
from tests.io.released_files import content, network, recipe, shrunk, write

VP, SUBVP, DDPM = (f"paper/score_sde_cifar10_{name}" for name in ("ddpmpp_vp", "ddpmpp_subvp", "ddpm"))
SMLD = {
    "network": {"init_args": {"embedding": "positional"}},
    "process": {"class_path": "SMLDChain", "init_args": {"sigma_max": 100}},
    "preconditioning": {"init_args": {"label": "index"}},
}


def imported(folder: Path, *base: str, **arguments):
    """(loaded model, content of the file, the network it was made with, checkpoint)."""
    settings = recipe(folder, *base, **arguments)
    net = network(named(str(settings)))
    held = write(folder / "released.pth", net)
    save(import_score_sde(folder / "released.pth", str(settings)), folder / "ours.ckpt")
    return load(folder / "ours.ckpt").double(), held, net, folder / "ours.ckpt"


def their_network(net, held):
    """The released network with averaged weights, paired by hand: all entries but the noise levels and W, in order."""
    names = [name for name in held["model"] if name not in ("module.sigmas", "module.all_modules.0.W")]
    state = {**held["model"], **dict(zip(names, held["ema"]["shadow_params"], strict=True))}
    del state["module.sigmas"]
    net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return net.double().eval()


@pytest.fixture
def x():
    return torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# The score is theirs (score_sde.md 2.3). Each of these writes their formulas out.


def test_ve(tmp_path: Path, x):
    model, held, net, _ = imported(tmp_path)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    sigma = (0.01 * (50 / 0.01) ** t)[:, None, None, None]
    theirs = their_network(net, held)(2 * x - 1, sigma.flatten().log()) / sigma
    assert theirs.std() > 1e-3
    torch.testing.assert_close(model.denoiser.score(2 * x - 1, t), theirs / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("base", [VP, SUBVP])
def test_vp_and_subvp(tmp_path: Path, x, base: str):
    model, held, net, _ = imported(tmp_path, base)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    kept = torch.exp(-(0.1 * t + (20 - 0.1) * t**2 / 2))  # a^2
    std = (1 - kept if base == SUBVP else torch.sqrt(1 - kept))[:, None, None, None]
    theirs = -their_network(net, held)(2 * x - 1, 999 * t) / std
    assert theirs.std() > 1e-3
    torch.testing.assert_close(model.denoiser.score(2 * x - 1, t), theirs, rtol=1e-5, atol=1e-7)


def test_discrete_ve(tmp_path: Path, x):
    model, held, net, _ = imported(tmp_path, **SMLD)
    label = torch.tensor([0, 700])  # 0 is the largest noise
    sigma = held["model"]["module.sigmas"][label][:, None, None, None]
    theirs = their_network(net, held)(2 * x - 1, label.double()) / sigma
    ours = model.denoiser.score(2 * x - 1, model.process.time(999 - label))
    torch.testing.assert_close(ours, theirs / 2, rtol=1e-5, atol=0)


def test_discrete_vp(tmp_path: Path, x):
    model, held, net, _ = imported(tmp_path, DDPM)
    label = torch.tensor([0, 700])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[label]
    theirs = -their_network(net, held)(2 * x - 1, label.double()) / torch.sqrt(1 - kept)[:, None, None, None]
    torch.testing.assert_close(model.denoiser.score(2 * x - 1, model.process.time(label)), theirs, rtol=1e-5, atol=1e-7)


# What is in the checkpoint.


def test_the_average_is_taken_the_raw_weights_kept_and_the_frequencies_those_of_the_file(tmp_path: Path):
    _, held, _, path = imported(tmp_path)
    checkpoint = read_checkpoint(path)
    name = "network.all_modules.4.Conv_0.weight"
    position = [n for n in held["model"] if n[7:] not in ("sigmas", "all_modules.0.W")].index(f"module.{name[8:]}")
    assert torch.equal(checkpoint["state_dict"][name], held["ema"]["shadow_params"][position])
    assert torch.equal(checkpoint["raw_state"][name], held["model"][f"module.{name[8:]}"])
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["raw_state"][name])
    frequencies = "network.all_modules.0.W"
    assert torch.equal(checkpoint["state_dict"][frequencies], held["model"]["module.all_modules.0.W"])
    assert frequencies not in checkpoint["raw_state"]
    assert not any("sigmas" in key for key in checkpoint["state_dict"])
    assert checkpoint["callbacks"][EMA().state_key] == {"updates": 7}
    stored = hyper_parameters(path)
    assert stored.model["spec"] == image_spec(3, 32)
    assert stored.model["process"]["init_args"] == {"sigma_min": 0.02, "sigma_max": 100}
    assert stored.model["network"]["class_path"].startswith("lightning_sgm.")


# Reading.


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_foreign_classes_are_refused_by_name_and_not_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = content(network(named(str(recipe(tmp_path)))))
    for entry in ("optimizer", "step", "model"):
        torch.save({**held, entry: Bomb()}, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=r"contains (posix|nt)\.mkdir"):
            read(tmp_path / "bad.pth")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("old", [True, False])
def test_the_numpy_number_in_the_optimizer_is_read_under_its_old_and_new_name(tmp_path: Path, old: bool):
    path = tmp_path / "released.pth"
    write(path, network(named(str(recipe(tmp_path)))))
    with pytest.raises(Exception, match="numpy"):
        torch.load(path, weights_only=True)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "numpy.pth", "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                names = [b"numpy._core.multiarray", b"numpy.core.multiarray"]
                present = names[0] if names[0] in data else names[1]
                data = data.replace(present, names[old])
            target.writestr(entry.filename, data)
    assert read(tmp_path / "numpy.pth").step == 7


def test_damaged_files_are_told_in_one_line(tmp_path: Path):
    path = tmp_path / "released.pth"
    write(path, network(named(str(recipe(tmp_path)))))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="score SDE code or is damaged: it is cut off") as error:
        read(path)
    assert "\n" not in str(error.value)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="no model and no ema and no step"):
        read(path)
    torch.save({"model": {}, "ema": {"shadow_params": [1]}, "step": 0}, path)
    with pytest.raises(ValueError, match="not as they write them"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.pth")


def test_an_average_that_does_not_pair_is_refused(tmp_path: Path):
    held = content(network(named(str(recipe(tmp_path)))))
    held["ema"]["shadow_params"].pop(3)
    torch.save(held, tmp_path / "released.pth")
    with pytest.raises(ValueError, match="average has other shapes"):
        read(tmp_path / "released.pth")


def test_entries_that_do_not_fit_are_listed(tmp_path: Path):
    settings = recipe(tmp_path)
    held = content(network(named(str(settings))))
    held["model"]["module.all_modules.4.Conv_7.weight"] = held["model"].pop("module.all_modules.4.Conv_0.weight")
    names = [n for n in held["model"] if n not in ("module.sigmas", "module.all_modules.0.W")]
    held["ema"]["shadow_params"] = [held["model"][name] for name in names]
    torch.save(held, tmp_path / "released.pth")
    with pytest.raises(
        ValueError,
        match=r"1 missing \(all_modules\.4\.Conv_0\.weight\); 1 unexpected \(all_modules\.4\.Conv_7\.weight\)",
    ):
        import_score_sde(tmp_path / "released.pth", str(settings))


def test_other_noise_levels_than_those_named_are_refused(tmp_path: Path):
    settings = recipe(tmp_path)
    write(tmp_path / "released.pth", network(named(str(settings))), sigma_max=90.0)
    with pytest.raises(ValueError, match="its sigma_max is 180, not 100"):
        import_score_sde(tmp_path / "released.pth", str(settings))


# Recognising the model.

CIFAR = "cifar10_ddpmpp"
AMBIGUOUS = {
    "vp/cifar10_ddpm": {"vp/cifar10_ddpm", "vp/cifar10_ddpm_continuous", "subvp/cifar10_ddpm_continuous"},
    f"vp/{CIFAR}": {f"vp/{CIFAR}", f"vp/{CIFAR}_continuous", f"subvp/{CIFAR}_continuous"},
    f"vp/{CIFAR}_deep_continuous": {f"vp/{CIFAR}_deep_continuous", f"subvp/{CIFAR}_deep_continuous"},
    "vp/cifar10_ncsnpp": {"vp/cifar10_ncsnpp", "vp/cifar10_ncsnpp_continuous", "subvp/cifar10_ncsnpp_continuous"},
    "vp/cifar10_ncsnpp_deep_continuous": {
        "vp/cifar10_ncsnpp_deep_continuous",
        "subvp/cifar10_ncsnpp_deep_continuous",
    },
}
ALIKE = [
    {"ve/ffhq_256_ncsnpp_continuous", "ve/celebahq_256_ncsnpp_continuous"},
    {"vp/ddpm/bedroom", "vp/ddpm/church", "vp/ddpm/celebahq"},
]


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch):
    small = shrunk(CONFIGURATIONS)
    for name, one in small.items():
        monkeypatch.setitem(configurations.CONFIGURATIONS, name, one)
    monkeypatch.setattr(score_sde, "named", functools.cache(named))


UNIQUE = [
    *("ve/cifar10_ncsnpp", "ve/cifar10_ncsnpp_continuous", "ve/cifar10_ncsnpp_deep_continuous", "ve/cifar10_ddpm"),
    *("ve/celeba_ncsnpp", "ve/bedroom_ncsnpp_continuous", "ve/church_ncsnpp_continuous"),
    "ve/ffhq_1024_ncsnpp_continuous",
]


@pytest.mark.usefixtures("small_table")
@pytest.mark.parametrize("name", [*UNIQUE, *AMBIGUOUS, *(min(names) for names in ALIKE)])
def test_each_model_is_recognised_or_its_candidates_named(tmp_path: Path, name: str):
    values = named(name)
    process = values["model"]["init_args"]["process"]
    sigma_max = process.get("init_args", {}).get("sigma_max", 100.0) / 2
    net = network(values, side(name, values))
    path = tmp_path / "released.pth"
    write(path, net, sigma_max=sigma_max, decay=values["ema"]["decay"])
    several = next((names for names in AMBIGUOUS.values() if name in names), None)
    if several:
        with pytest.raises(ValueError, match="--model") as error:
            identify(read(path), path)
        assert {other for other in CONFIGURATIONS if f"{other}," in f"{error.value},"} == several
        return
    assert set(identify(read(path), path)) == next((alike for alike in ALIKE if name in alike), {name})


@pytest.mark.usefixtures("small_table")
def test_a_stranger_is_compared_with_the_nearest(tmp_path: Path):
    net = network(named(str(recipe(tmp_path))))
    held = content(network(named("ve/cifar10_ncsnpp_continuous")))
    held["model"]["module.extra"] = torch.zeros(2)
    held["ema"]["shadow_params"].append(torch.zeros(2))
    torch.save(held, tmp_path / "extra.pth")
    with pytest.raises(ValueError, match=r"nearest is ve/cifar10_ncsnpp_continuous, .* 1 unexpected \(extra\)"):
        import_score_sde(tmp_path / "extra.pth")
    write(tmp_path / "own.pth", net)
    with pytest.raises(ValueError, match="none of the released models"):
        import_score_sde(tmp_path / "own.pth")


# Sizes of the real ones (score_sde.md 3 and 11); the entries of a file have one more, the noise levels.
SIZES = {
    "ve/cifar10_ncsnpp_continuous": (59, 571, 62_758_915),
    "ve/cifar10_ncsnpp_deep_continuous": (95, 963, 107_587_075),
    "ve/cifar10_ncsnpp": (58, 570, 62_693_251),
    "vp/cifar10_ddpmpp": (55, 564, 61_804_419),
    "subvp/cifar10_ddpmpp_continuous": (55, 564, 61_804_419),
    "vp/cifar10_ddpmpp_deep_continuous": (91, 956, 106_632_579),
    "ve/cifar10_ddpm": (37, 308, 35_218_947),
    "ve/church_ncsnpp_continuous": (77, 645, 65_574_549),
    "ve/ffhq_1024_ncsnpp_continuous": (70, 553, 105_785_896),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str):
    values = named(name)
    with torch.device("meta"):
        net = network(values, side(name, values))
    modules = {key.split(".")[1] for key in net.state_dict()}
    assert (len(modules), len(net.state_dict()), sum(p.numel() for p in net.parameters())) == SIZES[name]


SETTINGS = {  # noise at t = 1, steps, snr of the corrector
    "ve/cifar10_ncsnpp_continuous": (100, 1000, 0.16),
    "ve/celeba_ncsnpp": (180, 1000, 0.17),
    "ve/bedroom_ncsnpp_continuous": (756, 2000, 0.075),
    "ve/church_ncsnpp_continuous": (760, 2000, 0.075),
    "ve/ffhq_256_ncsnpp_continuous": (696, 2000, 0.075),
    "ve/ffhq_1024_ncsnpp_continuous": (2696, 2000, 0.15),
    "vp/cifar10_ddpmpp": (None, 1000, None),
    "subvp/cifar10_ddpm_continuous": (None, 1000, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_noise_and_sampler(name: str):
    arguments = named(name)["model"]["init_args"]
    sampler = arguments["sampler"]["init_args"]
    snr = sampler["before"][0]["init_args"]["snr"] if sampler["before"] else None
    found = (arguments["process"].get("init_args", {}).get("sigma_max"), sampler["steps"], snr)
    assert found == SETTINGS[name]


@pytest.mark.usefixtures("small_table")
@pytest.mark.parametrize(
    "name",
    [
        *("ve/cifar10_ddpm", "ve/celeba_ncsnpp", "ve/ffhq_256_ncsnpp_continuous", "vp/cifar10_ddpmpp"),
        *("vp/cifar10_ncsnpp", "vp/cifar10_ncsnpp_deep_continuous", "vp/ddpm/church", "subvp/cifar10_ddpm_continuous"),
    ],
)
def test_every_kind_of_model_can_be_built_and_its_levels_visited(tmp_path: Path, name: str):
    """Grids, rules and processes go together, up to the last of all the steps."""
    values = named(name)
    net = network(values, side(name, values))
    process = values["model"]["init_args"]["process"].get("init_args", {})
    write(tmp_path / "released.pth", net, sigma_max=process.get("sigma_max", 100.0) / 2)
    model = save(import_score_sde(tmp_path / "released.pth", name), tmp_path / "ours.ckpt")
    assert isinstance(model, ScoreSDE)
    levels = model.sampler.levels(model.process)
    assert isinstance(model.sampler, Sampler)
    assert len(levels) == model.sampler.steps + 1
    assert math.isclose(float(levels[0].t), 1.0)
    hyper_parameters(tmp_path / "ours.ckpt")
