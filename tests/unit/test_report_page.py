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
    cell = AccuracyCell(points=(10, 20), num_asked=(100, 100), ends=((0.05, 0.17), (0.13, 0.29)))
    assert cell.mean == pytest.approx(0.15)
    assert cell.spread == pytest.approx(0.05)
    assert cell.interval == pytest.approx((0.09, 0.23))


def test_what_was_not_asked_has_no_accuracy() -> None:
    cell = AccuracyCell(points=(0,), num_asked=(0,), ends=((0.0, 1.0),))
    assert cell.mean is None
    assert cell.spread is None
    assert cell.interval is None


def test_scores_between_right_and_wrong_are_shown_as_such() -> None:
    from dataclasses import replace

    whole = page()
    turn = replace(whole.samples[0].turns[0], answers=(("blind", "Chat", 0.75), ("global", "Chad", 1.0), ("local", "x", 0.0), ("both", "y", None)))
    sample = replace(whole.samples[0], turns=(turn,))
    shown = render_page(replace(whole, samples=(sample,), metric="anls", metric_is_share=False, more_metrics=(), asked="9 pictures"))
    cells = re.findall(r'<td data-label="(?:blind|global only|local only|both views)".*?</td>', shown)
    assert [re.sub("<.*?>", "", cell).strip() for cell in cells] == ["Chat 75.0 %", "&#10003; Chad (right)", "&#10007; x (wrong)", "y (not scored)"]
    assert "Mean score in percent" in shown
    assert "answered right" not in shown
    assert "9 pictures, every question asked once per mode" in shown
    assert "The same answers by other metrics" not in shown


def test_other_metrics_have_a_table() -> None:
    html = render_page(page())
    table = html[html.index("The same answers by other metrics") :].partition("</table>")[0]
    assert "yes_no: f1" in table
    assert "<b>67.0</b>" in table  # anls, both views


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


def test_the_line_of_an_evaluation_tells_its_main_metric_and_what_was_not_asked() -> None:
    def scored(metric: str, fraction: float, family: str = "") -> dict[str, object]:
        return {"metric": metric, "mode": "blind", "fraction": fraction, "family": family, "detail": "", "kind": ""}

    record = {
        "seconds": 3.0,
        "num_questions": 20,
        "modes": ["blind"],
        "metrics": ["anls", "exact_match"],
        "num_images_trained_on": 0,
        "scores": [scored("exact_match", 0.1), scored("anls", 0.25), scored("anls", 0.9, "maps")],
    }
    outcome = StageOutcome(stage="evaluate", key="0123", seed=1, record=record, reused=False)
    assert outcome_line(outcome) == "evaluate seed 1          done in 3 s           20 questions, anls: blind 25.0%"
    record |= {"metrics": ["exact_match"], "num_images_trained_on": 4}
    assert outcome_line(outcome).endswith("20 questions, right: blind 10.0%; 4 images not asked, the run was trained on them")
    asked = StageOutcome(stage="build-dataset", key="0", seed=None, record={"seconds": 1, "num_samples": 2, "num_turns": 3}, reused=True, asked=True)
    assert outcome_line(asked) == "build-dataset (asked)    found done            2 images, 3 questions"


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


def test_the_plan_of_the_cache_stands_beside_its_outcome_where_there_was_one() -> None:
    from dataclasses import replace

    assert "as planned and as it was" in render_page(page())
    assert "+5.2 %" in render_page(page())
    assert "as planned" not in render_page(replace(page(), cache_plan=()))
    assert "What the plan counted" in render_page(page())
    assert "What the plan counted" not in render_page(replace(page(), cache_options=None))
