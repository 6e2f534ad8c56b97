import sys

import numpy as np
import pytest

from datamodules import series_sources as sources


def test_training_sines_are_the_references_numbers():
    x = sources.sines(50, 24, 5, 0)
    # The reference draws window by window, dimension by dimension, first the frequency and then the phase.
    generator = np.random.RandomState(123)
    for window in x[:7]:
        for dimension in window.T:
            frequency = generator.uniform(0, 0.1)
            phase = generator.uniform(0, 0.1)
            np.testing.assert_allclose(dimension, np.sin(frequency * np.arange(24) + phase), rtol=1e-14)


def test_sines_have_the_right_law_and_sets_are_independent():
    sets = [sources.sines(4000, 24, 3, split) for split in range(3)]
    grid = (np.arange(1000) + 0.5) / 10000
    for x in sets:
        assert x.shape == (4000, 24, 3)
        assert (x[:, 0] >= 0).all()
        assert (x[:, 0] <= np.sin(0.1)).all()
        # Mean at step j over f and p, both uniform in [0, 0.1).
        for step in (0, 10, 23):
            expected = np.sin(step * grid[:, None] + grid).mean()
            assert abs(x[:, step].mean() - expected) < 5 * x[:, step].std() / 12000**0.5
        assert np.abs(np.corrcoef(x[:, 12].T) - np.eye(3)).max() < 5 / 4000**0.5
    assert abs(np.corrcoef(sets[0][:, 12].ravel(), sets[1][:, 12].ravel())[0, 1]) < 5 / 12000**0.5
    assert not np.array_equal(sets[1], sets[2])
    assert np.array_equal(sets[1], sources.sines(4000, 24, 3, 1))


def test_hopper_starts_at_random_and_then_falls():
    pytest.importorskip("dm_control")
    x = sources.hopper(200, 12, 0)
    assert x.shape == (200, 12, 14)
    assert np.isfinite(x).all()
    start = x[:, 0]
    for part, low, high in ((start[:, :2], 0, 0.5), (start[:, 2:7], -2, 2), (start[:, 7:], -5, 5)):
        assert part.min() >= low
        assert part.max() <= high
        assert abs(part.mean() - (low + high) / 2) < 5 * (high - low) / 12**0.5 / part.size**0.5
        assert part.std() == pytest.approx((high - low) / 12**0.5, rel=0.1)
    # Positions follow velocities in steps of 0.005 s, by MuJoCo's semi-implicit rule.
    np.testing.assert_allclose(np.diff(x[..., :7], axis=1), 0.005 * x[:, 1:, 7:], atol=1e-9)
    assert np.array_equal(x, sources.hopper(200, 12, 0))
    assert not np.array_equal(x, sources.hopper(200, 12, 1))
    assert len(sources.HOPPER) == len(set(sources.HOPPER)) == 14


@pytest.mark.parametrize("name", sources.QUOTES)
def test_quotes_are_5031_days(name):
    pytest.importorskip("arch")
    values, columns = sources.quotes(name)
    assert values.shape == (5031, 6)
    assert columns == ["Open", "High", "Low", "Close", "Adj Close", "Volume"]
    assert (values[:, :5] > 0).all()
    assert (values[:, 1] >= values[:, 2]).all()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning_sgm\[mujoco\]'"):
        sources.hopper(3, 4, 0)
    monkeypatch.setitem(sys.modules, "arch.data.nasdaq", None)
    monkeypatch.setitem(sys.modules, "arch", None)
    with pytest.raises(ValueError, match=r"nasdaq comes with the package arch .*pip install 'lightning_sgm\[series\]'"):
        sources.quotes("nasdaq")
