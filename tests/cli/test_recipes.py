"""Recipes that build on others, and what the paper's samplers leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_sgm.denoiser import GaussianMixtureDenoiser
from lightning_sgm.methods.base import GenerativeModule
from lightning_sgm.processes import GaussianProcess
from lightning_sgm.random import Draw
from lightning_sgm.recipes import RecipeError, available, chain, content, read
from lightning_sgm.samplers import Sampler
from tests.conftest import TINY

PAPER = sorted(name for name in available() if name.startswith("paper/score_sde"))
DERIVED = sorted(name for name, path in available().items() if read(path).get("base"))


def test_a_base_is_found_beside_the_recipe_or_by_name(cli, tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "common.yaml").write_text("base: score_sde\nmodel:\n  init_args:\n    warmup: 7\n")
    (folder / "special.yaml").write_text("base: common.yaml\ntrainer:\n  log_every_n_steps: 2\n")
    assert [path.name for path in chain("mine/special.yaml")] == ["score_sde.yaml", "common.yaml", "special.yaml"]
    tiny = [option for option in TINY["score_sde"] if "warmup" not in option and "log_every" not in option]
    code, _, err = cli("fit", "--config", "mine/special.yaml", *tiny)
    assert code == 0, err
    saved = yaml.safe_load((tmp_path / "runs/special/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["warmup"] == 7
    assert saved["trainer"]["log_every_n_steps"] == 2
    assert "base" not in saved  # it is complete, and may be moved


def test_a_recipe_that_is_its_own_base_is_refused(cli, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    code, _, err = cli("fit", "--config", "a.yaml")
    assert code == 2
    assert "a.yaml is its own base: a.yaml -> b.yaml -> a.yaml" in err
    with pytest.raises(RecipeError, match="is its own base"):
        content("a.yaml")


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_recipe_is_the_same_to_import_and_to_the_command_line(name: str):
    def parsed(values: list[str]) -> str:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(GenerativeModule, "model", fail_untyped=False, skip={"spec"})
        return parser.dump(parser.parse_args([f"--config={value}" for value in values]))

    def model(part: dict) -> str:
        return yaml.safe_dump({"model": part["model"]}) if "model" in part else "{}"

    assert parsed([model(read(path)) for path in chain(name)]) == parsed([model(content(name))])


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_samplers_leave_no_noise(name: str):
    """Data in one point, an exact model: what is left of the noise is the sampler's fault (score_sde.md, trap 3)."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GaussianProcess, "process")
    parser.add_subclass_arguments(Sampler, "sampler")
    arguments = content(name)["model"]["init_args"]
    parts = parser.instantiate_classes(parser.parse_object({key: arguments[key] for key in ("process", "sampler")}))
    point = torch.full((1, 12), 0.5)
    denoiser = GaussianMixtureDenoiser(parts.process, point, torch.zeros(1, 12, 12))
    assert parts.sampler.steps in (18, 1000)
    found = parts.sampler(denoiser, (20, 12), Draw(0))
    assert (found - point).square().mean().sqrt() < 1e-5
