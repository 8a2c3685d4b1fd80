"""The report page from data alone: numbers as given, everything escaped, nothing fetched."""

import re
from pathlib import Path

import pytest

from pipelines.report import template_sha256
from pipelines.report_page import TEMPLATE, TEMPLATES, AccuracyCell, Curve, PhaseCurves, plot_geometry, render_page, smoothed
from pipelines.stages import StageOutcome
from pipelines.wording import bytes_text, outcome_line
from tests.page_data import page
from workers.errors import RecordError


def test_the_page_needs_nothing_else() -> None:
    html = render_page(page())
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in html


def test_questions_are_text_whatever_they_hold() -> None:
    html = render_page(page(question="<script>alert('x')</script> & more?"))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_every_picture_has_a_text_and_every_table_headers() -> None:
    html = render_page(page())
    assert len(re.findall(r"<img ", html)) == len(re.findall(r'<img [^>]*alt="[^"]+"', html)) == 15
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        assert 'scope="col"' in table
        assert 'scope="row"' in table
    assert len(re.findall(r"<h1", html)) == 1


def test_one_seed_has_no_spread() -> None:
    assert "&plusmn;" in render_page(page(num_seeds=3))
    assert "&plusmn;" not in render_page(page(num_seeds=1))


def test_accuracy_over_seeds() -> None:
    cell = AccuracyCell(num_right=(10, 20), num_asked=(100, 100))
    assert cell.mean == pytest.approx(0.15)
    assert cell.spread == pytest.approx(0.05)
    assert cell.interval is not None
    low, high = cell.interval
    assert low < 0.15 < high


def test_what_was_not_asked_has_no_accuracy() -> None:
    cell = AccuracyCell(num_right=(0,), num_asked=(0,))
    assert cell.mean is None
    assert cell.spread is None
    assert cell.interval is None


def test_bytes_read_well() -> None:
    assert [bytes_text(n) for n in (None, 0, 999, 1000, 999_400, 999_600, 2_310_000, 4_000_000_000)] == [
        "-",
        "0 B",
        "999 B",
        "1 kB",
        "999 kB",
        "1 MB",
        "2.31 MB",
        "4 GB",
    ]


def test_a_record_that_lacks_a_figure_is_named() -> None:
    outcome = StageOutcome(stage="build-dataset", key="0123", seed=None, record={"seconds": 1.0}, reused=True)
    with pytest.raises(RecordError, match=r"runs/build-dataset/0123/COMMITTED\.json in the root lacks 'num_samples'; remove that file"):
        outcome_line(outcome)


def test_smoothing_keeps_level_and_length() -> None:
    assert smoothed([1.0] * 50) == [1.0] * 50
    assert smoothed([]) == []
    assert len(smoothed([0.0, 1.0] * 100)) == 200


def test_plots_stay_in_their_frame_and_tell_start_and_end() -> None:
    curve = Curve(seed=0, steps=tuple(range(1, 1001)), losses=tuple(5.0 - step / 250 for step in range(1, 1001)))
    plot = plot_geometry(PhaseCurves(phase="x", trained="y", curves=(curve,)))
    points = [tuple(map(float, point.split(","))) for point in plot["lines"][0]["raw"].split()]
    assert len(points) <= 240
    assert all(plot["left"] <= x <= plot["right"] + 0.1 and 0 <= y <= plot["bottom"] for x, y in points)
    assert plot["first"] == pytest.approx(4.8, abs=0.01)
    assert plot["final"] == pytest.approx(1.2, abs=0.01)


def test_a_phase_without_steps_draws_an_empty_plot() -> None:
    plot = plot_geometry(PhaseCurves(phase="x", trained="y", curves=()))
    assert plot["lines"] == []
    assert plot["first"] is None


def test_a_new_template_is_a_new_report(tmp_path: Path) -> None:
    copy = tmp_path / TEMPLATE
    copy.write_bytes((TEMPLATES / TEMPLATE).read_bytes())
    before = template_sha256(copy)
    assert template_sha256(copy) == before
    copy.write_bytes(copy.read_bytes() + b" ")
    assert template_sha256(copy) != before
    assert template_sha256() != before
