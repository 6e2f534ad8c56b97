"""Files as the authors of ResShift and of latent diffusion write them, small and with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lightning_sgm.io.released.model import State
from lightning_sgm.networks import SwinUNet
from lightning_sgm.networks.swin_blocks import shift_mask
from lightning_sgm.recipes import overlay

NETWORK: dict[str, Any] = {
    "channels": 16,
    "multipliers": [1, 2],
    "blocks": 1,
    "swin_channels": 16,
    "head_channels": 8,
    "window": 4,
}
SPEC = {"kind": "image", "shape": [3, 16, 16], "low_shape": [3, 16, 16]}  # of the small network


def recipe(folder: Path, **arguments: Any) -> str:
    """A recipe of a small model; ``arguments`` of the model are changed."""
    codec = {"class_path": "Autoencoder", "init_args": {"name": None}}
    model = overlay({"network": {"init_args": NETWORK}, "codec": codec, "metrics": []}, arguments)
    values = {"base": "paper/resshift_realsr_x4", "model": {"init_args": model}}
    data = {"path": None, "short_side": None, "hold_out": 5, "crop": 64, "eval_size": 64, "eval_crops": 2}
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({**values, "data": {"init_args": {**data, "batch_size": 2}}}))
    return str(path)


def network_state(seed: int = 0, spec: dict[str, Any] = SPEC, **arguments: Any) -> State:
    """Entries of a network with the tables of offsets and masks that the authors' code stores."""
    torch.manual_seed(seed)
    network = SwinUNet(spec, **{**NETWORK, **arguments})
    state = {name: 0.1 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        if hasattr(module, "relative_position_index"):
            state[f"{name}.relative_position_index"] = module.relative_position_index
        if getattr(module, "shift", 0):
            side = spec["shape"][1]  # what a mask says does not depend on it
            seen = shift_mask(side, side, module.window, module.shift, True, torch.device("cpu"))
            state[f"{name}.attn_mask"] = torch.where(seen, 0.0, -100.0)
    return state


def stage_state(
    seed: int = 0,
    width: int = 32,
    multipliers: Sequence[int] = (1, 1, 1),
    layers: Sequence[int] = (1, 2, 1),
    channels: int = 3,
    codes: int = 64,
    device: str = "cpu",
) -> State:
    """Entries of a first stage, named as in latent diffusion's code."""
    generator = torch.Generator(device if device != "meta" else "cpu").manual_seed(seed)
    state: State = {}

    def conv(name: str, before: int, out: int, kernel: int) -> None:
        drawn = torch.empty(out, before, kernel, kernel, device=device)
        state[f"{name}.weight"] = drawn.normal_(0, (before * kernel**2) ** -0.5, generator=generator)
        state[f"{name}.bias"] = torch.empty(out, device=device).normal_(0, 0.1, generator=generator)

    def norm(name: str, count: int) -> None:
        state[f"{name}.weight"] = torch.empty(count, device=device).normal_(1, 0.1, generator=generator)
        state[f"{name}.bias"] = torch.empty(count, device=device).normal_(0, 0.1, generator=generator)

    def residual(name: str, before: int, out: int) -> None:
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", before, out, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if before != out:
            conv(f"{name}.nin_shortcut", before, out, 1)

    def middle(name: str, count: int) -> None:
        residual(f"{name}.mid.block_1", count, count)
        norm(f"{name}.mid.attn_1.norm", count)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.mid.attn_1.{part}", count, count, 1)
        residual(f"{name}.mid.block_2", count, count)

    plan = [width * multiplier for multiplier in multipliers]
    conv("encoder.conv_in", 3, width, 3)
    now = width
    for level, out in enumerate(plan):
        for block in range(layers[level]):
            residual(f"encoder.down.{level}.block.{block}", now, out)
            now = out
        if level < len(plan) - 1:
            conv(f"encoder.down.{level}.downsample.conv", now, now, 3)
    middle("encoder", now)
    norm("encoder.norm_out", now)
    conv("encoder.conv_out", now, channels, 3)
    conv("decoder.conv_in", channels, now, 3)
    middle("decoder", now)
    for level, out in reversed(list(enumerate(plan))):
        for block in range(layers[level] + 1):
            residual(f"decoder.up.{level}.block.{block}", now, out)
            now = out
        if level:
            conv(f"decoder.up.{level}.upsample.conv", now, now, 3)
    norm("decoder.norm_out", now)
    conv("decoder.conv_out", now, 3, 3)
    state["quantize.embedding.weight"] = torch.empty(codes, channels, device=device).normal_(generator=generator)
    conv("quant_conv", channels, channels, 1)
    conv("post_quant_conv", channels, channels, 1)
    return state


class LiteralStage:
    """The first stage of latent diffusion written out, on the entries of its own files."""

    def __init__(self, state: State) -> None:
        self.state = state

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, padding if weight.shape[-1] == 3 else 0)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def _residual(self, name: str, x: Tensor) -> Tensor:
        h = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)))
        h = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", h)))
        return h + (self._conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def _middle(self, name: str, x: Tensor) -> Tensor:
        x = self._residual(f"{name}.block_1", x)
        h = self._norm(f"{name}.attn_1.norm", x)
        q, k, v = (self._conv(f"{name}.attn_1.{part}", h).flatten(2) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).mul(q.shape[1] ** -0.5).softmax(2)
        h = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
        return self._residual(f"{name}.block_2", x + self._conv(f"{name}.attn_1.proj_out", h))

    def _blocks(self, name: str, x: Tensor) -> Tensor:
        block = 0
        while f"{name}.block.{block}.conv1.weight" in self.state:
            x = self._residual(f"{name}.block.{block}", x)
            block += 1
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Images to latents that are not quantised."""
        h, level = self._conv("encoder.conv_in", x), 0
        while f"encoder.down.{level}.block.0.conv1.weight" in self.state:
            h = self._blocks(f"encoder.down.{level}", h)
            if f"encoder.down.{level}.downsample.conv.weight" in self.state:
                h = self._conv(f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), 2, 0)
            level += 1
        h = self._middle("encoder.mid", h)
        return self._conv("quant_conv", self._conv("encoder.conv_out", F.silu(self._norm("encoder.norm_out", h))))

    def decode(self, z: Tensor) -> Tensor:
        """Latents, quantised here, to images."""
        codes = self.state["quantize.embedding.weight"]
        nearest = torch.cdist(z.movedim(1, -1).flatten(0, 2), codes).argmin(1)
        z = codes[nearest].reshape(*z.movedim(1, -1).shape).movedim(-1, 1)
        h = self._middle("decoder.mid", self._conv("decoder.conv_in", self._conv("post_quant_conv", z)))
        levels = 1 + max(int(name.split(".")[2]) for name in self.state if name.startswith("decoder.up."))
        for level in reversed(range(levels)):
            h = self._blocks(f"decoder.up.{level}", h)
            if level:
                h = self._conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0))
        return self._conv("decoder.conv_out", F.silu(self._norm("decoder.norm_out", h)))
