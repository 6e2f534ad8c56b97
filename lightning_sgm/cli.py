"""The command line proper: LightningCLI with recipes by name, run folders, precedence checkpoint < recipe < options."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

import datamodules  # noqa: F401  (short class names on the command line)
from lightning_sgm import codecs, guidance, methods, networks, objectives, optimizers, samplers  # noqa: F401
from lightning_sgm.arguments import GIVEN_HELP, Invocation, UsageError, prepare
from lightning_sgm.callbacks import EMA, Checkpoints, Compile, SampleLogger
from lightning_sgm.io.checkpoint import allowing, foreign_name
from lightning_sgm.io.files import write_json
from lightning_sgm.io.tables import table
from lightning_sgm.messages import Parser, one_line, quiet
from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.recipes import RecipeError
from lightning_sgm.trainer import Trainer


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml of a fit into the run folder; evaluation commands leave the fit's file alone."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save for fit only, without folder and checkpoint: the file is a recipe for further runs."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)
            path = Path(trainer.log_dir or ".") / self.config_filename
            if trainer.is_global_zero and path.exists():
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
                values["trainer"].pop("run_dir", None)
                values.pop("ckpt_path", None)
                values.pop("base", None)  # all of it is here
                path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


class CLI(LightningCLI):
    """fit, validate, test and predict on any method and DataModule."""

    def __init__(self, arguments: list[str]) -> None:
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """As Lightning's; ``predict`` shows what ``arguments.prepare`` has taken out before."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            for name, text in GIVEN_HELP.items():
                parser.add_argument(name, type=str, default="", help=text)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As Lightning's, but sampling works without data: their spec is in the checkpoint."""
        parser.add_argument("--base", type=str | None, default=None, help="recipe that a recipe builds on")
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

    def before_instantiate_classes(self) -> None:
        """Sampling needs no data: the checkpoint has their spec. Tables of numbers are ours."""
        if self.subcommand == "predict":
            self.config["predict"]["data"] = None
        elif self.config[self.subcommand].get("data") is None:
            raise UsageError(
                f"{self.subcommand} needs data, which neither the checkpoint nor a recipe names: give them, as in "
                "--data GraphDataModule --data.path FILE"
            )
        if self.subcommand in ("test", "validate"):
            self._verbose = self.config[self.subcommand]["verbose"]
            self.config[self.subcommand]["verbose"] = False

    def _save_numbers(self, command: str) -> None:
        folder = self.trainer.log_dir  # asks all processes
        if folder and self.trainer.is_global_zero:
            numbers = {key: float(value) for key, value in sorted(self.trainer.callback_metrics.items())}
            if self._verbose:
                print(table(numbers))
            path = Path(folder) / f"{command}.json"
            write_json(path, {"checkpoint": str(self.trainer.ckpt_path), **numbers})
            print(f"numbers: {path}")

    def _trust(self) -> str:
        """The ``--allow`` that a checkpoint with the user's own classes will need."""
        stored = {key: value for key, value in self.model.hparams.items() if key != "_instantiator"}
        name = foreign_name([f"{type(self.model).__module__}.{type(self.model).__name__}", stored])
        return f" --allow {name.partition('.')[0]}" if name else ""

    def after_fit(self) -> None:
        """Say where the run is and how to look at it."""
        folder = self.trainer.log_dir  # asks all processes
        if folder and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = os.path.normpath(folder)
            following = "predict" if self.model.can_sample else "test"
            files = " --data.path FOLDER" if self.model.rivals else ""  # what is to be completed
            print(
                f"run: {folder} (config.yaml, checkpoints/, samples/, metrics.csv)\n"
                f"look: tensorboard --logdir {folder}\n"
                f"next: python -m lightning_sgm {following} --ckpt_path {folder}/checkpoints/last.ckpt"
                f"{files}{self._trust()}"
            )


def run(arguments: list[str]) -> int:
    """Run a trainer command; exit code 0, 1 (failed while running), 2 (wrong usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    debug = "--debug" in arguments
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own my.py, also for the installed script
    invocation, before = None, True
    try:
        invocation = prepare([a for a in arguments if a != "--debug"])
        before = invocation.run_dir is not None and invocation.run_dir.exists()
        quiet()
        return _run(invocation)
    except SIGTERMException:
        print("stopped by SIGTERM; `--ckpt_path last` continues", file=sys.stderr)
        return 143
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError | RecipeError | FileNotFoundError) else 1
    finally:
        if invocation is not None:
            _remove_if_unused(invocation.run_dir, before)


def _interrupted() -> int:
    print("stopped by Ctrl-C; `--ckpt_path last` continues where a checkpoint was saved", file=sys.stderr)
    return 130


def _remove_if_unused(folder: Path | None, existed: bool) -> None:
    """A start that failed leaves no run behind."""
    if folder is None or existed or not folder.is_dir() or "LOCAL_RANK" in os.environ:
        return
    names = {path.name for path in folder.iterdir()}
    if all(name in ("config.yaml", "hparams.yaml") or name.startswith("events.out") for name in names):
        shutil.rmtree(folder)
        for parent in list(folder.parents)[:2]:
            if parent != Path(".") and not any(parent.iterdir()):
                parent.rmdir()


def _run(invocation: Invocation) -> int:
    with invocation.checkpoint_config() as checkpoint, allowing(invocation.allow):
        CLI(invocation.argv(checkpoint))
    return 0
