"""Folders of diffusers' unconditional image models (google/ddpm-*, google/ncsnpp-*), once they are on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_sgm.io.released.configurations import named
from lightning_sgm.io.released.model import Imported, State, image_spec, read_tensors, with_spec
from lightning_sgm.io.tensors import read_json
from lightning_sgm.recipes import overlay

_KIND, _WANTED = "weights of a diffusers model", "give the folder of a diffusers model"
# Attention layers were renamed, and files written before still have the old names.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_PREDICTIONS = {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}
_VE, _DDPM = "ve/ffhq_256_ncsnpp_continuous", "vp/ddpm/bedroom"


def import_folder(folder: Path, model: str | None = None) -> Imported:
    """A pipeline's folder, or that of its ``UNet2DModel`` alone.

    Args:
        folder: with model_index.json, unet/ and scheduler/, or all in one place, or just config.json and weights.
        model: a name in ``CONFIGURATIONS`` or a recipe that takes the place of the scheduler.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model or its scheduler is none of those known here, or a file is damaged.
    """
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_json(place / "config.json", _WANTED)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{folder} holds a {config['_class_name']}; only a UNet2DModel can be imported")
    values = _settings(folder, config, model)
    channels, side = config.get("in_channels", 3), config.get("sample_size")
    if side is None or (isinstance(side, list) and side[0] != side[-1]):
        raise ValueError(
            f"sample_size in {place / 'config.json'} must be one number, the side of the images, got {side}"
        )
    side = side[0] if isinstance(side, list) else side
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    network = {"class_path": "DiffusersUNet", "init_args": {"config": plain}}
    values = overlay(values, {"model": {"init_args": {"network": network}}})
    weights = _weights(place)
    return Imported(
        model=with_spec(values["model"], image_spec(channels, side)),
        data=None,
        weights={f"network.model.{key}": tensor for key, tensor in weights.items()},
        raw={},
        updates=0,
        about=[
            f"read: {place}, the only weights in it are taken for averaged ones",
            f"model: UNet2DModel for images {channels} x {side} x {side}, "
            f"{sum(tensor.numel() for tensor in weights.values()):,} parameters",
        ],
    )


def _settings(folder: Path, config: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Process, prediction and sampler, from the scheduler or the model named."""
    fourier = config.get("time_embedding_type") == "fourier"
    if fourier != bool(config.get("center_input_sample")):
        raise ValueError(
            f"{folder} is neither a DDPM of images in [-1, 1] with a positional embedding nor an NCSN++ of images in "
            "[0, 1] with a Fourier embedding: how its noise is counted is not known"
        )
    files = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None and model is None:
        raise FileNotFoundError(
            f"{folder} has no scheduler_config.json, so the noise is not known: add it, or --model with the name of a "
            "model of the same noise"
        )
    if model is not None:
        values = named(model)
        label = values["model"]["init_args"].get("preconditioning", {}).get("init_args", {}).get("label")
        if (label == "log_half_sigma") != fourier:
            raise ValueError(f"{model} has another kind of noise label than the model in {folder}")
        return values
    assert file is not None
    changes = (_ve if fourier else _ddpm)(read_json(file, _WANTED), file)
    return overlay(named(_VE if fourier else _DDPM), {"model": {"init_args": changes}})


def _ve(scheduler: dict[str, Any], file: Path) -> dict[str, Any]:
    """The VE SDE of a ``ScoreSdeVeScheduler``, whose sigma is that of images in [0, 1]."""
    if scheduler.get("_class_name") != "ScoreSdeVeScheduler":
        raise ValueError(f"{file} is of a {scheduler.get('_class_name')}; an NCSN++ needs a ScoreSdeVeScheduler")
    given = {"num_train_timesteps": 2000, "snr": 0.15, "sigma_min": 0.01, "sigma_max": 1348.0, **scheduler}
    steps = given.get("correct_steps", 1)
    langevin = {"class_path": "Langevin", "init_args": {"snr": given["snr"], "steps": steps}}
    sigmas = {"sigma_min": 2 * given["sigma_min"], "sigma_max": 2 * given["sigma_max"]}
    grid = {"class_path": "UniformTime", "init_args": {"t_min": given.get("sampling_eps", 1e-5)}}
    return {
        "process": {"class_path": "VE", "init_args": sigmas},
        "sampler": {"init_args": {"steps": given["num_train_timesteps"], "grid": grid, "before": [langevin]}},
    }


def _ddpm(scheduler: dict[str, Any], file: Path) -> dict[str, Any]:
    """The chain of a scheduler with linear betas."""
    given = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", **scheduler}
    prediction = given.get("prediction_type", "epsilon")
    wrong = [
        f"{key} {given.get(key)!r}"
        for key, known in {
            "beta_schedule": given["beta_schedule"] == "linear",
            "prediction_type": prediction in _PREDICTIONS,
            "trained_betas": given.get("trained_betas") is None,
            "rescale_betas_zero_snr": not given.get("rescale_betas_zero_snr"),
        }.items()
        if not known
    ]
    if wrong or "sigma_max" in scheduler:
        raise ValueError(
            f"{file} is of a {given.get('_class_name')} with {', '.join(wrong) or 'sigma_max'}; a DDPM with linear "
            f"betas that predicts {', '.join(_PREDICTIONS)} can be imported"
        )
    steps = int(given["num_train_timesteps"])
    noise = "transition" if str(given.get("variance_type", "fixed_small")).startswith("fixed_large") else "posterior"
    betas = {"steps": steps, "beta_min": steps * given["beta_start"], "beta_max": steps * given["beta_end"]}
    return {
        "process": {"class_path": "DDPMChain", "init_args": betas},
        "preconditioning": {"init_args": {"prediction": _PREDICTIONS[prediction]}},
        "sampler": {
            "init_args": {"steps": steps, "rule": {"class_path": "Ancestral", "init_args": {"noise": noise}}},
        },
    }


def _weights(place: Path) -> State:
    """The tensors of a model's folder under today's names."""
    files = [place / f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "bin")]
    weights: State = {}
    for name, tensor in read_tensors(files, _KIND).items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if name != "time_proj.W":  # the frequencies under a second name
            weights[name] = tensor.float()
    return weights
