"""RADD as a method: completion, further corpora and losses, pictures."""

import pytest
import torch
from torch import nn

from lightning_sgm.methods import RADD, Complete
from lightning_sgm.networks import MaskedTransformer
from lightning_sgm.samplers import UnmaskingSampler

SPEC = {"kind": "text", "length": 12, "vocabulary": 256, "tokenizer": "bytes", "bytes_per_token": 1.0}


def model(**arguments):
    def network(spec):
        made = MaskedTransformer(spec, width=16, blocks=1, heads=2)
        nn.init.normal_(made.output_layer.linear.weight, std=0.3)
        return made

    return RADD(network, SPEC, **arguments)


def test_completions_keep_what_is_given_and_do_not_depend_on_their_batch():
    radd = model(task=Complete(prompt="abc", suffix="z"))
    together = radd.generate(5)
    assert together["length"].tolist() == [12] * 5
    assert all(bytes(row[:3]) == b"abc" and row[-1] == ord("z") for row in together["x"].tolist())
    assert (together["x"] < 256).all()
    assert torch.equal(radd.generate(5, batch_size=2)["x"], together["x"])
    assert not torch.equal(together["x"][0], together["x"][1])


def test_only_free_positions_cost_evaluations():
    radd = model(task=Complete(template="ab__c"), sampler=UnmaskingSampler(rule="any_order"))
    found = radd.generate(4)
    assert radd.sampler_evaluations == 2
    assert (found["x"][:, 5:] == 256).all()
    assert (found["x"][:, :5] < 256).all()
    assert found["length"].tolist() == [5] * 4


def test_a_completion_of_one_token_has_the_conditional_law():
    radd = model(task=Complete(template="ab_c"))
    x = radd.generate(4000)["x"]
    prompt = torch.full((1, 12), 256)
    prompt[0, :4] = torch.tensor([97, 98, 256, 99])
    law = radd.eval().denoiser.log_probs(prompt)[0, 2].exp().detach().double()
    counts = torch.bincount(x[:, 2], minlength=256).double()
    likely = law > 0.002
    chi = ((counts - 4000 * law).square() / (4000 * law))[likely].sum() / likely.sum()
    assert float(chi) < 1.5


def test_an_unmasking_goes_from_all_masks_to_sample_zero():
    radd = model().eval()
    found = radd.pictures()["unmasking"]
    masked = (found["x"] == 256).sum(1)
    assert masked[0] == 12
    assert masked[-1] == 0
    assert (masked.diff() < 0).all()
    assert found["evaluations"][0] == 0
    assert torch.equal(found["x"][-1], radd.generate(1)["x"][0])


@pytest.mark.parametrize("passes", [0, -1])
def test_passes(passes):
    with pytest.raises(ValueError, match="passes must be at least 1"):
        model(passes=passes)
