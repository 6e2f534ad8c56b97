"""The command line proper: LightningCLI with recipes by name, run folders, precedence checkpoint < recipe < options."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

import datamodules  # noqa: F401  (short class names on the command line)
from lightning_sgm import methods, networks, objectives, samplers  # noqa: F401
from lightning_sgm.arguments import Invocation, UsageError, prepare
from lightning_sgm.callbacks import EMA, Checkpoints, Compile, SampleLogger
from lightning_sgm.io.files import write_json
from lightning_sgm.messages import Parser, one_line, quiet
from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.trainer import Trainer


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml of a fit into the run folder; evaluation commands leave the fit's file alone."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save for fit only."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """fit, validate, test and predict on any method and DataModule."""

    def __init__(self, invocation: Invocation, arguments: list[str]) -> None:
        self.invocation = invocation
        super().__init__(
            GenerativeModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=Parser,
            trainer_class=Trainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            args=arguments,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As Lightning's, but sampling works without data: their spec is in the checkpoint."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sections of the callbacks that users change, and the one link from data to model."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(SampleLogger, "samples")
        parser.add_lightning_class_args(Compile, "compile")
        parser.link_arguments("data.spec", "model.init_args.spec", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Nothing: ``prepare`` has put the checkpoint's values before the recipe, so the command line wins."""

    def after_test(self) -> None:
        """All numbers of the test as JSON beside the checkpoint."""
        self._save_numbers("test")

    def after_validate(self) -> None:
        """As after_test."""
        self._save_numbers("validate")

    @rank_zero_only
    def _save_numbers(self, command: str) -> None:
        numbers = {key: float(value) for key, value in sorted(self.trainer.callback_metrics.items())}
        if self.trainer.log_dir:
            path = Path(self.trainer.log_dir) / f"{command}.json"
            write_json(path, {"checkpoint": str(self.trainer.ckpt_path), **numbers})
            print(f"numbers: {path}")

    @rank_zero_only
    def after_fit(self) -> None:
        """Say where the run is and how to look at it."""
        if self.trainer.log_dir and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = os.path.normpath(self.trainer.log_dir)
            recipe = f"--config {self.invocation.recipe} " if self.invocation.recipe else ""
            print(
                f"run: {folder} (config.yaml, checkpoints/, samples/, metrics.csv)\n"
                f"look: tensorboard --logdir {folder}\n"
                f"next: python -m lightning_sgm predict {recipe}--ckpt_path {folder}/checkpoints/last.ckpt"
            )


def run(arguments: list[str]) -> int:
    """Run a trainer command; exit code 0, 1 (failed while running), 2 (wrong usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    debug = "--debug" in arguments
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own my.py, also for the installed script
    try:
        invocation = prepare([a for a in arguments if a != "--debug"])
        quiet()
        return _run(invocation)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; `--ckpt_path last` continues where a checkpoint was saved", file=sys.stderr)
        return 130
    except SIGTERMException:
        print("stopped by SIGTERM; `--ckpt_path last` continues", file=sys.stderr)
        return 143
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError | FileNotFoundError) else 1


def _run(invocation: Invocation) -> int:
    with invocation.checkpoint_config() as checkpoint:
        CLI(invocation, invocation.argv(checkpoint))
    return 0
