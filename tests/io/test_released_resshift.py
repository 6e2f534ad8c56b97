"""Weights of ResShift, SinSR and TAD-SR: imported models compute what theirs do, and what does not fit is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lightning_sgm.io.checkpoint import load, read_checkpoint
from lightning_sgm.io.released.first_stage import write_folder
from lightning_sgm.io.released.model import Imported, save
from lightning_sgm.io.released.resshift import MODELS, Model, import_resshift, import_sinsr, import_tad_sr
from lightning_sgm.networks import SwinUNet
from lightning_sgm.random import Draw
from tests.io.released_restoration_files import (
    NETWORK,
    SPEC,
    LiteralStage,
    network_state,
    recipe,
    stage_state,
)

STAGE = "autoencoder_vq_f4.pth"
FULL: dict[str, Any] = {
    "channels": 160,
    "multipliers": (1, 2, 2, 4),
    "blocks": 2,
    "swin_channels": 192,
    "head_channels": 32,
    "window": 8,
}
F8 = {"width": 64, "multipliers": (1, 2, 4, 8), "layers": (1, 2, 3, 4), "channels": 8, "codes": 4096}


def images(*shape: int) -> Tensor:
    return Draw(3).uniform(shape) * 2 - 1


def write(folder: Path, name: str = "net.pth", stage: str | None = STAGE, **arguments: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(network_state(**arguments), folder / name)
    if stage is not None:
        torch.save(stage_state(), folder / stage)
    return folder / name


def saved(imported: Imported, path: Path) -> Any:
    save(imported, path)
    return load(path)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Let the name of a released model stand for a small one."""

    def change(source: str, name: str, base: str = "paper/resshift_realsr_x4", **changes: Any) -> str:
        text = yaml.safe_load(Path(recipe(tmp_path)).read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**text, "base": base}))
        monkeypatch.setitem(MODELS[source], name, MODELS[source][name]._replace(recipe=str(path), **changes))
        return name

    return change


def by_hand(model: Any, low: Tensor, numbers: Tensor) -> Tensor:
    """Their one step: x_0 by the network, which sees x_T divided by its standard deviation and the last index."""
    state = stage_state()
    stage, network = LiteralStage(state), SwinUNet(SPEC, **NETWORK, released_masks=True)
    network.load_state_dict(network_state())
    y = stage.encode(torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic"))
    sigma = 2.0 * 0.99
    noise = model.sample_draw(numbers).normal(tuple(y.shape))
    scaled = (y + sigma * noise) / (sigma**2 + 1.0) ** 0.5
    with torch.no_grad():
        return stage.decode(network(scaled, torch.tensor([14.0]), low=low)).clamp(-1, 1)


def test_a_student_restores_in_one_step(tmp_path: Path):
    imported = import_sinsr(write(tmp_path / "weights"), recipe(tmp_path))
    model, low, numbers = saved(imported, tmp_path / "ours.ckpt"), images(1, 3, 16, 16), torch.tensor([5])
    assert set(imported.weights) == set(model.state_dict())
    restored = model.restore(low, numbers)
    assert model.sampler_evaluations == 1
    assert restored.std() > 0.1
    torch.testing.assert_close(restored, by_hand(model, low, numbers), rtol=0, atol=1e-4)
    assert model.restore(images(1, 3, 21, 9), numbers).shape == (1, 3, 84, 36)
    assert "1 of 15 steps" in imported.about[-1]


def test_a_teacher_visits_all_indices(tmp_path: Path):
    model = saved(import_resshift(write(tmp_path / "weights"), recipe(tmp_path)), tmp_path / "ours.ckpt")
    found = [model.process.index(level.t).item() for level in model.sampler.levels(model.process)[:-1]]
    assert found == list(range(14, -1, -1))
    assert type(model.sampler.rule).__name__ == "Ancestral"
    model.restore(images(1, 3, 16, 16), torch.tensor([0]))
    assert model.sampler_evaluations == 15


def test_noise_levels_are_stored_as_a_table_of_each_formula(tmp_path: Path, known: Callable[..., str]):
    """With 4 steps the students' code has another formula than their teachers'."""
    for source, name, wanted in [
        (import_resshift, "resshift_realsrx4_s4_v3", [0.1, 0.520096, 0.761382, 0.99]),
        (import_tad_sr, "TAD-faceir", [0.031623, 0.37644, 0.667323, 0.99]),
    ]:
        part = source.__name__.removeprefix("import_")
        known(part, name, "paper/resshift_realsr_x4_s4", stage="autoencoder_vq_f4", channels=3, degradation="blind")
        imported = source(write(tmp_path / part, f"{name}.pth"))
        table = imported.model["init_args"]["process"]["init_args"]["sqrt_eta"]
        assert table == pytest.approx(wanted, abs=1e-6)
        model = saved(imported, tmp_path / f"{part}.ckpt")
        assert model.process.table.tolist() == table
        assert (
            read_checkpoint(tmp_path / f"{part}.ckpt")["hyper_parameters"]["process"]["init_args"]["sqrt_eta"] == table
        )
    assert all(
        model.formula == ("resshift" if source == "resshift" else "sinsr")
        for source in MODELS
        for model in MODELS[source].values()
    )


@pytest.mark.parametrize("kind", ["plain", "state_dict", "module.", "_orig_mod.", "module._orig_mod.", "safetensors"])
def test_files_are_written_in_several_ways(tmp_path: Path, kind: str):
    network, stage = network_state(), stage_state()
    if kind == "safetensors":
        save_file(network, tmp_path / "net.safetensors")
        save_file(stage, tmp_path / "first.safetensors")
    else:
        prefix = kind if kind.endswith(".") else ""
        for name, state in (("net", network), ("first", stage)):
            held: Any = {f"{prefix}{key}": tensor for key, tensor in state.items()}
            torch.save(
                {"state_dict": held, "iters_start": 3} if kind == "state_dict" else held, tmp_path / f"{name}.pth"
            )
    (tmp_path / "notes.pth").write_text("no weights")
    settings = recipe(tmp_path)
    imported = import_sinsr(tmp_path, settings)  # the folder of both
    assert imported.data is not None
    for key, tensor in network.items():
        if not key.endswith(("relative_position_index", "attn_mask")):
            assert torch.equal(imported.weights[f"network.{key}"], tensor)
    assert torch.equal(imported.weights["codec.model.quant_conv.weight"], stage["quant_conv.weight"])


def test_half_precision_becomes_float32(tmp_path: Path):
    path = write(tmp_path / "weights")
    torch.save(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network_state().items()},
        path,
    )
    weights = import_sinsr(path, recipe(tmp_path)).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_which_model_it_is(tmp_path: Path, known: Callable[..., str]):
    known("sinsr", "SinSR_v1")
    known("sinsr", "SinSR_v2")
    known("resshift", "resshift_realsrx4_s15_v2")
    path = write(tmp_path / "weights", "a.pth")
    with pytest.raises(ValueError, match=r"which model it is: add --model with one of resshift_realsrx4_s15_v1, "):
        import_resshift(path)
    assert "SinSR_v1" not in import_resshift(path, "resshift_realsrx4_s15_v2").about[-1]
    path.rename(path.with_name("My ResShift_RealSRx4_s15_v2 (1).pth"))
    found = import_resshift(path.with_name("My ResShift_RealSRx4_s15_v2 (1).pth"))
    assert "model: resshift_realsrx4_s15_v2, 15 of 15 steps" in found.about[-1]
    with pytest.raises(FileNotFoundError, match="no recipe or file 'SinSR_v3'"):
        import_sinsr(tmp_path / "weights", "SinSR_v3")
    with pytest.raises(ValueError, match="no recipe of ResShift: give that of the model"):
        import_sinsr(tmp_path / "weights", "tad_sr")
    with pytest.raises(ValueError, match="fit a SwinUNet, but the network of resshift is SRResNet"):
        import_sinsr(tmp_path / "weights", "resshift")


def test_weights_of_one_architecture_need_no_name(tmp_path: Path, known: Callable[..., str], monkeypatch: Any):
    known("tad_sr", "TAD-SR")
    assert "model: TAD-SR, 1 of 15 steps" in import_tad_sr(write(tmp_path / "weights", "a.pth")).about[-1]
    one = Model(recipe(tmp_path), "sinsr")
    monkeypatch.setitem(MODELS, "sinsr", {"SinSR_v1": one, "SinSR_v2": one})
    assert "model: SinSR_v1, 1 of 15 steps" in import_sinsr(tmp_path / "weights" / "a.pth").about[-1]


def test_the_first_stage_is_looked_for(tmp_path: Path, known: Callable[..., str]):
    settings, folder = recipe(tmp_path), tmp_path / "weights"
    path = write(folder, "SinSR_v1.pth", stage=None)
    known("sinsr", "SinSR_v1")
    with pytest.raises(FileNotFoundError, match=r"its first stage is missing: put autoencoder_vq_f4.pth beside it$"):
        import_sinsr(path)
    with pytest.raises(
        FileNotFoundError, match=r"latents of 3 channels, .* put the file of its VQ autoencoder beside it"
    ):
        import_sinsr(path, settings)
    torch.save(stage_state(channels=8), folder / "faces.pth")
    with pytest.raises(FileNotFoundError, match=r"beside it \(not faces.pth, which has other latents\)"):
        import_sinsr(path)
    torch.save(stage_state(1), folder / "a.pth")
    assert "a.pth" in import_sinsr(path).about[1]
    torch.save(stage_state(2), folder / "b.pth")
    with pytest.raises(ValueError, match=r"several first stages lie beside .*: a.pth, b.pth"):
        import_sinsr(path)
    torch.save(stage_state(3), folder / STAGE)
    found = import_sinsr(path)
    assert torch.equal(found.weights["codec.model.quant_conv.bias"], stage_state(3)["quant_conv.bias"])
    (folder / STAGE).write_bytes((folder / STAGE).read_bytes()[:-500])
    with pytest.raises(
        ValueError, match=r"autoencoder_vq_f4.pth is not a VQ autoencoder of latent diffusion or is damaged"
    ):
        import_sinsr(path)


def test_a_recipe_may_have_another_codec(tmp_path: Path):
    write_folder_of = tmp_path / "first.pth"
    torch.save(stage_state(), write_folder_of)
    write_folder(write_folder_of, tmp_path / "vq-f4")
    codec = {"class_path": "Autoencoder", "init_args": {"name": str(tmp_path / "vq-f4")}}
    path = write(tmp_path / "weights", stage=None)
    imported = import_sinsr(path, recipe(tmp_path, codec=codec))
    assert not any(name.startswith("codec.") for name in imported.weights)
    spec = {**SPEC, "shape": [48, 16, 16]}
    torch.save(network_state(spec=spec), path)
    pixels = {"class_path": "PixelUnshuffle", "init_args": {"factor": 4}}
    model = saved(import_sinsr(path, recipe(tmp_path, codec=pixels)), tmp_path / "ours.ckpt")
    assert model.restore(images(1, 3, 8, 8), torch.tensor([0])).shape == (1, 3, 32, 32)


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**network_state(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in state.items() if value is not None}


MASK = "output_blocks__2__1__blocks__1__attn_mask"
INDEX = "input_blocks__1__1__blocks__0__attn__relative_position_index"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(out__0__bias=None), "1 missing .out.0.bias"),
        (changed(out__1__bias=torch.ones(1)), "1 unexpected .out.1.bias"),
        (changed(out__0__bias=torch.ones(3)), r"another shape .out.0.bias \[3\] for \[16\]"),
        (changed(**{MASK: torch.zeros(16, 16, 16)}), "trained with other masks"),
        (changed(**{INDEX: torch.zeros(16, 16, dtype=torch.long)}), "not that of windows of this size"),
        (network_state(swin_channels=8), "of another shape"),
        (
            changed(feature_extractor__0__weight=torch.ones(16, 4, 3, 3)),
            "an inpainting model, whose network sees a mask",
        ),
        ({"conv.weight": torch.ones(1)}, "is not weights of ResShift's network: it has no input_blocks.0.0.weight"),
        (stage_state(), "it is a first stage, give the network's file"),
        ([torch.ones(1)], "it holds no tensors by name"),
        ({"a": 1}, "it holds no tensors by name"),
        ({}, "it holds no tensors by name"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, state: Any, message: str):
    path = write(tmp_path / "weights")
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        import_sinsr(path, recipe(tmp_path))


def test_folders_and_inpainting(tmp_path: Path, known: Callable[..., str]):
    folder = tmp_path / "weights"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="there are no weights of ResShift's network"):
        import_resshift(folder)
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent\.pth"):
        import_resshift(folder / "absent.pth")
    known("sinsr", "SinSR_v1")
    known("sinsr", "SinSR_v2")
    for number, name in enumerate(("SinSR_v1", "SinSR_v2", "resshift_realsrx4_s15_v1")):
        write(folder, f"{name}.pth", seed=number)
    with pytest.raises(ValueError, match=r"several networks \(SinSR_v1.pth, SinSR_v2.pth\): give one"):
        import_sinsr(folder)
    found = import_sinsr(folder, "SinSR_v2").weights["network.out.0.bias"]
    assert torch.equal(found, network_state(1)["out.0.bias"])
    write(folder, "resshift_inpainting_face_s4.pth")
    with pytest.raises(ValueError, match="of an inpainting model"):
        import_resshift(folder / "resshift_inpainting_face_s4.pth", recipe(tmp_path))


class Evil:
    """Pickles as a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_damaged_files_and_code_in_them(tmp_path: Path):
    path, settings = write(tmp_path / "weights"), recipe(tmp_path)
    content = path.read_bytes()
    for damaged in (content[:-100], content[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            import_sinsr(path, settings)
    torch.save({"state_dict": {"input_blocks.0.0.weight": Evil(tmp_path / "made")}}, path)
    with pytest.raises(ValueError, match="contains posix"):
        import_sinsr(path, settings)
    path.write_bytes(content)
    torch.save({**stage_state(), "evil": Evil(tmp_path / "made")}, path.with_name(STAGE))
    with pytest.raises(FileNotFoundError, match="first stage is missing"):
        import_sinsr(path, settings)
    assert not (tmp_path / "made").exists()


def test_import_and_predict(cli, tmp_path: Path):
    write(tmp_path / "weights", "SinSR_v1.pth")
    settings = recipe(tmp_path)
    arguments = ("import", "--source", "sinsr", "--checkpoint", "weights", "--output", "ours.ckpt")
    code, out, err = cli(*arguments, "--model", settings)
    assert code == 0, err
    assert "first stage: weights/autoencoder_vq_f4.pth, 3 channels at 1/4 of the side" in out
    assert "predict --ckpt_path ours.ckpt --data.path FOLDER" in out
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 13), "red").save(tmp_path / "pictures/a.png")
    code, out, err = cli("predict", "--ckpt_path", "ours.ckpt", "--data.path", "pictures")
    assert code == 0, err
    (picture,) = tmp_path.rglob("restored/a.png")
    assert Image.open(picture).size == (80, 52)
    code, out, err = cli("test", "--ckpt_path", "ours.ckpt", "--trainer.limit_test_batches", "1")
    assert code == 0, err
    assert "test/loss" in out
    (tmp_path / "weights" / STAGE).unlink()
    code, out, err = cli(*arguments[:-1], "other.ckpt", "--model", settings)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert "first stage is missing" in err
    assert not Path("other.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "steps"), [("resshift_realsrx4_s15_v1", "resshift", 15), ("TAD-faceir", "tad_sr", 4)]
)
def test_in_full_size(tmp_path: Path, name: str, source: str, steps: int):
    """What the released files hold, and nothing else: 564 entries at x4."""
    faces = "face" in name
    spec = {"kind": "image", "shape": [8 if faces else 3, 64, 64], "low_shape": [3, *([512 if faces else 64] * 2)]}
    torch.manual_seed(0)
    network = SwinUNet(spec)
    state = network_state(spec=spec, **FULL)
    assert len(state) == 564 + (12 if faces else 0)
    assert sum(p.numel() for p in network.parameters()) == sum(
        t.numel() for k, t in state.items() if not k.endswith(("relative_position_index", "attn_mask"))
    )
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / f"{name}.pth")
    stage = F8 if faces else {"width": 128, "multipliers": (1, 2, 4), "layers": (2, 2, 2), "codes": 8192}
    torch.save(stage_state(**stage), tmp_path / ("ffhq512_vq_f8_dim8_face.pth" if faces else STAGE))  # type: ignore[arg-type]
    imported = {"resshift": import_resshift, "tad_sr": import_tad_sr}[source](tmp_path / f"{name}.pth")
    assert len(imported.model["init_args"]["process"]["init_args"]["sqrt_eta"]) == steps
    model = saved(imported, tmp_path / "ours.ckpt")
    assert torch.equal(model.network.out[2].bias, state["out.2.bias"])
    if faces:
        assert model.restore(images(1, 3, 100, 90), torch.tensor([0])).shape == (1, 3, 100, 90)
