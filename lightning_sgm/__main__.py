"""``python -m lightning_sgm``: answers what needs no torch at once and hands the rest to the command line proper."""

from __future__ import annotations

import difflib
import sys

from lightning_sgm import __version__

COMMANDS = {
    "fit": "train a model: fit --config radd",
    "validate": "losses of a checkpoint on the validation split",
    "test": "all metrics of a checkpoint on the test split: table, JSON, TensorBoard",
    "predict": "write samples of a checkpoint to files",
    "import": "turn released weights into a checkpoint: import --help",
    "export": "write a checkpoint's model as a folder for others: export --help",
    "recipes": "list the recipes, one line each",
}

HELP = f"""lightning_sgm {__version__}: train, sample and judge score-based generative models

usage: python -m lightning_sgm COMMAND [--config RECIPE] [--ckpt_path FILE | last] [--section.key VALUE ...]

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

texts: predict --prompt TEXT, --suffix TEXT, --template "To be ___ or" (each _ is a token to find), --prompts FILE

options:
  --config RECIPE     a recipe's name or a YAML file; several are merged from left to right
  --ckpt_path last    the newest checkpoint of the recipe's runs; or a file
  --print_config      show every value that would be used, and stop
  --allow PACKAGE     let a checkpoint use classes of this package of yours
  --debug             full traceback instead of one line when something goes wrong
  --version           print the version

`python -m lightning_sgm fit --help` lists all options of a command; README.md shows examples.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 success, 1 failure while running, 2 wrong usage)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"lightning_sgm {__version__}")
        return 0
    if arguments[0] == "recipes":
        from lightning_sgm.recipes import listing

        print(listing())
        return 0
    if arguments[0] == "import":
        from lightning_sgm.importing import run as run_import

        return run_import(arguments[1:])
    if arguments[0] == "export":
        from lightning_sgm.exporting import run as run_export

        return run_export(arguments[1:])
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}."
        print(f"error: unknown command {arguments[0]!r}; {hint}", file=sys.stderr)
        return 2
    from lightning_sgm.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
