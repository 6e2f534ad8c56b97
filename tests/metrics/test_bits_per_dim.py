import math

import pytest
import torch

from lightning_sgm.metrics import BitsPerDim


def test_a_uniform_density_costs_its_levels():
    """Dequantised levels that are all equally likely take log2(levels) bits, in any interval."""
    for levels in (2, 17, 256):
        for low, high in ((-1.0, 1.0), (0.0, 1.0), (-3.0, 7.0)):
            metric = BitsPerDim(5, levels, (low, high))
            metric.update(torch.full((4,), -5 * math.log(high - low)))
            assert float(metric.compute()["bits_per_dim"]) == pytest.approx(math.log2(levels), rel=1e-7)


@pytest.mark.parametrize(
    ("levels", "value_range", "offset"),
    [(256, (-1, 1), 7), (256, (0, 1), 8), (17, (-1, 1), math.log2(17) - 1), (None, (0, 9), 0)],
)
def test_offsets(levels, value_range, offset):
    metric = BitsPerDim(10, levels, value_range)
    torch.testing.assert_close(
        metric.bits(torch.tensor([0.0, -10 * math.log(2)])), torch.tensor([offset, offset + 1.0], dtype=torch.float64)
    )


def test_mean_and_standard_error_and_halves_that_merge():
    values = 100 * torch.randn(41, dtype=torch.float64) - 300
    whole, first, second = BitsPerDim(64), BitsPerDim(64), BitsPerDim(64)
    for part in values.split(7):
        whole.update(part)
    first.update(values[:13])
    second.update(values[13:])
    first.merge_state(second)
    bits = 7 - values.numpy() / 64 / math.log(2)
    for metric in (whole, first):
        result = metric.compute()
        assert float(result["bits_per_dim"]) == pytest.approx(bits.mean(), rel=1e-12)
        assert float(result["standard_error"]) == pytest.approx(bits.std(ddof=1) / math.sqrt(41), rel=1e-10)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_misuse_of_bits_per_dim():
    for arguments in ((0,), (3, 0), (3, 256, (1.0, 1.0))):
        with pytest.raises(ValueError, match="BitsPerDim needs"):
            BitsPerDim(*arguments)
    with pytest.raises(ValueError, match=r"shape \(batch,\)"):
        BitsPerDim(3).update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no example"):
        BitsPerDim(3).compute()
    one = BitsPerDim(3)
    one.update(torch.zeros(1))
    assert one.compute()["standard_error"].isnan()
