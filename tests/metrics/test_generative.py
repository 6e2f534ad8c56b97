"""Generative perplexity by a tiny causal language model, against its own probabilities token by token."""

import json
import math

import pytest
import torch

from lightning_sgm.metrics import GenerativePerplexity

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Folder of a random GPT-2 with its byte-pair tokenizer, a context of 16 and the vocabulary's two files."""
    folder = tmp_path_factory.mktemp("judge")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the cat sat on the mat and the dog"] * 5, vocab_size=280, special_tokens=[END])
    bpe.save_model(str(folder))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=bpe.get_vocab_size(), n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def nats(judge, ids):
    """-ln p of every token after the first, one at a time."""
    model = transformers.GPT2LMHeadModel.from_pretrained(judge).eval()
    values = []
    for i in range(1, len(ids)):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)
        values.append(-float(log_probs[ids[i]]))
    return values


def test_both_conventions_on_the_judges_own_tokens(judge):
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    end = tokenizer.eos_token_id
    cat, the = tokenizer("cat")["input_ids"][0], tokenizer("the")["input_ids"][0]
    # "cat" in pieces that no tokenizer would choose, and two ends.
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "cat"]
    rows = [
        [the, *letters, end, the, end, cat],
        [the, the, cat, cat, the, cat, the, the],
        [end, the, end, cat, the, the, end, cat],  # the first end is not judged, the others are not the first
    ]
    metric = GenerativePerplexity(str(judge), {"gpt2": str(judge)}, batch_size=1)
    for row in rows:
        metric.update(torch.tensor([row]), real=False)
    found = metric.compute()
    per_sequence = [math.exp(sum(nats(judge, row)) / 7) for row in rows]
    assert float(found["perplexity_radd"]) == pytest.approx(sum(per_sequence) / 3, rel=1e-4)
    again = [tokenizer(tokenizer.decode(row))["input_ids"] for row in rows]
    assert again[0] != rows[0]
    total, tokens = 0.0, 0
    for ids in again:
        ends = int(ids[0] == end)
        for token, value in zip(ids[1:], nats(judge, ids), strict=True):
            ends += token == end
            if token != end or ends == 1:
                total, tokens = total + value, tokens + 1
    assert tokens == sum(map(len, again)) - 3 - 1 - 2
    assert float(found["perplexity_mdlm"]) == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_other_tokens_are_judged_as_text_and_long_texts_in_pieces(judge):
    text = b"the cat sat on the mat and the dog sat on the cat and the mat sat on the dog"
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    ids = tokenizer(text.decode())["input_ids"]
    assert len(ids) > 16
    values = [value for start in range(0, len(ids), 16) for value in nats(judge, ids[start : start + 16])]
    metric = GenerativePerplexity(str(judge), "bytes")
    metric.update(torch.tensor([list(text)]), real=True)
    found = metric.compute()
    assert set(found) == {"perplexity_radd_real", "perplexity_mdlm_real"}
    assert float(found["perplexity_mdlm_real"]) == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)


def test_text_is_cut_to_the_tokens_that_were_generated(judge):
    """As MDLM truncates it to the model's length. A broken character is told again as U+FFFD, three bytes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in ("Ã", "Ã", "t", "h")]
    again = tokenizer(tokenizer.decode(letters))["input_ids"]
    assert len(again) > 4
    metric = GenerativePerplexity(str(judge), {"gpt2": str(judge)})
    metric.update(torch.tensor([letters]), real=False)
    assert float(metric.compute()["perplexity_mdlm"]) == pytest.approx(
        math.exp(sum(nats(judge, again[:4])) / 3), rel=1e-4
    )


def test_a_sequence_is_judged_once_where_both_ways_agree(judge):
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    whole = tokenizer("the cat sat on the mat")["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "thecatsatonthemat"][: len(whole)]
    rows: list[int] = []
    for x, name, judged in (
        (whole, {"gpt2": str(judge)}, 1),
        (letters, {"gpt2": str(judge)}, 2),
        ([97] * 6, "bytes", 1),
    ):
        metric = GenerativePerplexity(str(judge), name)
        metric.prepare(None)
        metric._judge.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        metric.update(torch.tensor([x]), real=False)
        assert sum(rows) == judged
        rows.clear()


def test_equal_tokens_are_told_from_equally_many(judge, tmp_path):
    """A vocabulary of the same size in another order is another vocabulary."""
    vocabulary = json.loads((judge / "vocab.json").read_text())
    last = len(vocabulary) - 1
    swapped = {token: last - i if i in (5, last - 5) else i for token, i in vocabulary.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(swapped))
    (tmp_path / "merges.txt").write_text((judge / "merges.txt").read_text())
    x = torch.tensor([[5, 9, 5, 70, last - 5, 11]])
    found = []
    for folder in (judge, tmp_path):
        metric = GenerativePerplexity(str(judge), {"gpt2": str(folder)})
        metric.update(x, real=False)
        found.append(float(metric.compute()["perplexity_radd"]))
    assert found[0] == pytest.approx(math.exp(sum(nats(judge, x[0].tolist())) / 5), rel=1e-4)
    assert abs(found[1] / found[0] - 1) > 1e-2


def test_judged_in_float32_whatever_the_trainers_precision(judge):
    x = torch.randint(97, 123, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for autocast in (False, True):
        metric = GenerativePerplexity(str(judge), "bytes")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            metric.update(x, real=False)
        found.append(float(metric.compute()["perplexity_radd"]))
    assert found[0] == found[1]


def test_batches_and_processes_do_not_matter(judge):
    x = torch.randint(97, 123, (6, 20), generator=torch.Generator().manual_seed(0))
    whole = GenerativePerplexity(str(judge), "bytes", batch_size=4)
    whole.update(x, real=False)
    parts = [GenerativePerplexity(str(judge), "bytes", batch_size=1) for _ in range(2)]
    for part, rows in zip(parts, (x[::2], x[1::2]), strict=True):
        part.update(rows, real=False)
    parts[0].merge_state(parts[1])
    for name, value in whole.compute().items():
        assert float(parts[0].compute()[name]) == pytest.approx(float(value), rel=1e-5)


def test_the_tokenizer_of_the_data_is_taken(judge):
    class Data:
        spec = {"tokenizer": {"characters": "abc"}}

    metric = GenerativePerplexity(str(judge))
    metric.prepare(Data())
    metric.update(torch.tensor([[0, 1, 2, 0, 1]]), real=False)
    assert float(metric.compute()["perplexity_radd"]) > 1


def test_what_is_missing_is_named(judge, tmp_path):
    with pytest.raises(ValueError, match="give it a tokenizer"):
        GenerativePerplexity(str(judge)).update(torch.zeros(1, 4, dtype=torch.int64), real=False)
    with pytest.raises(FileNotFoundError, match=r"no causal language model at .*nowhere"):
        GenerativePerplexity(str(tmp_path / "nowhere"), "bytes").prepare(None)

    class Data:
        spec = {"kind": "text"}

    with pytest.raises(ValueError, match="without text data"):
        GenerativePerplexity(str(judge)).prepare(Data())
    with pytest.raises(ValueError, match=r"\[0, 256\).*mask"):
        GenerativePerplexity(str(judge), "bytes").update(torch.full((1, 4), 256), real=False)
    with pytest.raises(ValueError, match="batch_size"):
        GenerativePerplexity(batch_size=0)
