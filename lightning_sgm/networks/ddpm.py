"""The U-Net of DDPM (Ho et al. 2020) as the score SDE code has it, with its parameter names."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sgm.networks.base import Spec
from lightning_sgm.networks.ncsnpp import NCSNpp


class DDPM(NCSNpp):
    """The older architecture ("ddpm") of Song et al. 2021: plain residual blocks, convolutions between levels.

    It is the U-Net of :class:`~lightning_sgm.networks.ncsnpp.NCSNpp` with its ingredients left out; released weights
    (``all_modules.<i>.<name>``) fit. On the way up a level has one attention, where Ho et al. have one per block.
    Group norms have min(C / 4, 32) groups: the reference's 32 from 128 channels on. For CIFAR-10 ``channels=[128, 256,
    256, 256], layers_per_block=2, attention=[16], dropout=0.1``, 35,218,947 parameters.

    Args:
        spec: of image data; ``shape`` and ``classes`` are used. The sides must be divisible by 2^(levels - 1).
        channels: channels of each level, finest first; each level but the last halves the image.
        layers_per_block: residual blocks per level.
        attention: heights of the images (such as 16) at which there is attention.
        dropout: inside residual blocks, in training.
        conditional: take the batch's class as condition ``label``, (B,) int64 in 0 .. K; K, or no label, is the null
            class of unconditional answers.
    """

    def __init__(
        self,
        spec: Spec,
        channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        conditional: bool = False,
    ) -> None:
        super().__init__(spec, channels, layers_per_block, attention, dropout, conditional, block="ddpm", rescale=False)
