"""int8 per token behind a calibration: against plain loops, at the edges of its numbers, and what it is worth beside plain int8."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quality import MapQuality
from model.quantisation import ChannelCalibration, ChannelMoments, dequantise, map_quality, quantise


def with_outliers(num_tokens: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Tokens as a vision transformer's middle layers have them: every channel with a mean of its own, and four sixty times wider than the rest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, width, generator=generator)
    tokens[:, torch.randperm(width, generator=generator)[:4]] *= 60
    return tokens + 3 * torch.randn(width, generator=generator)


def calibrated(tokens: torch.Tensor) -> ChannelCalibration:
    moments = ChannelMoments(tokens.shape[-1])
    moments.update(tokens)
    return moments.calibration()


def quality(tokens: torch.Tensor, calibration: ChannelCalibration):
    return map_quality(tokens, dequantise(*quantise(tokens, calibration), calibration))


def test_codes_and_steps_are_those_of_plain_loops():
    tokens = with_outliers(7, 12)
    calibration = calibrated(with_outliers(50, 12, seed=1))
    codes, steps = quantise(tokens, calibration)
    back = dequantise(codes, steps, calibration)
    for token in range(7):
        normalised = [
            (tokens[token, channel].item() - calibration.centre[channel].item()) / calibration.scale[channel].item() for channel in range(12)
        ]
        step = torch.tensor(max(map(abs, normalised)) / 127).half().item()
        assert steps[token].item() == step
        for channel in range(12):
            code = max(-127, min(127, round(normalised[channel] / step)))
            assert abs(codes[token, channel].item() - code) <= (abs(normalised[channel] / step % 1 - 0.5) < 1e-4)  # a tie may fall either way
            expected = codes[token, channel].item() * step * calibration.scale[channel].item() + calibration.centre[channel].item()
            assert back[token, channel].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_moments_are_those_of_all_tokens_however_they_come():
    tokens = with_outliers(200, 9) + 1000
    whole, parts, halves = ChannelMoments(9), ChannelMoments(9), [ChannelMoments(9), ChannelMoments(9)]
    whole.update(tokens)
    for part in tokens.split([1, 0, 63, 36, 100]):
        parts.update(part)
    for half, moments in zip(tokens.reshape(2, 4, 25, 9), halves, strict=True):
        moments.update(half)
    halves[0].merge(halves[1])
    halves[0].merge(ChannelMoments(9))
    for moments in (whole, parts, halves[0]):
        assert moments.num_tokens == 200
        torch.testing.assert_close(moments.mean, tokens.double().mean(dim=0))
        torch.testing.assert_close(moments.deviation, tokens.double().std(dim=0, correction=0))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**16),
)
def test_no_number_is_further_off_than_half_a_step(rows, width, size, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    calibration = ChannelCalibration(
        centre=size * torch.randn(width, generator=generator), scale=size * torch.exp(torch.randn(width, generator=generator))
    )
    tokens = calibration.centre + calibration.scale * spread * torch.randn(rows, width, generator=generator)
    codes, steps = quantise(tokens, calibration)
    error = (dequantise(codes, steps, calibration) - tokens).abs() / calibration.scale
    # Half a step; where the step was rounded down, what was clipped of the largest number; and fp32's own rounding of centre and token.
    clipped = 127 * (steps.float() * 2.0**-11).clamp(min=2.0**-25)  # fp16's smallest numbers are 2**-24 apart
    rounding = 4e-7 * (tokens.abs() + calibration.centre.abs()) / calibration.scale
    assert (error <= 0.5 * steps.float()[:, None] * (1 + 1e-5) + clipped[:, None] + rounding).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(2, 6))
def test_a_token_s_numbers_do_not_depend_on_the_others(seed, rows):
    tokens = with_outliers(rows, 16, seed=seed)
    calibration = calibrated(tokens)
    codes, steps = quantise(tokens, calibration)
    for row in range(rows):
        alone = quantise(tokens[row : row + 1], calibration)
        assert torch.equal(alone[0][0], codes[row])
        assert torch.equal(alone[1][0], steps[row])


def test_a_token_at_the_centre_comes_back_exactly():
    calibration = ChannelCalibration(centre=torch.tensor([3.0, -2.0]), scale=torch.tensor([1.0, 5.0]))
    codes, steps = quantise(torch.tensor([[3.0, -2.0]]), calibration)
    assert (codes == 0).all()
    assert steps.item() == 0
    assert dequantise(codes, steps, calibration).tolist() == [[3.0, -2.0]]


def test_channels_that_do_not_vary_cost_nothing():
    tokens = with_outliers(64, 8)
    tokens[:, 3], tokens[:, 5] = 7.25, 0.0
    calibration = calibrated(tokens)
    assert calibration.scale[3].item() == calibration.scale[5].item() == pytest.approx(tokens.std(dim=0, correction=0).mean().item(), rel=1e-5)
    back = dequantise(*quantise(tokens, calibration), calibration)
    assert (back[:, 3] == 7.25).all()
    assert (back[:, 5] == 0).all()
    assert quality(tokens, calibration).snr_db > 40


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_shows_in_its_step_alone(value):
    tokens = with_outliers(3, 8)
    calibration = calibrated(tokens)
    tokens[1, 4] = value
    codes, steps = quantise(tokens, calibration)
    assert torch.isfinite(steps).tolist() == [True, False, True]
    assert (codes[1] == 0).all()


def test_calibration_is_worth_what_outliers_cost():
    """Claim: some 42 dB with a calibration whatever the channels are like, 17 dB without one where four channels are sixty times wider."""
    tokens = with_outliers(2000, 1024)
    tokens = tokens - tokens.mean(dim=0)  # plain int8 would also have to carry the means
    narrow = torch.ones(1024, dtype=torch.bool)
    narrow[tokens.std(dim=0).topk(4).indices] = False
    with_calibration, plain = calibrated(tokens), ChannelCalibration.identity(1024)

    def useful_snr_db(calibration: ChannelCalibration) -> float:
        """Of the channels that are not outliers, which is where the information is."""
        return map_quality(tokens[:, narrow], dequantise(*quantise(tokens, calibration), calibration)[:, narrow]).snr_db

    assert 40 < useful_snr_db(with_calibration) < 44
    assert useful_snr_db(plain) < 18


def test_quality_is_what_it_says():
    computed = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    stored = torch.tensor([[1.0, 1.0], [0.0, 2.0], [3.0, 4.0]])
    found = map_quality(computed, stored)
    signal = sum((x - 4 / 3) ** 2 for x in (1, 0, 3)) + sum((y - 2) ** 2 for y in (0, 2, 4))
    assert found.num_tokens == 3
    assert found.snr_db == pytest.approx(10 * math.log10(signal / 1))
    assert found.cosine == pytest.approx((1 / math.sqrt(2) + 1 + 1) / 3)
    assert found.worst_cosine == pytest.approx(1 / math.sqrt(2))
    both = found + map_quality(2 * computed, 2 * stored) + map_quality(torch.zeros(0, 2), torch.zeros(0, 2))
    assert both.num_tokens == 6
    assert both.snr_db == pytest.approx(found.snr_db)
    assert both.cosine == pytest.approx(found.cosine)


def test_quality_by_a_calibration_is_by_how_much_its_tokens_varied():
    calibration = ChannelCalibration(centre=torch.tensor([5.0, 5.0]), scale=torch.tensor([2.0, 1.0]))
    alike = torch.full((10, 2), 3.0)
    found = map_quality(alike, alike + 0.1, calibration)
    assert found.snr_db == pytest.approx(10 * math.log10((4 + 1) / (2 * 0.1**2)), rel=1e-4)


def test_quality_of_what_was_not_rounded_and_of_nothing():
    assert (MapQuality().snr_db, MapQuality().cosine) == (math.inf, 1)
    assert map_quality(torch.ones(4, 2), torch.ones(4, 2)).snr_db == math.inf
    assert map_quality(torch.ones(4, 2), torch.zeros(4, 2) + 0.5).snr_db == -math.inf
