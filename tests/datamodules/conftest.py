"""Fixtures of the tests of the data modules."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory):
    """A folder with a small vocabulary in GPT-2's two files."""
    tokenizers = pytest.importorskip("tokenizers")
    trainer = tokenizers.ByteLevelBPETokenizer()
    lines = ["the cat sat on the mat\n\n\n", "the dog  sat on the cat\n", "äöü über 12 34\t\n"] * 5
    trainer.train_from_iterator(lines, vocab_size=330, min_frequency=1, special_tokens=["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("small_gpt2")
    trainer.save_model(str(folder))
    return str(folder)
