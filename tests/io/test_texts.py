import html
import re

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.plugin_util import markdown_to_safe_html  # type: ignore[import-untyped]

from lightning_sgm.io.texts import TextWriter, readable


def tokens(*texts):
    return {"x": torch.tensor([list(text) for text in texts])}


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_single_texts_hold_the_exact_bytes(tmp_path):
    batch = {"x": torch.stack([torch.arange(256), torch.arange(256).flip(0)]), "index": torch.tensor([3, 10])}
    files = TextWriter("bytes").save_each(batch, tmp_path)
    assert [file.name for file in files] == ["000003.txt", "000010.txt"]
    assert files[0].read_bytes() == bytes(range(256))
    assert files[1].read_bytes() == bytes(range(255, -1, -1))


def test_an_overview_of_texts(tmp_path):
    batch = tokens(b"To be,\n  or\tnot ", b"\xff\x1b[31m\x00\r\n\x7f caf\xc3!") | {"index": torch.tensor([4, 5])}
    (path,) = TextWriter("bytes").save(batch, tmp_path / "v1.2")
    assert path == tmp_path / "v1.2.txt"
    rule = "=" * 20
    expected = (
        f"{rule} sample 4 {rule}\nTo be,\n  or\tnot \n\n"
        f"{rule} sample 5 {rule}\n\\xff\\x1b[31m\\x00\\x0d\n\\x7f caf\\xc3!\n"
    )
    assert path.read_bytes().decode() == expected


def test_collected_texts_make_the_same_overview(tmp_path):
    batch = {"x": torch.randint(0, 256, (3, 40)), "index": torch.tensor([0, 5, 9])}
    writer = TextWriter("bytes")
    (direct,) = writer.save(batch, tmp_path / "direct")
    (collected,) = writer.collect(writer.save_each(batch, tmp_path), tmp_path / "collected")
    assert direct.read_bytes() == collected.read_bytes()


def test_characters(tmp_path):
    writer = TextWriter({"characters": "\naé"})
    assert writer.decode(torch.tensor([[1, 2, 0], [2, 2, 1]])) == ["aé\n".encode(), "ééa".encode()]


def test_gpt2(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the cat sat on the mat, naïve"] * 3, vocab_size=300, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(tmp_path))
    text = "the  naïve\ncat , ok"
    ids = bpe.encode(text).ids
    writer = TextWriter({"gpt2": str(tmp_path)})
    assert writer.decode(torch.tensor([ids])) == [text.encode()]
    vocabulary = bpe.get_vocab_size()
    shown = writer.decode(torch.tensor([[*ids, vocabulary, vocabulary, ids[0]]]))
    assert shown == [f"{text}░░{bpe.decode(ids[:1])}".encode()]


def test_masks_and_lengths_are_shown(tmp_path):
    batch = {"x": torch.tensor([[72, 256, 256, 105], [97, 98, 99, 100]]), "length": torch.tensor([4, 2])}
    assert TextWriter().decode(**batch) == ["H░░i".encode(), b"ab"]
    files = TextWriter().save_each(batch, tmp_path)
    assert files[1].read_bytes() == b"ab"


def test_an_unmasking_is_titled_by_its_evaluations(tmp_path):
    batch = {"x": torch.tensor([[256, 97], [98, 97]]), "evaluations": torch.tensor([0, 7])}
    (path,) = TextWriter().save(batch, tmp_path / "x")
    assert re.findall("after [0-9]+ evaluations", path.read_text()) == ["after 0 evaluations", "after 7 evaluations"]


@pytest.mark.parametrize(
    "text",
    [
        "Exit.\n\n  HAMLET\n    To  be\n",
        "a\n```\n# not a heading\n````\n*b* <b>&amp;</b>",
        "\n\nstarts late",
        "~~~\n    x\n",
    ],
)
def test_texts_in_tensorboard_keep_their_spaces(tmp_path, text):
    logger = TensorBoardLogger(tmp_path, "run", "0")
    TextWriter().log(logger, "samples", tokens(text.encode(), b"#" * len(text)), 7)
    logger.finalize("success")
    (entry,) = events(logger.log_dir).Tensors("samples/text_summary")
    page = markdown_to_safe_html(entry.tensor_proto.string_val[0].decode())
    blocks = [html.unescape(block) for block in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]
    assert blocks == [f"{text}\n", "#" * len(text) + "\n"]
    assert "sample 0" in page
    assert "sample 1" in page


def test_readable_keeps_text():
    assert readable("Müller\t→\n".encode()) == "Müller\t→\n"
    assert readable(b"\xc2\x85") == "\\x85"


def test_token_numbers_are_better_than_nothing(tmp_path):
    writer = TextWriter({"gpt2": str(tmp_path / "nowhere")})
    with pytest.warns(UserWarning, match="token numbers are written in place of text: tokenizer_path .*nowhere"):
        (path,) = writer.save({"x": torch.tensor([[15496, 995], [1, 2]])}, tmp_path / "x")
    assert "15496 995" in path.read_text()
