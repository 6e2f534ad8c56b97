"""A denoiser that knows the mean and covariance of its data, so that its network learns only what these do not tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sgm.denoiser import BaseDenoiser, Label, Preconditioning
from lightning_sgm.processes.chains import as_chain
from lightning_sgm.processes.gaussian import GaussianProcess, Level, Time, as_time

_MOST = 8192  # values of an example: the covariance of more does not fit
_AT_ONCE = 1024  # examples whose products are taken at once


class LinearPreconditioning(Preconditioning):
    """The network corrects the best linear estimate of x_0, in units of what that leaves open.

    For data of mean m and covariance sum_k v_k b_k b_k^T, x_t = alpha x_0 + sigma eps has in direction b_k the variance
    T_k = alpha^2 v_k + sigma^2. The best linear estimate of x_0 there is m + alpha v_k / T_k (x_t - alpha m), exact for
    Gaussian data (Wiener), and its error has variance v_k sigma^2 / T_k. The network is shown (x_t - alpha m) /
    sqrt(T_k), of unit variance in every direction at every level, and its answer counts in units of that error. With
    equal v_k this is EDM's preconditioning (Karras et al. 2022, table 1). Where directions differ by orders of
    magnitude, as the level of a window and the movements in it do, each is denoised at the noise levels that matter to
    it, and :class:`~lightning_sgm.objectives.OutputWeight` weighs all of them equally.

    The moments come from training data (:meth:`Moments.fit`) and are stored in checkpoints.

    Args:
        floor: directions with less than so much of the mean variance are taken to have none: x_0 is m there.
        label: what the network is told of the level, see :class:`~lightning_sgm.denoiser.Preconditioning`; "time" by
            default.
    """

    def __init__(self, floor: float = 1e-9, label: Label | None = None) -> None:
        super().__init__("x0", label)
        if not 0 < floor < 1:
            raise ValueError(f"floor of LinearPreconditioning must lie strictly between 0 and 1, got {floor}")
        self.floor = floor

    def scales(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """There are none for all directions alike, so that denoisers without moments refuse it.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "LinearPreconditioning needs a method that learns the covariance of its data, which only PaDTS does: "
            "choose EDMPreconditioning"
        )


class Moments(nn.Module):
    """Mean and principal directions of data, learnt once and stored in checkpoints; float64 whatever the precision.

    Args:
        shape: of an example, (*).
        floor: see :class:`LinearPreconditioning`.

    Attributes:
        mean: (D,) for examples of D values.
        basis: (D, D), a direction in each column.
        variances: (D,), increasing; 0 for directions the data do not have.

    Raises:
        ValueError: more than 8192 values.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor

    def __init__(self, shape: Sequence[int], floor: float = 1e-9) -> None:
        super().__init__()
        size = math.prod(shape)
        if size > _MOST:
            raise ValueError(
                f"LinearPreconditioning is for examples of at most {_MOST} values, these have {size}: choose "
                "EDMPreconditioning, or shorter windows"
            )
        self.floor = floor
        self._fitted = False
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("basis", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("variances", torch.zeros(size, dtype=torch.float64))

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` has been called, now or before the checkpoint was written."""
        # Asked at every step: the device is waited for only until the answer is yes.
        self._fitted = self._fitted or bool(self.variances.any())
        return self._fitted

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Learn from examples (N, *).

        Raises:
            ValueError: they are fewer than two, do not vary, or are not finite.
        """
        values = x.flatten(1)
        if len(values) < 2 or not values.isfinite().all() or not (values != values[:1]).any():
            raise ValueError(
                f"LinearPreconditioning learns from at least 2 examples, finite and not all the same, which these "
                f"{len(values)} are not: look at the data"
            )
        mean = sum(part.double().sum(0) for part in values.split(_AT_ONCE)) / len(values)
        covariance = torch.zeros_like(self.basis)
        for part in values.split(_AT_ONCE):
            centred = part.double() - mean
            covariance += centred.T @ centred / (len(values) - 1)
        variances, basis = torch.linalg.eigh(covariance)
        alive = variances > self.floor * variances.mean()
        if len(values) <= len(mean) and not alive.all():
            # So few examples do not show all directions: those not seen may vary as the least of the others do.
            rank_zero_warn(
                f"{len(values)} examples of {len(mean)} values do not show their covariance: shorter examples, more of "
                "them, or EDMPreconditioning may do better"
            )
            variances = torch.where(alive, variances, variances[alive].min())
            alive = torch.ones_like(alive)
        # Constant values must stay so to the last bit: correlations of roundings have infinite gradients.
        constant = (values == values[:1]).all(0)
        self.mean.copy_(torch.where(constant, values[0].to(mean), mean))
        self.basis.copy_(torch.where(constant[:, None] & alive, 0.0, basis))
        self.variances.copy_(torch.where(alive, variances, 0.0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Moments:
        # bf16-true and .half() would round small directions away; only the device may change.
        kept = {name: getattr(self, name) for name in ("mean", "basis", "variances")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self


class LinearDenoiser(BaseDenoiser):
    """A network under :class:`LinearPreconditioning`.

    Args:
        network: called as network(x, label, **conditions).
        process: the Gaussian process.
        preconditioning: what the network is told.
        moments: of the data.
    """

    def __init__(
        self, network: nn.Module, process: GaussianProcess, preconditioning: LinearPreconditioning, moments: Moments
    ) -> None:
        super().__init__(process)
        if preconditioning.label_kind == "index":
            as_chain(process, "the label index")
        self.network, self.preconditioning, self.moments = network, preconditioning, moments
        self.conditions = tuple(getattr(network, "conditions", ()))
        self.classes = int(getattr(network, "classes", 0))

    def x0(self, x: Tensor, t: Time, **conditions: Tensor) -> Tensor:
        """E[x_0 | x_t].

        Raises:
            RuntimeError: the moments are not known.
        """
        if not self.moments.fitted:
            raise RuntimeError("LinearPreconditioning does not know the data yet: fit first, or load a checkpoint")
        level = self.process.level(as_time(t, x.device))
        dtype = torch.promote_types(x.dtype, torch.float32)
        basis, mean, variances = (part.to(dtype) for part in (self.moments.basis, self.moments.mean, self._variances))
        total, error = (part.to(dtype) for part in self._scales(level))
        alpha = level.alpha.to(dtype)[..., None]
        seen = _product(x.flatten(1).to(dtype) - alpha * mean, basis) / total
        label = self.preconditioning.label(level, self.process).to(dtype).expand(len(x))
        output = self.network(_product(seen, basis.T).view(x.shape).to(x.dtype), label, **conditions)
        output = _product(output.to(dtype).flatten(1), basis)
        return (mean + _product(alpha * variances / total * seen + error * output, basis.T)).view(x.shape).to(x.dtype)

    def in_output(self, error: Tensor, level: Level) -> Tensor:
        """Errors of x_0 (B, *) in units of the network's answer, (B, D); 0 where the data do not vary.

        Scaled so that their mean is over the directions that the data have.
        """
        _, scale = self._scales(level)
        alive = self._variances > 0
        inverse = torch.where(alive, 1.0 / torch.where(alive, scale, 1.0), 0.0) * alive.double().mean().rsqrt()
        return _product(error.flatten(1), self.moments.basis.to(error.dtype)) * inverse.to(error.dtype)

    @property
    def _variances(self) -> Tensor:
        return self.moments.variances

    def _scales(self, level: Level) -> tuple[Tensor, Tensor]:
        """sqrt(T_k) and sqrt(v_k) sigma / sqrt(T_k), float64 of shape (D,) or (B, D)."""
        alpha, sigma = level.alpha[..., None], level.sigma[..., None]
        total = torch.sqrt(alpha**2 * self._variances + sigma**2)
        total = torch.where(total > 0, total, torch.inf)  # without variance and without noise: nothing is shown
        return total, torch.sqrt(self._variances) * sigma / total


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Their product, in full precision also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ matrix
