"""Folders of diffusers models: the score of the imported model is the one diffusers computes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from lightning_sgm.io.checkpoint import load
from lightning_sgm.io.released.model import save
from lightning_sgm.io.released.score_sde import import_score_sde

NCSNPP = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("SkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "center_input_sample": True,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": math.sqrt(2),
    "norm_num_groups": None,
    "attention_head_dim": None,
}
DDPM = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
    "attention_head_dim": None,
}


def pipeline(folder: Path, config: dict, scheduler) -> UNet2DModel:
    """A hub folder with random weights of some size; its network."""
    torch.manual_seed(0)
    model = UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "unet")
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    names = {"_class_name": "Pipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(names))
    return model


def imported(folder: Path, model: str | None = None):
    save(import_score_sde(folder, model), folder.with_suffix(".ckpt"))
    return load(folder.with_suffix(".ckpt"))


def ve(**how) -> ScoreSdeVeScheduler:
    return ScoreSdeVeScheduler(num_train_timesteps=12, snr=0.075, sigma_max=348.0, **how)


def test_ncsnpp(tmp_path: Path):
    folder = tmp_path / "ncsnpp"
    theirs = pipeline(folder, NCSNPP, ve(correct_steps=2)).double()
    model = imported(folder).double()
    assert (model.process.sigma_min, model.process.sigma_max) == (0.02, 696.0)
    assert (model.sampler.steps, model.sampler.before[0].snr, model.sampler.before[0].steps) == (12, 0.075, 2)
    t = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)
    sigma = 0.01 * (348.0 / 0.01) ** t
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64) + sigma[:, None, None, None]
    with torch.no_grad():
        score = theirs(x, sigma).sample
    assert score.std() > 1e-4
    torch.testing.assert_close(model.denoiser.score(2 * x - 1, t), score / 2, rtol=1e-5, atol=1e-9)
    assert model.float().generate(2)["x"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm(tmp_path: Path, variance: str, prediction: str):
    folder = tmp_path / "ddpm"
    scheduler = DDPMScheduler(200, beta_end=0.03, variance_type=variance, prediction_type=prediction)
    theirs = pipeline(folder, DDPM, scheduler).double()
    model = imported(folder).double()
    index = torch.tensor([0, 60, 199])
    kept = scheduler.alphas_cumprod.double()[index]
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        answer = theirs(x, index).sample
        a, s = (v.sqrt()[:, None, None, None] for v in (kept, 1 - kept))
        noise = answer if prediction == "epsilon" else a * answer + s * x
    assert noise.std() > 1e-2
    torch.testing.assert_close(model.denoiser.noise(x, model.process.time(index)), noise, rtol=1e-4, atol=1e-5)
    assert model.sampler.rule.noise == {"fixed_small": "posterior", "fixed_large": "transition"}[variance]
    assert model.sampler.steps == 200


def test_one_step_of_ddpm_is_theirs(tmp_path: Path):
    """The mean of the ancestral step of theirs, which draws nothing at index 0."""
    folder = tmp_path / "ddpm"
    scheduler = DDPMScheduler(50, clip_sample=False)
    theirs = pipeline(folder, DDPM, scheduler)
    model = imported(folder)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        answer = theirs(x, torch.tensor([0, 0])).sample
        last = scheduler.step(answer, 0, x).prev_sample
        torch.testing.assert_close(model.denoiser.x0(x, model.process.time(0)), last, rtol=1e-4, atol=1e-4)


def test_flat_folders_old_names_and_bin_files(tmp_path: Path):
    """google/ddpm-* have everything in one place, attention under its old names and, some, no safetensors."""
    folder = tmp_path / "ddpm"
    theirs = pipeline(folder, DDPM, DDPMScheduler())
    flat = tmp_path / "flat"
    flat.mkdir()
    (folder / "unet" / "config.json").rename(flat / "config.json")
    (folder / "scheduler" / "scheduler_config.json").rename(flat / "scheduler_config.json")
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert any(".query." in key for key in state)
    torch.save(state, flat / "diffusion_pytorch_model.bin")
    first = imported(flat)
    (flat / "diffusion_pytorch_model.bin").unlink()
    save_file(state, flat / "diffusion_pytorch_model.safetensors")
    second = imported(flat)
    for name, value in theirs.state_dict().items():
        for model in (first, second):
            assert torch.equal(model.network.state_dict()[f"model.{name}"], value)


def test_a_model_without_scheduler_takes_the_noise_of_a_named_one(tmp_path: Path):
    folder = tmp_path / "ncsnpp"
    pipeline(folder, NCSNPP, None)
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config\.json.*--model"):
        imported(folder)
    model = imported(folder / "unet", "ve/church_ncsnpp_continuous")
    assert model.process.sigma_max == 760.0
    assert model.spec["shape"] == [3, 16, 16]
    with pytest.raises(ValueError, match="another kind of noise label"):
        imported(folder, "vp/cifar10_ddpm")


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), "DDPMScheduler with beta_schedule 'squaredcos_cap_v2'"),
        (DDPMScheduler(trained_betas=[0.1, 0.2]), "trained_betas"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr True"),
        (ve(), "sigma_max"),
    ],
)
def test_other_schedules_are_refused(tmp_path: Path, scheduler, told: str):
    pipeline(tmp_path / "ddpm", DDPM, scheduler)
    with pytest.raises(ValueError, match=told):
        imported(tmp_path / "ddpm")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_class_embeds": 3}, "with classes"),
        ({"out_channels": 6}, "gives 6 channels"),
        ({"center_input_sample": True}, "how its noise is counted"),
        ({"sample_size": (16, 8)}, "must be one number"),
        ({"sample_size": None}, "sample_size"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, changes: dict, told: str):
    pipeline(tmp_path / "ddpm", {**DDPM, **changes}, DDPMScheduler())
    with pytest.raises(ValueError, match=told):
        imported(tmp_path / "ddpm")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_damaged_and_foreign_folders_are_told(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "ddpm"
    pipeline(folder, DDPM, DDPMScheduler())
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        imported(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        imported(folder)
    torch.save({"conv_in.weight": Bomb()}, weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"contains posix\.mkdir"):
        imported(folder)
    assert not Path("exploded").exists()
    torch.save([torch.zeros(2)], weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="holds no tensors by name"):
        imported(folder)
    config = folder / "unet" / "config.json"
    config.write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel"):
        imported(folder)
    config.write_text('{"_class_name":')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        imported(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="give the folder of a diffusers model"):
        imported(folder)
