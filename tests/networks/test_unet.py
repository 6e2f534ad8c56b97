import pytest
import torch

from lightning_sgm.networks.unet import UNet
from lightning_sgm.testing import check_network

DIGITS = {"kind": "image", "shape": [1, 8, 8], "classes": 10}


def perturbed(**options):
    """A small network whose zero layers are not zero."""
    torch.manual_seed(0)
    network = UNet(DIGITS, **{"channels": [8, 8], **options}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ([1, 8, 8], {"channels": [8, 16], "attention": [4]}),
        ([3, 16, 8], {"channels": [8, 8, 12], "layers_per_block": 2, "embedding": "fourier"}),
        ([2, 5, 5], {"channels": [8], "time_scale_shift": "default"}),
        ([1, 8, 8], {"channels": [8, 8], "conditional": True}),
    ],
)
def test_satisfies_the_contract(shape, options):
    spec = {"kind": "image", "shape": shape, "classes": 4}
    check_network(lambda spec: UNet(spec, **options), spec)


def test_digits_size_and_zero_start():
    network = UNet(DIGITS, channels=[16, 32], attention=[4])
    assert sum(p.numel() for p in network.parameters()) == 190369
    assert (network(torch.randn(2, 1, 8, 8), torch.tensor([0.0, 999.0])) == 0).all()


def test_attention_where_asked_and_in_the_middle_with_one_head():
    from diffusers.models.attention_processor import Attention

    def heads(**options):
        network = UNet({**DIGITS, "shape": [1, 16, 16]}, channels=[16, 16, 32], **options)
        return [module.heads for module in network.modules() if isinstance(module, Attention)]

    assert heads() == [1]
    assert heads(attention=[8]) == [1] * 4
    assert all(m.group_norm is not None for m in UNet(DIGITS).modules() if isinstance(m, Attention))


def test_classes_and_the_null_class():
    network = perturbed(conditional=True)
    assert network.conditions == ("label",)
    assert network.model.class_embedding.num_embeddings == 11
    x, noise = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    null = torch.full((3,), 10)
    assert torch.equal(network(x, noise), network(x, noise, label=null))
    assert not torch.allclose(network(x, noise, label=null), network(x, noise, label=torch.zeros(3, dtype=torch.int64)))


def test_conditions_are_a_choice():
    assert UNet(DIGITS, channels=[8]).conditions == ()
    with pytest.raises(ValueError, match="no classes"):
        UNet({"shape": [1, 8, 8], "classes": 0}, channels=[8], conditional=True)


@pytest.mark.parametrize(("embedding", "near", "far"), [("positional", 400.0, 500.0), ("fourier", 0.2, 0.4)])
def test_the_noise_label_matters_and_may_be_fractional(embedding, near, far):
    network = perturbed(embedding=embedding)
    x = torch.randn(1, 1, 8, 8)
    first, same, other = (network(x, torch.tensor([label])) for label in (near, near * 1.0001, far))
    assert 0 < (first - same).norm() < 0.1 * (first - other).norm()


def test_positional_weights_are_those_of_the_plain_diffusers_model():
    """So they can be exported as such."""
    from diffusers import UNet2DModel

    network = perturbed(attention=[4], conditional=True)
    plain = UNet2DModel.from_config(network.model.config).eval()
    plain.load_state_dict(network.model.state_dict(), strict=True)
    x, noise, label = torch.randn(3, 1, 8, 8), torch.tensor([0.4, 30.0, 999.0]), torch.tensor([0, 9, 10])
    expected = plain(x, noise, class_labels=label).sample
    torch.testing.assert_close(network(x, noise, label=label), expected, atol=1e-4, rtol=1e-4)


def test_fourier_frequencies_are_saved():
    network, again = (UNet(DIGITS, channels=[8], embedding="fourier") for _ in range(2))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.model.time_proj.frequencies, network.model.time_proj.frequencies)


def test_groups_divide_all_levels():
    for channels, groups in (([16, 32], 4), ([24, 36], 3), ([128, 256], 32), ([6, 10], 1), ([320, 640], 32)):
        assert UNet({"shape": [1, 8, 8]}, channels=channels).model.conv_norm_out.num_groups == groups


def test_sides_must_divide():
    with pytest.raises(ValueError, match="3 levels needs image sides divisible by 4, got shape \\[1, 8, 6\\]"):
        UNet({"shape": [1, 8, 6]}, channels=[8, 8, 8])
    with pytest.raises(ValueError, match="UNet needs 'shape'"):
        UNet({"kind": "text", "vocabulary": 5})
