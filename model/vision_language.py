"""Connector and language model together: splice visual tokens into text, drop what a question does not need, the training loss, greedy answers.

A sequence is [text before][global tokens][separator][local tokens][text after]; with one branch alone the separator is left out, blind has neither.
All sequences of a batch are gathered from one bank of rows in a single indexing step:

    row 0 zeros (padding) | 1 the separator | 2 the newline | text embeddings | global tokens, image by image | local tokens, view by view

The selector works on the gathered sequences: it scores the local tokens of each against its own text and closes the gaps that dropped ones leave.

Input: a Batch (built on the host with numpy). Output: loss sums, or answers. Invariant: a sequence's result does not depend on its neighbours in the
batch or on padding; answers are never looked at to choose what is shown, unless the spec asks for the authors' leak.

Source: SliME (arXiv 2406.08487) for the order of the parts, the separator and the selector, LLaVA for the splice. Differs: nothing is ever truncated
here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from model.adapters import NUM_EXPERTS
from model.chat import Conversation
from model.connector import Connector, Experts
from model.errors import ConversationError, MissingMapError
from model.language_model import LanguageModel, decoder, embed, first_token, multiplies_bf16
from model.lora import sequence_keys
from model.losses import evidence_loss, supervised_loss
from model.merging import NEWLINE
from model.quantisation import PackedMap
from model.selector import keep_probabilities, kept_tokens, straight_through, text_direction, token_scores
from model.specs import SelectorSpec, TextGuidedSelectorSpec
from model.views import ViewPlan

__all__ = [
    "MODES",
    "Batch",
    "Maps",
    "Mode",
    "VisionLanguageModel",
    "VisualLayout",
    "VisualTokens",
    "lay_out_images",
    "plan_sequences",
    "room_for_text",
]

Mode = Literal["blind", "global", "local", "both"]
"""What a sequence shows of its image."""
MODES: tuple[Mode, ...] = ("blind", "global", "local", "both")

_PADDING_ROW, _SEPARATOR_ROW, _NEWLINE_ROW, _TEXT_ROW = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualLayout:
    """Where each image's visual tokens lie among those of a batch."""

    tokens_per_global_view: int
    tokens_per_local_view: int
    separator: bool
    """Whether one stands between global and local tokens."""
    global_index: tuple[int | None, ...]
    """For every image: its place among the global views of the batch, None when it has none there."""
    first_view: tuple[int, ...]
    """For every image: its first local view among all of the batch."""
    local_orders: tuple[NDArray[np.int64], ...]
    """For every image: its local tokens in their order, counted from its first one, or NEWLINE; empty when the batch has no local view of it."""

    @property
    def num_global_views(self) -> int:
        """Global views in the batch."""
        return sum(index is not None for index in self.global_index)


def lay_out_images(connector: Connector, has_global: Sequence[bool], plans: Sequence[ViewPlan | None]) -> VisualLayout:
    """The layout of images whose views are stacked in order.

    Args:
        connector: tells how many tokens a view makes and how they are merged.
        has_global: for every image, whether its global view is in the batch.
        plans: for every image, the plan of its views if its local ones are in the batch, None else.

    Returns:
        The layout.
    """
    places = np.cumsum(has_global) - 1
    num_views = [0 if plan is None or not connector.tokens_per_local_view else plan.rows * plan.columns for plan in plans]
    return VisualLayout(
        tokens_per_global_view=connector.tokens_per_global_view,
        tokens_per_local_view=connector.tokens_per_local_view,
        separator=connector.spec.separator is not None,
        global_index=tuple(int(place) if there else None for place, there in zip(places, has_global, strict=True)),
        first_view=tuple(int(start) for start in np.cumsum([0, *num_views[:-1]])),
        local_orders=tuple(np.zeros(0, dtype=np.int64) if plan is None else connector.local_order(plan) for plan in plans),
    )


def room_for_text(max_tokens: int, connector: Connector, plan: ViewPlan) -> int:
    """Text tokens that fit beside an image's visual tokens when both branches are shown and the selector drops none.

    Args:
        max_tokens: the longest sequence.
        connector: tells how many tokens a view makes and how they are merged.
        plan: of the image's views.

    Returns:
        Number of tokens; negative when the visual ones alone do not fit.
    """
    separator = connector.spec.separator is not None and connector.spec.local_branch is not None
    return max_tokens - connector.tokens_per_global_view - separator - len(connector.local_order(plan))


Maps = Mapping[str, Float[Tensor, "_ _ _"] | PackedMap]
"""By name, [views, tokens, width]."""


def dense_maps(maps: Maps) -> dict[str, Float[Tensor, "_ _ _"]]:
    """Maps in numbers, on the device where they are.

    Args:
        maps: dense or packed.
    """
    return {name: part.dense() if isinstance(part, PackedMap) else part for name, part in maps.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Everything that a forward pass needs, as tensors on one device."""

    text_ids: Int[Tensor, "text"]
    in_prompt: Bool[Tensor, "text"]
    """Whether a text token belongs to what is asked, and not to an answer that is to be learned."""
    gather: Int[Tensor, "batch length"]
    """Row of the bank at every position."""
    first_local_row: int
    """Rows from here on are local tokens."""
    lengths: Int[Tensor, "batch"]
    label_positions: Int[Tensor, "supervised"]
    """Flat positions (batch * length) whose hidden state predicts a supervised token."""
    label_ids: Int[Tensor, "supervised"]
    global_maps: Maps | None = None
    """By name, of the images that show their global view: [images, global_tokens, width], dense or packed."""
    local_maps: Maps | None = None
    """By name, of all local views that are shown: [views, local_tokens, width], dense or packed."""
    gate_noise: Float[Tensor, "images tokens experts"] | None = None
    """Of as many images as global_maps has; None where the phase has no noise."""
    selects: bool = False
    """Whether the connector's selector drops local tokens."""
    selector_noise: Float[Tensor, "batch most"] | None = None
    """Standard normal numbers for the local tokens of every sequence, in their order, in training."""
    evidence_places: Int[Tensor, "pairs"] | None = None
    """Local tokens, counted over all local views of the batch, that should mean a word."""
    evidence_words: Int[Tensor, "pairs"] | None = None
    evidence_scale: float = 0.0
    """What the summed evidence loss is multiplied with before it joins the summed cross entropy."""
    experts: Experts = "mixture"
    dropout_keys: tuple[int, ...] | None = None
    """What the adapters' dropout of each sequence draws from, in training with it."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        if torch.device(device).type == self.text_ids.device.type == "cpu":
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        def move_all(maps: Maps | None) -> Maps | None:
            if maps is None:
                return None
            return {name: part.to(device) if isinstance(part, PackedMap) else part.to(device, non_blocking=True) for name, part in maps.items()}

        return Batch(
            text_ids=self.text_ids.to(device),
            in_prompt=self.in_prompt.to(device),
            gather=self.gather.to(device),
            first_local_row=self.first_local_row,
            lengths=self.lengths.to(device),
            label_positions=self.label_positions.to(device),
            label_ids=self.label_ids.to(device),
            global_maps=move_all(self.global_maps),
            local_maps=move_all(self.local_maps),
            gate_noise=move(self.gate_noise),
            selects=self.selects,
            selector_noise=move(self.selector_noise),
            evidence_places=move(self.evidence_places),
            evidence_words=move(self.evidence_words),
            evidence_scale=self.evidence_scale,
            experts=self.experts,
            dropout_keys=self.dropout_keys,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualTokens:
    """A connector's output for the images of a batch."""

    global_tokens: Float[Tensor, "images tokens hidden"] | None
    local_tokens: Float[Tensor, "views queries hidden"] | None
    idle: tuple[Float[Tensor, "_ _ hidden"], ...] = ()
    """Tokens of a blank view, which no sequence shows, for every branch that the batch has no maps of; only where every block has to run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """What the language model sees of a batch."""

    embedded: Float[Tensor, "batch length hidden"]
    lengths: Int[Tensor, "batch"]
    label_positions: Int[Tensor, "supervised"]
    """Flat positions (batch * length) whose hidden state predicts a supervised token."""
    attention_bias: Float[Tensor, "batch length"] | None = None
    """Zeros that carry a selector's gradient: what every position's attention to a token is raised by."""

    def causal_mask(self) -> Float[Tensor, "batch 1 length length"] | None:
        """What is added to attention logits: nothing that a causal model does not add by itself, but for the bias' gradient; None without one."""
        if self.attention_bias is None:
            return None
        length, bias = self.embedded.shape[1], self.attention_bias
        later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
        return bias[:, None, None].expand(-1, 1, length, -1).masked_fill(later, torch.finfo(torch.bfloat16).min).to(self.embedded.dtype)

    def left_padding(self) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
        """Attention mask and position numbers of sequences that are padded in front."""
        length = self.embedded.shape[1]
        mask = (torch.arange(length, device=self.lengths.device)[None] >= length - self.lengths[:, None]).long()
        return mask, (mask.cumsum(dim=1) - 1).clamp(min=0)


def _without(sequences: Sequences, dropped: Bool[Tensor, "batch length"], *, pad_left: bool) -> Sequences:
    """Sequences with some positions taken out and the gaps closed."""
    batch, length = dropped.shape
    lengths = sequences.lengths - dropped.sum(dim=1)
    longest = int(lengths.max()) if batch else 0
    # Stable: what stays keeps its order, padding stays at its end; what is dropped goes behind it, or in front where padding is in front.
    order = torch.argsort((~dropped if pad_left else dropped).to(torch.int8), dim=1, stable=True)
    order = order[:, length - longest :] if pad_left else order[:, :longest]
    embedded = sequences.embedded.gather(1, order[..., None].expand(-1, -1, sequences.embedded.shape[2]))
    row, place = sequences.label_positions // max(length, 1), sequences.label_positions % max(length, 1)
    # The first answer token may be predicted from a visual token; where that is dropped, from the last one kept before it.
    kept_before = (~dropped).cumsum(dim=1) - 1
    moved = kept_before[row, place]
    if pad_left:
        moved = moved - (length - sequences.lengths[row]) + (longest - lengths[row])
    bias = None if sequences.attention_bias is None else sequences.attention_bias.gather(1, order)
    return Sequences(embedded=embedded, lengths=lengths, label_positions=row * longest + moved, attention_bias=bias)


def _visual_rows(mode: Mode, image: int, layout: VisualLayout, first_global: int, first_local: int) -> list[NDArray[np.int64]]:
    """Rows of the bank that one sequence shows of its image, in order."""
    rows: list[NDArray[np.int64]] = []
    if mode in ("global", "both"):
        place = layout.global_index[image]
        if place is None:
            raise MissingMapError(f"a sequence shows the global view of image {image}, which is not in the batch")
        start = first_global + place * layout.tokens_per_global_view
        rows.append(np.arange(start, start + layout.tokens_per_global_view))
    if mode in ("local", "both"):
        order = layout.local_orders[image]
        if not len(order) and mode == "local":
            raise MissingMapError(f"a sequence shows the local views of image {image}, which are not in the batch")
        if len(order):
            if rows and layout.separator:
                rows.append(np.array([_SEPARATOR_ROW]))
            start = first_local + layout.first_view[image] * layout.tokens_per_local_view
            rows.append(np.where(order == NEWLINE, _NEWLINE_ROW, start + order))
    return rows


def plan_sequences(
    conversations: Sequence[Conversation],
    modes: Sequence[Mode],
    images: Sequence[int],
    layout: VisualLayout,
    *,
    pad_left: bool = False,
    **maps: Any,
) -> Batch:
    """Lay out a batch of sequences.

    Args:
        conversations: the text of each.
        modes: what each shows of its image.
        images: which image of the layout each is about; several may share one.
        layout: where the images' visual tokens lie.
        pad_left: pad in front, as generation needs it; behind else.
        **maps: fields of the Batch that hold features or say how they are used: `global_maps`, `local_maps`, `gate_noise`, `selects`, ...

    Returns:
        The batch, on the CPU.

    Raises:
        MissingMapError: a sequence shows what is not there.
        ConversationError: a sequence begins with a supervised token; its label would be another sequence's.
    """
    text: list[int] = []
    in_prompt: list[bool] = []
    rows: list[NDArray[np.int64]] = []
    labels: list[tuple[NDArray[np.int64], list[int]]] = []
    first_global = _TEXT_ROW + sum(conversation.num_text_tokens for conversation in conversations)
    first_local = first_global + layout.num_global_views * layout.tokens_per_global_view
    for conversation, mode, image in zip(conversations, modes, images, strict=True):
        before = _TEXT_ROW + len(text) + np.arange(len(conversation.before))
        after = _TEXT_ROW + len(text) + len(conversation.before) + np.arange(len(conversation.after))
        text += [*conversation.before, *conversation.after]
        in_prompt += [True] * len(conversation.before) + [not learned for learned in conversation.supervised]
        parts = [before, *_visual_rows(mode, image, layout, first_global, first_local), after]
        rows.append(np.concatenate(parts))
        supervised = np.flatnonzero(np.asarray(conversation.supervised, dtype=bool))
        if len(supervised) and len(rows[-1]) == len(after) and supervised[0] == 0:
            raise ConversationError("conversation_unmasked", "a blind sequence begins with a supervised token, which nothing could predict")
        # The hidden state at position p predicts the token at p + 1.
        labels.append((len(rows[-1]) - len(after) + supervised - 1, [conversation.after[place] for place in supervised]))
    length = max((len(row) for row in rows), default=0)
    gather = np.full((len(rows), length), _PADDING_ROW, dtype=np.int64)
    positions = []
    for number, row in enumerate(rows):
        start = length - len(row) if pad_left else 0
        gather[number, start : start + len(row)] = row
        positions.append(number * length + start + labels[number][0])
    return Batch(
        text_ids=torch.tensor(text, dtype=torch.int64),
        in_prompt=torch.tensor(in_prompt, dtype=torch.bool),
        first_local_row=first_local,
        gather=torch.from_numpy(gather),
        lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64),
        label_positions=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *positions])),
        label_ids=torch.tensor([token for _, ids in labels for token in ids], dtype=torch.int64),
        **maps,
    )


class VisionLanguageModel(nn.Module):
    """A connector in front of a language model.

    The models' own dropout stays off and that of adapters draws from keys in the batch, so a step is a pure function of weights and batch.

    Attributes:
        runs_every_block: let a blank view go through a branch of which a training batch shows nothing. Nothing changes but that every parameter has
            a gradient, of zeros if need be: ranks that share parameters or gradients out must all do the same, whatever their samples show.
    """

    def __init__(
        self, connector: Connector, language_model: LanguageModel, *, precision: Literal["fp32", "bf16"] = "fp32", separator_id: int | None = None
    ) -> None:
        """Put the parts together.

        Args:
            connector: as built for this language model's width.
            language_model: loaded.
            precision: of matrix products; weights keep the type they have. See `products` for devices without products of bf16.
            separator_id: of the separator's token where it is known; else the tokenizer says it.
        """
        super().__init__()
        self.connector = connector
        self.language_model = language_model.network
        self.tokenizer = language_model.tokenizer
        self.max_tokens = language_model.max_tokens
        self.precision = precision
        separator = connector.spec.separator
        self.separator_id = separator_id
        if separator is not None and separator_id is None:
            self.separator_id = first_token(language_model.tokenizer, separator)
        self.language_model.train(mode=False)
        self.runs_every_block = False
        self._dropout = sequence_keys(self.language_model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.connector.token_scale.device

    def visual_tokens(self, batch: Batch) -> VisualTokens:
        """Run the connector on a batch's features.

        Args:
            batch: with the maps that its sequences show.

        Returns:
            Their visual tokens; None for a branch that the batch has no maps of.
        """
        return self._visual_tokens(batch, blank=False)

    def _visual_tokens(self, batch: Batch, *, blank: bool) -> VisualTokens:
        """The same; with `blank`, a branch that the batch has no maps of reads a blank view, in its turn and not behind the others.

        Ranks that share parameters or gradients out pair them by that order, forward and backward.
        """
        connector, local, idle = self.connector, self.connector.spec.local_branch, []
        global_tokens = local_tokens = None
        with self.autocast():
            if batch.global_maps is not None:
                global_tokens = connector.global_tokens(dense_maps(batch.global_maps), experts=batch.experts, noise=batch.gate_noise)
            elif blank:
                # The gate's noise matrix takes part where it does for ranks that show something.
                noise = None if batch.gate_noise is None else torch.zeros(1, connector.num_global_patches, NUM_EXPERTS, device=self.device)
                maps = connector.blank_maps(connector.spec.global_branch.fusion)
                idle.append(connector.global_tokens(maps, experts=batch.experts, noise=noise))
            if batch.local_maps is not None:
                local_tokens = connector.local_tokens(dense_maps(batch.local_maps))
            elif blank and local is not None:
                idle.append(connector.local_tokens(connector.blank_maps(local.fusion)))
        return VisualTokens(global_tokens=global_tokens, local_tokens=local_tokens, idle=tuple(idle))

    @torch.no_grad()
    def visual_tokens_without_gradient(self, batch: Batch) -> VisualTokens:
        """The same, for answering.

        Args:
            batch: with the maps of some images; its sequences do not matter.

        Returns:
            As `visual_tokens`.
        """
        return self.visual_tokens(batch)

    def embed_sequences(self, batch: Batch, visual: VisualTokens) -> Float[Tensor, "batch length hidden"]:
        """Input embeddings of every position, gathered from the bank.

        Args:
            batch: the plan.
            visual: the images' tokens.

        Returns:
            Embeddings; zeros where there is padding.
        """
        separator = torch.tensor([self.separator_id or 0], device=batch.text_ids.device)  # without one, no position asks for its row
        text = embed(self.language_model, torch.cat([separator, batch.text_ids]))
        parts = [text.new_zeros(1, text.shape[1]), text[:1], self.connector.newline_token().to(text.dtype), text[1:]]
        shown = [tokens for tokens in (visual.global_tokens, visual.local_tokens) if tokens is not None]
        parts += [tokens.flatten(0, 1).to(text.dtype) for tokens in (*shown, *visual.idle)]  # no row asks for the idle ones
        return torch.cat(parts).index_select(0, batch.gather.flatten()).reshape(*batch.gather.shape, -1)

    def sequences(self, batch: Batch, visual: VisualTokens, *, pad_left: bool = False) -> "Sequences":
        """The batch's sequences as the language model sees them, without the local tokens that the selector drops.

        Args:
            batch: the plan.
            visual: the images' tokens.
            pad_left: whether the batch was planned so.

        Returns:
            Embeddings, lengths and the places of the labels.

        Raises:
            MissingMapError: the batch asks for a selection and the connector has no selector.
        """
        embedded = self.embed_sequences(batch, visual)
        whole = Sequences(embedded=embedded, lengths=batch.lengths, label_positions=batch.label_positions)
        local = batch.gather >= batch.first_local_row
        if not batch.selects:
            return whole
        spec, selector = self.connector.spec.selector, self.connector.selector
        if spec is None:
            raise MissingMapError("the batch asks the connector to drop local tokens, but it has no selector; add connector.local.selector")
        learns = selector is not None and torch.is_grad_enabled() and selector.from_tokens.requires_grad
        if selector is not None and learns:
            # With nothing to choose from as well: behind a mask that has a gradient, attention sums in another order than behind none.
            nothing = 0.0 * selector.from_tokens.sum()
            whole = replace(whole, attention_bias=nothing.expand(batch.gather.shape))
        if visual.local_tokens is None and not self.runs_every_block:
            return whole
        with torch.autocast(self.device.type, enabled=False):
            probabilities = self._keep_probabilities(batch, embedded.float(), local, spec)
            kept = kept_tokens(probabilities, local, spec.top_p)
            if learns:
                whole = replace(whole, attention_bias=straight_through(probabilities, local))
        return _without(whole, local & ~kept, pad_left=pad_left)

    def _keep_probabilities(
        self, batch: Batch, embedded: Float[Tensor, "batch length hidden"], local: Bool[Tensor, "batch length"], spec: SelectorSpec
    ) -> Float[Tensor, "batch length"]:
        """How likely every local token of a sequence is to be needed, by the sequence's own text."""
        leaks = isinstance(spec, TextGuidedSelectorSpec) and spec.authors_leak
        shown = torch.ones_like(batch.in_prompt) if leaks else batch.in_prompt
        # Rows that are no text of what is asked: padding, separator, newline, visual tokens, answers.
        rows = torch.zeros(int(batch.first_local_row), dtype=torch.bool, device=shown.device)
        rows[_TEXT_ROW : _TEXT_ROW + len(shown)] = shown
        in_text = rows[batch.gather.clamp(max=batch.first_local_row - 1)] & ~local
        direction = text_direction(embedded, in_text, spec.reduce)
        if self.connector.selector is None:
            scores = token_scores(embedded.detach(), direction.detach())
        else:
            scores = self.connector.selector(embedded, direction)
        if batch.selector_noise is not None:
            place = (local.cumsum(dim=1) - 1).clamp(min=0)
            scores = scores + spec.noise * batch.selector_noise.gather(1, place) * local
        return keep_probabilities(scores, local, spec.temperature)

    def forward(self, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
        """Sums of a training batch (padded behind: under a causal mask nothing real ever looks there, so no mask is needed).

        Args:
            batch: with labels.

        Returns:
            The objective to descend; the summed cross entropy over the supervised tokens, which it equals but for the evidence loss; and how many
            of them were predicted right.
        """
        visual = self._visual_tokens(batch, blank=self.runs_every_block)
        with self.autocast():
            sequences = self.sequences(batch, visual)
            self._tell_dropout(batch.dropout_keys, sequences.lengths)
            mask = sequences.causal_mask()
            hidden: Tensor = decoder(self.language_model)(inputs_embeds=sequences.embedded, attention_mask=mask, use_cache=False).last_hidden_state
            selected = hidden.flatten(0, 1).index_select(0, sequences.label_positions)
            loss = supervised_loss(selected, batch.label_ids, self.language_model.get_output_embeddings())  # type: ignore[operator]
        objective = loss.total
        # The scale is that of the whole step: where parameters are shared out, all ranks or none ask for the words.
        words = self._words() if batch.evidence_scale > 0 and (self.runs_every_block or batch.evidence_places is not None) else None
        if words is not None and batch.evidence_places is not None and batch.evidence_words is not None and visual.local_tokens is not None:
            places = visual.local_tokens.flatten(0, 1).index_select(0, batch.evidence_places)
            objective = objective + batch.evidence_scale * evidence_loss(places, batch.evidence_words, words)
        return objective, loss.total.detach(), loss.correct

    @torch.no_grad()
    def _words(self) -> Float[Tensor, "vocabulary hidden"]:
        """Every input embedding, asked of its module and not read behind its back: where its table is shared out, asking gathers it."""
        if not self.runs_every_block:
            table: Tensor = self.language_model.get_input_embeddings().weight  # type: ignore[operator]
            return table
        return embed(self.language_model, torch.arange(self.language_model.get_input_embeddings().num_embeddings, device=self.device))  # type: ignore[operator]

    def _tell_dropout(self, keys: tuple[int, ...] | None, lengths: Int[Tensor, "batch"]) -> None:
        if self._dropout is not None:
            self._dropout.tell(keys, [] if keys is None else lengths.tolist())

    @torch.no_grad()
    def prompt_logits(self, batch: Batch, last: int = 0) -> Float[Tensor, "batch length vocabulary"]:
        """What the language model predicts at the positions of a prompt, visual tokens included.

        Args:
            batch: padded in front; without labels.
            last: so many positions at the end, which spares memory; 0 is all.

        Returns:
            Logits in fp32; what stands at padding means nothing.
        """
        head: Any = self.language_model.get_output_embeddings()  # type: ignore[operator]
        self._tell_dropout(None, batch.lengths)
        with self.autocast():
            sequences = self.sequences(batch, self.visual_tokens(batch), pad_left=True)
            mask, positions = sequences.left_padding()
            output = decoder(self.language_model)(inputs_embeds=sequences.embedded, attention_mask=mask, position_ids=positions, use_cache=False)
            logits: Tensor = head(output.last_hidden_state[:, -last:])
        return logits.float()

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, visual: VisualTokens | None = None) -> list[list[int]]:
        """Greedy answers, batched, with a cache of keys and values.

        Args:
            batch: padded in front; without labels.
            max_new_tokens: an answer ends here at the latest.
            visual: the images' tokens if they are known already.

        Returns:
            New tokens of each sequence, its end token left out.
        """
        network = decoder(self.language_model)
        head: Any = self.language_model.get_output_embeddings()  # type: ignore[operator]
        ends = torch.tensor(self.end_ids(), device=batch.gather.device)
        self._tell_dropout(None, batch.lengths)
        with self.autocast():
            sequences = self.sequences(batch, self.visual_tokens(batch) if visual is None else visual, pad_left=True)
            embedded, lengths = sequences.embedded, sequences.lengths
            mask, positions = sequences.left_padding()
            output = network(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=True)
            new: list[Tensor] = []
            finished = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
            for step in range(max_new_tokens):
                token = head(output.last_hidden_state[:, -1]).float().argmax(dim=-1)
                finished = finished | torch.isin(token, ends)
                new.append(torch.where(finished, torch.full_like(token, -1), token))
                if bool(finished.all()) or step + 1 == max_new_tokens:
                    break
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                output = network(
                    inputs_embeds=embed(self.language_model, token)[:, None],
                    attention_mask=mask,
                    position_ids=lengths[:, None] + step,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
        return [[token for token in row if token >= 0] for row in torch.stack(new, dim=1).tolist()]

    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        configured = getattr(getattr(self.language_model, "generation_config", None), "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        return sorted({self.tokenizer.eos_token_id, *(token for token in more if token is not None)})

    @property
    def products(self) -> Literal["fp32", "bf16"]:
        """In which type matrices are multiplied here: bf16 only where the device does so in hardware, or the language model is held in it.

        Fp32 in its place rounds less and is faster there; the weights are the same numbers either way, see `hold_rounded`.
        """
        if self.precision == "fp32":
            return "fp32"
        held: Tensor = self.language_model.get_input_embeddings().weight  # type: ignore[operator]
        return "bf16" if held.dtype == torch.bfloat16 or multiplies_bf16(self.device) else "fp32"

    def autocast(self) -> torch.autocast:
        """The context in which the parts compute."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.products == "bf16")
