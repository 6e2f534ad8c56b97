"""Masked language models of the transformers library behind the contract of a token network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sgm.networks.base import Spec, TokenNetwork, entry


class HuggingFaceMaskedLM(TokenNetwork):
    """Any ``AutoModelForMaskedLM`` (ModernBERT, BERT, ...), from a configuration, a folder or the hub.

    Its vocabulary is that of the data with one more row, V, for the mask. A model that comes with just V rows gets it;
    one with its own mask token can keep it, see ``mask_token``. Where ``positions`` are given, the model's head runs
    only there. Nothing is padded: all L positions attend to each other as the model does.

    Args:
        spec: of text data; ``vocabulary`` and, if present, ``length`` are used.
        config: for a new model: ``{"model_type": "modernbert", "hidden_size": 128, ...}``, the entries of the
            transformers configuration. Without ``pad_token_id`` the model has no padding token.
        name: for a trained model: a folder written by ``save_pretrained``, or a name on the hub.
        mask_token: row of a trained model's vocabulary that is its mask, to be used for V. This token is then never
            predicted.

    Raises:
        ValueError: unless exactly one of ``config`` and ``name`` is given, sizes fit and transformers is installed.
        FileNotFoundError: if there is no model called ``name``.
    """

    def __init__(
        self,
        spec: Spec,
        config: dict[str, Any] | None = None,
        name: str | None = None,
        mask_token: int | None = None,
    ) -> None:
        super().__init__()
        if (config is None) == (name is None):
            raise ValueError("HuggingFaceMaskedLM needs exactly one of config (a new model) and name (a trained one)")
        self.vocabulary = int(entry(spec, "vocabulary", "HuggingFaceMaskedLM"))
        self.mask_token = mask_token
        self.model = _load(name) if name is not None else _new(config or {}, self.vocabulary + 1)
        self._fit_vocabulary()
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and spec.get("length", 0) > longest:
            raise ValueError(
                f"the model reads at most {longest} positions but the data have {spec['length']}: set "
                f"max_position_embeddings in its config or choose shorter sequences"
            )
        self._positions: Tensor | None = None
        if self.model.base_model is not self.model:
            self.model.base_model.register_forward_hook(self._narrow)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (B, L) to logits (B, L, V), or (N, V) at the flat ``positions``."""
        if self.mask_token is not None:
            x = x.masked_fill(x == self.vocabulary, self.mask_token)
        self._positions = positions
        try:
            logits = self.model(input_ids=x).logits
            narrowed = self._positions is None
        finally:
            self._positions = None
        if positions is not None:
            logits = logits.flatten(0, 1) if narrowed else logits.flatten(0, 1).index_select(0, positions)
        logits = logits[..., : self.vocabulary]
        if self.mask_token is not None and self.mask_token < self.vocabulary:
            # Finite, so that probability times log-probability stays 0.
            logits = logits.index_fill(-1, x.new_tensor([self.mask_token]), -1e9)
        return logits

    def _narrow(self, module: object, args: object, output: Any) -> Any:
        """Forward hook of the model without its head: keep the hidden states at the wanted positions, (1, N, width)."""
        if self._positions is not None:
            hidden = output["last_hidden_state"]
            output["last_hidden_state"] = hidden.flatten(0, 1).index_select(0, self._positions)[None]
            self._positions = None
        return output

    def _fit_vocabulary(self) -> None:
        rows = self.model.get_input_embeddings().num_embeddings
        if self.mask_token is None and rows == self.vocabulary:
            self.model.resize_token_embeddings(rows + 1, mean_resizing=False)
            return
        needed = self.vocabulary if self.mask_token is not None else self.vocabulary + 1
        if rows < needed or (self.mask_token is not None and not 0 <= self.mask_token < rows):
            raise ValueError(
                f"the model knows {rows} tokens but the data have {self.vocabulary} and a mask (mask_token "
                f"{self.mask_token}): choose the tokenizer this model was trained with"
            )


def _new(config: dict[str, Any], rows: int) -> Any:
    transformers = _transformers()
    # The pad token's row would be zero and never trained, but all our tokens are data.
    entries = {"pad_token_id": None, **config, "vocab_size": rows}
    if "model_type" not in entries:
        raise ValueError('config needs a "model_type", such as "modernbert" or "bert"')
    made = transformers.AutoConfig.for_model(entries.pop("model_type"), **entries)
    return transformers.AutoModelForMaskedLM.from_config(made)


def _load(name: str) -> Any:
    try:
        return _transformers().AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"no transformers model at {name!r}: give a folder written by save_pretrained"
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "HuggingFaceMaskedLM needs the transformers library: pip install 'lightning_sgm[text]'"
        ) from error
    return transformers
