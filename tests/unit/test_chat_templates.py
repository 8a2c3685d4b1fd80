"""The templates that come with Loupe: what they write, which tokens that makes, and which of those are learned. Tokens that are are marked by `*`."""

import json
import pickle
import re
import shutil

import pytest

from model.chat import tokenise_conversation, tokenise_question, with_template
from model.errors import ConversationError, LanguageModelError
from model.language_model import load_tokenizer
from tests.small_tokenizers import chatml_like, llama3_like, sentencepiece_bpe, sentencepiece_unigram, spelled
from workers.language_models import check_usable

TURNS = [("What is it?", "A cat."), ("How many?", "Two"), ("Where?", "On the mat")]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. "
)


def marked(tokenizer, conversation):
    """Tokens behind the image, those with a loss behind a star."""
    tokens = tokenizer.convert_ids_to_tokens(conversation.after)
    return ["*" * on + token for token, on in zip(tokens, conversation.supervised, strict=True)]


def texts(tokenizer, conversation):
    """The same, runs of tokens with and without a loss put together as text."""
    runs = []
    for token, on in zip(conversation.after, conversation.supervised, strict=True):
        if not runs or runs[-1][0] != on:
            runs.append((on, []))
        runs[-1][1].append(token)
    return ["*" * on + spelled(tokenizer, ids) for on, ids in runs]


VICUNA = [
    *("\u2581", "<0x0A>", "W", "h", "a", "t", "\u2581is", "\u2581it", "?", "\u2581ASSISTANT", ":", "*\u2581A", "*\u2581cat", "*.", "*</s>"),
    *("\u2581USER", ":", "\u2581How", "\u2581many", "?", "\u2581ASSISTANT", ":", "*\u2581Two", "*</s>"),
    *("\u2581USER", ":", "\u2581Where", "?", "\u2581ASSISTANT", ":", "*\u2581On", "*\u2581the", "*\u2581mat", "*</s>"),
]


@pytest.mark.parametrize(("num_turns", "num_tokens"), [(1, 15), (3, 34)])
def test_vicuna_token_by_token(num_turns, num_tokens):
    tokenizer = with_template(sentencepiece_unigram(), "vicuna_v1")
    conversation = tokenise_conversation(tokenizer, TURNS[:num_turns], 1000)
    assert marked(tokenizer, conversation) == VICUNA[:num_tokens]
    assert spelled(tokenizer, conversation.before) == f"<s> {SYSTEM}USER: "
    assert conversation.before[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("make", [sentencepiece_unigram, sentencepiece_bpe, llama3_like, chatml_like])
def test_vicuna_on_any_tokenizer(make):
    tokenizer = with_template(make(), "vicuna_v1")
    end, blank = tokenizer.eos_token, " " if make in (sentencepiece_unigram, sentencepiece_bpe) else ""
    assert texts(tokenizer, tokenise_conversation(tokenizer, TURNS, 1000)) == [
        f"{blank}\nWhat is it? ASSISTANT:", f"* A cat.{end}", f"{blank}USER: How many? ASSISTANT:", f"* Two{end}", f"{blank}USER: Where? ASSISTANT:",
        f"* On the mat{end}",
    ]  # fmt: skip


HEAD, TAIL = "<|start_header_id|>", "<|end_header_id|>"


@pytest.mark.parametrize("num_turns", [1, 3])
def test_llama3(num_turns):
    tokenizer = with_template(llama3_like(), "llama3")
    conversation = tokenise_conversation(tokenizer, TURNS[:num_turns], 1000)
    assert tokenizer.convert_ids_to_tokens(conversation.before) == ["<|begin_of_text|>", HEAD, "user", TAIL, "\u010a\u010a"]
    answer = f"{HEAD}assistant{TAIL}\n\n"
    expected = [
        f"\nWhat is it?<|eot_id|>{answer}", "*A cat.<|eot_id|>", f"{HEAD}user{TAIL}\n\nHow many?<|eot_id|>{answer}", "*Two<|eot_id|>",
        f"{HEAD}user{TAIL}\n\nWhere?<|eot_id|>{answer}", "*On the mat<|eot_id|>",
    ]  # fmt: skip
    assert texts(tokenizer, conversation) == expected[: 2 * num_turns]
    if num_turns == 1:
        asked = ["\u010a", "What", "\u0120", "i", "s", "\u0120", "i", "t", "?", "<|eot_id|>", HEAD, "assistant", TAIL, "\u010a\u010a"]
        assert marked(tokenizer, conversation) == [*asked, "*A", "*\u0120", "*cat", "*.", "*<|eot_id|>"]


@pytest.mark.parametrize("num_turns", [1, 3])
def test_chatml(num_turns):
    tokenizer = with_template(chatml_like(), "chatml")
    conversation = tokenise_conversation(tokenizer, TURNS[:num_turns], 1000)
    assert tokenizer.convert_ids_to_tokens(conversation.before) == ["<|im_start|>", "user", "\u010a"]
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    expected = [
        f"\nWhat is it?{answer}", "*A cat.<|im_end|>", f"\n<|im_start|>user\nHow many?{answer}", "*Two<|im_end|>",
        f"\n<|im_start|>user\nWhere?{answer}", "*On the mat<|im_end|>",
    ]  # fmt: skip
    # The line break behind an end token belongs to the next message: nobody learns it.
    assert texts(tokenizer, conversation) == [*expected[: 2 * num_turns], "\n"]


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (sentencepiece_unigram, ["<s>"], ["*\u2581A", "*\u2581cat", "*.", "*<0x0A>"]),
        (llama3_like, ["<|begin_of_text|>"], ["*A", "*\u0120", "*cat", "*.\u010a"]),
        (chatml_like, [], ["*A", "*\u0120", "*cat", "*.\u010a"]),
    ],
)
def test_plain_is_image_caption_line_break(make, before, after):
    tokenizer = with_template(make(), "plain")
    for question in ("What is it?", "Say something else entirely"):
        conversation = tokenise_conversation(tokenizer, [(question, "A cat.")], 1000)
        assert tokenizer.convert_ids_to_tokens(conversation.before) == before
        assert marked(tokenizer, conversation) == after


def test_plain_takes_one_caption():
    tokenizer = with_template(llama3_like(), "plain")
    with pytest.raises(ConversationError, match="plain holds one caption") as raised:
        tokenise_conversation(tokenizer, TURNS, 1000)
    assert raised.value.reason == "conversation_template"
    asked = tokenise_question(tokenizer, "What?", 1000)
    assert (tokenizer.convert_ids_to_tokens(asked.before), asked.after) == (["<|begin_of_text|>"], ())
    with pytest.raises(ConversationError, match="no prompt"):  # without a begin token a blind sequence would be empty
        tokenise_question(with_template(chatml_like(), "plain"), "What?", 1000)


@pytest.mark.parametrize(("make", "template"), [(llama3_like, "llama3"), (chatml_like, "chatml"), (sentencepiece_bpe, "vicuna_v1")])
def test_every_prompt_of_training_is_one_of_inference(make, template):
    tokenizer = with_template(make(), template)
    whole = tokenise_conversation(tokenizer, TURNS, 1000)
    asked = tokenise_question(tokenizer, TURNS[0][0], 1000)
    assert whole.before == asked.before
    assert whole.after[: len(asked.after)] == asked.after
    assert whole.supervised[len(asked.after)]
    assert not any(whole.supervised[: len(asked.after)])
    for num_turns in (1, 2):
        part = tokenise_conversation(tokenizer, TURNS[:num_turns], 1000)
        assert whole.after[: len(part.after)] == part.after


@pytest.mark.parametrize(("make", "template"), [(llama3_like, "llama3"), (chatml_like, "chatml")])
def test_an_answer_that_begins_inside_a_token_is_refused(make, template):
    """The cue ends in a line break, and line breaks merge: at inference the prompt would end in another token."""
    tokenizer = with_template(make(), template)
    with pytest.raises(ConversationError, match=r"start of answer 2 is no border between tokens.*remove them") as raised:
        tokenise_conversation(tokenizer, [TURNS[0], ("How many?", "\nTwo")], 1000)
    assert raised.value.reason == "conversation_unmasked"


def test_an_answer_that_ends_inside_a_token_is_refused():
    tokenizer = llama3_like()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ '=' if m['role'] == 'user' else '\n' }}{% endfor %}"
    with pytest.raises(ConversationError, match="end of answer 1 is no border between tokens") as raised:
        tokenise_conversation(tokenizer, [("What", "cat"), ("\nTwo", "cat")], 1000)
    assert raised.value.reason == "conversation_unmasked"


def test_an_answer_without_tokens_is_refused():
    tokenizer = llama3_like()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ '=' if m['role'] == 'user' }}{% endfor %}"
    with pytest.raises(ConversationError, match="answer 1 has no token of its own") as raised:
        tokenise_conversation(tokenizer, [("What", "")], 1000)
    assert raised.value.reason == "conversation_unmasked"


def test_an_end_token_that_is_no_token_is_refused():
    tokenizer = sentencepiece_unigram()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ '=' if m['role'] == 'user' else eos_token }}{% endfor %}"
    tokenizer._special_tokens_map["eos_token"] = "many"  # letters, for this vocabulary knows the word at the start of words only
    with pytest.raises(ConversationError, match="end token behind answer 1 is no token of its own") as raised:
        tokenise_conversation(tokenizer, [("What is it", "A cat")], 1000)
    assert raised.value.reason == "conversation_unmasked"


@pytest.mark.parametrize("mark", ["<|start_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>"])
@pytest.mark.parametrize("template", ["llama3", "vicuna_v1", "plain"])
def test_every_special_token_is_a_mark(mark, template):
    """Most of Llama 3's are not among those that its tokenizer lists as special."""
    tokenizer = with_template(llama3_like(), template)
    with pytest.raises(ConversationError, match=re.escape(f"answer of turn 1 holds '{mark}'")) as raised:
        tokenise_conversation(tokenizer, [("What?", f"A {mark} cat")], 1000)
    assert raised.value.reason == "conversation_marks"
    with pytest.raises(ConversationError, match="question of turn 1"):
        tokenise_question(tokenizer, mark, 1000)


def test_turns_are_dropped_whole_until_the_rest_fits():
    tokenizer = with_template(llama3_like(), "llama3")
    parts = [tokenise_conversation(tokenizer, TURNS[:num_turns], 1000) for num_turns in (1, 2, 3)]
    for room in range(1, parts[-1].num_text_tokens + 2):
        fitting = [part for part in parts if part.num_text_tokens <= room]
        if fitting:
            assert tokenise_conversation(tokenizer, TURNS, room) == fitting[-1]
        else:
            with pytest.raises(ConversationError, match=rf"takes {parts[0].num_text_tokens} tokens.*room for {room}") as raised:
                tokenise_conversation(tokenizer, TURNS, room)
            assert raised.value.reason == "conversation_too_long"


def test_an_own_template_that_refuses_is_an_error_of_the_row():
    tokenizer = llama3_like()
    tokenizer.chat_template = "{{ raise_exception('only assistants') }}"
    with pytest.raises(ConversationError, match="refuses the conversation: only assistants") as raised:
        tokenise_conversation(tokenizer, TURNS, 1000)
    assert raised.value.reason == "conversation_template"


def test_a_slow_tokenizer_needs_no_offsets():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(extra_ids=0)
    assert not slow.is_fast
    tokenizer = with_template(slow, "vicuna_v1")
    conversation = tokenise_conversation(tokenizer, [("What?", "\u00c4h"), ("And?", "B")], 1000)
    spoken = [token for token, on in zip(conversation.after, conversation.supervised, strict=True) if on]
    assert tokenizer.convert_ids_to_tokens(spoken) == [" ", "\u00c3", "\u0084", "h", "</s>", " ", "B", "</s>"]


def test_a_template_that_the_tokenizer_has_no_tokens_for_is_refused():
    with pytest.raises(LanguageModelError, match=r"llama3 writes the tokens .* does not know <\|start_header_id\|>.*choose the template"):
        with_template(sentencepiece_unigram(), "llama3")
    with pytest.raises(LanguageModelError, match=r"chatml writes .* does not know <\|im_start\|>, <\|im_end\|> as"):
        with_template(llama3_like(), "chatml")
    with pytest.raises(LanguageModelError, match=r"no chat template.*language_model\.template \(vicuna_v1, llama3, chatml, or plain"):
        with_template(llama3_like(), "own")


@pytest.mark.parametrize(("make", "template", "end"), [(llama3_like, "llama3", "<|eot_id|>"), (chatml_like, "chatml", "<|im_end|>")])
def test_a_tokenizer_is_saved_with_the_template_it_speaks(make, template, end, tmp_path):
    tokenizer = make()
    before = tokenizer.eos_token
    speaking = with_template(tokenizer, template)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, before)
    assert speaking.eos_token == end
    speaking.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == end
    assert tokenise_conversation(loaded, TURNS, 1000) == tokenise_conversation(speaking, TURNS, 1000)


def test_a_tokenizer_without_a_template_is_refused_unless_one_is_named(tmp_path):
    sentencepiece_bpe().save_pretrained(tmp_path)
    with pytest.raises(LanguageModelError, match=rf"{tmp_path}: its tokenizer has no chat template.*language_model\.template"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, None).chat_template is None
    assert "ASSISTANT" in load_tokenizer(tmp_path, "vicuna_v1").chat_template


REWRITES = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
SWALLOWS = "{% for m in messages %}{{ m['content'] | replace('<image>', '') }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITES, "no loss mask for a conversation of 2 turns in plain words about an image: .*rewrites earlier messages"),
        (SWALLOWS, "no loss mask .*found it 0 times"),
    ],
)
def test_a_template_without_a_loss_mask_is_refused_before_there_are_conversations(template, message, tiny_language_model_folder, tmp_path):
    shutil.copytree(tiny_language_model_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(LanguageModelError, match=rf"language model .*its tokenizer's own chat template gives {message}.*language_model\.template"):
        check_usable(str(tmp_path / "model"), ["own"])
    assert check_usable(str(tmp_path / "model"), ["plain", "vicuna_v1"]) > 0  # those that come with Loupe have one


def test_the_reason_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ConversationError("conversation_marks", "what")))
    assert (error.reason, str(error)) == ("conversation_marks", "what")
