"""Intervals over images: they hold the truth as often as they say, know that questions of one image go together, and never claim certainty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.intervals import _t_quantile, _tail, ratio_interval
from model.metrics import Share


def slow_interval(numerators, denominators, clusters, resamples=4000, seed=7):
    """The plain way: draw images, add up their questions, sort, take the ends."""
    generator = np.random.default_rng(seed)
    names = sorted(set(clusters))
    members = {name: [place for place, cluster in enumerate(clusters) if cluster == name] for name in names}
    ratios = []
    for _ in range(resamples):
        top = bottom = 0.0
        for place in generator.integers(0, len(names), len(names)):
            for question in members[names[place]]:
                top += numerators[question]
                bottom += denominators[question]
        ratios.append(top / bottom)
    tail = _tail(len(names))
    return float(np.quantile(ratios, tail)), float(np.quantile(ratios, 1 - tail))


def test_it_agrees_with_the_plain_way():
    generator = np.random.default_rng(3)
    clusters = [f"image-{number // 3}" for number in range(60)]
    scores = np.repeat(generator.random(20), 3) * 0.6 + generator.random(60) * 0.4
    ours, plain = ratio_interval(scores, np.ones(60), clusters), slow_interval(scores, np.ones(60), clusters)
    assert ours == pytest.approx(plain, abs=0.01)  # both are simulations: 2000 and 4000 draws
    assert ratio_interval(scores, np.ones(60), clusters) == ours


def coverage(num_images, questions_per_image, share_of_image, *, draws, seed):
    """How often the interval holds the true mean, over draws of images and of their questions' scores; per image: common luck and each one's own."""
    generator = np.random.default_rng(seed)
    clusters = np.repeat([f"{number:04d}" for number in range(num_images)], questions_per_image).tolist()
    held = 0
    for _ in range(draws):
        common = np.repeat(generator.beta(2, 3, num_images), questions_per_image)
        own = generator.beta(2, 3, num_images * questions_per_image)
        low, high = ratio_interval(share_of_image * common + (1 - share_of_image) * own, np.ones(len(own)), clusters)
        held += low <= 0.4 <= high  # the mean of beta(2, 3)
    return held / draws


@pytest.mark.parametrize(("num_images", "share_of_image"), [(12, 1.0), (12, 0.5), (60, 1.0), (60, 0.0)])
def test_95_percent_intervals_hold_the_truth_in_about_95_percent_of_draws(num_images, share_of_image):
    """400 draws: the standard error of a coverage of 0.95 is 0.011."""
    assert 0.92 <= coverage(num_images, 4, share_of_image, draws=400, seed=11) <= 0.985


def test_an_interval_over_questions_would_not():
    """The same draws, each question taken for an image of its own: why clusters are drawn."""
    generator = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        scores = np.repeat(generator.beta(2, 3, 40), 8)
        low, high = ratio_interval(scores, np.ones(320), [str(number) for number in range(320)])
        held += low <= 0.4 <= high
    assert held / 200 < 0.8


def test_f1_is_covered_too():
    """Truth by a large draw: yes with probability 0.4, answered rightly with 0.8, by images that are easy or hard."""

    def draw(generator, num_images):
        hard = np.repeat(generator.random(num_images) < 0.5, 4)
        true = generator.random(num_images * 4) < 0.4
        said = np.where(generator.random(num_images * 4) < np.where(hard, 0.65, 0.95), true, ~true)
        return 2.0 * (true & said), 1.0 * true + said

    generator = np.random.default_rng(5)
    tops, bottoms = draw(generator, 200_000)
    truth = tops.sum() / bottoms.sum()
    clusters = np.repeat([str(number) for number in range(50)], 4).tolist()
    held = 0
    for _ in range(400):
        low, high = ratio_interval(*draw(generator, 50), clusters)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.985


def test_students_t():
    known = {4: 2.776, 9: 2.262, 29: 2.045, 99: 1.984}  # any table of it
    for degrees, value in known.items():
        assert _t_quantile(degrees) == pytest.approx(value, rel=0.02)
    assert _tail(10**6) == pytest.approx(0.025, abs=1e-5)


@pytest.mark.parametrize("number", [1, 5, 200])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_images_that_do_not_differ_leave_no_certainty(number, value):
    low, high = ratio_interval([value] * number, [1.0] * number, [str(place) for place in range(number)])
    assert 0 <= low <= value <= high <= 1
    assert high - low > 1 / (number + 4)
    if value == 0:
        assert high == pytest.approx(Share(correct=0, total=number).interval[1])
    if value == 1:
        assert low == pytest.approx(Share(correct=number, total=number).interval[0])


def test_runs_that_never_differ_are_not_called_equal():
    low, high = ratio_interval([0.0] * 30, [1.0] * 30, [str(place) for place in range(30)], lowest=-1, highest=1)
    assert (low, high) == pytest.approx((-high, 3.8415 / 33.8415), abs=1e-4)


def test_nothing_looked_for_is_nothing_known():
    assert ratio_interval([], [], []) == (0.0, 1.0)
    assert ratio_interval([0.0, 0.0], [0.0, 0.0], ["a", "b"]) == (0.0, 1.0)
    assert ratio_interval([0.0], [0.0], ["a"], lowest=-1.0) == (-1.0, 1.0)


scores = st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abcdef")), min_size=1, max_size=30)


@given(scores, st.randoms(use_true_random=False))
def test_the_value_lies_within_and_order_changes_nothing(pairs, random):
    low, high = ratio_interval([value for value, _ in pairs], [1.0] * len(pairs), [image for _, image in pairs])
    mean = sum(value for value, _ in pairs) / len(pairs)
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1
    shuffled = list(pairs)
    random.shuffle(shuffled)
    again = ratio_interval([value for value, _ in shuffled], [1.0] * len(pairs), [image for _, image in shuffled])
    assert again == pytest.approx((low, high), abs=1e-9)
