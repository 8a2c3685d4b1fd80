"""A report page out of made-up records, for tests of the drawing alone."""

import io
import math

from model.metrics import Share
from pipelines.cache_plan_text import OPTION_HEADINGS
from pipelines.report_page import (
    AccuracyCell,
    AccuracyRow,
    Curve,
    DatasetRow,
    MetricRow,
    PageSample,
    PageTurn,
    PhaseCurves,
    PlannedOptions,
    PlannedRow,
    ReportPage,
    StageRow,
    data_uri,
)

MODES = ("blind", "global", "local", "both")


def picture(width: int, height: int, hue: int) -> str:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), (245, 244, 240))
    draw = ImageDraw.Draw(image)
    for place in range(12):
        x = place * width // 12
        draw.rectangle((x + 4, height * (3 + place % 7) // 12, x + width // 16, height - 8), fill=(hue, 90 + 10 * place, 160))
    out = io.BytesIO()
    image.save(out, "PNG")
    return data_uri(out.getvalue(), "image/png")


def page(*, num_seeds: int = 3, question: str = "Which country is at the left?") -> ReportPage:
    seeds = tuple(range(num_seeds))
    levels = {"blind": 18, "global": 34, "local": 58, "both": 63}

    def row(label: str, group: str, number: int, shift: int) -> AccuracyRow:
        cells = {
            mode: AccuracyCell(
                points=tuple(round(number * (level + shift + 2 * seed) / 100) for seed in seeds),
                num_asked=tuple(number for _ in seeds),
                ends=tuple(Share(correct=round(number * (level + shift + 2 * seed) / 100), total=number).interval for seed in seeds),
            )
            for mode, level in levels.items()
        }
        return AccuracyRow(label=label, group=group, num_questions=number, majority=0.17, cells=cells)

    families = ("charts", "maps", "collages", "pages", "geometry")
    samples = []
    for place, family in enumerate(families):
        samples.append(
            PageSample(
                sample_id=f"{family}-{place:05d}",
                family=family,
                image_uri=picture(672, 448, 40 * place),
                width_px=672,
                height_px=448,
                grid=tuple((224.0 * c, 224.0 * r, 224.0 * (c + 1), 224.0 * (r + 1)) for r in range(2) for c in range(3)),
                evidence=(300.0, 120.0, 372.0, 150.0),
                global_uri=picture(112, 112, 40 * place),
                answer_uri=picture(112, 112, 40 * place + 20),
                answer_view=2,
                turns=tuple(
                    PageTurn(
                        question=question if number == 0 else "How many bars are higher than 12.5?",
                        truth="Norway",
                        detail="small",
                        answers=tuple((mode, "Norway" if mode == "both" else "Chad", float(mode == "both")) for mode in MODES),
                    )
                    for number in range(3)
                ),
            )
        )
    steps = tuple(range(1, 301))
    phases = tuple(
        PhaseCurves(
            phase=name,
            trained=trained,
            curves=tuple(
                Curve(seed=seed, steps=steps, losses=tuple(0.6 + 3 * math.exp(-step / 90) + 0.1 * math.sin(step * 1.7 + seed) for step in steps))
                for seed in seeds
            ),
        )
        for name, trained in (
            ("global_mlp", "global_mlp"),
            ("resampler+gate", "resampler, gate"),
            ("compression", "compression"),
            ("sft", "global_mlp, resampler, gate, compression, language_model"),
        )
    )
    return ReportPage(
        title="demo",
        description="Five families of drawn pictures, the small encoder and the small language model that come with Loupe.",
        headline=(("both views", "63.2 %"), ("points over blind", "+45.1"), ("pictures", "1200"), ("questions", "7200"), ("whole run", "8 min 12 s")),
        facts=(
            ("Encoder", "builtin:vision-encoder, 8 blocks of 192, views of 112 px"),
            ("Language model", "builtin:language-model"),
            ("Maps, global", "layer_7, mean_0_3, mean_4_7"),
            ("Root", "file:///a/very/long/path/that/has/no/spaces/and/should/wrap/somewhere/loupe-data"),
        ),
        dataset=tuple(DatasetRow(family=name, num_train=204, num_held_out=36, num_turns=1440, num_small_turns=900) for name in families),
        quarantine=(("build-dataset", "not_an_image", 2),),
        phases=phases,
        modes=MODES,
        accuracy=(
            row("all questions", "overall", 1080, 0),
            row("small detail", "detail", 700, -8),
            row("large detail", "detail", 380, 9),
            *(row(name, "family", 216, 3 * place - 6) for place, name in enumerate(families)),
        ),
        metric="exact_match",
        metric_is_share=True,
        rule="equal to the true answer after lower-casing and trimming",
        more_metrics=(
            MetricRow(
                label="anls",
                rule="1 less the edit distance over the longer answer's length, 0 from half of it on",
                num_questions=1080,
                cells={mode: (level / 100 + 0.04, level / 100 - 0.01, level / 100 + 0.09) for mode, level in levels.items()},
            ),
            MetricRow(
                label="yes_no: f1",
                rule="harmonic mean of precision and recall",
                num_questions=None,
                cells=dict.fromkeys(MODES, (0.5, 0.4, 0.6)),
            ),
        ),
        asked="Held-out pictures",
        samples=tuple(samples),
        stages=(
            StageRow(name="build-dataset", key="0123456789abcdef", seconds=61.2, num_bytes=92_000_000, note="1200 images, 7200 questions"),
            StageRow(name="cache-features", key="0123456789abcdef", seconds=75.0, num_bytes=602_000_000, note="8400 views"),
            StageRow(name="train-connector seed 0", key="0123456789abcdef", seconds=311.0, num_bytes=24_000_000, note="760 steps"),
        ),
        cache_plan=(
            PlannedRow(what="views", planned="8,400", found="8,400", difference="+0.0 %"),
            PlannedRow(what="time", planned="2 min 35 s", found="2 min 43 s", difference="+5.2 %"),
        ),
        cache_options=PlannedOptions(
            facts=(
                ("images", "1,200 (the built dataset)"),
                ("views", "8,400: 1 global each, and 6 local: 1,200"),
                ("hardware", "this machine, cpu with 2 cores, writing 130 MB/s in between, probed with this encoder"),
                ("training", "at most 6.23 images/s, by its language model's products alone; it reads at most fp16 3.24 MB/s, int8 1.65 MB/s"),
            ),
            headings=OPTION_HEADINGS,
            rows=(
                ("fp16", "520 kB", "624 MB", "20", "150", "2,400", "5 s", "3 min 57 s", "0 s", "4 min 02 s", "$0.01", "$0.00", "1"),
                ("int8, global view only", "39.4 kB", "47.2 MB", "5", "30", "1,200", "5 s", "34 s", "0 s", "39 s", "$0.00", "$0.00", "never"),
            ),
            recommended="cache fp16. With 5.8 training passes it costs 0.01 dollars in all, encoding in every pass 0.03; int8 0.01.",
        ),
        ask_command='loupe ask loupe-data/exports/0123456789abcdef picture.png "Which country is at the left?"',
        recipe_text='name = "demo"\n\n[dataset]\nseed = 0\n',
        seeds=seeds,
    )
