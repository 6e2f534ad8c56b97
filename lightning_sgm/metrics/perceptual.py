"""How alike images look, and how good: by networks whose weights come from elsewhere."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn

from lightning_sgm.metrics.base import DoubleMetric
from lightning_sgm.metrics.restoration import check_pair, unit
from lightning_sgm.metrics.shift_tolerant import ShiftTolerant

_WEIGHTS = "weights/vST0.0/{net}_shift_tolerant.pth"  # in the package stlpips_pytorch
_LEAST = 32  # side of the images of a distance


class _Mean(DoubleMetric):
    """Mean over images of what a network says; the network is frozen, in float32, and in no checkpoint."""

    inputs: tuple[str, ...] = ("x", "truth")
    paired = True
    floor = False
    higher_is_better: bool | None = False
    total: Tensor
    images: Tensor

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name = name
        # Inside a list: the weights belong neither into checkpoints nor into another precision.
        self._network = [network.requires_grad_(False).eval()]
        self.add_sum("total")
        self.add_sum("images")

    @property
    def frozen(self) -> list[nn.Module]:
        """What copies of the metric share."""
        return self._network

    @torch.no_grad()
    def _judge(self, *images: Tensor) -> None:
        """Add what the network says of images."""
        network = self._network[0].to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            values = network(*images).double().flatten()
        if len(values) != len(images[0]):
            raise ValueError(f"{self.name} gave {len(values)} values for {len(images[0])} images")
        self.add("total", values.sum())
        self.add("images", float(len(values)))

    def compute(self) -> Tensor:
        """The mean, a float64 scalar.

        Raises:
            ValueError: there was no image.
        """
        if not self.images:
            raise ValueError(f"{self.name} has seen no image")
        return self.total / self.images


class PerceptualDistance(_Mean):
    """Distance of restored images from the true ones, for a network of two images in [-1, 1]."""

    def update(self, x: Tensor, truth: Tensor, real: bool = False) -> None:
        """Add images.

        Args:
            x: (B, 1 or 3, H, W) restored, in [-1, 1]; rounded to 8 bits, as files would hold them.
            truth: like x.
            real: has no effect, a pair is always a sample and its truth.

        Raises:
            ValueError: other shapes, or sides below 32 pixels.
        """
        check_pair(x, truth)
        if min(x.shape[-2:]) < _LEAST:
            raise ValueError(f"{self.name} needs images of at least {_LEAST} x {_LEAST} pixels, got {x.shape[-2:]}")
        self._judge(*(_colors(side) * 2 - 1 for side in (x, truth)))

    def distances(self, x: Tensor, truth: Tensor) -> Tensor:
        """(B,) float32 distances of images (B, 3, H, W) in [-1, 1] as they are, with gradients: for losses."""
        network = self._network[0].to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            return network(x.float(), truth.float()).flatten()


class STLPIPS(PerceptualDistance):
    """Shift-tolerant LPIPS (Ghildyal and Liu 2022, 2207.13686); 0 is best. It is not LPIPS.

    The weights come with the package stlpips-pytorch, whose file is read and whose code is not run. On bicubic x4 it
    prefers blocky nearest-neighbour images to smooth ones: report it beside PSNR.

    Args:
        net: network whose features are compared; their values do not compare, and the metric of "vgg" is st_lpips_vgg.

    Raises:
        ValueError: stlpips-pytorch is not installed, or its file is another one; net is neither of these.
    """

    def __init__(self, net: Literal["alex", "vgg"] = "alex") -> None:
        if net not in ("alex", "vgg"):
            raise ValueError(f"net must be alex or vgg, got {net!r}")
        super().__init__("st_lpips" if net == "alex" else f"st_lpips_{net}", ShiftTolerant(net, _read_weights(net)))


class LPIPS(PerceptualDistance):
    """LPIPS (Zhang et al. 2018, 1801.03924) by torchmetrics; 0 is best. Values of "alex" and "vgg" do not compare.

    Args:
        net: network whose features are compared; torchvision downloads its weights.

    Raises:
        ValueError: the weights are not there and cannot be downloaded.
    """

    def __init__(self, net: Literal["alex", "vgg"] = "alex") -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            network = LearnedPerceptualImagePatchSimilarity(net_type=net).net
        except (URLError, OSError) as error:
            raise ValueError(
                f"LPIPS needs torchvision's ImageNet weights of {net}, which are not in {torch.hub.get_dir()} and "
                f"could not be downloaded: connect to the internet once, or use STLPIPS"
            ) from error
        super().__init__("lpips" if net == "alex" else f"lpips_{net}", network)


class NoReference(_Mean):
    """Quality of images without a truth, by the package pyiqa, which downloads its weights.

    Args:
        measure: "niqe" (lower is better), "clipiqa" or "musiq" (higher is better).

    Raises:
        ValueError: pyiqa is not installed or has no weights.
    """

    inputs = ("x",)
    paired = False
    higher_is_better = None

    def __init__(self, measure: Literal["niqe", "clipiqa", "musiq"] = "clipiqa") -> None:
        try:
            network = import_module("pyiqa").create_metric(measure)
        except ImportError as error:
            raise ValueError(f"{measure} needs pyiqa: pip install 'lightning_sgm[quality]'") from error
        except OSError as error:
            raise ValueError(f"pyiqa could not download the weights of {measure}: connect once: {error}") from error
        super().__init__(measure, network)

    def update(self, x: Tensor, real: bool = False) -> None:
        """Add samples.

        Args:
            x: (B, 1 or 3, H, W) in [-1, 1]; rounded to 8 bits, as files would hold them.
            real: whether they are data, which are passed over.
        """
        if not real:
            self._judge(_colors(x))


def _colors(x: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] as (B, 3, H, W) float32 in [0, 1], rounded to 8 bits."""
    return unit(x, rounded=True).float().expand(-1, 3, -1, -1)


def _read_weights(net: str) -> dict[str, Tensor]:
    """The released tensors of a network in the installed package."""
    spec = find_spec("stlpips_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("STLPIPS needs the weights in stlpips-pytorch: pip install 'lightning_sgm[restoration]'")
    path = Path(spec.submodule_search_locations[0]) / _WEIGHTS.format(net=net)
    if not path.is_file():
        raise ValueError(f"this stlpips-pytorch has no {path}: pip install --force-reinstall stlpips-pytorch")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
