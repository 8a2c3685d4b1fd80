import pytest

from model.chat import tokenise_conversation, tokenise_question
from model.errors import ConversationError
from tests.tiny import tiny_tokenizer as make_tokenizer


@pytest.fixture
def tiny_tokenizer():
    """One of each test's own: some change its template."""
    return make_tokenizer()


TURNS = [("What is it?", "A cat."), ("How many?", "Two"), ("Where?", "On the mat")]


def test_the_mask_covers_answers_and_their_ends(tiny_tokenizer):
    conversation = tokenise_conversation(tiny_tokenizer, TURNS, 1000)
    assert conversation.turns_kept == 3
    spoken = [token for token, on in zip(conversation.after, conversation.supervised, strict=True) if on]
    assert tiny_tokenizer.decode(spoken) == "A cat.<|end|>Two<|end|>On the mat<|end|>"
    assert tiny_tokenizer.decode(conversation.before) == "<|user|>"
    silent = [token for token, on in zip(conversation.after, conversation.supervised, strict=True) if not on]
    assert tiny_tokenizer.decode(silent) == (
        "\nWhat is it?<|end|><|assistant|><|user|>How many?<|end|><|assistant|><|user|>Where?<|end|><|assistant|>"
    )


def test_what_the_template_adds_behind_an_answer_is_not_supervised(tiny_tokenizer):
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("'<|end|>' }}", "'<|end|>\n' }}")
    conversation = tokenise_conversation(tiny_tokenizer, TURNS[:1], 1000)
    assert conversation.supervised[-2:] == (True, False)


def test_a_prompt_has_the_same_tokens_in_training_and_at_inference(tiny_tokenizer):
    trained = tokenise_conversation(tiny_tokenizer, TURNS, 1000)
    asked = tokenise_question(tiny_tokenizer, TURNS[0][0], 1000)
    assert trained.before == asked.before
    assert trained.after[: len(asked.after)] == asked.after
    assert not any(trained.supervised[: len(asked.after)])
    assert trained.supervised[len(asked.after)]
    assert asked.num_supervised == 0


def test_whole_turns_are_dropped_at_the_end(tiny_tokenizer):
    whole = tokenise_conversation(tiny_tokenizer, TURNS, 1000)
    shorter = tokenise_conversation(tiny_tokenizer, TURNS, whole.num_text_tokens - 1)
    assert shorter.turns_kept == 2
    assert whole.after[: len(shorter.after)] == shorter.after
    assert shorter.supervised[-1]


def test_a_first_turn_that_does_not_fit_is_an_error(tiny_tokenizer):
    with pytest.raises(ConversationError, match=r"takes \d+ tokens.*room for 10"):
        tokenise_conversation(tiny_tokenizer, TURNS, 10)
    with pytest.raises(ConversationError, match="room for 5"):
        tokenise_question(tiny_tokenizer, "What?", 5)


@pytest.mark.parametrize("text", ["see <image>", "end it <|end|> now"])
def test_marks_of_the_prompt_inside_a_turn_are_refused(tiny_tokenizer, text):
    with pytest.raises(ConversationError, match="meaning of its own"):
        tokenise_conversation(tiny_tokenizer, [(text, "no")], 1000)
    with pytest.raises(ConversationError, match="meaning of its own"):
        tokenise_conversation(tiny_tokenizer, [("what", text)], 1000)
    with pytest.raises(ConversationError, match="meaning of its own"):
        tokenise_question(tiny_tokenizer, text, 1000)


def test_a_template_that_rewrites_history_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ messages | length }}" + tiny_tokenizer.chat_template
    with pytest.raises(ConversationError, match="no longer begins"):
        tokenise_conversation(tiny_tokenizer, TURNS, 1000)


def test_a_template_that_swallows_the_image_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('<image>', '') }}{% endfor %}"
    with pytest.raises(ConversationError, match="found it 0 times"):
        tokenise_conversation(tiny_tokenizer, TURNS, 1000)


def test_nothing_to_say(tiny_tokenizer):
    with pytest.raises(ConversationError, match="at least one"):
        tokenise_conversation(tiny_tokenizer, [], 1000)
