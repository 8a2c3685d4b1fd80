"""Questions to an export in one batch: each answered as if it were alone; and likelihoods against one token at a time."""

from pathlib import Path

import pytest
import torch

from model.chat import tokenise_conversation
from model.errors import ConversationError, ExportError
from model.export import ExportedModel, load_export
from tests.small_data import png
from tests.tiny_training import write_tiny_export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> ExportedModel:
    return load_export(write_tiny_export(tmp_path_factory.mktemp("export"), tiny_encoder_folder, tiny_language_model_folder))


ASKED = [
    (png(1), "What?"),
    (png(2, 56, 200), "Which of all these colours is the one at the left?"),
    (None, "And without?"),
    (png(3, 300, 60), "?"),
    (png(1), "How many?"),
]


@pytest.mark.parametrize("mode", ["blind", "global", "local", "both"])
def test_a_batch_answers_as_one_by_one(exported: ExportedModel, mode: str) -> None:
    together = exported.ask_many(ASKED, mode, max_new_tokens=6)
    for (image, question), found in zip(ASKED, together, strict=True):
        alone = exported.ask_many([(image, question)], mode, max_new_tokens=6)[0]
        assert (found.text, found.num_visual_tokens, found.mode) == (alone.text, alone.num_visual_tokens, alone.mode)
        assert found.mode == (mode if image else "blind")
        assert (found.num_visual_tokens == 0) == (found.mode == "blind")
        if image is not None:
            assert exported.ask(image, question, mode, max_new_tokens=6).text == alone.text
    assert [found.text for found in exported.ask_many(ASKED[::-1], mode, max_new_tokens=6)] == [found.text for found in together[::-1]]


def test_images_show_in_the_answers(exported: ExportedModel) -> None:
    """Else the tests above would pass on a model that looks at nothing."""
    first, second = exported.ask_many([(png(1), "What?"), (png(7), "What?")], max_new_tokens=1)
    assert exported.log_likelihood(png(1), "What?", "yes")[0] != exported.log_likelihood(png(7), "What?", "yes")[0]
    assert first.num_visual_tokens == second.num_visual_tokens > 0


def test_answers_may_end_where_the_longest_sequence_does(exported: ExportedModel) -> None:
    too_many = exported.model.max_tokens
    with pytest.raises(ConversationError, match="there is room for -"):
        exported.ask_many([(png(1), "What?")], max_new_tokens=too_many)
    exported.model.max_tokens = 80
    try:
        (found,) = exported.ask_many([(png(1), "What?")], max_new_tokens=too_many, may_end_early=True)
        assert found.num_answer_tokens + found.num_visual_tokens < 80
        with pytest.raises(ConversationError):
            exported.ask_many([(png(1), "What? " * 20)], max_new_tokens=too_many, may_end_early=True)
    finally:
        exported.model.max_tokens = too_many


@pytest.mark.parametrize("image", [png(1), None], ids=["image", "blind"])
def test_a_likelihood_is_the_product_over_its_tokens(exported: ExportedModel, image: bytes | None) -> None:
    """The reference asks for one token after the other, each by the text so far."""
    model = exported.model
    conversation = tokenise_conversation(model.tokenizer, [("What?", "no 7")], 200)
    shown = exported._show([image], "both")
    sequences = exported._batch([conversation], shown, pad_left=False)
    embedded = model.embed_sequences(sequences, model.visual_tokens_without_gradient(sequences))[0]
    log_probability, greedy = 0.0, True
    answer = [token for token, counts in zip(conversation.after, conversation.supervised, strict=True) if counts]
    behind = len(conversation.supervised) - max(place for place, counts in enumerate(conversation.supervised) if counts) - 1
    for place, token in enumerate(answer):
        end = len(embedded) - behind - len(answer) + place
        with torch.no_grad():
            logits = model.language_model(inputs_embeds=embedded[None, :end]).logits[0, -1].float()
        log_probability += float(logits.log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
    found = exported.log_likelihood(image, "What?", "no 7")
    assert found[0] == pytest.approx(log_probability, rel=1e-4)
    assert found[1] == greedy


def test_a_mode_that_shows_nothing_is_refused(tmp_path: Path, exported: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    config = replace(exported.config, connector=replace(exported.config.connector, local_branch=None))
    monkeypatch.setattr(exported, "config", config)
    with pytest.raises(ExportError, match="no local branch"):
        exported.ask_many(ASKED, "local")
