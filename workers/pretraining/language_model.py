"""Train the small language model that Loupe ships: Llama format, its own tokenizer, on the families' text alone. It never sees a pixel.

What it reads is *layout text*: a picture written down as the words that stand at each place, place by place, in the order in which a connector will
later hand over visual tokens (the global view's places, a separator, the local views' places), followed by questions and answers about it. Several
words at one place are the sum of their embeddings; the first digit of a number is a word with a space before it, the second one without. So the model
learns to answer from places and contents, and a connector has only to learn what pictures say. A tenth of the steps are plain prose.

    python -m workers.pretraining.language_model --output model/assets/language-model

The record beside the weights, and the card that `workers.pretraining.cards` makes of it, hold what was measured on layouts that were never trained
on.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model.language_model import multiplies_bf16
from model.views import View, ViewSpec, plan_views
from workers.dataset.rendering import FAMILIES, choose_turns, sketch
from workers.dataset.rendering.canvas import Canvas
from workers.dataset.rendering.material import load_paragraphs, load_states
from workers.dataset.rendering.places import PLACES
from workers.dataset.samples import Turn
from workers.dataset.spec import RENDERED_HEIGHT_PX, RENDERED_WIDTH_PX
from workers.pretraining.labels import COLOUR_CLASSES, GLYPH_CLASSES, READABLE_FROM_PX, colour_shares, place_glyphs

VIEW_PX = 112
GLOBAL_GRID = 8
LOCAL_GRID = 4
NUM_GLOBAL = GLOBAL_GRID**2
NUM_LOCAL = 6 * LOCAL_GRID**2
SEPARATOR = ","
_MIN_COLOUR_SHARE = 0.0075
"""Three of the 400 lattice points of a place: a pictograph's ink covers 2 to 4 % of its place."""
_STATE_NAMES = frozenset(state.name for state in load_states())
_PAGE_PLACES = frozenset(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "centre", "right"))
_LOOKED_UP = frozenset(
    {"charts/value", "maps/number of colour", "collages/colour of object", "collages/object of colour", "pages/number of colour", "geometry/length"}
)
"""Kinds that are answered by finding one place by its contents: what the curriculum begins with."""
_HELD_OUT_FROM = 1_000_000
_MODES = ("both", "local", "global", "blind")
_MODE_SHARES = (0.5, 0.3, 0.1, 0.1)

BOS, EOS, PAD, USER, ASSISTANT = "<s>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
BLANK = "."
"""The word for a place with nothing on it."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|> {{ message['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Slot = tuple[tuple[str, int], ...]
"""The words at one place, each with its role (0, or 1 for the second character of a number)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A picture as text: what stands where, and what can be asked."""

    global_slots: tuple[Slot, ...]
    local_slots: tuple[Slot, ...]
    turns: tuple[Turn, ...]


def _slots(canvas: Canvas, view: View, grid: int) -> list[Slot]:
    shares = colour_shares(canvas, view, grid, samples_per_cell=20)
    words: list[list[tuple[str, int]]] = [[] for _ in range(grid * grid)]
    for cell, row in enumerate(shares):
        words[cell].extend((COLOUR_CLASSES[number], 0) for number in np.flatnonzero(row >= _MIN_COLOUR_SHARE))
    for glyph in place_glyphs(canvas, view, grid):
        if glyph.size_px >= READABLE_FROM_PX:
            name, _, role = GLYPH_CLASSES[glyph.glyph].partition("@")
            for cell in glyph.patches:
                words[cell].append((name, int(role or 0)))
    return [tuple(cell) for cell in words]


def make_layout(family: str, number: int, seed: int) -> Layout:
    """Draw one picture and write it down."""
    picture, _ = sketch(family, number, seed)
    plan = plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, VIEW_PX, ViewSpec())
    local: list[Slot] = []
    for view in plan.local_views:
        local.extend(_slots(picture.canvas, view, LOCAL_GRID))
    return Layout(tuple(_slots(picture.canvas, plan.global_view, GLOBAL_GRID)), tuple(local), picture.turns)


def train_tokenizer(layouts: Sequence[Layout], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words are the families' words; digits are always tokens of their own."""
    words = [*COLOUR_CLASSES, *(name for name in GLYPH_CLASSES if "@" not in name), *(state.name for state in load_states())]
    lines = [f" {word}" for word in (*words, *range(10)) for _ in range(400)]
    for layout in layouts:
        lines.extend(f"\n{turn.question} {turn.answer}" for turn in layout.turns)
    lines.extend(load_paragraphs())
    tokenizer = Tokenizer(models.BPE())
    # A space belongs to the letter or digit behind it, and every digit is a token: " 72" is " 7" and "2".
    pattern = Regex(r" ?[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=1024)
    fast.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _only_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ValueError(f"the tokenizer cuts {text!r} into {len(tokens)} tokens; raise the vocabulary's size")
    return tokens[0]


def _word_ids(tokenizer: PreTrainedTokenizerFast) -> dict[tuple[str, int], int]:
    """Token of every (word, role): a space before first characters, none before second ones."""
    names = [(name.partition("@")[0], int(name.partition("@")[2] or 0)) for name in GLYPH_CLASSES]
    words = (*((colour, 0) for colour in COLOUR_CLASSES), *names)
    return {(name, role): _only_token(tokenizer, name if role else f" {name}") for name, role in words}


class SlotTable:
    """Layouts as padded arrays of word ids, so that a batch of slots is two embedding look-ups."""

    max_words = 10

    def __init__(self, layouts: Sequence[Layout], word_ids: dict[tuple[str, int], int], blank_id: int) -> None:
        self.blank_id = blank_id
        self.glyph_ids = [number for (word, _), number in word_ids.items() if word not in COLOUR_CLASSES]
        self.ids = np.full((len(layouts), NUM_GLOBAL + NUM_LOCAL, self.max_words), -1, dtype=np.int16)
        for row, layout in enumerate(layouts):
            for place, slot in enumerate((*layout.global_slots, *layout.local_slots)):
                for position, word in enumerate(slot[: self.max_words]):
                    self.ids[row, place, position] = word_ids[word]

    def embed(self, rows: np.ndarray, places: slice, embedding: Tensor) -> Tensor:
        """[batch, places, width]: sums of word embeddings."""
        ids = torch.from_numpy(self.ids[rows][:, places].astype(np.int64))
        present = (ids >= 0).unsqueeze(-1).to(embedding.dtype)
        # Detached: the words learn from the text alone; the gather's backward would take as long as the model's.
        # Every place holds the blank, so that an empty one is one vector and not the noise blown up by the first norm.
        return embedding.detach()[self.blank_id] + (embedding.detach()[ids.clamp(min=0)] * present).sum(dim=2)


@dataclass(frozen=True, slots=True)
class Curriculum:
    """How much of a layout a step shows: first the places that hold a glyph, then more and more of the others, then the empty ones, then all.

    Looking a word up among ten places is learned in a few hundred steps, among a hundred and sixty not in a thousand; once learned it carries over.
    """

    glyphs_until: int
    """Steps that show only the local places with a glyph."""
    filled_until: int
    """Steps by which all local places with anything on them are shown."""
    compact_until: int
    """Steps by which the empty local places are shown too. From here on, whole layouts in all modes, and all kinds of questions."""

    def keep_shares(self, step: int) -> tuple[float, float]:
        """Share of the filled places without a glyph and of the empty places that a step shows."""
        filled = (step - self.glyphs_until) / max(self.filled_until - self.glyphs_until, 1)
        empty = (step - self.filled_until) / max(self.compact_until - self.filled_until, 1)
        return min(max(filled, 0.0), 1.0), min(max(empty, 0.0), 1.0)


def _compact(table: SlotTable, rows: np.ndarray, keep_shares: tuple[float, float], embedding: Tensor, rng: np.random.Generator) -> Tensor:
    """The local places that hold a glyph and shares of the others, in order, with blanks behind."""
    ids = table.ids[rows, NUM_GLOBAL:]
    filled = (ids >= 0).any(axis=2)
    drawn = rng.random(ids.shape[:2])
    kept = np.isin(ids, table.glyph_ids).any(axis=2) | np.where(filled, drawn < keep_shares[0], drawn < keep_shares[1])
    order = torch.argsort(torch.from_numpy(~kept).byte(), dim=1, stable=True)[:, : max(int(kept.sum(axis=1).max()), 1)]
    places = table.embed(rows, slice(NUM_GLOBAL, None), embedding)
    places = torch.where(torch.from_numpy(kept).unsqueeze(-1), places, embedding.detach()[table.blank_id])
    return places.gather(1, order.unsqueeze(-1).expand(-1, -1, places.shape[-1]))


def _key(question: str) -> str:
    """What a question looks up: the place, the state, the colour or the object that it ends with."""
    words = question.rstrip("?").split()
    two = " ".join(words[-2:])
    return two if two in PLACES or two in _PAGE_PLACES or two in _STATE_NAMES else words[-1]


def _text_ids(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], *, shorthand: bool = False) -> tuple[list[int], list[float]]:
    """Token ids after the image's place, and each one's loss weight: 1 on answers, 0 on questions.

    In shorthand a question is its key alone (" red 7", " top left umbrella"): the look-up without the question around it. Learning both at once takes
    a hundred steps where full questions alone stay on a plateau for more than a thousand.
    """
    ids: list[int] = []
    weights: list[float] = []
    for position, turn in enumerate(turns):
        question = f"\n{turn.question}{ASSISTANT}" if position == 0 else f"{USER}{turn.question}{ASSISTANT}"
        asked = tokenizer.encode(f" {_key(turn.question)}" if shorthand else question, add_special_tokens=False)
        answered = tokenizer.encode(f" {turn.answer}{EOS}", add_special_tokens=False)
        ids += asked + answered
        weights += [0.0] * len(asked) + [1.0] * len(answered)
    return ids, weights


def _pad(rows: list[tuple[list[int], list[float]]], pad_id: int) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row, _ in rows])
    weights = torch.tensor([row + [0.0] * (length - len(row)) for _, row in rows])
    return ids, weights


def _prefix(mode: str, rows: np.ndarray, table: SlotTable, embedding: Tensor, separator_id: int, noise: Tensor | None) -> Tensor | None:
    """The places handed over in a mode, [batch, places, width], or None when blind."""
    if mode == "blind":
        return None
    parts = []
    if mode in ("both", "global"):
        parts.append(table.embed(rows, slice(0, NUM_GLOBAL), embedding))
    if mode == "both":
        parts.append(embedding[separator_id].expand(len(rows), 1, -1))
    if mode in ("both", "local"):
        parts.append(table.embed(rows, slice(NUM_GLOBAL, None), embedding))
    places = torch.cat(parts, dim=1)
    return places if noise is None else places + noise[: len(rows), : places.shape[1]]


def train(arguments: argparse.Namespace) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[str]]:
    """Train tokenizer and model from nothing.

    Args:
        arguments: the command line's.

    Returns:
        The model, its tokenizer and the log.
    """
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    layouts = [make_layout(FAMILIES[position % len(FAMILIES)], position // len(FAMILIES), arguments.seed) for position in range(arguments.pictures)]
    tokenizer = train_tokenizer(layouts, arguments.vocabulary)
    table = SlotTable(layouts, _word_ids(tokenizer), _only_token(tokenizer, BLANK))
    log = [f"{len(layouts)} layouts, {len(tokenizer)} tokens, {time.monotonic() - started:.0f} s"]
    print(log[-1], flush=True)
    heads = arguments.width // 64
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, total_steps=arguments.steps, pct_start=0.05)
    rng = np.random.Generator(np.random.Philox(key=arguments.seed + 1))
    separator_id = _only_token(tokenizer, SEPARATOR)
    prose = [tokenizer.encode(f"{BOS}{text}{EOS}", add_special_tokens=False)[:256] for text in load_paragraphs()]
    curriculum = Curriculum(*arguments.curriculum)
    answers_loss = answers_right = 0.0
    head_ids = torch.tensor(tokenizer.encode(f"{BOS}{USER}", add_special_tokens=False))
    for step in range(arguments.steps):
        if step % 10 == 9:
            chosen = [prose[position] for position in rng.integers(0, len(prose), size=arguments.batch_size)]
            ids, weights = _pad([(row, [0.0] + [0.1] * (len(row) - 1)) for row in chosen], tokenizer.pad_token_id)
            inputs = model.model.embed_tokens(ids)
            skip = 0
        else:
            mode = _MODES[int(rng.choice(4, p=_MODE_SHARES))]
            rows = rng.integers(0, len(layouts), size=arguments.batch_size)
            compact = step < curriculum.compact_until
            asked = [tuple(turn for turn in layouts[row].turns if not compact or turn.kind in _LOOKED_UP) or layouts[row].turns for row in rows]
            shorthand = bool(rng.random() < (0.5 if compact else 0.2))
            texts = [_text_ids(tokenizer, choose_turns(turns, arguments.turns, rng), shorthand=shorthand) for turns in asked]
            ids, weights = _pad(texts, tokenizer.pad_token_id)
            embedding = model.model.embed_tokens.weight
            scale = embedding.detach().pow(2).mean().sqrt()
            noise = torch.randn(arguments.batch_size, NUM_GLOBAL + 1 + NUM_LOCAL, arguments.width) * scale * arguments.noise
            if compact:
                short = _compact(table, rows, curriculum.keep_shares(step), embedding, rng)
                places: Tensor | None = short + noise[:, : short.shape[1]]
            else:
                places = _prefix(mode, rows, table, embedding, separator_id, noise)
            head = model.model.embed_tokens(head_ids).expand(arguments.batch_size, -1, -1)
            inputs = torch.cat([part for part in (head, places, model.model.embed_tokens(ids)) if part is not None], dim=1)
            skip = inputs.shape[1] - ids.shape[1]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bf16("cpu")):
            hidden = model.model(inputs_embeds=inputs).last_hidden_state
        # Position skip + k predicts text token k + 1; the first text token is a question's and never asked for.
        target, weight = ids[:, 1:], weights[:, 1:]
        picked = weight > 0
        logits = model.lm_head(hidden[:, skip : skip + ids.shape[1] - 1][picked].float())
        losses = nn.functional.cross_entropy(logits, target[picked], reduction="none")
        loss = (losses * weight[picked]).sum() / weight[picked].sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 != 9:
            answers_loss += 0.05 * (loss.item() - answers_loss)
            right = (logits.argmax(dim=-1) == target[picked])[weight[picked] == 1.0].float().mean().item()
            answers_right += 0.05 * (right - answers_right)
        if step % 100 == 99:
            seconds = time.monotonic() - started
            log.append(f"step {step + 1}: mean loss {answers_loss:.4f}, answers' tokens right {answers_right:.3f} ({seconds:.0f} s)")
            print(log[-1], flush=True)
        if step % 400 == 399 and step >= curriculum.compact_until:
            accuracy = measure(model, tokenizer, 100, arguments.seed, ("both",))["both"]["overall"]
            log.append(f"step {step + 1}: held-out layouts answered rightly {accuracy:.3f}")
            print(log[-1], flush=True)
    return model.eval(), tokenizer, log


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_pictures: int, seed: int, modes: Sequence[str] = _MODES
) -> dict[str, dict[str, float]]:
    """Share of single questions about unseen layouts whose greedy answer is exactly right, by mode and kind."""
    layouts = [make_layout(FAMILIES[position % len(FAMILIES)], _HELD_OUT_FROM + position // len(FAMILIES), seed) for position in range(num_pictures)]
    table = SlotTable(layouts, _word_ids(tokenizer), _only_token(tokenizer, BLANK))
    rng = np.random.Generator(np.random.Philox(key=seed + 2))
    chosen = [(row, turn) for row, layout in enumerate(layouts) for turn in choose_turns(layout.turns, 8, rng)]
    embedding = model.model.embed_tokens.weight
    separator_id = _only_token(tokenizer, SEPARATOR)
    head = embedding[torch.tensor(tokenizer.encode(f"{BOS}{USER}", add_special_tokens=False))]
    results: dict[str, dict[str, float]] = {}
    for mode in modes:
        right: dict[str, list[bool]] = {}
        # Teacher forcing tells exactly whether greedy decoding gives the answer: it does if each token is the best one given the right ones before.
        for start in range(0, len(chosen), 64):
            part = chosen[start : start + 64]
            rows = np.array([row for row, _ in part])
            ids, weights = _pad([_text_ids(tokenizer, [turn]) for _, turn in part], tokenizer.pad_token_id)
            places = _prefix(mode, rows, table, embedding, separator_id, None)
            inputs = torch.cat([x for x in (head.expand(len(part), -1, -1), places, embedding[ids]) if x is not None], dim=1)
            skip = inputs.shape[1] - ids.shape[1]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bf16("cpu")):
                hidden = model.model(inputs_embeds=inputs).last_hidden_state
            best = model.lm_head(hidden[:, skip:-1].float()).argmax(dim=-1)
            good = ((best == ids[:, 1:]) | (weights[:, 1:] < 1.0)).all(dim=1)
            for (_, turn), hit in zip(part, good.tolist(), strict=True):
                right.setdefault(turn.kind, []).append(hit)
        overall = [hit for hits in right.values() for hit in hits]
        results[mode] = {"overall": sum(overall) / len(overall), **{kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(right.items())}}
    return results


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--curriculum", type=int, nargs=3, default=(350, 600, 850), help="glyphs until, filled until, compact until: see Curriculum")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1280)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    model, tokenizer, log = train(arguments)
    seconds = time.monotonic() - started
    measured = measure(model, tokenizer, 500, arguments.seed)
    print(json.dumps(measured, indent=1), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    weights = (arguments.output / "model.safetensors").read_bytes()
    record = {
        "arguments": {key: value for key, value in vars(arguments).items() if key != "output"},
        "seconds": round(seconds),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
        "num_tokens": len(tokenizer),
        "shares": f"After a curriculum of short layouts in the first {arguments.curriculum[2]} steps, a conversation showed "
        + ", ".join(f"{mode} {share:.0%}" for mode, share in zip(_MODES, _MODE_SHARES, strict=True))
        + ".",
        "measured": measured,
        "log": log,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
