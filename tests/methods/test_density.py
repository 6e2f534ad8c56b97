"""Bits per dimension in `test`."""

import json
import math
from typing import Any, cast

import pytest
import torch

from lightning_sgm.likelihood import Likelihood
from lightning_sgm.methods import ScoreSDE
from lightning_sgm.methods.density import DensityTest
from lightning_sgm.processes.gaussian import VE, VP
from lightning_sgm.random import Draw
from tests.conftest import TINY
from tests.samplers.exact import MEAN, SDES, STD, gaussian

SPEC = {"kind": "image", "shape": [3, 2, 2], "classes": 0, "levels": 256, "range": [-1.0, 1.0], "dequantized": True}
CLI = [*TINY["score_sde"], "--model.test_samples=2", "--model.likelihood=Likelihood", "--model.likelihood.rtol=1e-3"]


class Method:
    """What a DensityTest needs of a method."""

    def evaluation_draw(self, batch):
        return Draw(3, batch["index"])

    def conditions(self, batch):
        return {}


@pytest.fixture
def batch():
    x = MEAN + STD * torch.randn(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return {"x": x, "index": torch.arange(60)}


def collected(batch, process, size, examples=None, likelihood=Likelihood()):
    test, method = DensityTest(likelihood, SPEC, examples), cast(Any, Method())
    for start in range(0, 60, size):
        part = {name: value[start : start + size] for name, value in batch.items()}
        test.update(method, gaussian(process, 12, dtype=torch.float32), part)
    return test


@pytest.mark.parametrize("process", SDES.values(), ids=SDES.keys())
def test_numbers_are_those_of_the_data_s_law(batch, process):
    found = collected(batch, process, 20).compute(process)
    law = torch.distributions.Normal(MEAN, STD)
    bits = 7 - law.log_prob(batch["x"].double()).flatten(1).mean(1) / math.log(2)
    assert float(found["bits_per_dim"]) == pytest.approx(float(bits.mean()), abs=1e-3)
    assert float(found["bits_per_dim_standard_error"]) == pytest.approx(float(bits.std()) / math.sqrt(60), rel=0.02)
    assert 20 < float(found["likelihood_evaluations"]) < 200
    expected = Likelihood().prior_bias(process, float(batch["x"].mean()), float(batch["x"].std())) / math.log(2)
    assert float(found["prior_bias"]) == pytest.approx(expected, rel=0.01)
    assert 0 < float(found["prior_bias"]) < 1e-4


def test_neither_batches_nor_processes_matter(batch):
    whole, parts = collected(batch, VP(), 60).compute(VP()), collected(batch, VP(), 7).compute(VP())
    for name in ("bits_per_dim", "bits_per_dim_standard_error", "prior_bias"):
        assert float(parts[name]) == pytest.approx(float(whole[name]), abs=5e-5), name


def test_the_first_examples(batch):
    found = collected(batch, VP(), 7, examples=10).compute(VP())
    first = collected({name: value[:10] for name, value in batch.items()}, VP(), 10).compute(VP())
    assert float(found["bits_per_dim"]) == pytest.approx(float(first["bits_per_dim"]), abs=5e-5)
    test = collected(batch, VP(), 7, examples=10)
    assert int(test.bits.examples) == 10
    test.reset()
    assert int(test.bits.examples) == 0


def test_what_numbers_depend_on_is_said():
    said = DensityTest(Likelihood(probes=2, t_min=1e-4, data_mean=0.1, data_std=0.5), SPEC, 9).describe(VE())
    for words in ("first 9", "256 levels in [-1.0, 1.0]", "t = 0.0001", "dopri5", "rtol 3e-06", "2 rademacher probes"):
        assert words in said
    assert "prior N(0.1, 100.001^2)" in said
    assert "1 rademacher probe," in DensityTest(Likelihood(), SPEC).describe(VP())
    assert "exact trace" in DensityTest(Likelihood("exact"), SPEC).describe(VP())
    assert "continuous data" in DensityTest(Likelihood(), {"shape": [2]}).describe(VP())


def test_mistakes():
    with pytest.raises(ValueError, match="likelihood_examples"):
        DensityTest(Likelihood(), SPEC, 0)
    with pytest.raises(ValueError, match=r"data\.dequantize"):
        DensityTest(Likelihood(), {**SPEC, "dequantized": False})


def test_a_method_has_its_own_count_of_evaluations():
    likelihood = Likelihood()
    method = ScoreSDE(lambda spec: torch.nn.Linear(2, 2), SPEC, likelihood=likelihood)  # type: ignore[arg-type,return-value]
    assert method.density is not None
    assert method.density.likelihood is not likelihood
    assert not any(name.startswith("density") for name in method.state_dict())


def test_the_command_line_prints_bits_per_dim(cli, tmp_path):
    assert cli("fit", "--config", "score_sde", *TINY["score_sde"])[0] == 0
    results = []
    for more in ((), ("--data.batch_size=5", "--model.likelihood.probes=2")):
        code, out, err = cli("test", "--config", "score_sde", *CLI, "--model.likelihood_examples=9", *more)
        assert code == 0, err
        assert "bits/dim of the first 9 test examples, 17 levels in [-1.0, 1.0]" in out + err
        assert "test/bits_per_dim" in out
        results.append(json.loads((tmp_path / "runs/score_sde/version_0/test.json").read_text()))
    for numbers in results:
        assert 1 < numbers["test/bits_per_dim"] < 6  # a uniform law has log2(17) = 4.09
        assert 0 < numbers["test/bits_per_dim_standard_error"] < 0.5
        assert numbers["test/likelihood_evaluations"] > 20
        assert 0 <= numbers["test/prior_bias"] < 1e-4
    first, second = (numbers["test/bits_per_dim"] for numbers in results)
    assert first == pytest.approx(second, abs=0.5)
    code, _, err = cli("test", "--config", "score_sde", *CLI, "--data.dequantize=false")
    assert code != 0
    assert "set data.dequantize to true" in err
    assert "Traceback" not in err


def test_standardised_arrays_are_judged_in_their_own_units(batch):
    """A density of x in units of 1 / s is s times smaller, whatever the shape."""
    scales = [2.0, 0.5, 8.0]
    x = batch["x"][:, :, 0, 0]
    found = []
    for std in ([1.0], scales, [4.0]):
        spec = {"kind": "array", "shape": [3], "mean": [0.0], "std": std, "dequantized": True}
        test = DensityTest(Likelihood(), spec)
        test.update(cast(Any, Method()), gaussian(VP(), 3), {"x": x, "index": batch["index"]})
        found.append(float(test.compute(VP())["bits_per_dim"]))
    assert found[1] - found[0] == pytest.approx(math.log2(8) / 3, abs=1e-9)
    assert found[2] - found[0] == pytest.approx(2, abs=1e-9)


def test_images_of_which_nobody_says_that_they_are_dequantised_are_refused():
    with pytest.raises(ValueError, match=r"set data\.dequantize to true"):
        DensityTest(Likelihood(), {key: value for key, value in SPEC.items() if key != "dequantized"})
