"""Token networks that are exact: their answers are the conditionals of a law that is known in full."""

import itertools

import torch

from lightning_sgm.denoiser import TokenDenoiser
from lightning_sgm.networks.base import TokenNetwork
from lightning_sgm.processes.absorbing import AbsorbingProcess


def oracle_denoiser(network):
    return TokenDenoiser(network, AbsorbingProcess(), network.vocabulary)


class Oracle(TokenNetwork):
    """Log-conditionals ln p(token at i | unmasked tokens) (B, L, V) in float64, given at ``positions`` like a network.

    Attributes:
        rows: number of sequences evaluated so far.
        calls: number of calls so far.
    """

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.rows = 0
        self.calls = 0

    def conditionals(self, x):
        raise NotImplementedError

    def forward(self, x, positions=None):
        self.rows += len(x)
        self.calls += 1
        log_probs = self.conditionals(x).log()
        return log_probs if positions is None else log_probs.flatten(0, 1)[positions]


class JointOracle(Oracle):
    """Any joint law over few short sequences, by enumeration.

    Args:
        joint: (V,) * L probabilities.
    """

    def __init__(self, joint):
        super().__init__(joint.shape[0])
        self.joint = joint
        self.sequences = torch.tensor(list(itertools.product(range(joint.shape[0]), repeat=joint.ndim)))

    def conditionals(self, x):
        known = x[:, None, :]
        possible = ((known == self.sequences) | (known == self.vocabulary)).all(-1)
        weights = possible * self.joint.flatten()
        one_hot = torch.nn.functional.one_hot(self.sequences, self.vocabulary).double()
        return torch.einsum("bs,slv->blv", weights / weights.sum(1, keepdim=True), one_hot)


class ConstantOracle(Oracle):
    """The same law at every position, whatever is unmasked.

    Args:
        probs: (V,) probabilities.
    """

    def __init__(self, probs):
        super().__init__(len(probs))
        self.log_probs = probs.log()

    def forward(self, x, positions=None):
        self.rows += len(x)
        self.calls += 1
        shape = x.shape if positions is None else positions.shape
        return self.log_probs.expand(*shape, self.vocabulary)


class MarkovOracle(Oracle):
    """A stationary first-order Markov chain; conditionals by the forward-backward recursion.

    Args:
        transition: (V, V) probabilities of the next token, one row per token.
    """

    def __init__(self, transition):
        super().__init__(len(transition))
        self.transition = transition
        values, vectors = torch.linalg.eig(transition.T)
        stationary = vectors[:, values.real.argmax()].real
        self.stationary = stationary / stationary.sum()

    def conditionals(self, x):
        evidence = torch.nn.functional.one_hot(x, self.vocabulary + 1)[..., :-1].double()
        evidence = torch.where((x == self.vocabulary)[..., None], 1.0, evidence)
        length = x.shape[1]
        before = [self.stationary.expand(len(x), -1)]
        after = [torch.ones(len(x), self.vocabulary, dtype=torch.float64)]
        for i in range(length - 1):
            forward = (before[-1] * evidence[:, i]) @ self.transition
            before.append(forward / forward.sum(1, keepdim=True))
            backward = (after[-1] * evidence[:, length - 1 - i]) @ self.transition.T
            after.append(backward / backward.sum(1, keepdim=True))
        product = torch.stack(before, 1) * torch.stack(after[::-1], 1)
        return product / product.sum(-1, keepdim=True)
