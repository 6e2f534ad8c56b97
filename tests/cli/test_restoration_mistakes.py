"""Mistakes with pictures, teachers and parts of restorers: one line that names the thing, and nothing half-written."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY

FIT = ("fit", "--config", "resshift", *TINY["resshift"])
BARE = ("fit", "--config", "resshift", *(option for option in TINY["resshift"] if "network" not in option))
DISTIL = ("fit", "--config", "tad_sr", *TINY["tad_sr"])
SWIN: tuple[str, ...] = (
    "--model.network=SwinUNet",
    "--model.network.channels=32",
    "--model.network.multipliers=[1, 2]",
)
SWIN += ("--model.network.swin_channels=32", "--model.network.window=4")


def picture(path: Path, width: int = 48, height: int = 40, kind: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) + {"RGB": (3,), "RGBA": (4,)}.get(kind, ())
    deep = np.uint16 if kind == "16" else np.uint8
    Image.fromarray(np.random.default_rng(0).integers(0, np.iinfo(deep).max, shape, dtype=deep)).save(path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Folders of pictures, right and wrong ones."""
    for number in range(6):
        picture(tmp_path / f"good/{number}.png")
        picture(tmp_path / f"small/{number}.png", 24, 20)
        for name, width in (("pairs", 12), ("unpaired", 12), ("apart", 12), ("uneven", 12 + 8 * (number == 3))):
            picture(tmp_path / f"{name}/gt/{number}.png")
            picture(tmp_path / f"{name}/lq/{number}.jpg", width, 10)
    (tmp_path / "unpaired/lq/3.jpg").unlink()
    picture(tmp_path / "apart/lq/6.jpg", 12, 10)
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "broken/a.png")
    (tmp_path / "broken/b.png").write_bytes((tmp_path / "broken/a.png").read_bytes()[:900])
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def said(code: int, err: str) -> str:
    """The one line of a mistake."""
    assert code in (1, 2), err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    return line


def check_fit(result: tuple[int, str, str], words: tuple[str, ...]) -> None:
    line = said(result[0], result[2])
    assert all(word in line for word in words), line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data.path=small",), ("small/", "24 x 20 pixels", "too few for crop: 32")),
        (("--data.path=good", "--data.eval_size=44"), ("good/0.png", "48 x 40 pixels", "eval_size: 44")),
        (("--data.path=unpaired",), ("unpaired/gt/3.png has no partner", "unpaired/lq")),
        (("--data.path=apart/gt", "--data.low_path=apart/lq"), ("apart/lq/6.jpg has no partner", "apart/gt")),
        (("--data.path=uneven",), ("uneven/gt/3.png is 48 x 40", "uneven/lq/3.jpg 20 x 10", "not a factor of 4")),
        (("--data.path=good", "--data.low_path=gone"), ("no such folder: gone",)),
        (("--data.path=gone",), ("no such folder: gone",)),
        (("--data.path=empty",), ("no pictures", "empty")),
        (("--data.path=broken",), ("cannot read the picture broken/b.png",)),
        (("--data.crop=30",), ("crop must be divisible by the factor 4, got 30",)),
        (("--data.degradation=blind",), ("crop must be at least 47 for the blind degradation, got 32",)),
        (
            ("--data.path=pairs", "--data.degradation=blind", "--data.crop=48", "--data.eval_size=48"),
            ("leave out long_side, short_side and degradation",),
        ),
    ],
)
def test_pictures_that_cannot_be_trained_on(cli: Any, files: Path, arguments: tuple[str, ...], words: tuple[str, ...]):
    check_fit(cli(*FIT, *arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model.network=UNet",), ("UNet does not see the degraded image", "SRResNet and SwinUNet")),
        ((*SWIN, "--model.tile=12"), ("tile must be a multiple of 8", "got tile 12")),
        ((*SWIN, "--model.tile=4", "--model.overlap=2"), ("tile must be a multiple of 8", "got tile 4")),
        (("--model.tile=16",), ("larger than the overlap", "got tile 16 and overlap 16")),
        ((*SWIN[:-1], "--data.crop=32"), ("SwinUNet needs images whose sides are multiples of 16", "[8, 8]")),
        (("--model.codec.factor=3",), ("PixelUnshuffle needs image sides divisible by 3, got 32 x 32",)),
        (
            ("--model.codec.factor=3", "--data.crop=36"),
            ("SRResNet needs sides of its images that are a whole multiple",),
        ),
        (("--data.factor=3", "--data.crop=33", "--data.eval_size=33"), ("sides divisible by 4, got 33 x 33",)),
        (("--model.sampler.steps=16",), ("chain of 15", "at most 15 steps")),
        (("--model.process.steps=4",), ("chain of 4", "at most 4 steps")),
        (("--model.objective.weight=NoiseWeight", "--model.perceptual=lightning_sgm.metrics.STLPIPS"), ("DataWeight",)),
    ],
)
def test_parts_that_do_not_fit(cli: Any, arguments: tuple[str, ...], words: tuple[str, ...]):
    if any("STLPIPS" in argument for argument in arguments):
        pytest.importorskip("stlpips_pytorch")
    check_fit(cli(*BARE, *arguments), words)


@pytest.mark.parametrize(
    "option", ["--model.metrics=[lightning_sgm.metrics.STLPIPS]", "--model.perceptual=lightning_sgm.metrics.STLPIPS"]
)
def test_a_distance_that_is_not_installed(cli: Any, monkeypatch: pytest.MonkeyPatch, option: str):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_sgm.metrics.perceptual.find_spec",
        lambda name, *more: None if name == "stlpips_pytorch" else real(name, *more),
    )
    check_fit(cli(*FIT, option), ("STLPIPS needs the weights in stlpips-pytorch", "pip install"))


def test_kinds_of_pictures_are_converted_and_that_is_said_once(cli: Any, files: Path, teacher: Path):
    for number, kind in enumerate(("L", "RGBA", "16", "RGB", "L", "RGBA")):
        picture(files / f"kinds/{number}.png", kind=kind)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code, _, err = cli(*FIT, "--data.path=kinds")
        assert code == 0, err
    assert sum("5 pictures become RGB with 8 bits per colour" in str(each.message) for each in told) == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code, _, err = cli("predict", "--ckpt_path", teacher, "--data.path=kinds", "--trainer.run_dir=out")
        assert code == 0, err
    (line,) = [str(each.message) for each in told if "converted" in str(each.message)]
    assert "5 of 6 pictures are converted to 8-bit colour (gray: 3, transparency dropped: 2, 16 bits: 1)" in line
    assert len(list((files / "out/restored").glob("?.png"))) == 6


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("broken", ("cannot read the picture broken/b.png",)),
        ("empty", ("there are no pictures", "empty")),
        ("gone", ("there is no picture or folder of pictures gone",)),
        ("notes.txt", ("cannot read the picture notes.txt",)),
        ("", ("--data.path needs a value after it: a picture or a folder",)),
    ],
)
def test_pictures_that_cannot_be_restored(cli: Any, files: Path, teacher: Path, path: str, words: tuple[str, ...]):
    code, _, err = cli("predict", "--ckpt_path", teacher, f"--data.path={path}", "--trainer.run_dir=out")
    line = said(code, err)
    assert all(word in line for word in words), line
    assert not (files / "out").exists()


def test_commands_that_do_not_fit_the_checkpoint(cli: Any, files: Path, teacher: Path):
    given = ("--ckpt_path", teacher, "--trainer.run_dir=out")
    line = said(*cli("predict", *given, "--data.path=good", "--model.tile=8")[::2])
    assert "got tile 8 and overlap 16" in line
    line = said(*cli("predict", *given, "--data.path=good", "--num_samples=3")[::2])
    assert "leave out num_samples" in line
    line = said(*cli("test", *given, "--data.factor=2")[::2])
    assert "trained for factor 4, but the data have 2" in line
    line = said(*cli("predict", *given)[::2])
    assert "restores images, give it some: --data.path FOLDER (or FILE)" in line
    assert not list(Path("out").glob("**/*.png"))


def test_other_methods_take_no_files_and_teach_nothing(cli: Any, files: Path):
    assert cli("fit", "--config", "radd", *TINY["radd"])[0] == 0
    line = said(*cli("predict", "--config", "radd", "--data.path=good")[::2])
    assert "RADD completes no files: leave out --data.path" in line
    line = said(*cli(*DISTIL, "--model.teacher=runs/radd/version_0/checkpoints/last.ckpt")[::2])
    assert "RADD, which cannot be distilled" in line
    assert not Path("runs/tad_sr").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("needs a teacher", "--model.teacher CHECKPOINT")),
        (("--model.teacher=gone.ckpt",), ("gone.ckpt",)),
        (("--model.teacher=good/0.png",), ("good/0.png is not a checkpoint",)),
        (("--model.teacher=good",), ("good/config.json",)),
        (("--model.teacher=foreign.ckpt",), ("foreign.ckpt is not a checkpoint", "no state_dict")),
        (("TEACHER", "--data.factor=2"), ("factor 4", "2")),
        (("TEACHER", "--data.crop=30"), ("crop must be divisible by the factor 4, got 30",)),
        (("TEACHER", "--data.fixed=false"), ("set data.fixed to true",)),
        (("TEACHER", "--model.solver.grid=ChainGrid", "--model.solver.steps=20"), ("chain of 15", "at most 15 steps")),
    ],
)
def test_teachers_that_do_not_fit(cli: Any, files: Path, teacher: Path, arguments: tuple[str, ...], words: Any):
    torch.save({"weights": torch.zeros(2)}, files / "foreign.ckpt")
    told = [f"--model.teacher={teacher}" if argument == "TEACHER" else argument for argument in arguments]
    check_fit(cli(*DISTIL, *told), words)


def test_a_student_is_no_teacher_and_the_teachers_codec_must_fit_the_squares(cli: Any, files: Path, teacher: Path):
    code, _, err = cli(*DISTIL, f"--model.teacher={teacher}", "--trainer.run_dir=student")
    assert code == 0, err
    check_fit(cli(*DISTIL, "--model.teacher=student/checkpoints/last.ckpt"), ("Distillation", "cannot be distilled"))
    code, _, err = cli(*FIT, "--model.codec.factor=8", "--trainer.run_dir=coarse")
    assert code == 0, err
    coarse = ("--model.teacher=coarse/checkpoints/last.ckpt", "--data.crop=36")
    check_fit(cli(*DISTIL, *coarse), ("sides divisible by 8, got 36 x 36",))
