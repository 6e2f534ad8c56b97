"""RADD: absorbing discrete diffusion with a time-free network (Ou et al. 2024, 2406.03736)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from datamodules.tokenizers import described
from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.methods.base import Batch, Curve, GenerativeModule
from lightning_sgm.methods.bound import BoundTest
from lightning_sgm.methods.completion import Complete
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.methods.token_pictures import masking_curve, unmasking
from lightning_sgm.networks.base import Spec, TokenNetwork, build
from lightning_sgm.objectives.masked import MaskedLoss, MaskedObjective
from lightning_sgm.processes.absorbing import AbsorbingProcess
from lightning_sgm.random import Draw
from lightning_sgm.samplers.unmasking import UnmaskingSampler


class RADD(GenerativeModule):
    """Masked diffusion language model: the network estimates p(token | unmasked tokens) and never sees time.

    Args:
        network: a token network, or a factory that receives ``spec``.
        process: the absorbing process, log-linear by default.
        objective: one of the paper's four losses and how its masks are drawn.
        sampler: unmasking rule and number of steps.
        task: what samples are to complete; None for texts from scratch. Checkpoints do not keep it: say it again to
            each command.
        passes: repeated passes over the data by which ``test`` estimates the likelihood bound and its standard error.
        test_losses: further losses by which it does.
        pieces: into how many pieces sequences are cut in training, by the update from which on: ``{0: 4, 500: 2, 1000:
            1}``. Short pieces at first teach neighbours sooner, at the same number of tokens.
        spec, optimizer, warmup, decay, exact, drop, metrics, test_samples, val_samples: see
            :class:`GenerativeModule`; the paper's AdamW 3e-4, weight decay 0.03 and 2500 updates of warm-up.
    """

    def __init__(
        self,
        network: TokenNetwork | Callable[[Spec], TokenNetwork],
        spec: dict[str, Any],
        process: AbsorbingProcess = AbsorbingProcess(),
        objective: MaskedObjective = MaskedObjective(),
        sampler: UnmaskingSampler = UnmaskingSampler(),
        task: Complete | None = None,
        passes: int = 4,
        test_losses: list[MaskedLoss] | None = None,
        pieces: dict[int, int] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.03),
        warmup: int = 2500,
        decay: Decay = "constant",
        exact: bool = False,
        drop: dict[str, float] | None = None,
        metrics: list[Metric] | None = None,
        test_samples: int = 64,
        val_samples: int = 0,
    ) -> None:
        super().__init__(
            spec=spec,
            optimizer=optimizer,
            warmup=warmup,
            decay=decay,
            exact=exact,
            drop=drop,
            metrics=metrics,
            test_samples=test_samples,
            val_samples=val_samples,
        )
        self.record(locals(), forget=("task",))
        self.network = build(network, spec)
        self.process = process
        self.objective = objective
        self.sampler = copy.copy(sampler)  # it counts evaluations, and a default is shared by all models
        self.task = task
        self._corpora: tuple[str, ...] = ("",)
        self.denoiser = TokenDenoiser(self.network, process, spec["vocabulary"])
        self.bound = BoundTest(objective, test_losses or [], passes)
        self.pieces = {int(update): int(count) for update, count in (pieces or {}).items()}
        if wrong := [count for count in self.pieces.values() if count < 1 or spec["length"] % count]:
            raise ValueError(
                f"pieces must be equal: sequences of {spec['length']} tokens cannot be cut into {wrong[0]}; choose "
                "another data.length or other pieces"
            )

    @property
    def noise_device(self) -> torch.device:
        """Masks are drawn on the host, so that the number of masked positions is known without a device sync."""
        return torch.device("cpu")

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Any-order NLL bound per example, (B,): "loss" nats per sequence, "nll" nats per token, bits per byte."""
        conditions = self.conditions(batch, draw.fork(0) if self.training else None)
        x = batch["x"]
        pieces = self._pieces() if self.training else 1
        if pieces > 1:
            x, draw = x.reshape(pieces * len(x), -1), draw.split(pieces)
            conditions = {name: value.repeat_interleave(pieces, 0) for name, value in conditions.items()}
        terms = self.objective(self.denoiser, x, draw, **conditions)
        terms = {name: term.view(-1, pieces).mean(1) for name, term in terms.items()}
        terms["loss"] = pieces * terms["loss"]  # still nats per sequence
        if self.spec.get("bytes_per_token"):
            terms["bits_per_byte"] = terms["nll"] / (math.log(2.0) * self.spec["bytes_per_token"])
        return terms

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse data whose tokens mean something else than those the weights were trained on."""
        super().on_load_checkpoint(checkpoint)
        stored = (checkpoint.get("hyper_parameters", {}).get("spec") or {}).get("tokenizer")
        given = self.spec.get("tokenizer")
        if stored is not None and given is not None and described(stored) != described(given):
            raise ValueError(
                f"the model was trained on tokens of {described(stored)}, the data have {described(given)}: leave "
                "data.tokenizer and data.path as they were, and give other texts as data.corpora"
            )

    @property
    def samples_wanted(self) -> int:
        """One for each text of a file to complete."""
        texts = [] if self.task is None else self.task.texts
        return len(texts) if len(texts) > 1 else super().samples_wanted

    def _pieces(self) -> int:
        """Into how many pieces a sequence is cut at this time of the training."""
        begun = [update for update in self.pieces if update <= self.updates]
        return self.pieces[max(begun)] if begun else 1

    def on_test_start(self) -> None:
        """Make ready for the test split and each further corpus.

        Raises:
            ValueError: samples would be completions, which are no fair samples of the model.
        """
        super().on_test_start()
        if self.metrics and self.task is not None:
            raise ValueError("test judges texts from scratch: leave out model.task, or set model.metrics to null")
        data: Any = getattr(self.trainer, "datamodule", None)
        own = {"": self.spec.get("bytes_per_token")}
        further = {} if data is None else {name: data.bytes_per_token_of(name) for name in data.test_sets if name}
        self._corpora = (*own, *further)
        self.bound.begin(own | further, self.device)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Several passes with different masks over each corpus; samples' metrics see the test split once."""
        if dataloader_idx >= len(self._corpora):
            raise ValueError("several test loaders need a DataModule that names them (test_sets)")
        self.bound.update(self, self.denoiser, batch, self._corpora[dataloader_idx])
        if not dataloader_idx:
            self.feed_real(batch)

    def on_test_epoch_end(self) -> None:
        """Perplexity and bits with standard errors, what is known of the data's own, then the samples' metrics."""
        found = self.bound.compute()
        found["loss"] = self.spec["length"] * found["nll"]
        if "entropy" in self.spec:
            found["entropy"] = torch.tensor(self.spec["entropy"], dtype=torch.float64, device=self.device)
        self.log_dict({f"test/{name}": value for name, value in found.items()}, sync_dist=True)
        super().on_test_epoch_end()

    def sample(self, indices: Tensor, prompt: Tensor | None = None, **conditions: Any) -> Batch:
        """Sequences "x" (n, L) of real tokens.

        Args:
            indices: (n,) numbers of the samples.
            prompt: (n, L) fixes all positions that are not the mask; by default the task does, if there is one. Then
                there is also "length" (n,), of the texts, behind which the masks stay.
            conditions: passed on to the network.
        """
        draw = self.sample_draw(indices)
        if prompt is None and self.task is not None:
            given = self.task.given(indices, self.spec)
            x, wanted = given.x.to(self.device), given.wanted.to(self.device)
            return {"x": self.sampler(self.denoiser, x, draw, wanted, **conditions), "length": given.length}
        if prompt is None:
            prompt = torch.full((len(indices), self.spec["length"]), self.denoiser.mask_id)
        return {"x": self.sampler(self.denoiser, prompt.to(self.device), draw, **conditions)}

    def pictures(self) -> dict[str, Batch | Curve]:
        """One text while it is unmasked, and the loss over the masked fraction."""
        found: dict[str, Batch | Curve | None] = {"unmasking": unmasking(self), "loss_by_masked": masking_curve(self)}
        return {name: picture for name, picture in found.items() if picture is not None}
