"""What is given of a text, and what is left to find."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sgm.methods import Complete

BYTES = {"kind": "text", "length": 16, "vocabulary": 256, "tokenizer": "bytes"}
LETTERS = {**BYTES, "vocabulary": 4, "tokenizer": {"characters": "abcd"}}
MASK = 256


def shown(found, row=0):
    """The row up to its length, `_` where a token is wanted and `.` where none is known or wanted."""
    tokens = zip(found.x[row].tolist(), found.wanted[row].tolist(), strict=True)
    return "".join("_" if want else "." if token == MASK else chr(token) for token, want in tokens)


def known(count=1, **texts):
    return Complete(**texts).given(torch.arange(count), BYTES)


def test_a_prompt_a_suffix_and_both():
    assert shown(known(prompt="To be")) == "To be___________"
    assert shown(known(suffix="end.")) == "____________end."
    assert shown(known(prompt="To be", suffix="end.")) == "To be_______end."
    assert known(prompt="To be").length.tolist() == [16]


def test_what_is_behind_a_text_is_neither_known_nor_wanted():
    found = known(prompt="To", suffix="!", length=6)
    assert shown(found) == "To___!.........."
    assert found.length.tolist() == [6]
    found = known(template="To be ___ or")
    assert shown(found) == "To be ___ or...."
    assert found.length.tolist() == [12]


@given(st.text(alphabet="ab?", min_size=1, max_size=16).filter(lambda text: "?" in text))
def test_any_pattern(template):
    found = Complete(template=template, blank="?").given(torch.tensor([3]), LETTERS)
    assert found.length.tolist() == [len(template)]
    inside = found.x[0, : len(template)].tolist()
    assert inside == [{"a": 0, "b": 1, "?": 4}[letter] for letter in template]
    assert found.wanted[0].tolist() == [letter == "?" for letter in template.ljust(16)]


def test_samples_take_texts_in_turn(tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\n\nabc\n")
    found = known(4, file=str(tmp_path / "prompts.txt"))
    assert [shown(found, row).rstrip("_") for row in range(4)] == ["ab", "abc", "ab", "abc"]
    numbered = Complete(file=str(tmp_path / "prompts.txt")).given(torch.tensor([7]), BYTES)
    assert shown(numbered).rstrip("_") == "abc"


def test_only_line_feeds_end_lines(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a\x0cb\r\nc\n")
    assert [text["prompt"] for text in Complete(file=str(tmp_path / "p.txt")).texts] == ["a\x0cb", "c"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}', encoding="utf-8")
    assert Complete(file=str(tmp_path / "p.jsonl")).texts == [{"prompt": "a\u2028b"}]


def test_a_file_of_all_kinds(tmp_path):
    texts = [{"template": "a_c"}, {"prompt": "x", "length": 3}, {"suffix": "z", "prompt": "y"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    found = known(3, file=str(tmp_path / "texts.jsonl"))
    assert [shown(found, row) for row in range(3)] == ["a_c" + "." * 13, "x__" + "." * 13, "y______________z"]
    assert found.length.tolist() == [3, 3, 16]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "nothing to complete"),
        ({"length": 3}, "nothing to complete"),
        ({"prompt": "a", "template": "a_"}, "a template is a whole text"),
        ({"prompt": "x" * 17}, "the prompt has 17 tokens, and the model's block 16: shorten the prompt"),
        ({"prompt": "x" * 9, "suffix": "y" * 9}, "the prompt and suffix has 18 tokens"),
        ({"prompt": "x" * 16}, "the prompt has 16 tokens and leaves none to find: the block has 16"),
        ({"prompt": "abc", "length": 3}, "length 3 leaves none to find: raise it"),
        ({"template": "no blanks"}, "the template has 9 tokens and leaves none to find: put a _ for each"),
        ({"template": "_" * 17}, "the template has 17 tokens, and the model's block 16"),
        ({"prompt": "a", "length": 17}, "has 17 tokens, and the model's block 16"),
        ({"prompt": "a", "length": 0}, "length of a text must be at least 1 token, got 0"),
        ({"template": "a", "blank": "ab"}, "blank must be one character"),
    ],
)
def test_what_cannot_be_completed_is_named(texts, message):
    with pytest.raises(ValueError, match=message):
        known(**texts)


def test_a_character_the_model_does_not_know():
    with pytest.raises(ValueError, match="the character 'x'"):
        Complete(prompt="x").given(torch.arange(1), LETTERS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n\n", "p.txt is empty"),
        ("p.txt", b"ok\n\xff", "p.txt is not UTF-8 text: invalid start byte at byte 3"),
        ("p.jsonl", b'{"prompt": "a"}\n{', r"p.jsonl, line 2 is not JSON"),
        ("p.txt", b"", "p.txt is empty"),
        ("p.jsonl", b"[1]", "p.jsonl, line 1 must be an object"),
        ("p.jsonl", b'{"promt": "a"}', "p.jsonl, line 1: unknown promt"),
        ("p.jsonl", b'{"prompt": 1}', "p.jsonl, line 1: prompt must be text, got 1"),
        ("p.jsonl", b'{"length": 4}', "p.jsonl, line 1: nothing to complete"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Complete(file=str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no such file of texts"):
        Complete(file=str(tmp_path / "absent.txt"))
