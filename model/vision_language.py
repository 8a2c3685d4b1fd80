"""Connector and language model together: splice visual tokens into text, the training loss, and greedy answers.

A sequence is [text before][global tokens][separator][local tokens][text after]; with one branch alone the separator is left out, blind has neither.
All sequences of a batch are gathered from one bank of rows in a single indexing step:

    row 0 zeros (padding) | row 1 the separator | text embeddings | global tokens, image by image | local tokens, view by view

Input: a Batch (built on the host with numpy). Output: loss sums, or answers. Invariant: a sequence's result does not depend on its neighbours in the
batch or on padding.

Source: SliME (arXiv 2406.08487) for the order of the parts and the separator, LLaVA for the splice. Differs: nothing is ever truncated here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from model.chat import Conversation
from model.connector import Connector, Experts
from model.errors import ConversationError, MissingMapError
from model.language_model import LanguageModel, decoder, embed, first_token
from model.losses import evidence_loss, supervised_loss

__all__ = [
    "MODES",
    "Batch",
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

_PADDING_ROW, _SEPARATOR_ROW, _TEXT_ROW = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualLayout:
    """Where each image's visual tokens lie among those of a batch."""

    tokens_per_global_view: int
    tokens_per_local_view: int
    global_index: tuple[int | None, ...]
    """For every image: its place among the global views of the batch, None when it has none there."""
    first_view: tuple[int, ...]
    """For every image: its first local view among all of the batch."""
    num_views: tuple[int, ...]
    """For every image: its local views in the batch."""

    @property
    def num_global_views(self) -> int:
        """Global views in the batch."""
        return sum(index is not None for index in self.global_index)


def lay_out_images(connector: Connector, has_global: Sequence[bool], num_views: Sequence[int]) -> VisualLayout:
    """The layout of images whose views are stacked in order.

    Args:
        connector: tells how many tokens a view makes.
        has_global: for every image, whether its global view is in the batch.
        num_views: for every image, how many of its local views are.

    Returns:
        The layout.
    """
    places = np.cumsum(has_global) - 1
    return VisualLayout(
        tokens_per_global_view=connector.tokens_per_global_view,
        tokens_per_local_view=connector.tokens_per_local_view,
        global_index=tuple(int(place) if there else None for place, there in zip(places, has_global, strict=True)),
        first_view=tuple(int(start) for start in np.cumsum([0, *num_views[:-1]])),
        num_views=tuple(num_views),
    )


def room_for_text(max_tokens: int, connector: Connector, num_views: int) -> int:
    """Text tokens that fit beside an image's visual tokens when both branches are shown.

    Args:
        max_tokens: the language model's longest sequence.
        connector: tells how many tokens a view makes.
        num_views: local views of the image.

    Returns:
        Number of tokens; negative when the visual ones alone do not fit.
    """
    return max_tokens - connector.tokens_per_global_view - 1 - num_views * connector.tokens_per_local_view


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Everything that a forward pass needs, as tensors on one device."""

    text_ids: Int[Tensor, "text"]
    gather: Int[Tensor, "batch length"]
    """Row of the bank at every position."""
    lengths: Int[Tensor, "batch"]
    label_positions: Int[Tensor, "supervised"]
    """Flat positions (batch * length) whose hidden state predicts a supervised token."""
    label_ids: Int[Tensor, "supervised"]
    global_maps: Mapping[str, Float[Tensor, "images patches width"]] | None = None
    local_maps: Mapping[str, Float[Tensor, "views patches width"]] | None = None
    gate_noise: Float[Tensor, "images tokens experts"] | None = None
    evidence_places: Int[Tensor, "pairs"] | None = None
    """Local tokens, counted over all local views of the batch, that should mean a word."""
    evidence_words: Int[Tensor, "pairs"] | None = None
    evidence_scale: float = 0.0
    """What the summed evidence loss is multiplied with before it joins the summed cross entropy."""
    experts: Experts = "mixture"

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        if torch.device(device).type == self.text_ids.device.type == "cpu":
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        def move_all(maps: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
            return None if maps is None else {name: tensor.to(device, non_blocking=True) for name, tensor in maps.items()}

        return Batch(
            text_ids=self.text_ids.to(device),
            gather=self.gather.to(device),
            lengths=self.lengths.to(device),
            label_positions=self.label_positions.to(device),
            label_ids=self.label_ids.to(device),
            global_maps=move_all(self.global_maps),
            local_maps=move_all(self.local_maps),
            gate_noise=move(self.gate_noise),
            evidence_places=move(self.evidence_places),
            evidence_words=move(self.evidence_words),
            evidence_scale=self.evidence_scale,
            experts=self.experts,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualTokens:
    """A connector's output for the images of a batch."""

    global_tokens: Float[Tensor, "images tokens hidden"] | None
    local_tokens: Float[Tensor, "views queries hidden"] | None


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
        count = layout.num_views[image] * layout.tokens_per_local_view
        if count == 0 and mode == "local":
            raise MissingMapError(f"a sequence shows the local views of image {image}, which are not in the batch")
        if count:
            if rows:
                rows.append(np.array([_SEPARATOR_ROW]))
            start = first_local + layout.first_view[image] * layout.tokens_per_local_view
            rows.append(np.arange(start, start + count))
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
        **maps: fields of the Batch that hold features: `global_maps`, `local_maps`, `gate_noise`, `experts`.

    Returns:
        The batch, on the CPU.

    Raises:
        MissingMapError: a sequence shows what is not there.
        ConversationError: a sequence begins with a supervised token; its label would be another sequence's.
    """
    text: list[int] = []
    rows: list[NDArray[np.int64]] = []
    labels: list[tuple[NDArray[np.int64], list[int]]] = []
    first_global = _TEXT_ROW + sum(conversation.num_text_tokens for conversation in conversations)
    first_local = first_global + layout.num_global_views * layout.tokens_per_global_view
    for conversation, mode, image in zip(conversations, modes, images, strict=True):
        before = _TEXT_ROW + len(text) + np.arange(len(conversation.before))
        after = _TEXT_ROW + len(text) + len(conversation.before) + np.arange(len(conversation.after))
        text += [*conversation.before, *conversation.after]
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
        gather=torch.from_numpy(gather),
        lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64),
        label_positions=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *positions])),
        label_ids=torch.tensor([token for _, ids in labels for token in ids], dtype=torch.int64),
        **maps,
    )


class VisionLanguageModel(nn.Module):
    """A connector in front of a language model.

    Dropout stays off, so a step is a pure function of weights and batch.
    """

    def __init__(self, connector: Connector, language_model: LanguageModel, *, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        """Put the parts together.

        Args:
            connector: as built for this language model's width.
            language_model: loaded.
            precision: of matrix products; weights keep the type they have.
        """
        super().__init__()
        self.connector = connector
        self.language_model = language_model.network
        self.tokenizer = language_model.tokenizer
        self.max_tokens = language_model.max_tokens
        self.precision = precision
        self.separator_id = first_token(language_model.tokenizer, connector.spec.separator)
        self.language_model.train(mode=False)

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
        with self._autocast():
            return VisualTokens(
                global_tokens=None
                if batch.global_maps is None
                else self.connector.global_tokens(batch.global_maps, experts=batch.experts, noise=batch.gate_noise),
                local_tokens=None if batch.local_maps is None else self.connector.local_tokens(batch.local_maps),
            )

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
        separator = torch.tensor([self.separator_id], device=batch.text_ids.device)
        text = embed(self.language_model, torch.cat([separator, batch.text_ids]))
        parts = [text.new_zeros(1, text.shape[1]), text]
        parts += [tokens.flatten(0, 1).to(text.dtype) for tokens in (visual.global_tokens, visual.local_tokens) if tokens is not None]
        return torch.cat(parts).index_select(0, batch.gather.flatten()).reshape(*batch.gather.shape, -1)

    def forward(self, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
        """Sums of a training batch (padded behind: under a causal mask nothing real ever looks there, so no mask is needed).

        Args:
            batch: with labels.

        Returns:
            The objective to descend; the summed cross entropy over the supervised tokens, which it equals but for the evidence loss; and how many
            of them were predicted right.
        """
        visual = self.visual_tokens(batch)
        with self._autocast():
            embedded = self.embed_sequences(batch, visual)
            hidden: Tensor = decoder(self.language_model)(inputs_embeds=embedded, use_cache=False).last_hidden_state
            selected = hidden.flatten(0, 1).index_select(0, batch.label_positions)
            loss = supervised_loss(selected, batch.label_ids, self.language_model.get_output_embeddings())  # type: ignore[operator]
        objective = loss.total
        if batch.evidence_places is not None and batch.evidence_words is not None and visual.local_tokens is not None:
            places = visual.local_tokens.flatten(0, 1).index_select(0, batch.evidence_places)
            words: Tensor = self.language_model.get_input_embeddings().weight  # type: ignore[operator]
            objective = objective + batch.evidence_scale * evidence_loss(places, batch.evidence_words, words)
        return objective, loss.total.detach(), loss.correct

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
        ends = torch.tensor(self._end_ids(), device=batch.gather.device)
        length = batch.gather.shape[1]
        mask = (torch.arange(length, device=batch.gather.device)[None] >= length - batch.lengths[:, None]).long()
        with self._autocast():
            embedded = self.embed_sequences(batch, self.visual_tokens(batch) if visual is None else visual)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
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
                    position_ids=batch.lengths[:, None] + step,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
        return [[token for token in row if token >= 0] for row in torch.stack(new, dim=1).tolist()]

    def _end_ids(self) -> list[int]:
        configured = getattr(getattr(self.language_model, "generation_config", None), "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        return sorted({self.tokenizer.eos_token_id, *(token for token in more if token is not None)})

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
