"""From what is typed to what is parsed: recipes, checkpoints and run folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from lightning_sgm.arguments import UsageError, prepare
from lightning_sgm.recipes import available, describe, find
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def checkpoint(path: str, age: float) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_configs_come_first_wherever_they_stand(tmp_path: Path):
    Path("mine.yaml").write_text("{}")
    got = prepare(["fit", "--model.warmup=3", "--config", "radd", "--data.length", "8", "mine.yaml"])
    assert got.configs == [str(find("radd")), "mine.yaml"]
    assert got.options == ["--model.warmup=3", "--data.length", "8"]
    assert got.argv(None)[0] == "fit"
    assert got.argv("checkpoint.yaml")[1] == "--config=checkpoint.yaml"


def test_a_yaml_file_may_be_the_value_of_an_option():
    got = prepare(["fit", "--config=radd", "--model.network", "net.yaml"])
    assert got.options == ["--model.network", "net.yaml"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--model.sampler.grid.ratio_max", "null"), "ratio_max"),
        (("--model.sampler.grid", "UniformTime", "--model.sampler.grid.t_min=null"), "t_min"),
        (("--model.sampler.init_args.before", "null", "--model.label=null"), "before"),
    ],
)
def test_a_value_inside_of_a_part_can_be_set_to_null(cli, options: tuple[str, ...], name: str):
    recipe = Path("mine.yaml")
    recipe.write_text(
        "base: score_sde\nmodel:\n  init_args:\n    sampler:\n      init_args:\n        before: [Clamp]\n"
    )
    code, out, err = cli("fit", recipe, "--model.sampler.grid.ratio_max=7", *options, "--print_config")
    assert code == 0, err
    assert f"{name}: null" in out


def test_new_runs_are_numbered():
    assert prepare(["fit", "--config", "radd"]).run_dir == Path("runs/radd/version_0")
    Path("runs/radd/version_11").mkdir(parents=True)
    assert prepare(["fit", "--config", "radd"]).run_dir == Path("runs/radd/version_12")


def test_last_is_the_newest_and_continues_in_its_folder():
    checkpoint("runs/radd/version_0/checkpoints/last.ckpt", age=10)
    checkpoint("runs/radd/version_1/checkpoints/last.ckpt", age=100)
    got = prepare(["fit", "--config", "radd", "--ckpt_path", "last"])
    assert got.checkpoint == Path("runs/radd/version_0/checkpoints/last.ckpt")
    assert got.run_dir == Path("runs/radd/version_0")
    assert prepare(["test", "--config", "radd"]).checkpoint == got.checkpoint
    checkpoint("runs/radd/version_1/checkpoints/best.ckpt", age=5)
    assert prepare(["test", "--config", "radd", "--ckpt_path=best"]).run_dir == Path("runs/radd/version_1")


def test_a_named_checkpoint_starts_a_new_run_but_is_judged_in_its_own():
    file = checkpoint("runs/radd/version_3/checkpoints/last.ckpt", age=1)
    assert prepare(["fit", "--config", "radd", f"--ckpt_path={file}"]).run_dir == Path("runs/radd/version_4")
    assert prepare(["predict", f"--ckpt_path={file}"]).run_dir == Path("runs/radd/version_3")


def test_children_of_a_run_use_its_folder(monkeypatch: pytest.MonkeyPatch):
    parent = prepare(["fit", "--config", "radd"]).run_dir
    assert parent is not None
    parent.mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert prepare(["fit", "--config", "radd"]).run_dir == parent


@pytest.mark.parametrize("typed", [["--data.path", "my photos"], ["--data.path=my photos"]])
def test_data_to_predict_are_files_to_complete(typed: list[str]):
    file = checkpoint("last.ckpt", age=1)
    assert prepare(["predict", f"--ckpt_path={file}", *typed]).options == ["--path=my photos"]
    assert prepare(["test", f"--ckpt_path={file}", *typed]).options == typed
    for missing in (["--data.path"], ["--data.path="], ["--data.path", "--num_samples=3"]):
        with pytest.raises(UsageError, match=r"--data\.path needs a value after it: a picture or a folder"):
            prepare(["predict", f"--ckpt_path={file}", *missing])


def test_usage_errors():
    with pytest.raises(UsageError, match="--config needs a value"):
        prepare(["fit", "--config"])
    with pytest.raises(FileNotFoundError, match="score_sde"):
        prepare(["fit", "--config", "scoresde"])
    with pytest.raises(FileNotFoundError, match="run `fit` first"):
        prepare(["test", "--config", "radd"])


def test_recipes_have_a_description():
    assert all(len(describe(path)) > 20 for path in available().values())


@pytest.mark.parametrize("command", ["--help", "--version", "recipes", "unknown"])
def test_the_quick_answers_need_no_torch(command: str):
    code = (
        "import sys; sys.argv=['x', sys.argv[1]]; from lightning_sgm.__main__ import main; main(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert done.stdout or done.stderr


@pytest.mark.slow
def test_the_wheel_brings_its_recipes(tmp_path: Path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-m", "lightning_sgm", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert {line.split()[0] for line in run("recipes").splitlines()} == set(available())
    assert "MaskedTransformer" in run("fit", "--config", "radd", "--print_config")
