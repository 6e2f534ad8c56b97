"""The adversarial term: heads on the frozen teacher's features tell the student's samples from real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sgm.denoiser import BaseDenoiser, Denoiser
from lightning_sgm.networks.discriminator import TimeAwareHeads
from lightning_sgm.objectives.denoising import ChainTimes, Times, UniformTime
from lightning_sgm.objectives.distillation import Phase, Term, example_mean
from lightning_sgm.processes.chains import Chain
from lightning_sgm.processes.gaussian import GaussianProcess, Level

Features = list[Tensor]


class Adversarial(Term):
    """Hinge losses of a discriminator of noised samples, which knows the noise level (TAD-SR).

    Real z_r and fake z_s are noised by one noise n to a level, x = alpha z + sigma n, and shown to the teacher. Heads D
    (:class:`~lightning_sgm.networks.discriminator.TimeAwareHeads`) turn its features into K logits:

        critic  mean relu(1 - D(x_r)) + mean relu(1 + D(x_s)),   student  - mean D(x_s).

    The features of x_s are made once per phase, with their graph; the heads see them without it in the critic's loss
    and again, after the critic's step, in the student's. At first the logits do not depend on x: the critic's loss is 2
    and the student gets no gradient. "logit_real" and "logit_fake" are left in ``phase.logged``.

    Args:
        weight: see :class:`Term`.
        hidden: channels of the heads.
        times: law of the noise; None: all indices of a chain but the last, as in the paper's code, or uniform times of
            a continuous process.
        real: the "data", or the teacher's "solution" where there are none.
    """

    has_critic = True

    def __init__(
        self,
        weight: float = 0.02,
        hidden: int = 64,
        times: Times | None = None,
        real: Literal["data", "solution"] = "data",
    ) -> None:
        super().__init__(weight)
        if real not in ("data", "solution"):
            raise ValueError(f"real must be data or solution, got {real!r}")
        self.hidden, self.times = hidden, times or UniformTime()
        self._paper = times is None
        self.real: Literal["data", "solution"] = real
        self.heads: nn.Module | None = None

    def build(self, teacher: BaseDenoiser) -> None:
        """Make the heads.

        Raises:
            ValueError: the teacher gives no features, or could still learn from the student's loss.
        """
        if not isinstance(teacher, Denoiser) or not hasattr(teacher.network, "feature_channels"):
            network = type(getattr(teacher, "network", teacher)).__name__
            raise ValueError(
                f"Adversarial judges by features of the teacher, and {network} has no features and feature_channels: "
                "take a teacher with them, such as SRResNet or SwinUNet, or leave the term out"
            )
        if any(parameter.requires_grad for parameter in teacher.network.parameters()):
            raise ValueError("Adversarial needs a frozen teacher: call requires_grad_(False) of its network first")
        if self._paper and isinstance(teacher.process, Chain):
            self.times = ChainTimes(first=0, last=-2)
        channels = cast("Sequence[int]", teacher.network.feature_channels)
        self.heads = TimeAwareHeads(channels, hidden=self.hidden)

    def student(self, phase: Phase) -> Tensor:
        """Losses (B,) by the heads as they are now; their parameters get a gradient unless it is switched off."""
        logits = self._judge(self._fake(phase), self._label(phase))
        phase.log("logit_fake", logits)
        return -example_mean(logits)

    def critic(self, phase: Phase) -> Tensor:
        """Losses (B,) of the heads."""
        with torch.no_grad():
            real = self._features(phase.data if self.real == "data" else phase.solution, phase)
        # One call for both: spectral norms move with each, and the two must be judged by the same weights.
        both = [torch.cat([a, b.detach()]) for a, b in zip(real, self._fake(phase), strict=True)]
        real_logits, fake_logits = self._judge(both, self._label(phase).repeat(2)).chunk(2)
        phase.log("logit_real", real_logits)
        phase.log("logit_fake", fake_logits)
        return example_mean(F.relu(1.0 - real_logits)) + example_mean(F.relu(1.0 + fake_logits))

    def _fake(self, phase: Phase) -> Features:
        """Features of the student's noised sample, made once."""
        return phase.shared((self, "features"), lambda: self._features(phase.sample, phase))

    def _features(self, z: Tensor, phase: Phase) -> Features:
        level, noise = phase.noise(self, self.times)
        teacher = phase.teacher
        assert isinstance(teacher, Denoiser)
        return teacher.features(teacher.process.perturb(z, level, noise), level.t, **phase.given(teacher))

    def _label(self, phase: Phase) -> Tensor:
        """What the heads are told of the level, (B,) float32."""
        level, _ = phase.noise(self, self.times)
        return _label_of(level, phase.teacher.process).float()

    def _judge(self, features: Features, label: Tensor) -> Tensor:
        """Logits (B, K)."""
        if self.heads is None:
            raise RuntimeError("Adversarial has no heads yet: the method must call build(teacher) first")
        return self.heads(features, label)


def _label_of(level: Level, process: GaussianProcess) -> Tensor:
    """The chain's index, or 999 t of a continuous process."""
    return process.index(level.t) if isinstance(process, Chain) else 999.0 * level.t
