"""Codecs: there and back, frozen, and diffusers' autoencoders in the roles that ResShift gives them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sgm.codecs import VQ_F4, Autoencoder, Codec, Identity, PixelUnshuffle
from lightning_sgm.random import Draw

SMALL = {"block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
VQ = {**VQ_F4, **SMALL, "num_vq_embeddings": 64}
KL = {
    **{key: VQ_F4[key] for key in ("down_block_types", "up_block_types")},
    **SMALL,
    "latent_channels": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}


def vq(**arguments):
    codec = Autoencoder("vq", config=VQ, **arguments)
    # diffusers' new codebook is so small that all latents would share one entry.
    codec.model.quantize.embedding.weight.data = Draw(0).normal((64, 3))
    return codec


def kl(**arguments):
    return Autoencoder("kl", config=KL, **arguments)


def ragged(kind, **config):
    """Levels with other numbers of layers than diffusers itself can have."""
    given = {**(VQ if kind == "vq" else KL), "layers_per_block": [1, 3, 2], **config}
    return Autoencoder(kind, config=given)


def images(*shape):
    return Draw(1).normal(shape).clamp(-1, 1)


CODECS = {
    "identity": Identity,
    "unshuffle": PixelUnshuffle,
    "unshuffle 2": lambda: PixelUnshuffle(2),
    "vq": vq,
    "kl": kl,
    "ragged vq": lambda: ragged("vq"),
    "ragged kl": lambda: ragged("kl"),
}
every_codec = pytest.mark.parametrize("make", CODECS.values(), ids=CODECS.keys())


@every_codec
def test_shapes_are_as_announced(make):
    codec, x = make(), images(2, 3, 16, 24)
    z = codec.encode(x)
    assert tuple(z.shape[1:]) == codec.shape([3, 16, 24])
    assert codec.decode(z).shape == x.shape


@every_codec
def test_a_codec_is_never_trained(make):
    codec = make()
    assert not any(module.training for module in codec.modules())
    model = nn.Sequential(nn.Linear(2, 2), codec)
    model.train()
    assert model[0].training
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())


@every_codec
def test_gradients_pass_through_to_the_input(make):
    codec = make()
    z = codec.encode(images(1, 3, 16, 16)).requires_grad_()
    codec.decode(z).square().sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad.flatten(2).abs().sum(2) > 0).all()
    x = images(1, 3, 16, 16).requires_grad_()
    codec.encode(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.any()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_unshuffling_is_lossless(factor, rows, columns, channels):
    codec, x = PixelUnshuffle(factor), images(2, channels, rows * factor, columns * factor)
    z = codec.encode(x)
    assert torch.equal(codec.decode(z), x)
    assert torch.equal(z.flatten().sort().values, x.flatten().sort().values)


def test_unshuffling_by_hand():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    z = PixelUnshuffle(2).encode(x)
    assert z[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert PixelUnshuffle(4).shape([3, 256, 128]) == (48, 64, 32)
    assert Identity().shape([3, 5]) == (3, 5)


def test_vq_f4_has_the_size_of_the_papers():
    with torch.device("meta"):
        codec = Autoencoder(config=VQ_F4)
    assert sum(parameter.numel() for parameter in codec.parameters()) == 55_322_782
    assert codec.shape([3, 256, 512]) == (3, 64, 128)
    assert codec.scale == 1.0


def test_latents_are_quantised_on_the_way_back_only():
    codec = vq()
    codes = codec.model.quantize.embedding.weight
    z = codec.encode(images(2, 3, 16, 16))
    nearest = torch.cdist(z.movedim(1, -1).reshape(-1, 3), codes).argmin(1)
    quantised = codes[nearest].reshape(2, 4, 4, 3).movedim(-1, 1)
    assert (z - quantised).abs().max() > 0.01
    assert len(nearest.unique()) > 1
    torch.testing.assert_close(codec.decode(z), codec.decode(quantised))
    straight = codec.model.decode(quantised, force_not_quantize=True).sample
    torch.testing.assert_close(codec.decode(z), straight)


def test_the_scale_is_undone():
    x, plain, scaled = images(2, 3, 16, 16), vq(), vq(scale=3.0)
    scaled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(scaled.encode(x), 3.0 * plain.encode(x))
    torch.testing.assert_close(scaled.decode(scaled.encode(x)), plain.decode(plain.encode(x)))


def test_kl_latents_are_means_in_the_scale_of_their_configuration():
    codec, x = kl(), images(2, 3, 16, 16)
    mean = codec.model.encode(x).latent_dist.mean
    z = codec.encode(x)
    torch.testing.assert_close(z, 0.5 * (mean - 0.25))
    assert torch.equal(codec.encode(x), z)
    torch.testing.assert_close(codec.decode(z), codec.model.decode(mean).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [vq, kl, lambda: ragged("vq"), lambda: ragged("kl")])
def test_a_saved_autoencoder_comes_back(make, tmp_path):
    codec, x = make(), images(1, 3, 16, 16)
    codec.model.save_pretrained(tmp_path / "vae")
    for name, subfolder in ((tmp_path / "vae", None), (tmp_path, "vae")):
        loaded = Autoencoder(codec.kind, str(name), subfolder)
        assert loaded.scale == codec.scale
        assert torch.equal(loaded.encode(x), codec.encode(x))
        assert torch.equal(loaded.decode(loaded.encode(x)), codec.decode(codec.encode(x)))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match=f"is a {type(codec.model).__name__}, but kind"):
        Autoencoder("kl" if codec.kind == "vq" else "vq", str(tmp_path / "vae"))


def test_each_level_may_have_its_own_number_of_layers():
    model = ragged("vq").model
    assert [len(block.resnets) for block in model.encoder.down_blocks] == [1, 3, 2]
    assert [len(block.resnets) for block in model.decoder.up_blocks] == [3, 4, 2]
    assert model.config["layers_per_block"] == [1, 3, 2]
    # The channels change in the first layer of a level, so as many layers everywhere are the same thing.
    torch.manual_seed(0)
    codec, x = ragged("vq", layers_per_block=[2, 2, 2]), images(1, 3, 16, 16)
    even = Autoencoder("vq", config={**VQ, "layers_per_block": 2})
    even.load_state_dict(codec.state_dict())
    assert torch.equal(even.encode(x), codec.encode(x))
    assert torch.equal(even.decode(even.encode(x)), codec.decode(codec.encode(x)))


def test_a_missing_autoencoder(tmp_path):
    for name in (str(tmp_path / "nothing"), "./nothing/there", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no VQModel with safetensors at"):
            Autoencoder("vq", name)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        Autoencoder("vq", str(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelUnshuffle(0), "factor of PixelUnshuffle must be at least 1"),
        (lambda: PixelUnshuffle(4).shape([3, 30, 32]), "PixelUnshuffle needs image sides divisible by 4, got 30 x 32"),
        (lambda: PixelUnshuffle(4).encode(torch.zeros(1, 3, 32, 30)), "got 32 x 30: pad or crop"),
        (lambda: PixelUnshuffle(4).shape([7]), r"for images \(C, H, W\), got data of shape \[7\]: choose Identity"),
        (lambda: kl().encode(torch.zeros(1, 3, 18, 16)), "this autoencoder needs image sides divisible by 4"),
        (lambda: vq().shape([1, 16, 16]), "is for 3 channels, the data have 1"),
        (lambda: Autoencoder(), "exactly one of name"),
        (lambda: Autoencoder(name="a", config=VQ), "exactly one of name"),
        (lambda: Autoencoder("vae", config=VQ), "must be vq or kl"),  # type: ignore[arg-type]
        (lambda: vq(scale=0.0), "scale of an Autoencoder must be positive"),
        (lambda: ragged("vq", layers_per_block=[1, 2]), "one of 1 or more for each of 3 levels"),
        (lambda: ragged("vq", layers_per_block=[1, 2, 0]), "one of 1 or more for each of 3 levels"),
        (lambda: Autoencoder(config={"z_channels": 3}), "none of this diffusers' VQModel: .*z_channels"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_base_promises_only():
    for call in (lambda c: c.shape([1]), lambda c: c.encode(torch.zeros(1)), lambda c: c.decode(torch.zeros(1))):
        with pytest.raises(NotImplementedError):
            call(Codec())
