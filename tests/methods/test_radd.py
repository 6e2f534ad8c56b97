"""RADD as a method: completion, further corpora and losses, pictures."""

import pytest
import torch
from torch import nn

from datamodules import MarkovDataModule
from lightning_sgm import Trainer
from lightning_sgm.methods import RADD, Complete
from lightning_sgm.methods.token_pictures import unmasking
from lightning_sgm.networks import ExactMarkov, MaskedTransformer
from lightning_sgm.random import Draw
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
    found = unmasking(radd)
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


def test_training_on_pieces_is_training_on_shorter_sequences():
    radd = model(pieces={0: 4, 10: 2})
    batch = {"x": torch.randint(0, 256, (5, 12)), "index": torch.arange(5)}
    torch.nn.init.zeros_(radd.network.output_layer.linear.weight)
    radd.network.output_layer.linear.bias.data.copy_(torch.linspace(-3, 3, 257))
    bits = radd.network.output_layer.linear.bias[:256].log_softmax(0)
    radd.objective.loss = "k_DCE"
    seen = []
    radd.network.register_forward_hook(lambda module, given, output: seen.append(given[0].shape))
    terms = radd.train().losses(batch, Draw(0, batch["index"]))
    assert tuple(seen[0]) == (20, 3)
    assert terms["loss"].shape == terms["nll"].shape == (5,)
    # Unbiased: the network does not look at anything, so a token costs what its byte costs.
    total = torch.stack([radd.losses(batch, Draw(seed, batch["index"]))["nll"] for seed in range(400)]).mean(0)
    assert torch.allclose(total, -bits[batch["x"]].mean(1), atol=0.15)
    assert torch.allclose(terms["loss"], 12 * terms["nll"])
    radd.eval().losses(batch, Draw(0, batch["index"]))
    assert tuple(seen[-1]) == (5, 12)


def test_pieces_do_not_depend_on_their_batch_in_exact_mode():
    radd = model(pieces={0: 3}).train()
    batch = {"x": torch.randint(0, 256, (6, 12)), "index": torch.tensor([3, 9, 2, 7, 1, 0])}
    torch.manual_seed(0)
    radd.network.blocks[0].dropout = 0.0
    whole = radd.losses(batch, Draw(1, batch["index"]))["loss"]
    half = {name: value[2:5] for name, value in batch.items()}
    assert torch.allclose(radd.losses(half, Draw(1, half["index"]))["loss"], whole[2:5], rtol=1e-5)


@pytest.mark.parametrize("count", [0, 5, 13])
def test_pieces_that_do_not_fit_are_named(count):
    with pytest.raises(ValueError, match=f"sequences of 12 tokens cannot be cut into {count}"):
        model(pieces={0: count})


def test_an_exact_network_has_nothing_to_train(tmp_path):
    data = MarkovDataModule(length=12, sequences=64, val_sequences=8, test_sequences=8)
    radd = RADD(ExactMarkov, data.spec, warmup=0, passes=1)
    run = Trainer(run_dir=str(tmp_path), max_steps=1, logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="ExactMarkov has nothing to train: use test or predict"):
        run.fit(radd, data)
    (numbers,) = run.test(radd, data, verbose=False)
    assert numbers["test/entropy"] == pytest.approx(data.spec["entropy"])
    assert numbers["test/nll"] == pytest.approx(numbers["test/entropy"], abs=0.5)


def test_a_corpus_smaller_than_the_number_of_processes_is_ready_on_all(tmp_path):
    """What a process that gets no batch has to have for the sums over processes."""
    radd = model(test_losses=["lambda_DCE"])
    radd.bound.begin({"": 1.0, "small": None}, torch.device("cpu"))
    assert set(radd.bound._found) == {"", "lambda_DCE", "small", "small/lambda_DCE"}
