"""Views through an encoder in batches of one shape, packed over images and branches, with everything that is not the forward pass beside it.

Input: a unit's views by branch, uint8 on the host. Output: its maps as they are stored. On CUDA a batch goes through pinned memory by a stream of its
own, its maps are rounded on the device and come back by another one, and while they do the next batch computes; there are two of everything. On a
CPU the same code runs with streams that do nothing and buffers that are the result. Invariant: batches are formed within a unit and begin with its
first view, so a unit's numbers depend on the unit and on the batch's size alone.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from model.encoder import Encoder
from model.encoder_execution import BatchSize, EncoderForward
from model.quality import MapQuality
from model.quantisation import map_quality
from model.specs import MapSpec, deepest_layer
from model.views import Branch
from workers.caching.codec import FeatureCodec, RoundedMap, StoredMap

__all__ = ["EncodedViews", "PendingViews", "ViewEncoder"]

_SLOTS = 2
"""Batches under way: one computes while the other one's maps come back and its successor's views go there."""


@dataclass(frozen=True, kw_only=True)
class EncodedViews:
    """The maps of some views of a branch, as they are stored."""

    maps: dict[str, StoredMap]
    finite: np.ndarray
    """Per view whether all that is stored of it is finite: bool [views]."""
    quality: dict[str, MapQuality]
    """Of the first views, by map."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Neighbouring views of a branch in a batch."""

    branch: Branch
    start: int
    """Among the branch's views, as `stop`."""
    stop: int
    row: int
    """Of the batch, where they begin."""

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.stop - self.start)


def _packed(num_views: Mapping[Branch, int], maps: Mapping[Branch, Sequence[MapSpec]], batch_views: int) -> list[list[_Part]]:
    """Batches of views, each with what it holds.

    Branches share batches where they need as many blocks. Else the views of one would run through blocks that only the other one needs.
    """
    by_depth: dict[int, list[Branch]] = {}
    for branch, count in num_views.items():
        if count and maps[branch]:
            by_depth.setdefault(deepest_layer(maps[branch]), []).append(branch)
    batches: list[list[_Part]] = []
    for branches in by_depth.values():
        batch: list[_Part] = []
        row = 0
        for branch in branches:
            start = 0
            while start < num_views[branch]:
                stop = min(num_views[branch], start + batch_views - row)
                batch.append(_Part(branch=branch, start=start, stop=stop, row=row))
                row, start = row + stop - start, stop
                if row == batch_views:
                    batches.append(batch)
                    batch, row = [], 0
        if batch:
            batches.append(batch)
    return batches


class _Landing:
    """What is left to do when a batch's maps have come back.

    Whoever comes first does it: the thread that waits for its unit, or the one that needs the buffers for another unit.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            if self._work is not None:
                self._work()
                self._work = None  # behind the work: where it fails, it fails for both


@dataclass(kw_only=True)
class _Slot:
    """Buffers of one batch under way."""

    host_views: UInt8[Tensor, "batch 3 px px"]
    """Pinned on CUDA."""
    device_views: UInt8[Tensor, "batch 3 px px"]
    """On a CPU those on the host themselves."""
    staging: dict[tuple[Branch, str, str], Tensor] = field(default_factory=dict)
    """Pinned room for what comes back, by branch, map and kind; of whole batches."""
    landing: _Landing | None = None
    """Of the batch that is in here."""

    def land(self) -> None:
        """Wait for the batch that is in here, so that the next one may come."""
        if self.landing is not None:
            self.landing()
            self.landing = None


class PendingViews:
    """Views that are on their way through the encoder. Made by `ViewEncoder.submit`."""

    def __init__(self, encoded: dict[Branch, EncodedViews]) -> None:
        self._encoded = encoded
        self.landings: list[_Landing] = []

    def result(self) -> dict[Branch, EncodedViews]:
        """Wait for them.

        Returns:
            The maps by branch.
        """
        for landing in self.landings:
            landing()
        return self._encoded


class ViewEncoder:
    """Encodes the views of units. One thread submits at a time; any may wait for what it has submitted.

    Args:
        encoder: loaded deep enough.
        codec: of the cache.
        batch_views: views in one forward pass; None is automatic. Halved where memory ends. A BatchSize is shared with others, who then learn of it.
        compiled: as EncoderForward takes it.
        once: for a few views that are submitted together, and no others: they are encoded in less time than a compiler takes, and no batch is filled
            up to the size of others.
    """

    def __init__(
        self,
        encoder: Encoder,
        codec: FeatureCodec,
        batch_views: int | BatchSize | None = None,
        *,
        compiled: bool | None = None,
        once: bool = False,
    ) -> None:
        self.codec = codec
        self.batch_size = batch_views if isinstance(batch_views, BatchSize) else BatchSize(encoder, batch_views)
        self._encoder = encoder
        self._forward = EncoderForward(encoder, compiled=False, recorded=False) if once else EncoderForward(encoder, compiled=compiled)
        self._once = once
        self._is_staged = encoder.device.type == "cuda"
        """Whether views and maps go through buffers between host and device, in batches of one shape. Works on a CPU too, and is a waste there."""
        self._streams = torch.get_device_module(encoder.device)
        """torch.cuda, or torch.cpu, whose streams and events do nothing."""
        with self._here():
            self._inward, self._outward = self._streams.Stream(), self._streams.Stream()
        self._slots: list[_Slot] = []
        self._num_batches = 0

    @property
    def _pins(self) -> bool:
        """Whether the host's buffers are pinned, without which copies wait for each other."""
        return self._encoder.device.type == "cuda"

    def submit(
        self,
        views: Mapping[Branch, UInt8[np.ndarray, "_views 3 px px"]],
        maps: Mapping[Branch, Sequence[MapSpec]],
        num_compared: Mapping[Branch, int],
    ) -> PendingViews:
        """Begin to encode views. On a CPU they are encoded when this returns.

        Args:
            views: uint8 [views, 3, view_px, view_px] by branch; read until this returns.
            maps: which, of each of those branches.
            num_compared: so many of a branch's first views are read back, to tell how true they are.

        Returns:
            What to wait for.

        Raises:
            EncoderError: memory ends at a single view, or the encoder was not loaded as deep as a map needs it.
        """
        with self._here():
            return self.batch_size.backing_off(lambda batch_views: self._submit(views, maps, num_compared, batch_views), self._release)

    def _here(self) -> contextlib.AbstractContextManager[object]:
        """A block in which the encoder's device is the current one.

        CUDA's belongs to the thread: a new one begins at the first GPU, and streams and events that it makes would wait for nothing that the
        encoder's does.
        """
        return torch.cuda.device(self._encoder.device) if self._encoder.device.type == "cuda" else contextlib.nullcontext()

    def _submit(
        self,
        views: Mapping[Branch, np.ndarray],
        maps: Mapping[Branch, Sequence[MapSpec]],
        num_compared: Mapping[Branch, int],
        batch_views: int,
    ) -> PendingViews:
        encoded = {
            branch: EncodedViews(
                maps={item.name: self.codec.empty(branch, item, len(part)) for item in maps[branch]},
                finite=np.ones(len(part), dtype=np.bool_),
                quality={item.name: MapQuality() for item in maps[branch]},
            )
            for branch, part in views.items()
        }
        pending = PendingViews(encoded)
        room = min(batch_views, sum(map(len, views.values()))) if self._once else batch_views
        for parts in _packed({branch: len(part) for branch, part in views.items()}, maps, batch_views):
            slot = self._free_slot(room)
            for part in parts:
                slot.host_views[part.rows].numpy()[:] = views[part.branch][part.start : part.stop]
            slot.landing = self._enqueue(slot, parts, maps, num_compared, encoded)
            if self._is_staged:
                pending.landings.append(slot.landing)
            else:  # nothing is on its way, and what is left is this thread's to compute: see ComputingThread
                slot.land()
        return pending

    def _free_slot(self, batch_views: int) -> _Slot:
        if len(self._slots) < _SLOTS:
            side = self._encoder.spec.view_px
            host = torch.zeros((batch_views, 3, side, side), dtype=torch.uint8, pin_memory=self._pins)
            self._slots.append(_Slot(host_views=host, device_views=torch.empty_like(host, device=self._encoder.device) if self._is_staged else host))
            # Memory that torch gives may be read and written still by what is queued on the stream that computes, which the other does not follow.
            self._inward.wait_stream(self._streams.current_stream())
        slot = self._slots[self._num_batches % len(self._slots)] if len(self._slots) == _SLOTS else self._slots[-1]
        self._num_batches += 1
        slot.land()
        return slot

    def _release(self) -> None:
        """Give back buffers that were made for larger batches, when what is under way in them has landed."""
        for slot in self._slots:
            slot.land()
        self._slots.clear()
        self._forward.release()

    @torch.inference_mode()
    def _enqueue(
        self,
        slot: _Slot,
        parts: Sequence[_Part],
        maps: Mapping[Branch, Sequence[MapSpec]],
        num_compared: Mapping[Branch, int],
        encoded: Mapping[Branch, EncodedViews],
    ) -> _Landing:
        """A batch on its way: views there, maps computed and rounded, and back."""
        streams, computing = self._streams, self._streams.current_stream()
        num_rows = parts[-1].rows.stop
        if self._is_staged:
            if not self._once:
                # One shape, for compiled code and graphs. A CPU compiles nothing, and would compute what nobody wants.
                slot.host_views[num_rows:].zero_()
                num_rows = len(slot.device_views)
            with streams.stream(self._inward):
                slot.device_views[:num_rows].copy_(slot.host_views[:num_rows], non_blocking=True)
            computing.wait_stream(self._inward)
        # Where shapes are compiled every batch gives all maps that any branch wants, so that there is one shape; else those that it needs.
        asking = maps if self._is_staged and not self._once else [part.branch for part in parts]
        deepest = max(deepest_layer(maps[part.branch]) for part in parts)
        union = dict.fromkeys(item for branch in asking for item in maps[branch] if item.layers[-1] <= deepest)
        reduced = self._forward(slot.device_views[:num_rows], list(union))
        rounded = [(part, item, self.codec.rounded(part.branch, item, reduced[item.name][part.rows])) for part in parts for item in maps[part.branch]]
        compared = [
            (part, item, reduced[item.name][part.row : part.row + min(part.stop, num_compared[part.branch]) - part.start])
            for part in parts
            for item in maps[part.branch]
            if part.start < num_compared[part.branch]
        ]
        self._outward.wait_stream(computing)
        with streams.stream(self._outward):
            staged = [(part, item, self._on_host(slot, part, item, there)) for part, item, there in rounded]
            landed = streams.Event()
            landed.record(self._outward)

        def land() -> None:
            landed.synchronize()
            for part, item, here in staged:
                place = encoded[part.branch].maps[item.name][part.start : part.stop]
                place.values[:] = here.values.numpy()
                if here.steps is not None and place.steps is not None:
                    place.steps[:] = here.steps.numpy()
                encoded[part.branch].finite[part.start : part.stop] &= here.finite.numpy()
            for part, item, tokens in compared:
                self._compare(part, item, tokens, encoded[part.branch])
            rounded.clear()  # memory of the device, which had to stay until now

        return _Landing(land)

    def _on_host(self, slot: _Slot, part: _Part, item: MapSpec, there: RoundedMap) -> RoundedMap:
        if not self._is_staged:
            return there

        def copied(kind: str, tensor: Tensor) -> Tensor:
            key = (part.branch, item.name, kind)
            if key not in slot.staging:
                slot.staging[key] = torch.empty((len(slot.host_views), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=self._pins)
            return slot.staging[key][: len(tensor)].copy_(tensor, non_blocking=True)

        return RoundedMap(
            values=copied("values", there.values),
            steps=None if there.steps is None else copied("steps", there.steps),
            finite=copied("finite", there.finite),
        )

    def _compare(self, part: _Part, item: MapSpec, tokens: Tensor, encoded: EncodedViews) -> None:
        """How true the first views of a part are, by what is stored of them."""
        kept = [place for place in range(len(tokens)) if encoded.finite[part.start + place]]
        if not kept:
            return
        stored = encoded.maps[item.name]
        # On the host: whoever waits for a unit compares it, and a device whose memory ends then is past the place that backs off. One image's
        # numbers in double precision are 33 MB of a map of CLIP-L/14-336.
        tokens = tokens.cpu()
        back = torch.cat([self.codec.load(part.branch, item, stored[part.start + place : part.start + place + 1]) for place in kept])
        encoded.quality[item.name] += map_quality(tokens[kept], back, self.codec.calibration(part.branch, item))
