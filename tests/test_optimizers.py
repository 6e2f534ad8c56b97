"""MuonAdamW is torch's Muon on hidden matrices and torch's AdamW on everything else, and resumes like one optimiser."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_sgm.networks import MaskedTransformer
from lightning_sgm.optimizers import MuonAdamW

SPEC = {"kind": "text", "length": 8, "vocabulary": 5}


def network():
    torch.manual_seed(0)
    net = MaskedTransformer(SPEC, width=16, blocks=2, heads=2, dropout=0.0)
    nn.init.normal_(net.output_layer.linear.weight)
    return net


def step(net, optimizer, number=0):
    x = torch.randint(0, 6, (4, 8), generator=torch.Generator().manual_seed(number))
    net(x).logsumexp(-1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_each_parameter_moves_as_under_its_own_optimiser():
    ours, theirs = network(), network()
    names = dict(theirs.named_parameters())
    hidden = [p for name, p in names.items() if name.startswith("blocks") and p.ndim == 2]
    rest = [p for name, p in names.items() if not (name.startswith("blocks") and p.ndim == 2)]
    assert len(hidden) == 8
    both = MuonAdamW(ours.named_parameters(), lr=2e-3, muon_lr=1e-2, weight_decay=0.1)
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for number in range(3):
        step(ours, both, number)
        x = torch.randint(0, 6, (4, 8), generator=torch.Generator().manual_seed(number))
        theirs(x).logsumexp(-1).square().mean().backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedules_and_resuming():
    def rate(update):
        return 1 / (1 + update)

    net = network()
    optimizer = MuonAdamW(net.named_parameters())
    schedule = LambdaLR(optimizer, rate)
    for number in range(2):
        step(net, optimizer, number)
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-2 / 3), pytest.approx(1e-3 / 3)]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    resumed = MuonAdamW(other.named_parameters())
    again = LambdaLR(resumed, rate)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    again.load_state_dict(schedule.state_dict())
    for number in range(2, 4):
        step(net, optimizer, number)
        step(other, resumed, number)
        schedule.step()
        again.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_copies_work_by_themselves():
    net = network()
    optimizer = MuonAdamW(net.named_parameters())
    step(net, optimizer)
    other, copied = copy.deepcopy((net, optimizer))
    step(net, optimizer, 1)
    step(other, copied, 1)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="takes all parameters when it is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def test_a_closure_is_called_once():
    net, calls = network(), []
    before = [p.clone() for p in net.parameters()]

    def closure():
        calls.append(1)
        loss = net(torch.zeros(1, 8, dtype=torch.int64)).logsumexp(-1).sum()
        loss.backward()
        return loss

    assert MuonAdamW(net.named_parameters()).step(closure).requires_grad
    assert len(calls) == 1
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_what_it_cannot_do_is_named():
    with pytest.raises(ValueError, match=r"give it module.named_parameters\(\)"):
        MuonAdamW(network().parameters())
    with pytest.raises(ValueError, match=r"no matrix for Muon"):
        MuonAdamW(nn.Conv2d(1, 1, 3).named_parameters())
