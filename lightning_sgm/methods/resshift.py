"""ResShift: restoring images by a diffusion between the degraded and the clean one (Yue et al. 2023, 2307.12348)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_sgm.codecs import Codec, Identity
from lightning_sgm.denoiser import BaseDenoiser, Preconditioning
from lightning_sgm.guidance.clipping import ResidualInRange
from lightning_sgm.methods.base import Batch, Curve, GenerativeModule
from lightning_sgm.methods.encoded import Encoded, only
from lightning_sgm.methods.image_files import Pictures
from lightning_sgm.methods.learning_rate import Decay
from lightning_sgm.methods.pictures import loss_curve
from lightning_sgm.metrics.perceptual import PerceptualDistance
from lightning_sgm.networks.base import Network, Spec, build, entry
from lightning_sgm.objectives.denoising import ChainTimes, DenoisingObjective
from lightning_sgm.objectives.weights import DataWeight
from lightning_sgm.processes.chains import as_chain
from lightning_sgm.processes.gaussian import GaussianProcess
from lightning_sgm.processes.residual import ResidualShift
from lightning_sgm.random import Draw
from lightning_sgm.residual_denoiser import ResidualDenoiser, ResShiftPreconditioning
from lightning_sgm.samplers.grids import ChainGrid
from lightning_sgm.samplers.loop import Sampler
from lightning_sgm.samplers.rules import Ancestral
from lightning_sgm.tiles import restore_tiled

_TILE = 128  # least side of tiles that are not chosen, in pixels of the small image


class ResShift(GenerativeModule):
    """Restores ``low`` images, such as small or damaged ones, with the residual x - y as the state of the diffusion.

    y is ``low`` enlarged bicubically to the size of x; both are encoded by the codec. A sample is a restored image: of
    the validation data in training, of the files that are given to ``predict``.

    Args:
        network: a network with the condition ``low``, or a factory that receives ``spec`` with the shape in the space
            of the codec.
        spec: of a :class:`~datamodules.SuperResolutionDataModule`.
        codec: from images to the space of the model; the images themselves by default.
        process: of the residuals.
        preconditioning: what the network sees and says; the paper's by default. An
            :class:`~lightning_sgm.denoiser.EDMPreconditioning` at the residuals' standard deviation makes an untrained
            network answer hardly more than y, which spares small models most of the training.
        objective: law of t and weights of the loss; the paper's by default.
        sampler: rule and grid that run time backwards; the paper's ancestral sampler over all indices by default.
        perceptual: distance of the decoded estimate of x_0 from the true image, such as
            :class:`~lightning_sgm.metrics.LPIPS`, for the loss (Yue et al. 2024, 2403.07319); the objective must weigh
            the error of x_0. Checkpoints do not keep it.
        perceptual_weight: its factor; 1 for super-resolution and 10 for faces in the paper.
        tile: side of the pieces in which large images are restored, in pixels of ``low``; None for whole images,
            "auto" for the smallest that suits the network and is not below 128. Checkpoints do not keep it.
        overlap: pixels that neighbouring pieces share.
        tile_batch: pieces that are restored at once, or more where as many images are.
        optimizer, warmup, decay, exact, metrics, test_samples, val_samples: see :class:`GenerativeModule`; AdamW at
            5e-5 without weight decay and 5000 updates of warm-up as in the paper. Metrics judge all examples of the
            split, beside nearest and bicubic interpolation; with val_samples > 0 validation does so too.

    Raises:
        ValueError: data without low-resolution images; a network that does not see them; a codec, tile or objective
            that does not fit.
    """

    rivals = ("samples", "bicubic", "nearest")
    forgotten = ("perceptual", "tile", "overlap", "tile_batch")

    def __init__(
        self,
        network: Network | Callable[[Spec], Network],
        spec: dict[str, Any],
        codec: Codec | None = None,
        process: GaussianProcess = ResidualShift(),
        preconditioning: Preconditioning = ResShiftPreconditioning(),
        objective: DenoisingObjective | None = None,
        sampler: Sampler | None = None,
        perceptual: PerceptualDistance | None = None,
        perceptual_weight: float = 1.0,
        tile: int | Literal["auto"] | None = "auto",
        overlap: int = 16,
        tile_batch: int = 4,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0),
        warmup: int = 5000,
        decay: Decay = "constant",
        exact: bool = False,
        metrics: list[Metric] | None = None,
        test_samples: int = 256,
        val_samples: int = 0,
    ) -> None:
        super().__init__(
            spec=spec,
            optimizer=optimizer,
            warmup=warmup,
            decay=decay,
            exact=exact,
            metrics=metrics,
            test_samples=test_samples,
            val_samples=val_samples,
        )
        self.record(locals(), forget=self.forgotten)
        self.factor = int(entry(spec, "factor", "ResShift"))
        self.codec = Identity() if codec is None else codec
        self.network = build(network, {**spec, "shape": list(self.codec.shape(spec["shape"]))})
        if not {"low", "origin"} & set(getattr(self.network, "conditions", ())):
            raise ValueError(
                f"{type(self.network).__name__} does not see the degraded image: choose a network with the condition "
                "low, as SRResNet and SwinUNet"
            )
        self.objective = objective or DenoisingObjective(times=ChainTimes(), weight=DataWeight())
        if perceptual is not None and self.objective.weight.of != "x0":
            raise ValueError("perceptual needs an objective that weighs the error of x_0: choose the weight DataWeight")
        self.process = process
        steps = as_chain(process, "the paper's sampler").steps if sampler is None else 0
        self.sampler = sampler or Sampler(rule=Ancestral(), steps=steps, grid=ChainGrid())
        self.denoiser = ResidualDenoiser(self.network, process, preconditioning)
        self.guided: BaseDenoiser = self.denoiser
        if self.codec.of_pixels:
            self.guided = ResidualInRange(self.denoiser, *spec["range"])
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.tile = -(-_TILE // self.multiple) * self.multiple if tile == "auto" else tile
        self.overlap, self.tile_batch = overlap, tile_batch
        self._check_tile()
        self.sampler.levels(process)  # a grid that does not fit is told before training

    @property
    def unsaved(self) -> tuple[str, ...]:  # type: ignore[override]
        """A codec that finds its weights itself."""
        return () if self.codec.stored else ("codec.",)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights for another factor, which may have the same shapes."""
        trained = (checkpoint.get("hyper_parameters") or {}).get("spec", {}).get("factor", self.factor)
        if trained != self.factor:
            raise ValueError(
                f"the model was trained for factor {trained}, but the data have {self.factor}: set data.factor"
            )
        super().on_load_checkpoint(checkpoint)

    # Between images and the space of the model.

    def enlarge(self, low: Tensor, mode: str = "bicubic") -> Tensor:
        """Images (B, 3, h, w) interpolated to the size of the restored ones; not clipped, as in the paper."""
        if self.factor == 1:
            return low
        corners = None if mode == "nearest" else False
        return F.interpolate(low, scale_factor=self.factor, mode=mode, align_corners=corners)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoded:
        """Residuals of a batch in the space of the model, and y there as ``origin`` beside ``low``.

        Of what the network cannot take in one piece, whole photographs in evaluation, the middle.
        """
        low, x = self._middle(batch["low"]), self._middle(batch["x"], self.factor)
        conditions = self._conditions(low)
        return Encoded(self.codec.encode(x) - conditions["origin"], conditions)

    def _middle(self, image: Tensor, scale: int = 1) -> Tensor:
        """The middle (B, 3, h, w) of images, whose sides, over ``scale``, suit the network.

        They are at most a tile's or those of the training squares, which must fit into the memory.
        """
        for axis in (2, 3):
            size = image.shape[axis] // scale
            trained = self.spec["shape"][axis - 1] // self.factor
            most = size if self.tile is None else min(size, max(self.tile, trained))
            kept = most // self.multiple * self.multiple or size  # what is smaller than a multiple is refused below
            image = image.narrow(axis, (size - kept) // 2 * scale, kept * scale)
        return image

    def _conditions(self, low: Tensor) -> dict[str, Tensor]:
        return {"origin": self.codec.encode(self.enlarge(low)), "low": low}

    def decode(self, x0: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Images (B, 3, H, W), in range, of residuals (B, *)."""
        low, high = self.spec["range"]
        return self.codec.decode(x0 + conditions["origin"]).clamp(low, high)

    # Training.

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Weighted denoising error per example, (B,); "perceptual" beside it where that is asked for."""
        x0, conditions = self.encode(batch)
        wanted = only(conditions, self.denoiser)
        if self.perceptual is None:
            return self.objective(self.denoiser, x0, draw, **wanted)
        times = self.objective.times(self.process, len(x0), draw)
        answer, squared = self.objective.answered(times, self.denoiser, x0, draw, **wanted)
        error = self.objective.reduce(squared)
        distance = self.perceptual.distances(self.decode(answer, conditions), self._middle(batch["x"], self.factor))
        return {"loss": error + self.perceptual_weight * distance, "error": error, "perceptual": distance}

    # Restoring.

    def restore(self, low: Tensor, numbers: Tensor) -> Tensor:
        """Restored images (B, 3, H, W) in [-1, 1] of any size, each a function of (run seed, number).

        Args:
            low: (B, 3, h, w) in [-1, 1].
            numbers: (B,) int64, on the CPU or anywhere.
        """
        return restore_tiled(
            self._restore,
            low,
            self.factor,
            numbers=numbers,
            multiple=self.multiple,
            tile=self.tile,
            overlap=self.overlap,
            batch=max(self.tile_batch, len(low)),
            on_tile=self.on_part,
        )

    def _restore(self, low: Tensor, numbers: Tensor) -> Tensor:
        conditions = self._conditions(low)
        shape = tuple(conditions["origin"].shape)
        x0 = self.sampler(self.guided, shape, self.sample_draw(numbers), **only(conditions, self.guided))
        return self.decode(x0, conditions)

    @property
    def multiple(self) -> int:
        """What the sides of ``low`` are padded to multiples of."""
        side = self.codec.factor * int(getattr(self.network, "multiple", 1))
        return side // math.gcd(side, self.factor)

    def _check_tile(self) -> None:
        if self.tile is not None and (self.tile % self.multiple or not 0 <= self.overlap < self.tile):
            raise ValueError(
                f"tile must be a multiple of {self.multiple} pixels of the small image, which the network needs, and "
                f"larger than the overlap, which is 0 or more, got tile {self.tile} and overlap {self.overlap}"
            )

    def complete(self, batch: Batch) -> Batch:
        """``batch`` restored: "x", "before" (what it was made of), "bicubic", and "truth" where that is known."""
        low, numbers = batch["low"], batch["index"]
        found = {"before": low, "bicubic": self.enlarge(low).clamp(*self.spec["range"])}
        truth = {"truth": batch["x"]} if "x" in batch else {}
        named = {"name": batch["name"]} if "name" in batch else {}
        return {**found, "x": self.restore(low, numbers), **truth, "index": numbers, **named}

    def rivals_of(self, batch: Batch) -> dict[str, Tensor]:
        """Images to be compared with the true ones of a batch: restored, and merely enlarged."""
        low, high = self.spec["range"]
        enlarged = {mode: self.enlarge(batch["low"], mode).clamp(low, high) for mode in ("bicubic", "nearest")}
        return {"samples": self.restore(batch["low"], batch["index"]), **enlarged}

    def sample(self, indices: Tensor, **conditions: Any) -> Batch:
        """Restored validation images, number i modulo their number, as :meth:`complete` gives them.

        Raises:
            ValueError: there are no validation data, as in ``predict``.
        """
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is None:
            raise ValueError(f"{type(self).__name__} restores images, give it some: --data.path FOLDER (or FILE)")
        batch = data.examples("val", int(indices.max()) + 1 if len(indices) else 1)
        chosen = indices.cpu() % len(batch["index"])
        return self.complete({name: value[chosen].to(self.device) for name, value in batch.items()})

    def inputs(self, path: str) -> Pictures:
        """The pictures at ``path``, a file or a folder."""
        return Pictures(path)

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The pictures of a batch of files restored."""
        return self.complete(batch) if "low" in batch else super().predict_step(batch, batch_idx)

    def pictures(self) -> dict[str, Batch | Curve]:
        """The loss over the noise levels."""
        curve = loss_curve(self)
        return {} if curve is None else {"loss_by_level": curve}
