"""Every mistake ends in one clear message, exit code 1 or 2, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_sgm import load
from tests.conftest import TINY

TEXT = "To be, or not to be, that is the question. " * 40


def _message(code: int, err: str, expected: int | tuple[int, ...] = (1, 2)) -> str:
    assert code in ((expected,) if isinstance(expected, int) else expected), err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("--trainer.max_step=3", "max_steps"),
        ("--model.network.widht=8", "width"),
        ("--model.objektive=x", "objective"),
        ("--data.lenght=8", "length"),
        ("--smaples.count=1", "samples.count"),
    ],
)
def test_misspelt_keys_name_the_nearest(cli, argument: str, suggestion: str, tmp_path: Path):
    code, _, err = cli("fit", "--config", "radd", argument)
    message = _message(code, err, 2)
    assert argument.partition("=")[0].rpartition(".")[2].lstrip("-") in message
    assert suggestion in message.split("Did you mean")[1]
    assert not (tmp_path / "runs").exists()


def test_misspelt_key_in_a_recipe(cli, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("trainer:\n  max_step: 3\n")
    code, _, err = cli("fit", "--config", "radd", "--config", "mine.yaml")
    assert "max_steps" in _message(code, err, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trainer.max_steps=many",),
        ("--model.warmup=-1",),
        ("--data.length=0",),
        ("--data.batch_size=zero",),
        ("--model.sampler.steps=0",),
        ("--model.objective.loss=k_DSE",),
        ("--ema.decay=1.5",),
        ("--data.path=nowhere.txt",),
        ("--trainer.devices=64", "--trainer.accelerator=gpu"),
    ],
)
def test_wrong_values(cli, arguments: tuple[str, ...], tmp_path: Path):
    code, _, err = cli("fit", "--config", "radd", *TINY["radd"], *arguments)
    message = _message(code, err)
    assert len(message) < 700
    assert not list(tmp_path.rglob("*.ckpt"))


def test_unknown_command_and_recipe(cli):
    code, _, err = cli("fti")
    assert code == 2
    assert "did you mean fit" in err
    code, _, err = cli("fit", "--config", "rad")
    assert "radd" in _message(code, err, 2)


@pytest.mark.parametrize("content", ["", "short", "PNG\x00\x01\x02" * 50])
def test_bad_text_files_are_named(cli, content: str, tmp_path: Path):
    (tmp_path / "bad.txt").write_text(content)
    code, _, err = cli("fit", "--config", "radd", "--data.path", "bad.txt", "--trainer.max_steps=1")
    assert "bad.txt" in _message(code, err, 1)


def test_a_broken_image_is_named(cli, tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG no picture")
    code, _, err = cli("fit", "--config", "score_sde", "--data.path", "pictures", "--trainer.max_steps=1")
    assert "a.png" in _message(code, err, 1)


def test_checkpoints_that_do_not_fit(cli, tmp_path: Path):
    code, _, err = cli("predict", "--config", "radd")
    assert "fit" in _message(code, err, 2)
    code, _, err = cli("predict", "--config", "radd", "--ckpt_path", "gone.ckpt")
    assert "gone.ckpt" in _message(code, err, 2)
    cli("fit", "--config", "radd", *TINY["radd"])
    checkpoint = tmp_path / "runs/radd/version_0/checkpoints/last.ckpt"
    code, _, err = cli("validate", "--config", "score_sde", "--ckpt_path", checkpoint)
    _message(code, err)
    code, _, err = cli("fit", "--config", "radd", *TINY["radd"], "--ckpt_path=last", "--model.network.width=32")
    assert "shape" in _message(code, err, 1) or "size" in err
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(checkpoint.read_bytes()[:5000])
    code, _, err = cli("predict", "--ckpt_path", truncated)
    assert "truncated.ckpt" in _message(code, err, 1)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.zeros(2)}, foreign)
    code, _, err = cli("predict", "--ckpt_path", foreign)
    assert "foreign.ckpt" in _message(code, err, 1)


def test_debug_shows_the_traceback(cli):
    code, _, err = cli("fit", "--config", "radd", "--data.path=nowhere.txt", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_a_folder_that_cannot_be_written(cli, tmp_path: Path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    code, _, err = cli("fit", "--config", "radd", *TINY["radd"])
    assert "runs" in _message(code, err, 1)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(cli, tmp_path: Path):
    code, _, err = cli(
        "fit", "--config", "score_sde", *TINY["score_sde"], "--model.optimizer.init_args.lr=1e30", "--model.warmup=0"
    )
    assert "not a number" in _message(code, err, 1)


def test_a_checkpoint_may_not_import_what_it_likes(cli, tmp_path: Path):
    cli("fit", "--config", "score_sde", *TINY["score_sde"])
    path = tmp_path / "runs/score_sde/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (tmp_path / "evil.py").write_text("open('executed', 'w').close()\nclass Process: pass\n")
    attacks = [
        {"class_path": "evil.Process"},
        "evil.Process",
        "{class_path: evil.Process}",
        '{"class_path": "evil.Process"}',
        {"class_path": "lightning_sgm.samplers.DiffusersRule", "init_args": {"scheduler": "evil.Process"}},
    ]
    for attack in attacks:
        checkpoint["hyper_parameters"]["process"] = attack
        torch.save(checkpoint, path)
        for more in ((), ("--config", "score_sde")):
            code, _, err = cli("predict", "--ckpt_path", path, "--num_samples=1", *more)
            assert "--allow evil" in _message(code, err, 2)
        with pytest.raises(ValueError, match="evil"):
            load(path)
        assert not (tmp_path / "executed").exists()
    checkpoint["hyper_parameters"]["optimizer"] = {"class_path": "torch.utils.cpp_extension.load"}
    checkpoint["hyper_parameters"]["process"] = {"class_path": "lightning_sgm.processes.VP"}
    torch.save(checkpoint, path)
    code, _, err = cli("predict", "--ckpt_path", path, "--config", "score_sde", "--num_samples=1")
    assert "torch.utils.cpp_extension.load" in _message(code, err, 2)
