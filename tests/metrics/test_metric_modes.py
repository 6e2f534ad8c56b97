import pytest
import torch

from lightning_sgm.metrics import BitsPerDim, FrechetDistance, NGramJudge, TokenLikelihood, UnigramEntropy


def judge():
    metric = NGramJudge(4, 2)
    metric.fit(torch.tensor([0, 1, 2, 3, 0]))
    return metric


def feed_samples(x):
    def feed(metric):
        metric.update(x, real=True)
        metric.update(x, real=False)

    return feed


TOKENS = torch.tensor([[0, 1, 1, 3], [2, 1, 0, 0]])
CASES = [
    (TokenLikelihood, lambda metric: metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), 4)),
    (lambda: BitsPerDim(3), lambda metric: metric.update(torch.tensor([1.0, 2.0, 4.0]))),
    (FrechetDistance, feed_samples(torch.rand(5, 1, 2, 2))),
    (UnigramEntropy, feed_samples(TOKENS)),
    (judge, feed_samples(TOKENS)),
]


@pytest.mark.parametrize(("make", "feed"), CASES)
def test_a_metric_moves_between_test_and_fit(make, feed):
    """Trainer.test runs and resets under inference_mode, validation in fit without it."""
    metric = make()
    with torch.inference_mode():
        feed(metric)
        metric.reset()
    feed(metric)
    fresh = make()
    feed(fresh)
    torch.testing.assert_close(metric.compute(), fresh.compute(), rtol=0, atol=0)


@pytest.mark.parametrize(("make", "feed"), CASES)
def test_checkpoints_hold_no_sums(make, feed):
    metric = make()
    feed(metric)
    assert not metric.state_dict()
