import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgm.networks.embed import FourierEmbedding, Rotary, SinusoidalEmbedding, label_embedding


@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoids_follow_the_formula(shift):
    labels = torch.tensor([0.0, 0.3, 17.0, 998.7], dtype=torch.float64)
    got = SinusoidalEmbedding(10, shift=shift)(labels)
    for row, label in enumerate(labels.tolist()):
        for j in range(5):
            angle = label * 10000.0 ** (-j / (5 - shift))
            assert got[row, j] == pytest.approx(math.sin(angle), abs=1e-9)
            assert got[row, 5 + j] == pytest.approx(math.cos(angle), abs=1e-9)


def test_sinusoids_are_those_of_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    labels = torch.tensor([0.0, 1.5, 999.0])
    theirs = embeddings.get_timestep_embedding(labels, 16, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(SinusoidalEmbedding(16, shift=1)(labels), theirs, atol=1e-4, rtol=0)


def test_cosines_may_come_first():
    labels = torch.tensor([0.0, 1.5, 14.0])
    sines, cosines = SinusoidalEmbedding(8)(labels).chunk(2, 1)
    assert torch.equal(SinusoidalEmbedding(8, cosines_first=True)(labels), torch.cat([cosines, sines], 1))


def test_sinusoids_survive_a_cast_to_half_precision():
    labels = torch.tensor([999.0, 997.5])
    module = SinusoidalEmbedding(16)
    assert torch.equal(module.bfloat16()(labels), SinusoidalEmbedding(16)(labels))
    assert torch.equal(module(torch.tensor([5])), module(torch.tensor([5.0])))


def test_fourier_features_turn_at_their_frequencies():
    module = FourierEmbedding(8, scale=3.0)
    label = torch.tensor([0.2, -1.1])
    angle = 2 * math.pi * label[:, None] * module.frequencies
    torch.testing.assert_close(module(label), torch.cat([angle.sin(), angle.cos()], 1))
    assert "frequencies" in module.state_dict()
    assert FourierEmbedding(20000, scale=3.0).frequencies.std().item() == pytest.approx(3.0, rel=0.03)


def test_unusable_widths_and_kinds_are_refused():
    for make in (lambda: SinusoidalEmbedding(7), lambda: SinusoidalEmbedding(2, shift=1), lambda: FourierEmbedding(3)):
        with pytest.raises(ValueError, match="even width"):
            make()
    with pytest.raises(ValueError, match="positional"):
        label_embedding("learned", 8)  # type: ignore[arg-type]


def rotate(x, tables):
    cos, sin = tables
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def test_rotation_of_each_pair_is_by_position_times_frequency():
    width, length = 6, 5
    x = torch.randn(length, width, dtype=torch.float64)
    tables = [table.double() for table in Rotary(width)(length, x.device)]
    got = rotate(x, tables)
    for p in range(length):
        for j in range(3):
            angle = p * 10000.0 ** (-2 * j / width)
            a, b = x[p, j].item(), x[p, j + 3].item()
            assert got[p, j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
            assert got[p, j + 3].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_products_depend_on_the_distance_only(p, q, shift):
    x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(p), dtype=torch.float64)
    tables = [table.double() for table in Rotary(8)(101, x.device)]
    at = [[table[i] for table in tables] for i in (p, q, p + shift, q + shift)]
    first = rotate(x, at[0]) @ rotate(y, at[1])
    second = rotate(x, at[2]) @ rotate(y, at[3])
    assert first.item() == pytest.approx(second.item(), abs=1e-5)


def test_tables_are_float32_cached_and_no_state():
    module = Rotary(8)
    first = module(10, torch.device("cpu"))
    assert module(10, torch.device("cpu"))[0] is first[0]
    assert first[0].dtype == torch.float32
    assert not module.state_dict()
    torch.testing.assert_close(module(12, torch.device("cpu"))[1][:10], first[1])


def test_tables_made_under_inference_mode_serve_training():
    module, x = Rotary(4), torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        module(3, torch.device("cpu"))
    rotate(x, module(3, torch.device("cpu"))).sum().backward()
    assert x.grad is not None


def test_stored_frequencies_are_checked():
    module = Rotary(8)
    stored = {"inv_freq": 10000.0 ** (-torch.arange(0, 8, 2) / 8)}
    module.load_state_dict(stored, strict=True)
    with pytest.raises(RuntimeError, match="rotary base"):
        module.load_state_dict({"inv_freq": 500.0 ** (-torch.arange(0, 8, 2) / 8)}, strict=True)
    with pytest.raises(ValueError, match="even head width"):
        Rotary(5)
