"""Generated text judged by a causal language model of the transformers library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.tokenizers import Tokenizer, TokenizerName, storage, tokenizer_for
from lightning_sgm.metrics.base import DoubleMetric
from lightning_sgm.metrics.text import check_tokens


class GenerativePerplexity(DoubleMetric):
    """Perplexity of texts under a causal language model, in the two ways that were published; not comparable.

    - ``perplexity_radd`` (Ou et al. 2024 and SEDD): the tokens as they were generated, text behind the end of a
      document included; exp of the mean negative log-likelihood of each sequence, then the mean over sequences, which
      the worst of them rule. Where the judge has other tokens than the model, of the text in the judge's tokens.
    - ``perplexity_mdlm`` (Sahoo et al. 2024, as their code has it): the text in the judge's tokens again, cut to as
      many as were generated; exp of the mean over all tokens of all texts, end-of-text tokens but the first left out.
      (Their padding, which may count as an end, is not followed.)

    The first token of a text is not judged. Texts longer than the judge's context are judged in pieces of it, each
    with a first token of its own. Probabilities are float32 whatever the trainer's precision. Read these numbers next
    to :class:`~lightning_sgm.metrics.UnigramEntropy` and to those of real text (``_real``): text that repeats itself
    has a low perplexity.

    Args:
        model: name on the Hugging Face hub, or a folder with model and tokenizer.
        tokenizer: of the tokens to judge, as in a data specification; by default that of the data.
        batch_size: sequences per call of the judge.

    Attributes:
        inputs: the batch entries passed to ``update``.
        floor: no floor is computed; the numbers of real text are there.
    """

    inputs: tuple[str, ...] = ("x",)
    name = "generative"
    floor = False

    def __init__(self, model: str = "gpt2-large", tokenizer: TokenizerName | None = None, batch_size: int = 8) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size of GenerativePerplexity must be at least 1, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self.tokenizer = tokenizer
        self._judge: Any = None
        self._judge_tokenizer: Any = None
        self._own: Tokenizer | None = None
        self._same = False
        for side in ("real", "generated"):
            for sum_ in ("perplexities", "sequences", "nll", "tokens"):
                self.add_sum(f"{side}_{sum_}")

    def prepare(self, data: Any) -> None:
        """Load the judge, and take the tokenizer of a DataModule where none was given.

        Raises:
            ValueError: transformers is not installed, the model has no tokenizer, or nothing says which tokens to
                judge.
            FileNotFoundError: there is no such model, or no vocabulary of the tokens to judge.
        """
        if self._judge is not None:
            return
        if self.tokenizer is None:
            if data is None or "tokenizer" not in data.spec:
                raise ValueError("GenerativePerplexity cannot read tokens without text data: give it a tokenizer")
            self.tokenizer = data.spec["tokenizer"]
        self._own = tokenizer_for(self.tokenizer)
        self._judge, self._judge_tokenizer = _load(self.model)
        self._judge.to(self.device)
        self._same = _same_tokens(self._own, self._judge_tokenizer)

    @torch.no_grad()
    def update(self, x: Tensor, real: bool) -> None:
        """Judge sequences.

        Args:
            x: (B, L) tokens in [0, V), long.
            real: whether they are data or samples.
        """
        self.prepare(None)
        assert self._own is not None
        check_tokens(x, self._own.vocabulary)
        side = "real" if real else "generated"
        texts = [_text(self._own, row) for row in x.cpu().numpy()]
        again = [torch.tensor(self._judge_tokenizer(text)["input_ids"], dtype=torch.int64) for text in texts]
        again = [ids[: x.shape[1]] for ids in again]
        rows = list(x.cpu()) if self._same else list(again)
        # Tokens that both conventions share are judged once.
        changed = [i for i, ids in enumerate(again) if not torch.equal(ids, rows[i])]
        judged = self._judged(rows + [again[i] for i in changed])
        retold = judged[: len(rows)]
        for pieces in filter(None, retold):
            self.add(f"{side}_perplexities", torch.cat([nll for nll, _ in pieces]).mean().exp())
            self.add(f"{side}_sequences", 1.0)
        for i, pieces in zip(changed, judged[len(rows) :], strict=True):
            retold[i] = pieces
        for nll, ids in (piece for pieces in retold for piece in pieces):
            end = ids == self._judge_tokenizer.eos_token_id
            counted = (~end | (end.cumsum(0) == 1))[1:]
            self.add(f"{side}_nll", nll[counted].sum())
            self.add(f"{side}_tokens", float(counted.sum()))

    def compute(self) -> dict[str, Tensor]:
        """perplexity_radd and perplexity_mdlm of samples, and with ``_real`` of data; what was fed."""
        result = {}
        for side, suffix in (("generated", ""), ("real", "_real")):
            if getattr(self, f"{side}_sequences") > 0:
                mean = getattr(self, f"{side}_perplexities") / getattr(self, f"{side}_sequences")
                result[f"perplexity_radd{suffix}"] = mean
                result[f"perplexity_mdlm{suffix}"] = (
                    getattr(self, f"{side}_nll") / getattr(self, f"{side}_tokens")
                ).exp()
        return result

    def _judged(self, rows: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
        """For every piece of every row the (n - 1,) float64 nats of all tokens but the first, and the (n,) tokens."""
        context = getattr(self._judge.config, "max_position_embeddings", None) or max(map(len, rows))
        pieces = [(i, piece) for i, row in enumerate(rows) for piece in row.split(context) if len(piece) > 1]
        judged: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
        for start in range(0, len(pieces), self.batch_size):
            batch = pieces[start : start + self.batch_size]
            longest = max(len(piece) for _, piece in batch)
            ids = torch.stack([F.pad(piece, (0, longest - len(piece))) for _, piece in batch]).to(self.device)
            inside = torch.arange(longest) < torch.tensor([[len(piece)] for _, piece in batch])
            with torch.autocast(self.device.type, enabled=False):
                logits = self._judge(ids, attention_mask=inside.long().to(self.device)).logits[:, :-1].float()
                nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            for (i, piece), values in zip(batch, nll.view(len(batch), -1).double(), strict=True):
                judged[i].append((values[: len(piece) - 1], piece.to(self.device)))
        return judged


def _text(tokenizer: Tokenizer, row: Any) -> str:
    """What a row of tokens says; bytes that are no UTF-8 become U+FFFD."""
    return tokenizer.raw(row.astype(storage(tokenizer.vocabulary))).decode("utf-8", errors="replace")


def _same_tokens(own: Tokenizer, judge: Any) -> bool:
    """Whether every token of the model is the same text as the judge's token of that number."""
    if len(judge) != own.vocabulary:
        return False
    texts = judge.batch_decode([[i] for i in range(own.vocabulary)], clean_up_tokenization_spaces=False)
    return all(_text(own, np.array([i])) == text for i, text in enumerate(texts))


def _load(name: str) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("GenerativePerplexity needs transformers: pip install 'lightning_sgm[text]'") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no causal language model at {name!r}: give its name on the Hugging Face hub, if that is within reach, or "
            "a folder written by save_pretrained"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the language model at {name!r} has no tokenizer beside it: save that in its folder"
        ) from error
    return model.eval().requires_grad_(False), tokenizer
