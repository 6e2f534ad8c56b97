"""``python -m lightning_sgm export``: a checkpoint's model as a folder for others. Light until it is used."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_sgm.commands import CommandParser, Refusal, run_command


def run(arguments: list[str]) -> int:
    """Export a model; exit code 0, 1 (it cannot be exported) or 2 (wrong usage)."""
    return run_command(_parser(), _run, arguments)


def _run(given: argparse.Namespace) -> None:
    checkpoint, output = Path(given.checkpoint), Path(given.output)
    if output.exists():
        raise Refusal(f"{output} exists already: remove it or give another --output")
    if not checkpoint.exists():
        raise Refusal(f"there is no {checkpoint}: give the .ckpt file of a run")
    _export(checkpoint, output, given.allow)


def _export(checkpoint: Path, output: Path, allow: list[str]) -> None:
    from lightning_sgm.io.checkpoint import foreign_name, hyper_parameters
    from lightning_sgm.io.export import export

    stored = hyper_parameters(checkpoint)
    if name := foreign_name([stored.model_class, stored.model], allow):
        raise ValueError(
            f"{checkpoint} asks for {name}; if you trust it, add --allow {name.partition('.')[0]} to the command"
        )
    module = export(checkpoint, output, tuple(allow))
    name, number = type(module).__name__, sum(parameter.numel() for parameter in module.parameters())
    print(f"model: {name}, {number:,} parameters, averaged weights\nwrote: {output}")
    print(f'next: python -c "import lightning_sgm; model = lightning_sgm.load({str(output)!r})"')


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m lightning_sgm export",
        description="Write the averaged weights of a checkpoint as model.safetensors and its settings as config.json. "
        "lightning_sgm.load(folder) reads them back, whatever the method. Where a network's authors published files of "
        "this form, the entries have their names and their code reads the folder, too (RADD's transformer). Of a "
        "distillation the student alone is written, as a model of its own.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint of this package")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write; it must not exist yet")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the checkpoint use classes of this package of yours; importing them runs its code",
    )
    return parser
