"""diffusers' ``UNet2DModel`` exactly as a released configuration builds it, for weights made with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sgm.networks.base import Network, Spec, entry


class DiffusersUNet(Network):
    """A ``UNet2DModel`` for images in [-1, 1]: the DDPMs and NCSN++ of the hub.

    diffusers' NCSN++ (``time_embedding_type="fourier"``) takes noisy images of the range [0, 1] and their sigma, and
    divides its answer by sigma. Here it takes the range [-1, 1] and the label ln sigma, and the division is undone:
    scaled_score prediction and the label log_half_sigma, as for :class:`~lightning_sgm.networks.ncsnpp.NCSNpp`. Others
    ("positional") take the label as it is.

    For a new model rather use :class:`~lightning_sgm.networks.unet.UNet`, which knows diffusers' traps.

    Args:
        spec: of image data without classes; ``shape`` is used.
        config: constructor arguments of ``UNet2DModel``, plain values.

    Raises:
        ValueError: the configuration is of another model, or not for these data.
    """

    def __init__(self, spec: Spec, config: dict[str, Any]) -> None:
        from diffusers.models.unets.unet_2d import UNet2DModel

        super().__init__()
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        self.fourier = arguments.get("time_embedding_type") == "fourier"
        try:
            self.model = UNet2DModel(**{**arguments, "center_input_sample": False})
        except TypeError as error:
            raise ValueError(f"the configuration is none of this diffusers' UNet2DModel: {error}") from error
        given = self.model.config
        channels = int(entry(spec, "shape", "DiffusersUNet")[0])
        if given.in_channels != channels or given.out_channels != channels:
            raise ValueError(
                f"the model takes {given.in_channels} and gives {given.out_channels} channels, the data have {channels}"
            )
        if self.model.class_embedding is not None or given.time_embedding_type == "learned":
            raise ValueError("a UNet2DModel with classes or a learned time embedding is not supported")

    def forward(self, x: Tensor, noise: Tensor, /) -> Tensor:
        """Images (B, C, H, W) and noise labels (B,) to images (B, C, H, W)."""
        if not self.fourier:
            return self.model(x, noise, return_dict=False)[0]
        sigma = torch.exp(noise)
        return self.model(x, sigma, return_dict=False)[0] * sigma.to(x.dtype)[:, None, None, None]
