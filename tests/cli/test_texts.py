"""Texts as a user types them: prompts, suffixes, templates, files of them, and their mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TINY

PREDICT = ("predict", "--config", "radd", "--num_samples=3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a few updates on blocks of 32 bytes."""
    from lightning_sgm.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr("sys.argv", ["lightning_sgm"])
    patch.setenv("PL_GLOBAL_SEED", "0")
    assert main(["fit", "--config", "radd", *TINY["radd"], "--trainer.run_dir=runs/radd/version_0"]) == 0
    patch.undo()
    return folder / "runs"


@pytest.fixture
def user(cli, trained: Path, tmp_path: Path):
    (tmp_path / "runs").symlink_to(trained)
    return cli


def sample(number: int) -> bytes:
    return Path(f"runs/radd/version_0/predictions/{number:06d}.txt").read_bytes()


@pytest.mark.parametrize(
    ("options", "beginning", "end", "length"),
    [
        (["--prompt", "To be, "], b"To be, ", b"", 32),
        (["--prompt=To be", "--suffix= end."], b"To be", b" end.", 32),
        (["--suffix", ".yaml"], b"", b".yaml", 32),
        (["--template", "To be ___ or"], b"To be ", b" or", 12),
        (["--prompt=a", "--model.task.length=5"], b"a", b"", 5),
        (["--prompt", "{b: 1} # yes"], b"{b: 1} # yes", b"", 32),
        (["--prompt", "123"], b"123", b"", 32),
        (["--prompt", "# Title", "--suffix=null"], b"# Title", b"null", 32),
        (["--prompt", "~"], b"~", b"", 32),
        (["--template", "# _", "--model.task.blank=_"], b"# ", b"", 3),
    ],
)
def test_given_text_stays(user, options, beginning, end, length):
    code, out, err = user(*PREDICT, *options)
    assert code == 0, err
    assert "3 samples are in runs/radd/version_0/predictions" in out
    for number in range(3):
        text = sample(number)
        assert text.startswith(beginning)
        assert text.endswith(end)
        assert len(text) == length
    assert sample(0) != sample(1)


def test_a_sample_for_each_text_of_a_file(user, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("".join(f"{i:02d}\n" for i in range(20)))
    code, out, err = user(*PREDICT[:3], "--prompts", "prompts.txt")
    assert code == 0, err
    assert "20 samples are in" in out
    assert [sample(i)[:2] for i in range(20)] == [f"{i:02d}".encode() for i in range(20)]
    code, out, _ = user(*PREDICT)
    assert "beside them are 17 of earlier predictions" in out


def test_help_tells_of_prompts(user):
    code, out, _ = user("predict", "--help")
    assert code == 0
    assert all(option in out for option in ("--prompt ", "--suffix", "--template", "--prompts"))


def test_a_file_of_prompts(user, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("first\nsecond\n")
    code, _, err = user(*PREDICT, "--prompts", "prompts.txt", "--model.sampler.top_p=0.9")
    assert code == 0, err
    assert [sample(i)[:6] for i in range(3)][1] == b"second"
    assert sample(0).startswith(b"first")
    assert sample(2).startswith(b"first")


@pytest.mark.parametrize("command", ["fit", "test"])
def test_other_tokens_than_the_model_s_are_refused(user, tmp_path: Path, command: str):
    (tmp_path / "my.txt").write_text("abc\n" * 1000)
    checkpoint = "runs/radd/version_0/checkpoints/last.ckpt"
    options = ["--data.path=my.txt", "--data.tokenizer=characters"]
    code, _, err = user(command, "--config", "radd", *TINY["radd"], "--ckpt_path", checkpoint, *options)
    assert code == 1
    assert r"trained on tokens of bytes, the data have the characters '\nabc': leave data.tokenizer" in err


def test_further_corpora_and_losses(user, tmp_path: Path):
    (tmp_path / "one.txt").write_text("To be, or not to be\n" * 40)
    (tmp_path / "two.txt").write_text("Nothing will come of nothing\n" * 40)
    code, _, err = user(
        *("test", "--config", "radd", *TINY["radd"], "--data.corpora=[one.txt, second=two.txt]"),
        *("--model.test_losses=[lambda_DCE, t_DSE, t_DCE, k_DCE]", "--model.passes=2"),
    )
    assert code == 0, err
    numbers = json.loads(Path("runs/radd/version_0/test.json").read_text())
    for corpus in ("", "one/", "second/"):
        for loss in ("", "lambda_DCE/", "t_DSE/", "t_DCE/"):
            bits = numbers[f"test/{corpus}{loss}bits_per_byte"]
            assert bits == pytest.approx(8, abs=2)
            assert 0 <= numbers[f"test/{corpus}{loss}bits_per_byte_standard_error"] < 2
    assert not any("k_DCE" in name or "dataloader" in name for name in numbers)


def test_completions_are_not_judged_as_samples(user):
    options = ["--model.task=Complete", "--model.task.template=To be ___ or"]
    code, _, err = user("test", "--config", "radd", *TINY["radd"], *options)
    assert code == 1
    assert "test judges texts from scratch: leave out model.task" in err


def test_a_checkpoint_forgets_what_it_completed(user):
    assert user(*PREDICT, "--prompt", "xyz")[0] == 0
    assert user(*PREDICT)[0] == 0
    assert not sample(0).startswith(b"xyz")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", "x" * 33], 1, "the prompt has 33 tokens, and the model's block 32: shorten the prompt"),
        (["--template", "to be"], 1, "leaves none to find: put a _ for each token to find"),
        (["--template", "a_", "--prompt", "b"], 1, "a template is a whole text"),
        (["--prompts", "nowhere.txt"], 1, "no such file of texts to complete: nowhere.txt"),
        (["--prompt"], 2, "--prompt needs a value after it"),
        (["--prompt", "--suffix", "x"], 2, "--prompt needs a value after it"),
        (["--model.sampler.top_p=0"], 1, "top_p must lie in (0, 1], got 0"),
        (["--model.sampler.steps=0"], 1, "steps of the unmasking sampler must be at least 1, got 0"),
        (["--model.sampler.rule=any_order", "--model.sampler.order=[1,0]"], 1, "has 2 positions, sequences 32"),
    ],
)
def test_mistakes_are_named(user, options, code, message):
    found, _, err = user(*PREDICT, *options)
    assert message in err
    assert "Traceback" not in err
    assert found == code
