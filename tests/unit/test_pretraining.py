"""The labels that the shipped models learn from, and the text that layouts become."""

import json

import numpy as np
import pytest
import torch

from model.views import Box, View, ViewSpec, plan_views
from workers.dataset.rendering import FAMILIES, sketch
from workers.dataset.rendering.canvas import Canvas, load_font
from workers.pretraining import language_model
from workers.pretraining.cards import write_card
from workers.pretraining.labels import COLOUR_CLASSES, GLYPH_CLASSES, colour_shares, place_glyphs


def _canvas():
    return Canvas(224, 224, (255, 255, 255), np.random.default_rng(0))


def _view(left=0.0, top=0.0, right=224.0, bottom=224.0, view_px=112):
    return View(branch="local", index=1, row=0, column=0, source=Box(left=left, top=top, right=right, bottom=bottom), view_px=view_px)


def test_colour_shares_are_areas():
    canvas = _canvas()
    canvas.rectangle(Box(left=0, top=0, right=111, bottom=111), "blue")  # Pillow's right and bottom are inclusive: exactly a quarter
    shares = colour_shares(canvas, _view(), grid=2)
    blue = COLOUR_CLASSES.index("blue")
    assert shares[:, blue].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert shares.sum() == 1.0
    assert colour_shares(canvas, _view(left=56, right=168), grid=2)[0, blue] == 1.0
    # Outside of the image there is nothing.
    assert colour_shares(canvas, _view(left=-224, right=0), grid=2).sum() == 0.0


def test_what_is_drawn_over_is_gone():
    canvas = _canvas()
    canvas.rectangle(Box(left=0, top=0, right=223, bottom=223), "red")
    canvas.rectangle(Box(left=0, top=0, right=223, bottom=223), (10, 10, 10))
    assert colour_shares(canvas, _view(), grid=4).sum() == 0.0


def test_glyphs_land_in_their_patches_with_their_roles():
    canvas = _canvas()
    canvas.text(42, 14, "72", load_font("sans-bold", 20), (0, 0, 0))
    canvas.pictograph(182, 182, "anchor", 26, "red")
    placed = {GLYPH_CLASSES[glyph.glyph]: glyph for glyph in place_glyphs(canvas, _view(), grid=8)}
    assert set(placed) == {"7@0", "2@1", "anchor"}
    assert placed["anchor"].patches == (6 * 8 + 6,)
    assert all(patch < 8 for patch in placed["7@0"].patches)
    # Half the view's scale, half the size.
    far = {GLYPH_CLASSES[glyph.glyph]: glyph for glyph in place_glyphs(canvas, _view(right=448, bottom=448), grid=8)}
    assert far["anchor"].size_px == pytest.approx(placed["anchor"].size_px / 2)


def test_glyphs_outside_of_a_view_are_not_in_it():
    canvas = _canvas()
    canvas.pictograph(200, 200, "star", 26, "green")
    assert place_glyphs(canvas, _view(right=112, bottom=112), grid=8) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_small_answer_stands_in_the_layout(family):
    """A question that reads a mark can be answered from the local places alone."""
    layout = language_model.make_layout(family, 2, 0)
    assert len(layout.global_slots) == language_model.NUM_GLOBAL
    assert len(layout.local_slots) == language_model.NUM_LOCAL
    words = {word for slot in layout.local_slots for word in slot}
    for turn in layout.turns:
        if turn.detail == "small" and turn.answer.isdigit():
            assert {(digit, role) for role, digit in enumerate(turn.answer)} <= words
        elif turn.detail == "small" and " " not in turn.answer:
            assert (turn.answer, 0) in words


def test_layouts_agree_with_the_views_of_the_picture():
    picture, _ = sketch("charts", 2, 0)
    plan = plan_views(*picture.canvas.image.size, 112, ViewSpec())
    layout = language_model.make_layout("charts", 2, 0)
    grid = language_model.LOCAL_GRID
    for number, view in enumerate(plan.local_views):
        shares = colour_shares(picture.canvas, view, grid, samples_per_cell=20)
        for cell in range(grid * grid):
            written = {word for word, _ in layout.local_slots[number * grid * grid + cell] if word in COLOUR_CLASSES}
            assert written == {COLOUR_CLASSES[colour] for colour in np.flatnonzero(shares[cell] >= language_model._MIN_COLOUR_SHARE)}


def test_the_tokenizer_keeps_every_word_whole_and_every_digit_apart():
    layouts = [language_model.make_layout(family, number, 0) for family in FAMILIES for number in range(4)]
    tokenizer = language_model.train_tokenizer(layouts, 1280)
    ids = language_model._word_ids(tokenizer)
    assert len(set(ids.values())) == len(ids)
    tokens = tokenizer.encode(" 72 umbrella", add_special_tokens=False)
    assert tokens == [ids["7", 0], ids["2", 1], ids["umbrella", 0]]
    assert tokenizer.decode(tokens) == " 72 umbrella"
    assert len(tokenizer.encode("1967", add_special_tokens=False)) == 4
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "6"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s><|user|>How many?<|assistant|> 6<|end|>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<s><|user|>How many?<|assistant|>"


def test_slots_are_sums_of_the_blank_and_their_words():
    layout = language_model.Layout(
        global_slots=((("7", 0), ("2", 1), ("red", 0)),) + ((),) * (language_model.NUM_GLOBAL - 1),
        local_slots=((),) * language_model.NUM_LOCAL,
        turns=(),
    )
    ids = {("7", 0): 1, ("2", 1): 2, ("red", 0): 3}
    embedding = torch.randn(5, 8)
    table = language_model.SlotTable([layout], ids, blank_id=4)
    slots = table.embed(np.array([0]), slice(0, 2), embedding)
    assert torch.allclose(slots[0, 0], embedding[4] + embedding[1] + embedding[2] + embedding[3], atol=1e-6)
    assert torch.equal(slots[0, 1], embedding[4])


def test_the_curriculum_shows_glyphs_then_what_is_filled_then_what_is_empty():
    curriculum = language_model.Curriculum(10, 20, 40)
    assert [curriculum.keep_shares(step) for step in (0, 9, 15, 20, 30, 40)] == [(0, 0), (0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1)]


@pytest.mark.parametrize(
    ("question", "key"),
    [
        ("What value is written on the bar that is red?", "red"),
        ("Which object is at the middle centre?", "middle centre"),
        ("What number is on the tag at the bottom left?", "bottom left"),
        ("What number is printed on New Mexico?", "New Mexico"),
        ("Where is the anchor?", "anchor"),
    ],
)
def test_the_key_of_a_question_is_what_it_looks_up(question, key):
    assert language_model._key(question) == key


def test_cards_say_what_the_record_says(tmp_path):
    record = {
        "arguments": {"seed": 3, "steps": 10, "batch_size": 4, "pictures": 20, "sheets": 5, "threads": 1},
        "seconds": 120,
        "weights_sha256": "ab" * 32,
        "weights_bytes": 2**20,
        "limits": {"readable_from_px": 5.5, "local_min_px": 6.0, "global_max_px": 4.5},
        "measured": {
            "colour_f1": 0.5,
            "views": 7,
            "legibility": {
                "planned": {
                    "digits": {"4.0": {"accuracy": 0.25, "glyphs": 99}, "12.0": {"accuracy": 1.0, "glyphs": 3}},
                    "letters": {},
                    "objects": {},
                },
                "random": {"objects": {"14.0": {"accuracy": 0.5, "glyphs": 30}}},
            },
        },
    }
    (tmp_path / "training.json").write_text(json.dumps(record))
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| 4.0 | 0.25 | - | - |" in card
    assert "| 12.0 |" not in card
    assert "| 14.0+ | - | - | 0.50 |" in card
    assert "ab" * 32 in card
    assert "1.0 MiB" in card
