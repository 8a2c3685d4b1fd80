"""Conversations to tokens, with a mask that covers exactly the answers.

Input: (question, answer) turns about one image and a tokenizer with a chat template. Output: token ids before and behind the image's place, and which
of them are supervised. The template is the tokenizer's own; where an answer lies in the rendered text is found by rendering prefixes: the text of the
first k messages with the cue for an answer must begin the text of the first k + 1. Where it does not, no mask would be right, and that raises.

Invariant: the ids of the first question's prompt in training are the ids of the same prompt at inference, since every piece of text between two
borders is tokenised by itself. An answer is never cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import ConversationError

__all__ = ["IMAGE_PLACE", "Conversation", "tokenise_conversation", "tokenise_question"]

IMAGE_PLACE = "<image>"
"""Stands for the visual tokens in a rendered conversation, once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Tokens of a conversation around the place of its image."""

    before: tuple[int, ...]
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


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = f"{IMAGE_PLACE}\n{question}" if number == 0 else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _render(tokenizer: Any, messages: list[dict[str, str]], *, cue: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _check_turns(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> None:
    if not turns:
        raise ConversationError("a conversation needs at least one question with its answer, found none")
    for number, turn in enumerate(turns):
        for role, text in zip(("question", "answer"), turn, strict=True):
            found = [mark for mark in (IMAGE_PLACE, *tokenizer.all_special_tokens) if mark and mark in text]
            if found:
                raise ConversationError(
                    f"the {role} of turn {number + 1} holds {found[0]!r}, which has a meaning of its own in the prompt; remove it"
                )


def _split_at_image(text: str) -> tuple[str, str]:
    pieces = text.split(IMAGE_PLACE)
    if len(pieces) != 2:
        raise ConversationError(
            f"the rendered prompt must hold {IMAGE_PLACE!r} once, found it {len(pieces) - 1} times; the chat template alters the message"
        )
    return pieces[0], pieces[1]


def _answer_ids(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """Ids of an answer's text as rendered, and how many of them are supervised: up to its end token; what the template adds behind is not."""
    ids = _encode(tokenizer, text)
    end = tokenizer.eos_token_id
    if end in ids:
        return ids, len(ids) - ids[::-1].index(end)
    return ids, len(ids)


def tokenise_conversation(tokenizer: Any, turns: Sequence[tuple[str, str]], max_text_tokens: int) -> Conversation:
    """Tokens and mask of a conversation for training.

    Args:
        tokenizer: with a chat template.
        turns: (question, answer), in order; the image stands before the first question.
        max_text_tokens: room for text. Turns at the end that do not fit are dropped whole.

    Returns:
        The tokens; every kept answer is whole and supervised including its end token.

    Raises:
        ConversationError: nothing to say, a mark of the prompt inside a turn, a template whose text does not grow message by message, or a first turn
            that does not fit by itself.
    """
    _check_turns(tokenizer, turns)
    messages = _messages(turns)
    before: list[int] = []
    after: list[int] = []
    supervised: list[bool] = []
    done = ""
    kept = 0
    for number in range(len(turns)):
        asked = _render(tokenizer, messages[: 2 * number + 1], cue=True)
        answered = _render(tokenizer, messages[: 2 * number + 2], cue=False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise ConversationError(
                f"the chat template rewrites earlier messages at turn {number + 1}: the text so far no longer begins the text, so answers cannot be "
                "told "
                "from questions. Use a template that only appends"
            )
        question = asked[len(done) :]
        if number == 0:
            lead, question = _split_at_image(question)
            before = _encode(tokenizer, lead)
        question_ids = _encode(tokenizer, question)
        answer_ids, num_supervised = _answer_ids(tokenizer, answered[len(asked) :])
        if len(before) + len(after) + len(question_ids) + len(answer_ids) > max_text_tokens:
            break
        after += question_ids + answer_ids
        supervised += [False] * len(question_ids) + [place < num_supervised for place in range(len(answer_ids))]
        done = answered
        kept = number + 1
    if not kept:
        needed = len(before) + len(question_ids) + len(answer_ids)
        raise ConversationError(
            f"the first question with its answer takes {needed} tokens, but beside the visual tokens the language model has room for "
            f"{max_text_tokens}; "
            "shorten it, use fewer visual tokens or a model with a longer context"
        )
    return Conversation(before=tuple(before), after=tuple(after), supervised=tuple(supervised), turns_kept=kept)


def tokenise_question(tokenizer: Any, question: str, max_text_tokens: int) -> Conversation:
    """Tokens of one question with the cue for its answer, for inference.

    Args:
        tokenizer: with a chat template.
        question: about the image.
        max_text_tokens: room for the prompt.

    Returns:
        The tokens; none is supervised.

    Raises:
        ConversationError: a mark of the prompt inside the question, or a question that does not fit.
    """
    _check_turns(tokenizer, [(question, "")])
    lead, rest = _split_at_image(_render(tokenizer, _messages([(question, "")])[:1], cue=True))
    before, after = _encode(tokenizer, lead), _encode(tokenizer, rest)
    if len(before) + len(after) > max_text_tokens:
        raise ConversationError(f"the question takes {len(before) + len(after)} tokens, but there is room for {max_text_tokens}; shorten it")
    return Conversation(before=tuple(before), after=tuple(after), supervised=(False,) * len(after), turns_kept=1)
