"""What all data modules share: splits served by index, loaders, reference examples, checks."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule

from datamodules.loaders import Batch, EvalLoader, TrainLoader, permutation
from datamodules.streaming import StreamLoader

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_EXAMPLES = 2  # purpose of a hash, see loaders.py


class DataModule(LightningDataModule):
    """Data of one kind in three splits, served in batches by index.

    A subclass sets ``self.spec`` in its constructor and writes three methods: ``load`` (read everything into memory,
    once), ``count`` and ``fetch``. Loaders, resuming, processes and ``examples`` are done here.

    Attributes:
        spec: what a model needs to know of the data: plain numbers, strings, lists; known after construction.
        seed: of the order of training examples, of augmentations and of ``examples``; not of the splits.
        batch_size: examples per batch and process.

    Args:
        batch_size: see above.
        seed: see above.

    Raises:
        ValueError: batch_size below 1.
    """

    spec: dict[str, Any]

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        # The subclass's arguments go into checkpoints, so that evaluation finds the same data without a recipe.
        self.save_hyperparameters(logger=False)
        require_positive(batch_size=batch_size)
        self.batch_size = batch_size
        self.seed = seed
        # Evaluation does not pad: with more processes than examples some serve nothing.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._loaded = False

    def load(self) -> None:
        """Read all splits into memory. Called once, on every process, after ``prepare_data``."""
        raise NotImplementedError

    def count(self, split: Split) -> int:
        """Number of examples of a split."""
        raise NotImplementedError

    def fetch(self, split: Split, index: torch.Tensor, epoch: int | None) -> Batch:
        """The examples ``index`` (B,) int64 of a split, as a dict of tensors with B rows, without ``index`` itself.

        Args:
            split: "train", "val" or "test".
            index: positions in the split, each 0 <= i < count(split).
            epoch: counter of augmentations and random windows; None for the examples as they are.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the data if that has not happened yet; the stage makes no difference."""
        if not self._loaded:
            self.load()
            self._loaded = True

    def train_dataloader(self) -> TrainLoader | StreamLoader:
        """Training batches; under ``Trainer(overfit_batches=...)`` the same ones in every epoch."""
        reshuffle = getattr(self.trainer, "overfit_batches", 0) == 0
        return TrainLoader(
            lambda index, epoch: self.fetch("train", index, epoch),
            self.count("train"),
            self.batch_size,
            seed=self.seed,
            reshuffle=reshuffle,
            finished=self._finished_steps if self.trainer else None,
        )

    def _finished_steps(self) -> int:
        """Batches of the running epoch whose training step is finished, those before a resumption included."""
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def val_dataloader(self) -> EvalLoader:
        """All validation examples once, without augmentation."""
        return self.eval_loader("val")

    @property
    def test_sets(self) -> tuple[str, ...]:
        """Names of the loaders that ``test_dataloader`` gives, in order; "" is the test split."""
        return ("",)

    def test_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """All test examples once, without augmentation; a list where there are several ``test_sets``."""
        return self.eval_loader("test")

    def bytes_per_token_of(self, name: str) -> float | None:
        """Text bytes per token in a test set (``name`` of ``test_sets``), as far as that is known."""
        return self.spec.get("bytes_per_token")

    def eval_loader(self, split: Split) -> EvalLoader:
        """All examples of any split once, in order, without augmentation (e.g. to score the training examples)."""
        return EvalLoader(lambda index, epoch: self.fetch(split, index, epoch), self.count(split), self.batch_size)

    def examples(self, split: str, count: int) -> Batch:
        """The first ``count`` examples of a seeded permutation of a split, as one batch without augmentation.

        Works with and without a Trainer, before and after ``setup``.

        Args:
            split: "train", "val" or "test".
            count: number of examples; all of them if the split has fewer.

        Returns:
            A batch as the loaders give it, ``index`` included.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
        require_positive(count=count)
        if not self._loaded:
            self.prepare_data()
            self.setup()
        number = SPLITS.index(split)
        index = permutation(self.count(SPLITS[number]), self.seed, number, _EXAMPLES)[:count]
        return {**self.fetch(SPLITS[number], index, None), "index": index}


def require_positive(**values: int) -> None:
    """Raise a ValueError naming the first argument that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def require_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise a ValueError unless both fractions are above 0 and leave something to train on."""
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise ValueError(
            "val_fraction and test_fraction must be above 0 and sum to less than 1, "
            f"got {val_fraction} and {test_fraction}"
        )
