"""First stages of latent diffusion: diffusers' autoencoder computes what theirs does, and others are refused.

They were compared with the authors' own code too: latents and images of VQ-f4 and of VQ-f8 agree to 5e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sgm.codecs import VQ_F4, Autoencoder
from lightning_sgm.io.released.first_stage import first_stage_of, write_folder
from lightning_sgm.random import Draw
from tests.io.released_restoration_files import LiteralStage, network_state, stage_state

STAGE = "autoencoder_vq_f4.pth"
F8 = {"width": 64, "multipliers": (1, 2, 4, 8), "layers": (1, 2, 3, 4), "channels": 8, "codes": 4096}


def images(*shape: int) -> Tensor:
    return Draw(3).uniform(shape) * 2 - 1


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"multipliers": (1, 2), "layers": (2, 2)},
        {"multipliers": (1, 1, 2, 2), "layers": (1, 2, 3, 4), "channels": 8},
    ],
    ids=["f4", "f2", "f8"],
)
def test_the_first_stage_computes_what_theirs_does(sizes: dict[str, Any]):
    state = stage_state(**sizes)
    theirs, found = LiteralStage(state), first_stage_of(state, Path("a.pth"))
    codec = Autoencoder("vq", config=found.config)
    codec.model.load_state_dict(found.weights)
    x = images(1, 3, 32, 48)
    z = codec.encode(x)
    assert (z.shape[1], codec.factor) == (found.channels, found.factor)
    assert z.std() > 0.1
    torch.testing.assert_close(z, theirs.encode(x), rtol=0, atol=1e-5)
    wanted = theirs.decode(z)
    assert wanted.std() > 0.1
    torch.testing.assert_close(codec.decode(z), wanted, rtol=0, atol=1e-5)


def test_released_first_stages_in_full_size():
    """Numbers of entries and parameters are those of the authors' own modules."""
    f4 = stage_state(width=128, multipliers=(1, 2, 4), layers=(2, 2, 2), codes=8192, device="meta")
    assert (len(f4), sum(tensor.numel() for tensor in f4.values())) == (205, 55_322_782)
    assert first_stage_of(f4, Path("a.pth")).config == VQ_F4
    f8 = stage_state(**F8, device="meta")  # type: ignore[arg-type]
    assert (len(f8), sum(tensor.numel() for tensor in f8.values())) == (285, 77_009_115)
    found = first_stage_of(f8, Path("a.pth"))
    assert (found.factor, found.channels, found.config["layers_per_block"]) == (8, 8, [1, 2, 3, 4])


@pytest.mark.parametrize("layers", [(2, 2, 2), (1, 2, 1)])
def test_a_folder_of_diffusers(tmp_path: Path, layers: tuple[int, ...]):
    state = {**stage_state(layers=layers), "loss.discriminator.weight": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / STAGE)
    write_folder(tmp_path / STAGE, tmp_path / "vq-f4")
    codec, x = Autoencoder("vq", str(tmp_path / "vq-f4")), images(1, 3, 16, 16)
    assert not codec.stored
    torch.testing.assert_close(codec.encode(x), LiteralStage(state).encode(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="vq-f4 exists already"):
        write_folder(tmp_path / STAGE, tmp_path / "vq-f4")
    torch.save(network_state(), tmp_path / "net.pth")
    with pytest.raises(
        ValueError, match=r"net.pth is not a VQ autoencoder of latent diffusion or is damaged: it lacks"
    ):
        write_folder(tmp_path / "net.pth", tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.down.0.attn.0.q.weight": torch.ones(1)}, "1 unexpected .encoder.down_blocks.0.attn.0.q.weight"),
        ({"decoder.mid.block_1.norm1.bias": None}, "1 missing .decoder.mid_block.resnets.0.norm1.bias"),
        (
            {"decoder.up.1.block.0.conv1.bias": torch.ones(3)},
            r"another shape .decoder.up_blocks.1.resnets.0.conv1.bias",
        ),
        ({"encoder.conv_in.weight": None}, "it lacks 'encoder.conv_in.weight'"),
    ],
)
def test_other_autoencoders_are_refused(changes: dict[str, Tensor | None], message: str):
    state = {name: value for name, value in {**stage_state(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        first_stage_of(state, Path("a.pth"))
