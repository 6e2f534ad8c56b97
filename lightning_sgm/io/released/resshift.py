"""Weights of ResShift (Yue et al. 2023, 2307.12348), and of its one-step students SinSR and TAD-SR.

All three release plain ``.pth`` files of a network, and the first stage whose latents it works on as a file of its own.
What the files do not say is known by the models' names. The noise levels go into the checkpoint as a table, since the
authors' formula has changed over time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning_sgm.io.released.configurations import network_class
from lightning_sgm.io.released.first_stage import KIND, FirstStage, first_stage_of, is_first_stage, read_state
from lightning_sgm.io.released.model import Imported, State, build, differences, image_spec, with_spec
from lightning_sgm.processes import ResidualShift
from lightning_sgm.recipes import content, overlay

_KIND = "weights of ResShift's network"
_FIRST, _LAST, _STEM = "input_blocks.0.0.weight", "out.2.weight", "feature_extractor.0.weight"
_TABLES = (".relative_position_index", ".attn_mask")  # compared with ours and not kept
_ENDINGS = (".pth", ".pt", ".ckpt", ".safetensors")
_X4, _X4_S4, _FACES = "paper/resshift_realsr_x4", "paper/resshift_realsr_x4_s4", "paper/resshift_faces"
_ONE_STEP = {"class_path": "Sampler", "init_args": {"rule": "Euler", "steps": 1, "grid": "TrailingChain"}}


class Model(NamedTuple):
    """What is known of a released model by its name.

    Attributes:
        recipe: of its training.
        formula: of the noise levels, see :class:`~lightning_sgm.processes.ResidualShift`.
        stage: name of the first stage's file.
        channels: of the latents.
        degradation: what it restores; "pairs" where the data must have the degraded images.
    """

    recipe: str
    formula: str = "resshift"
    stage: str = "autoencoder_vq_f4"
    channels: int = 3
    degradation: str = "blind"


_FACE = {"stage": "ffhq512_vq_f8_dim8_face", "channels": 8, "degradation": "pairs"}
MODELS: dict[str, dict[str, Model]] = {
    "resshift": {
        "resshift_realsrx4_s15_v1": Model(_X4),
        "resshift_realsrx4_s15_v2": Model(_X4),
        "resshift_realsrx4_s4_v3": Model(_X4_S4),
        "resshift_bicsrx4_s4": Model(_X4_S4, degradation="bicubic"),
        "resshift_faceir_s4": Model(_FACES, **_FACE),  # type: ignore[arg-type]
    },
    "sinsr": {"SinSR_v1": Model(_X4, "sinsr"), "SinSR_v2": Model(_X4, "sinsr")},
    # With the 4 steps of faces the two formulas differ, and this is a student whose teacher had the other one.
    "tad_sr": {"TAD-SR": Model(_X4, "sinsr"), "TAD-faceir": Model(_FACES, "sinsr", **_FACE)},  # type: ignore[arg-type]
}
"""By source and by the name of the file."""


def import_resshift(path: Path, model: str | None = None) -> Imported:
    """A model that samples in 4 or 15 steps.

    Args:
        path: the network's file, with that of the first stage beside it; or the folder of both.
        model: a name in ``MODELS`` where the file has another, or a recipe of a model of your own.

    Raises:
        FileNotFoundError: no such file or recipe, or no first stage.
        ValueError: a file is damaged, is something else or of another model, or it is not known which model it is of.
    """
    return _import("resshift", path, model)


def import_sinsr(path: Path, model: str | None = None) -> Imported:
    """A student of SinSR as a ResShift model with one step; see :func:`import_resshift`."""
    return _import("sinsr", path, model)


def import_tad_sr(path: Path, model: str | None = None) -> Imported:
    """A student of TAD-SR as a ResShift model with one step; see :func:`import_resshift`."""
    return _import("tad_sr", path, model)


def _import(source: str, path: Path, model: str | None) -> Imported:
    file, state = _network(source, path, model)
    name, known = _identify(source, file, state, model)
    values = _sections(name, known, source != "resshift")
    arguments = values["model"]["init_args"]
    about = [f"read: {file}, the only weights in it are taken for averaged ones"]
    stage = _first_stage(file, known, state) if _needs_stage(arguments.get("codec"), known) else None
    if stage is not None:
        stage_file, found = stage
        codec = {"kind": "vq", "name": None, "config": found.config}
        arguments["codec"] = {"class_path": "Autoencoder", "init_args": codec}
        about.append(f"first stage: {stage_file}, {found.channels} channels at 1/{found.factor} of the side")
    section = with_spec(values["model"], arguments.get("spec") or _spec(values.get("data", {}).get("init_args", {})))
    method: Any = build(section)
    if isinstance(method.process, ResidualShift):
        table = {"sqrt_eta": method.process.table.tolist()}
        process = {"class_path": "ResidualShift", "init_args": {**_given(arguments.get("process")), **table}}
        section["init_args"]["process"] = process
    weights = {f"network.{key}": tensor for key, tensor in _fitted(method.network, state, file, name).items()}
    about.append(
        f"model: {name}, {method.sampler.steps} of {method.process.steps} steps, "
        f"{sum(tensor.numel() for tensor in weights.values()):,} parameters"
    )
    if stage is not None:
        weights |= {f"codec.model.{key}": tensor for key, tensor in stage[1].weights.items()}
    return Imported(section, values.get("data"), weights, {}, 0, about)


def _network(source: str, path: Path, model: str | None) -> tuple[Path, State]:
    """The network's file and its entries; of several in a folder that of a model of this source, or the one named.

    Raises:
        FileNotFoundError, ValueError: see :func:`import_resshift`.
    """
    if path.is_dir():
        found = {file: state for file, state in _readable(path).items() if _FIRST in state}
        named = [file for file in found if _named(MODELS[source], file.stem)]
        named = [file for file in named if model and model.lower() in file.stem.lower()] or named or list(found)
        if not named:
            raise FileNotFoundError(f"there are no {_KIND} ({', '.join(_ENDINGS)}) in {path}")
        if len(named) > 1:
            raise ValueError(f"{path} holds several networks ({', '.join(file.name for file in named)}): give one")
        return named[0], found[named[0]]
    state = read_state(path, _KIND)
    if _FIRST not in state:
        hint = "it is a first stage, give the network's file" if is_first_stage(state) else f"it has no {_FIRST}"
        raise ValueError(f"{path} is not {_KIND}: {hint}")
    return path, state


def _readable(folder: Path, but: Path | None = None) -> dict[Path, State]:
    """Entries by file of what lies in a folder and can be read."""
    found: dict[Path, State] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in _ENDINGS and file.is_file() and file != but:
            try:
                found[file] = read_state(file, _KIND)
            except ValueError:
                continue  # of another program, or damaged; what is missed in the end is named
    return found


def _named(known: dict[str, Model], text: str) -> str | None:
    """The model whose name is in a text."""
    return next((name for name in known if name.lower() in text.lower()), None)


def _identify(source: str, file: Path, state: State, model: str | None) -> tuple[str, Model | None]:
    """Name of a model and what is known of it; the name of a recipe and None.

    Raises:
        ValueError: the file's name does not say and the weights fit several, or a model that cannot be imported.
    """
    if "inpaint" in file.stem.lower() or (_STEM in state and state[_STEM].shape[1] == 4):
        raise ValueError(
            f"{file} is of an inpainting model, whose network sees a mask beside the image: only those of "
            "super-resolution and of faces can be imported"
        )
    known = MODELS[source]
    if model is not None:
        name = next((name for name in known if name.lower() == model.lower()), None)
        return (model, None) if name is None else (name, known[name])
    if name := _named(known, file.stem):
        return name, known[name]
    fitting = [name for name, one in known.items() if one.channels == _channels(state)]
    if fitting and all(known[name] == known[fitting[0]] for name in fitting):
        return fitting[0], known[fitting[0]]
    raise ValueError(
        f"neither name nor weights of {file} tell which model it is: add --model with one of {', '.join(known)}, or "
        "with a recipe of your own"
    )


def _channels(state: State) -> int:
    """Of what the network answers; 0 where it is none."""
    return len(state[_LAST]) if _LAST in state else 0


def _sections(name: str, known: Model | None, one_step: bool) -> dict[str, Any]:
    """The recipe's sections model and data, with what released weights ask for.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: a recipe of another model.
    """
    values = content(known.recipe if known else name)
    if str(values.get("model", {}).get("class_path")).rpartition(".")[2] != "ResShift":
        raise ValueError(f"{name} is no recipe of ResShift: give that of the model (for a student its teacher's)")
    if network_class(values) != "SwinUNet":
        raise ValueError(f"weights of ResShift fit a SwinUNet, but the network of {name} is {network_class(values)}")
    network = {"released_masks": True, **_given(values["model"]["init_args"]["network"])}
    changes: dict[str, Any] = {
        "network": {"class_path": "SwinUNet", "init_args": network},
        "perceptual": None,  # of training only, and it would be downloaded
        **({"sampler": _ONE_STEP} if one_step else {}),
        **({"process": {"init_args": {"lower_end": known.formula}}} if known else {}),
    }
    values["model"]["init_args"] = {**overlay(values["model"]["init_args"], changes), "network": changes["network"]}
    if known and known.degradation != "pairs":
        # Photographs that everyone has, until the user gives others.
        given = {"path": None, "short_side": None, "dataset": "packages", "degradation": known.degradation}
        values = overlay(values, {"data": {"init_args": {**given, "eval_crops": 8, "batch_size": 4, "hold_out": 5}}})
    return values


def _given(section: Any) -> dict[str, Any]:
    """Arguments in a recipe's section of a part."""
    return dict(section.get("init_args") or {}) if isinstance(section, dict) else {}


def _spec(data: dict[str, Any]) -> dict[str, Any]:
    """What the recipe's data would tell a model."""
    crop, factor = int(data.get("crop", 64)), int(data.get("factor", 4))
    low = {"low_shape": [3, crop // factor, crop // factor], "factor": factor, "fixed": False, "sigma_residual": None}
    return {**image_spec(3, crop), **low}


def _needs_stage(codec: Any, known: Model | None) -> bool:
    """Whether the codec's weights must come from a file: not in pixels, nor where a recipe of the user's names them."""
    name = codec.get("class_path") if isinstance(codec, dict) else codec
    return str(name).rpartition(".")[2] == "Autoencoder" and (known is not None or not _given(codec).get("name"))


def _first_stage(file: Path, known: Model | None, state: State) -> tuple[Path, FirstStage]:
    """The autoencoder beside a network: the one named as the authors do, or the only one whose latents fit.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or there are several.
    """
    names = [file.parent / f"{known.stage}{ending}" for ending in _ENDINGS] if known else []
    if named := next((one for one in names if one.is_file()), None):
        return named, first_stage_of(read_state(named, KIND), named)
    channels, wanted = _channels(state), f"{known.stage}.pth" if known else "the file of its VQ autoencoder"
    beside = {one: held for one, held in _readable(file.parent, but=file).items() if is_first_stage(held)}
    fitting = [one for one, held in beside.items() if held["quantize.embedding.weight"].shape[1] == channels]
    if not fitting:
        others = f" (not {', '.join(one.name for one in beside)}, which has other latents)" if beside else ""
        raise FileNotFoundError(
            f"the network in {file} works on latents of {channels} channels, and its first stage is missing: put "
            f"{wanted} beside it{others}"
        )
    if len(fitting) > 1:
        raise ValueError(f"several first stages lie beside {file}, leave one: {', '.join(one.name for one in fitting)}")
    return fitting[0], first_stage_of(beside[fitting[0]], fitting[0])


def _fitted(network: Any, state: State, file: Path, name: str) -> State:
    """The network's entries in float32; tables that ours makes itself are compared with those stored.

    Raises:
        ValueError: they are not those of this network.
    """
    weights = {key: tensor.float() for key, tensor in state.items() if not key.endswith(_TABLES)}
    if (wrong := differences(network.state_dict(), weights)).number:
        raise ValueError(f"{file} is not {name}: {wrong} among its entries")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} is not {name}: {str(error).partition(':')[2].strip()}") from error
    return weights
