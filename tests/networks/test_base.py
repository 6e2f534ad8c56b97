import pytest
import torch

from lightning_sgm.networks.base import attended, build, entry
from lightning_sgm.networks.mlp import MLP
from lightning_sgm.testing import check_network

SPEC = {"kind": "image", "shape": [2, 3, 5], "classes": 0}


def test_a_network_is_kept_and_a_factory_gets_the_spec():
    network = MLP(SPEC, width=8, depth=1)
    assert build(network, SPEC) is network
    assert isinstance(build(lambda spec: MLP(spec, width=8), SPEC), MLP)


def test_a_missing_entry_names_network_and_data():
    with pytest.raises(ValueError, match=r"UNet needs 'shape'.*'text'"):
        entry({"kind": "text"}, "shape", "UNet")


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_mlp_answers_each_example_alone(embedding):
    check_network(lambda spec: MLP(spec, width=16, depth=2, embedding=embedding), SPEC)


def test_mlp_starts_at_zero_and_learns_the_label():
    torch.manual_seed(0)
    network = MLP({"shape": [1]}, width=32, depth=1, embedding="fourier")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    x, label = torch.randn(256, 1), torch.rand(256) * 2 - 1
    assert (network(x, label) == 0).all()
    for _ in range(200):
        loss = (network(x, label)[:, 0] - x[:, 0] * label).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * (x[:, 0] * label).square().mean().item()


def test_attention_where_there_is_no_level_is_told():
    sides = [(28, 28), (14, 14), (7, 7)]
    assert attended(sides, [14], "UNet") == [False, True, False]
    with pytest.warns(UserWarning, match="UNet has no level of height 16, .* levels are 28, 14, 7 high"):
        assert attended(sides, [16, 7], "UNet") == [False, False, True]
