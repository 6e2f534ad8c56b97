"""The README says what works: its commands and its Python are run here, shortened."""

from __future__ import annotations

import datetime
import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image  # type: ignore[import-untyped]

from datamodules import GraphDataModule
from lightning_sgm.io.graphs import GraphWriter
from lightning_sgm.testing import check_process, check_rule
from tests.conftest import ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {p.name: p.read_text(encoding="utf-8") for p in sorted((ROOT / "recipes").glob("*.md"))}


def blocks(text: str, *languages: str) -> list[str]:
    return [body for kind, body in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL) if kind in languages]


def commands(text: str) -> list[str]:
    lines = [line for block in blocks(text, "bash", "console") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m lightning_sgm")]


def the_python(marker: str) -> str:
    (found,) = [block for block in blocks(README, "python") if marker in block]
    return found


@pytest.fixture
def a_users_files(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("To be, or not to be, that is the question. " * 500, encoding="utf-8")
    lines = [json.dumps({"text": f"To be, or not to be, that is question {i}."}) for i in range(500)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("To be\nOr not\n", encoding="utf-8")
    (tmp_path / "my.py").write_text(the_python("class Sine"), encoding="utf-8")
    np.save(tmp_path / "my.npy", np.random.default_rng(0).normal(size=(600, 5)))
    graphs = GraphDataModule(graphs=20)
    batch = graphs.examples("train", 14)
    GraphWriter().save(batch, tmp_path / "my")
    GraphWriter().save_each(batch, tmp_path / "my_graphs")
    smiles = ["CCO", "CC(=O)N", "c1ccccc1O", "CCCl", "CSC", "NCC#N", "OCC1CC1", "CC(C)F", "C=CC=O", "CCOC", "CN", "CO"]
    (tmp_path / "my.csv").write_text("smiles\n" + "\n".join(smiles), encoding="utf-8")
    series = np.random.default_rng(0).normal(size=(400, 3)).cumsum(0)
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(days=i) for i in range(len(series))]
    lines = [f"{day}," + ",".join(f"{value:.5f}" for value in row) for day, row in zip(days, series, strict=True)]
    (tmp_path / "my_series.csv").write_text("date,open,close,volume\n" + "\n".join(lines), encoding="utf-8")
    gaps = [line if i % 5 else ",".join([line.split(",")[0], "", *line.split(",")[2:]]) for i, line in enumerate(lines)]
    (tmp_path / "my_gaps.csv").write_text("date,open,close,volume\n" + "\n".join(gaps), encoding="utf-8")
    (tmp_path / "my_pictures").mkdir()
    for i in range(80):
        save_image(torch.rand(3, 40, 36), tmp_path / "my_pictures" / f"{i}.png")
    for folder, names in {"small_pictures": "ab", "my_pairs/gt": "abcdef", "my_pairs/lq": "abcdef"}.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            save_image(torch.rand(3, 40, 36), tmp_path / folder / f"{name}.png")


def recipe_of(arguments: list[str]) -> str:
    """The recipe of a command: what --config names, or whose run its checkpoint is from."""
    given = Path(arguments[arguments.index("--config") + 1]).stem if "--config" in arguments else ""
    of_run = [name for name in TINY if any(f"/{name}/" in argument for argument in arguments)]
    return given if given in TINY else (of_run or ["score_sde"])[0]


def run_all(cli, text: str) -> None:
    found = commands(text)
    assert found
    for command in found:
        arguments = shlex.split(command)[3:]
        if arguments[0] not in ("fit", "validate", "test", "predict"):
            assert cli(*arguments)[0] == 0
            continue
        tiny = [option for option in TINY[recipe_of(arguments)] if option.partition("=")[0] not in arguments]
        if "--config" not in arguments and "runs/" not in command:  # the checkpoint says what its data are
            tiny = [option for option in tiny if not option.startswith("--data")]
        if "ODESampler" in arguments:  # has no steps
            tiny = [option for option in tiny if "sampler" not in option]
        code, _, err = cli(*arguments, *tiny)
        if "fashion_mnist" in command and code:  # needs the network
            assert "fashion_mnist" in err.lower()
        elif "molecules" in command and code:  # needs the extra
            assert "rdkit" in err
        elif "STLPIPS" in command and code:  # likewise
            assert "stlpips" in err
        else:
            assert code == 0, f"{command}\n{err}"


@pytest.mark.usefixtures("a_users_files")
def test_the_commands_of_the_readme(cli):
    run_all(cli, README)
    exec(the_python("SuperResolutionPipeline"), {})  # reads what these have exported
    assert Image.open("large.png").size == (144, 160)


@pytest.mark.slow
@pytest.mark.usefixtures("a_users_files")
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_the_python_of_the_recipe_pages(cli, page: str):
    run_all(cli, PAGES[page])
    for code in blocks(PAGES[page], "python"):
        exec(code, {})


@pytest.mark.parametrize("marker", ["RADD(", "ScoreSDE("])
def test_the_python_of_the_readme(marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = the_python(marker)
    assert len([line for line in code.splitlines() if line.strip()]) < 10
    monkeypatch.chdir(tmp_path)
    short = re.sub(r"max_steps=\d+", "max_steps=2", code)
    (tmp_path / "start.py").write_text(short, encoding="utf-8")
    names = runpy.run_path("start.py")
    assert "sample" in names or names["images"].shape == (64, 1, 8, 8)


def test_the_users_own_parts_of_the_readme(tmp_path: Path):
    names: dict = {}
    exec(the_python("class Sine"), names)
    check_process(names["Sine"]())
    check_rule(names["Midpoint"]())


def test_links_and_pictures_exist():
    for text, folder in [(README, ROOT), *((page, ROOT / "recipes") for page in PAGES.values())]:
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (folder / target).exists(), target
