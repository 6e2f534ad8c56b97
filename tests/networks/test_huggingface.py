import sys

import pytest
import torch

from lightning_sgm.networks.huggingface import HuggingFaceMaskedLM
from lightning_sgm.testing import check_network

SPEC = {"kind": "text", "length": 10, "vocabulary": 7}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {kind: {"model_type": kind, **SIZES} for kind in ("modernbert", "bert")}


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_model_satisfies_the_contract(kind):
    network = HuggingFaceMaskedLM(SPEC, CONFIGS[kind])
    assert network.model.config.vocab_size == 8
    check_network(network, SPEC)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_head_runs_only_at_the_positions(kind):
    network, rows = HuggingFaceMaskedLM(SPEC, CONFIGS[kind]).eval(), []
    network.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(args[0].shape[:-1].numel())
    )
    x, positions = torch.randint(8, (3, 10)), torch.tensor([0, 11, 29])
    some = network(x, positions)
    torch.testing.assert_close(some, network(x).flatten(0, 1)[positions], atol=1e-6, rtol=1e-5)
    assert rows == [3, 30]


def test_tokens_have_no_padding_row():
    network = HuggingFaceMaskedLM(SPEC, CONFIGS["bert"])
    network(torch.zeros(1, 10, dtype=torch.int64)).logsumexp(-1).sum().backward()
    assert network.model.get_input_embeddings().weight.grad[0].abs().sum() > 0


def test_a_saved_model_is_read_and_gets_a_mask_row(tmp_path):
    first = HuggingFaceMaskedLM(SPEC, CONFIGS["modernbert"]).eval()
    first.model.save_pretrained(tmp_path)
    x = torch.randint(8, (2, 10))
    again = HuggingFaceMaskedLM(SPEC, name=str(tmp_path)).eval()
    torch.testing.assert_close(again(x), first(x))
    # The same model for data of 8 tokens: it has no row for their mask, 8, yet.
    longer = HuggingFaceMaskedLM({**SPEC, "vocabulary": 8}, name=str(tmp_path)).eval()
    torch.testing.assert_close(longer(x)[..., :7], first(x))
    assert longer(torch.full((1, 10), 8)).shape == (1, 10, 8)
    with pytest.raises(ValueError, match="knows 8 tokens but the data have 20"):
        HuggingFaceMaskedLM({**SPEC, "vocabulary": 20}, name=str(tmp_path))


def test_a_model_can_keep_its_own_mask(tmp_path):
    first = HuggingFaceMaskedLM(SPEC, CONFIGS["modernbert"]).eval()
    first.model.save_pretrained(tmp_path)
    own = HuggingFaceMaskedLM({**SPEC, "vocabulary": 8}, name=str(tmp_path), mask_token=3).eval()
    x = torch.tensor([[0, 8, 2, 8, 1, 1, 5, 6, 4, 0]])
    got = own(x).log_softmax(-1)
    expected = first.model(input_ids=x.masked_fill(x == 8, 3)).logits
    expected[..., 3] = -torch.inf
    kept = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(got[..., kept], expected.log_softmax(-1)[..., kept])
    assert got.isfinite().all()
    assert (got[..., 3].exp() == 0).all()


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="exactly one"):
        HuggingFaceMaskedLM(SPEC)
    with pytest.raises(ValueError, match="model_type"):
        HuggingFaceMaskedLM(SPEC, SIZES)
    with pytest.raises(ValueError, match="at most 5 positions but the data have 10"):
        HuggingFaceMaskedLM(SPEC, {**CONFIGS["bert"], "max_position_embeddings": 5})
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        HuggingFaceMaskedLM(SPEC, name=str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install"):
        HuggingFaceMaskedLM(SPEC, CONFIGS["bert"])
