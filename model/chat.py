"""Conversations to tokens, with a mask that covers exactly the answers.

Input: (question, answer) turns about one image, or about none, and a tokenizer with a chat template. Output: token ids before and behind the
image's place, and which of them are supervised. The template is the tokenizer's own or one of `templates/`. Where an answer lies in the rendered
text is found by rendering prefixes: the text of the first k messages with the cue for an answer must begin the text of the first k + 1. The text
before the image's place and the text behind it are each tokenised as one text, as at inference; where a border of an answer lies among the tokens
is found by tokenising the text up to the border: its ids must begin the ids of the whole. Where anything of this does not hold, no mask would be
right, and that raises.

Invariant: the ids of every prompt in training are the ids of the same prompt at inference. An answer is never cut. What the template adds behind an
answer's end token is not supervised.

Source: LLaVA (haotian-liu/LLaVA, c121f04) for `vicuna_v1` and `plain`, SliME's code for `llama3`. Differs: they tokenise every round by itself to
count its tokens, and where the counts do not add up they set all labels of the conversation to "ignored" with a printed warning. Here that is an
error that names the conversation. Their `plain` cuts long captions; here nothing is cut.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from model.errors import ConversationError, LanguageModelError
from model.specs import ChatTemplate

__all__ = ["IMAGE_PLACE", "Conversation", "check_mask", "tokenise_conversation", "tokenise_question", "with_template"]

IMAGE_PLACE = "<image>"
"""Stands for the visual tokens in a rendered conversation, once."""

_TEMPLATES = Path(__file__).parent / "templates"

_SPECIAL_TOKENS: dict[ChatTemplate, tuple[str, ...]] = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
"""What a template writes by name and a tokenizer must know as one token each; the last one ends an answer. Others end it with the tokenizer's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Tokens of a conversation around the place of its image."""

    before: tuple[int, ...]
    """None of a conversation about no image: all of it is in `after`."""
    after: tuple[int, ...]
    supervised: tuple[bool, ...]
    """For every token in `after`: whether the model is trained to predict it."""
    turns_kept: int

    @property
    def num_text_tokens(self) -> int:
        """Tokens without the visual ones."""
        return len(self.before) + len(self.after)

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the loss."""
        return sum(self.supervised)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """Where an answer lies in the text behind the image's place, in characters."""

    start: int
    """Where its cue ends."""
    stop: int
    """Where its turn ends, with what the template adds to the answer."""
    num_ends: int
    """End tokens in it: one, or none where the template writes none; it is supervised up to the last one, or up to the turn's end."""


def with_template(tokenizer: Any, template: ChatTemplate) -> Any:
    """A tokenizer that speaks a template.

    Args:
        tokenizer: as loaded from its folder.
        template: `own` is the tokenizer's; the others come with Loupe.

    Returns:
        The tokenizer itself for `own`; else a copy with the template and with the token that ends an answer in it as end token, so that whoever saves
        it saves both.

    Raises:
        LanguageModelError: it has no template of its own, or lacks tokens that the template writes.
    """
    if template == "own":
        if not tokenizer.chat_template:
            raise LanguageModelError(
                "its tokenizer has no chat template, so questions and answers have no form. Name the form that the model was trained on by "
                "language_model.template (vicuna_v1, llama3, chatml, or plain for captions), take an instruct version of the model, or add a "
                "chat_template.jinja to its folder"
            )
        return tokenizer
    needed = _SPECIAL_TOKENS.get(template, ())
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if missing := [token for token in needed if token not in known]:
        raise LanguageModelError(
            f"the template {template} writes the tokens {', '.join(needed)}, but its tokenizer does not know {', '.join(missing)} as tokens of their "
            "own; choose the template that this language model was trained on, or vicuna_v1, which needs no special tokens"
        )
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = (_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    if needed:
        speaking.eos_token = needed[-1]
    return speaking


_CANARY = (("What is shown?", "A red square."), ("Where does it stand?", "At the top."))
"""Plain words in two turns: what no template has a reason to refuse."""


def check_mask(tokenizer: Any, template: ChatTemplate) -> None:
    """Refuse a template of which no conversation, or none of several turns, has a loss mask: before features are cached, not after.

    Args:
        tokenizer: as `with_template` gave it.
        template: its name.

    Raises:
        LanguageModelError: plain words in two turns (in `plain` one), about an image or about none, cannot be tokenised with a mask.
    """
    # A caption has one turn and an image.
    turns, kinds = (_CANARY[:1], (True,)) if template == "plain" else (_CANARY, (True, False))
    for has_image in kinds:
        try:
            tokenise_conversation(tokenizer, turns, 2**31, has_image=has_image)
        except ConversationError as error:
            name = "its tokenizer's own chat template" if template == "own" else f"the template {template}"
            raise LanguageModelError(
                f"{name} gives no loss mask for a conversation of {len(turns)} turn{'s' if len(turns) > 1 else ''} in plain words "
                f"{'about an image' if has_image else 'without an image'}: {error}. Name another by language_model.template (vicuna_v1, llama3, "
                "chatml), or put one that only appends into the model's folder as chat_template.jinja"
            ) from error


def _messages(turns: Sequence[tuple[str, str]], *, has_image: bool = True) -> list[dict[str, str]]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = f"{IMAGE_PLACE}\n{question}" if has_image and number == 0 else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _render(tokenizer: Any, messages: list[dict[str, str]], *, cue: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
    except TemplateError as error:
        raise ConversationError("conversation_template", f"the chat template refuses the conversation: {error}") from error
    return text


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


@lru_cache(maxsize=16)
def _marks(tokenizer: Any) -> re.Pattern[str]:
    """What must not stand in a turn: the image's place, and every text that the tokenizer takes for a special token."""
    added = tokenizer.added_tokens_decoder.values()
    written = {mark for marks in _SPECIAL_TOKENS.values() for mark in marks}
    marks = {IMAGE_PLACE, *tokenizer.all_special_tokens, *(token.content for token in added if token.special or token.content in written)}
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True) if mark))


def _check_turns(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> None:
    if not turns:
        raise ConversationError("conversation_empty", "a conversation needs at least one question with its answer, found none")
    marks = _marks(tokenizer)
    for number, turn in enumerate(turns):
        for role, text in zip(("question", "answer"), turn, strict=True):
            if found := marks.search(text):
                raise ConversationError(
                    "conversation_marks",
                    f"the {role} of turn {number + 1} holds {found[0]!r}, which has a meaning of its own in the prompt; remove it",
                )


def _split_at_image(text: str) -> tuple[str, str]:
    pieces = text.split(IMAGE_PLACE)
    if len(pieces) != 2:
        raise ConversationError(
            "conversation_template",
            f"the rendered prompt must hold {IMAGE_PLACE!r} once, found it {len(pieces) - 1} times; the chat template alters the message",
        )
    return pieces[0], pieces[1]


def _rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], *, has_image: bool) -> tuple[str, str, list[_Answer]]:
    """The text before the image's place, the text behind it, and where the answers lie in the latter."""
    messages = _messages(turns, has_image=has_image)
    answers: list[tuple[int, int, int]] = []
    done = ""
    for number in range(len(turns)):
        asked = _render(tokenizer, messages[: 2 * number + 1], cue=True)
        answered = _render(tokenizer, messages[: 2 * number + 2], cue=False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise ConversationError(
                "conversation_template",
                f"the chat template rewrites earlier messages at turn {number + 1}: the text so far no longer begins the text, so answers cannot be "
                "told from questions. Use a template that only appends",
            )
        answers.append((len(asked), len(answered), answered.count(tokenizer.eos_token, len(asked))))
        done = answered
    lead, rest = _split_at_image(done) if has_image else ("", done)
    shift = len(done) - len(rest)
    if answers[0][0] < shift:
        raise ConversationError("conversation_template", f"the chat template puts {IMAGE_PLACE!r} behind the cue for the first answer")
    return lead, rest, [_Answer(start=start - shift, stop=stop - shift, num_ends=num_ends) for start, stop, num_ends in answers]


def _mask(ids: list[int], answers: Sequence[_Answer], begun: Mapping[int, list[int]], end_id: int) -> list[bool]:
    """Which ids are supervised.

    Args:
        ids: of the whole text.
        answers: those in the text.
        begun: ids of the text up to a border, by the border.
        end_id: of the end token.

    Returns:
        One flag for each id.

    Raises:
        ConversationError: a border lies inside a token, or an answer has no token.
    """

    def place(border: int, what: str) -> int:
        if ids[: len(begun[border])] != begun[border]:
            raise ConversationError(
                "conversation_unmasked",
                f"the {what} is no border between tokens: tokenised up to there, the text has other tokens than in the whole, so what is learned "
                "would not be what is asked for at inference. Blanks or line breaks at an answer's ends often do that; remove them",
            )
        return len(begun[border])

    supervised = [False] * len(ids)
    for number, answer in enumerate(answers, start=1):
        first = place(answer.start, f"start of answer {number}")
        if answer.num_ends:
            ends = [spot for spot in range(first, len(ids)) if ids[spot] == end_id][: answer.num_ends]
            if len(ends) < answer.num_ends:
                raise ConversationError("conversation_unmasked", f"the end token behind answer {number} is no token of its own in this tokenizer")
            last = ends[-1]
        else:
            last = place(answer.stop, f"end of answer {number}") - 1
        if last < first:
            raise ConversationError("conversation_unmasked", f"answer {number} has no token of its own, so nothing would be learned from it")
        supervised[first : last + 1] = [True] * (last + 1 - first)
    return supervised


def tokenise_conversation(tokenizer: Any, turns: Sequence[tuple[str, str]], max_text_tokens: int, *, has_image: bool = True) -> Conversation:
    """Tokens and mask of a conversation for training.

    Args:
        tokenizer: with a chat template.
        turns: (question, answer), in order; the image stands before the first question.
        max_text_tokens: room for text. Turns at the end that do not fit are dropped whole.
        has_image: whether there is an image. Without one its place and the line break behind it are left out.

    Returns:
        The tokens; every kept answer is whole and supervised including its end token.

    Raises:
        ConversationError: nothing to say, a mark of the prompt inside a turn, a template that refuses the conversation or whose text does not grow
            message by message, a border of an answer inside a token, or a first turn that does not fit by itself.
    """
    _check_turns(tokenizer, turns)
    lead, rest, answers = _rendered(tokenizer, turns, has_image=has_image)
    # An end token is found by its id: no turn can hold it, and half the texts need not be tokenised.
    borders = sorted({answer.start for answer in answers} | {answer.stop for answer in answers if not answer.num_ends})
    before, ids, *pieces = _encode(tokenizer, [lead, rest, *(rest[:border] for border in borders)])
    kept = len(answers)
    while len(before) + len(ids) > max_text_tokens:
        kept -= 1
        if not kept:
            raise ConversationError(
                "conversation_too_long",
                f"the first question with its answer takes {len(before) + len(ids)} tokens, but beside the visual tokens the language model has room "
                f"for {max_text_tokens}; shorten it, use fewer visual tokens or a model with a longer context",
            )
        ids = _encode(tokenizer, [rest[: answers[kept - 1].stop]])[0]
    supervised = _mask(ids, answers[:kept], dict(zip(borders, pieces, strict=True)), tokenizer.eos_token_id)
    return Conversation(before=tuple(before), after=tuple(ids), supervised=tuple(supervised), turns_kept=kept)


def tokenise_question(tokenizer: Any, question: str, max_text_tokens: int) -> Conversation:
    """Tokens of one question with the cue for its answer, for inference.

    Args:
        tokenizer: with a chat template.
        question: about the image.
        max_text_tokens: room for the prompt.

    Returns:
        The tokens; none is supervised.

    Raises:
        ConversationError: a mark of the prompt inside the question, a template that refuses it, or a question that does not fit.
    """
    _check_turns(tokenizer, [(question, "")])
    lead, rest = _split_at_image(_render(tokenizer, _messages([(question, "")])[:1], cue=True))
    before, after = _encode(tokenizer, [lead, rest])
    if not before and not after:
        raise ConversationError("conversation_template", "the chat template leaves out the question, and the tokenizer has no begin token: no prompt")
    if len(before) + len(after) > max_text_tokens:
        raise ConversationError(
            "conversation_too_long", f"the question takes {len(before) + len(after)} tokens, but there is room for {max_text_tokens}; shorten it"
        )
    return Conversation(before=tuple(before), after=tuple(after), supervised=(False,) * len(after), turns_kept=1)
