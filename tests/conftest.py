"""Shared fixtures: the command line in process, tiny recipes, real data where present."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import settings

from lightning_sgm.__main__ import main

# A shared machine may be slow at any moment; hypothesis must not take that for a failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Overrides that make a recipe run in a second; its own structure stays.
_SHORT = (
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=3",
    "--trainer.log_every_n_steps=1",
    "--model.warmup=2",
)
_IMAGES = (
    *_SHORT,
    "--model.test_samples=70",
    "--model.sampler.init_args.steps=3",
    "--data.batch_size=32",
    "--samples.count=4",
)
_TEXT = (
    *_SHORT,
    "--model.network.init_args.width=16",
    "--model.network.init_args.blocks=1",
    "--model.network.init_args.heads=2",
    "--model.test_samples=2",
    "--model.sampler.init_args.steps=4",
    "--data.length=32",
    "--data.batch_size=4",
    "--samples.count=2",
)
_GRAPHS = (
    *_SHORT,
    "--model.network.init_args.width=8",
    "--model.network.init_args.attention_width=8",
    "--model.network.init_args.layers=2",
    "--model.network.init_args.channels=[2, 3, 2]",
    "--model.test_samples=9",
    "--model.sampler.init_args.steps=3",
    "--data.batch_size=16",
    "--samples.count=3",
)
_RESTORATION = (
    *_SHORT,
    "--data.crop=32",
    "--data.crops_per_image=4",
    "--data.eval_crops=3",
    "--data.eval_size=32",
    "--data.batch_size=2",
    "--samples.count=2",
)
_SERIES = (
    *_SHORT,
    "--model.network.init_args.width=8",
    "--model.network.init_args.blocks=1",
    "--model.test_samples=30",
    "--model.compared=8",
    "--model.sampler.init_args.steps=3",
    "--data.windows=200",
    "--data.batch_size=16",
    "--samples.count=3",
)
_OWN = {
    "pad_ts": _SERIES,
    "resshift": (*_RESTORATION, "--model.network.init_args.channels=8", "--model.network.init_args.blocks=3"),
    "sinsr": _RESTORATION,
    "tad_sr": _RESTORATION,
    "tad_sr_perceptual": _RESTORATION,
    "gdss": _GRAPHS,
    "gdss_molecules": (*_GRAPHS, "--model.val_samples=5"),
    "radd": _TEXT,
    "radd_markov": _TEXT,
    "score_sde": _IMAGES,
    "score_sde_points": _IMAGES,
    "classifier": (*_SHORT, "--data.batch_size=32"),
}
_MORE = {
    "gdss_qm9": ("--data.dataset=grown",),  # QM9 is in a package of its own
    # Without the file, and without the package.
    "pad_ts_fmri": ("--data.path=null", "--data.dims=6"),
    "pad_ts_mujoco": ("--data.dataset=sines",),
    # The network's three levels, without a download.
    "score_sde_fashion_mnist": ("--data.dataset=digits", "--model.network.init_args.attention=[2]"),
}


def _tiny(path: Path) -> tuple[str, ...]:
    """Overrides of a recipe: its own, or those of the recipe that it builds on, and a few more."""
    own = _OWN.get(path.stem)
    if own is None:
        own = _tiny(path.with_name(f"{yaml.safe_load(path.read_text(encoding='utf-8'))['base']}.yaml"))
    return (*own, *_MORE.get(path.stem, ()))


TINY = {path.stem: _tiny(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))}
EVALUATION_ONLY = ("--trainer.max_steps", "--trainer.val_check_interval")


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch: pytest.MonkeyPatch):
    """The same random numbers in every test, and no seed or run folder left from another one."""
    torch.manual_seed(0)
    monkeypatch.delenv("SGM_RUN_DIR", raising=False)
    before = os.environ.get("PL_GLOBAL_SEED")
    yield
    if before is None:
        os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.pop("SGM_RUN_DIR", None)
    torch.set_grad_enabled(True)
    torch.set_flush_denormal(False)  # a fit that failed has left it; hypothesis refuses to go on so


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command in ``tmp_path``; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning_sgm"])
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("lightning")]:
        if logging.getLogger(name).handlers:
            # Lightning's handler holds the stream of an earlier test, which pytest has closed; this one looks it up.
            logging.getLogger(name).handlers = [logging._StderrHandler(logging.INFO)]  # type: ignore[attr-defined]

    def run(*arguments: str) -> tuple[int, str, str]:
        os.environ.pop("SGM_RUN_DIR", None)
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


Cli = Callable[..., tuple[int, str, str]]
