"""For any text in any template: the supervised tokens spell exactly the answers with their ends, or the row is refused for the right reason."""

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.chat import IMAGE_PLACE, tokenise_conversation, tokenise_question, with_template
from model.errors import ConversationError
from tests.small_tokenizers import (
    CHATML_SPECIAL,
    LLAMA3_SPECIAL,
    chatml_like,
    llama3_like,
    sentencepiece_bpe,
    sentencepiece_unigram,
    spelled,
)

BLANK = "\u2581"
"""SentencePiece's blank: a text that holds it cannot be told from one that holds a blank, by that model's own design."""

DIALECTS = [
    (sentencepiece_unigram, "vicuna_v1"),
    (sentencepiece_unigram, "plain"),
    (sentencepiece_bpe, "vicuna_v1"),
    (sentencepiece_bpe, "plain"),
    (llama3_like, "llama3"),
    (llama3_like, "vicuna_v1"),
    (llama3_like, "plain"),
    (chatml_like, "chatml"),
    (chatml_like, "vicuna_v1"),
    (chatml_like, "plain"),
]


@functools.cache
def speaking(make, template):
    return with_template(make(), template)


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BLANK), max_size=40)
spaced = st.text(st.sampled_from("\n\n  \t.?aA:\u00e9\u4e2d\U0001f600"), max_size=20)
worded = st.lists(st.sampled_from(["cat", "Two", "What", "is", "USER:", "ASSISTANT: no"])).map(" ".join)
MARKS = ("<unk>", "<s>", "</s>", IMAGE_PLACE, *LLAMA3_SPECIAL, *CHATML_SPECIAL)
texts = st.one_of(anything, spaced, worded).filter(lambda text: not any(mark in text for mark in MARKS))


def cue(template):
    """What the rendered text says between the cue for an answer and the answer, and what ends the answer."""
    return {"vicuna_v1": " ", "llama3": "", "chatml": "", "plain": ""}[template]


def end_of(tokenizer, template):
    return "\n" if template == "plain" else tokenizer.eos_token


def runs(conversation):
    """The runs of supervised tokens."""
    found, before = [], False
    for token, on in zip(conversation.after, conversation.supervised, strict=True):
        if on and not before:
            found.append([])
        if on:
            found[-1].append(token)
        before = on
    return found


def check(tokenizer, template, turns, conversation):
    spoken = [spelled(tokenizer, run) for run in runs(conversation)]
    wanted = [cue(template) + answer + end_of(tokenizer, template) for _, answer in turns]
    if template == "plain" and "<0x0A>" in tokenizer.get_vocab():
        # The caption is a text of its own, before which SentencePiece puts a blank unless one stands there.
        wanted = [text if text.startswith(" ") else f" {text}" for text in wanted]
    assert spoken == wanted
    asked = tokenise_question(tokenizer, turns[0][0], 100_000) if conversation.before or template != "plain" else None
    if asked is not None:
        assert conversation.before == asked.before
        assert conversation.after[: len(asked.after)] == asked.after
        assert not any(conversation.supervised[: len(asked.after)])


@pytest.mark.parametrize(("make", "template"), DIALECTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tidy_texts_are_never_refused(make, template, data):
    """Datasets strip their texts: such conversations must all get through."""
    tokenizer = speaking(make, template)
    turns = data.draw(st.lists(st.tuples(texts.map(str.strip), texts.map(str.strip)), min_size=1, max_size=1 if template == "plain" else 3))
    assume(all(answer for _, answer in turns))
    check(tokenizer, template, turns, tokenise_conversation(tokenizer, turns, 100_000))


@pytest.mark.parametrize(("make", "template"), DIALECTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blanks_at_the_ends_are_learned_or_refused(make, template, data):
    """Refused exactly where the text up to an answer, tokenised by itself, does not begin what the whole is tokenised to."""
    tokenizer = speaking(make, template)
    turns = data.draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=1 if template == "plain" else 3))
    messages = [
        {"role": role, "content": text}
        for number, (question, answer) in enumerate(turns)
        for role, text in (("user", f"{IMAGE_PLACE}\n{question}" if number == 0 else question), ("assistant", answer))
    ]

    def behind_the_image(count, *, cue):
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=cue)
        return tokenizer.encode(text.split(IMAGE_PLACE)[1], add_special_tokens=False)

    whole = behind_the_image(len(messages), cue=False)
    prompts = [behind_the_image(2 * number + 1, cue=True) for number in range(len(turns))]
    if all(whole[: len(prompt)] == prompt for prompt in prompts):
        check(tokenizer, template, turns, tokenise_conversation(tokenizer, turns, 100_000))
    else:
        with pytest.raises(ConversationError, match="no border between tokens") as raised:
            tokenise_conversation(tokenizer, turns, 100_000)
        assert raised.value.reason == "conversation_unmasked"


@pytest.mark.parametrize(("make", "template"), [(llama3_like, "llama3"), (chatml_like, "chatml"), (sentencepiece_bpe, "vicuna_v1")])
@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(texts.map(str.strip), texts.map(str.strip)), min_size=2, max_size=4), room=st.integers(1, 400))
def test_what_is_kept_of_a_long_conversation_is_a_shorter_one(make, template, turns, room):
    tokenizer = speaking(make, template)
    assume(all(answer for _, answer in turns))
    sizes = [tokenise_conversation(tokenizer, turns[: number + 1], 100_000).num_text_tokens for number in range(len(turns))]
    kept = sum(size <= room for size in sizes)
    assume(kept)
    assert tokenise_conversation(tokenizer, turns, room) == tokenise_conversation(tokenizer, turns[:kept], 100_000)
