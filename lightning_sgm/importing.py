"""``python -m lightning_sgm import``: weights that others released, as a checkpoint. Light until it is used."""

from __future__ import annotations

import argparse
import difflib
import importlib
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sgm.commands import CommandParser, Refusal, run_command


class _Source(NamedTuple):
    """Where weights come from: the function that imports them, given file and model, and what the help says.

    With ``data`` the function is also given --data.
    """

    module: str
    function: str
    help: str
    data: bool = False


SOURCES = {
    "score_sde": _Source(
        "lightning_sgm.io.released.score_sde",
        "import_score_sde",
        "Song et al. 2021: a .pth file of their PyTorch code, or the folder of a diffusers model (google/ncsnpp-*, "
        "google/ddpm-*)",
    ),
    "radd": _Source(
        "lightning_sgm.io.released.radd",
        "import_radd",
        "Ou et al. 2024: a hub folder (JingyangOu/radd-*), the folder of a run of their code, or the file in one",
    ),
    "mdlm": _Source(
        "lightning_sgm.io.released.mdlm",
        "import_mdlm",
        "Sahoo et al. 2024: a hub folder (kuleshov-group/mdlm-owt) or a .ckpt of their code, as RADD's network",
    ),
    "gdss": _Source(
        "lightning_sgm.io.released.gdss",
        "import_gdss",
        "Jo et al. 2022: a .pth file of their code, or the same as .safetensors with its .json beside it",
    ),
    "resshift": _Source(
        "lightning_sgm.io.released.resshift",
        "import_resshift",
        "Yue et al. 2023, 2024: resshift_*.pth for super-resolution or faces, with its first stage beside it "
        "(autoencoder_vq_f4.pth, ffhq512_vq_f8_dim8_face.pth)",
    ),
    "sinsr": _Source(
        "lightning_sgm.io.released.resshift",
        "import_sinsr",
        "Wang et al. 2024: SinSR_v1.pth or SinSR_v2.pth, likewise, as a ResShift model of one step",
    ),
    "tad_sr": _Source(
        "lightning_sgm.io.released.resshift",
        "import_tad_sr",
        "He et al. 2024: TAD-SR.pth or TAD-faceir.pth, likewise, as a ResShift model of one step",
    ),
    "pad_ts": _Source(
        "lightning_sgm.io.released.pad_ts",
        "import_pad_ts",
        "Li et al. 2025: model_*.pt of a run of their code, with --data; 4 heads, and 250 diffusion steps (500 where "
        "the width is 256), unless --model says otherwise",
        data=True,
    ),
}
"""By name; a new source is one function in ``lightning_sgm.io.released`` and a line here."""


def run(arguments: list[str]) -> int:
    """Import weights; exit code 0, 1 (they cannot be used) or 2 (wrong usage)."""
    return run_command(_parser(), _run, arguments)


def _run(given: argparse.Namespace) -> None:
    path, output = Path(given.checkpoint), Path(given.output)
    if given.source not in SOURCES:
        near = difflib.get_close_matches(given.source, SOURCES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"sources are {', '.join(SOURCES)}"
        raise Refusal(f"unknown source {given.source!r}; {hint}")
    if output.exists():
        raise Refusal(f"{output} exists already: remove it or give another --output")
    if not path.exists():
        raise Refusal(f"there is no {path}: download the weights and give the file or folder")
    source = SOURCES[given.source]
    if given.data is not None and not source.data:
        takers = ", ".join(name for name, other in SOURCES.items() if other.data)
        raise Refusal(f"--data is for {takers} only: leave it out")
    _import(source, path, output, (given.model, given.data) if source.data else (given.model,))


def _import(source: _Source, path: Path, output: Path, options: tuple[str | None, ...]) -> None:
    from lightning_sgm.io.released.model import save

    imported = getattr(importlib.import_module(source.module), source.function)(path, *options)
    module: Any = save(imported, output)
    for line in imported.about:
        print(line)
    wanted = "--data.path FOLDER" if module.rivals else "--num_samples 16"
    print(f"wrote: {output}\nnext: python -m lightning_sgm predict --ckpt_path {output} {wanted}")


def _parser() -> CommandParser:
    from lightning_sgm.io.released.configurations import CONFIGURATIONS

    sources = "\n".join(f"  {name:<12}{source.help}" for name, source in SOURCES.items())
    models = "\n".join(f"  {name}" for name in CONFIGURATIONS)
    parser = CommandParser(
        prog="python -m lightning_sgm import",
        description="Turn weights that others released into a checkpoint for test, predict, fit and load.",
        epilog=f"sources:\n{sources}\n\nmodels of score_sde:\n{models}\n\nNothing in a file is run: only tensors and "
        "plain values are read.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, help="where the weights come from, see below")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the released file, or a folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="checkpoint to write; it must not exist yet")
    parser.add_argument(
        "--model",
        help="which of the models below it is, where the weights do not tell; or, for all sources, a recipe (name or "
        "YAML file) with the settings of a model of your own",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="pad_ts: the data it was trained on, as the checkpoint lacks their range: a .csv, .npy or .npz file (any "
        "with the same columns, minima and maxima does), or sines for the generated waves; a recipe given by --model "
        "may choose columns, or name the data instead",
    )
    return parser
