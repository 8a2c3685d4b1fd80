"""How an encoder's forward pass is executed: how many views at once, compiled or not, recorded as a CUDA graph or not. Never what comes out of it.

Input: an encoder, views on its device. Output: its maps. Invariant: an execution that does not work here (a compiler that is missing, a batch that
does not fit into memory) is replaced by one that does, is said once in the log, and stays replaced for the rest of the process.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from model.architectures import encoder_flops
from model.encoder import Encoder
from model.errors import EncoderError, first_line
from model.packed_layers import can_pack, pack_layers
from model.specs import EncoderSpec, MapSpec

__all__ = ["BatchSize", "EncoderForward", "automatic_batch_views", "is_out_of_memory"]

_LOG = logging.getLogger(__name__)

_Result = TypeVar("_Result")

Maps = dict[str, Float[Tensor, "batch _tokens width"]]
"""By map name, fp32 on the encoder's device."""

_CPU_ROWS = 2048
"""Tokens of one forward pass on a CPU: 10 views of ViT-B/16 at 224 px, 31 of 65 tokens. Measured on cores with AVX2, ms of a core for one view, in
batches of 1, 2, 4, 8, 16, 32 and 64. A block of ViT-B/16 with one thread: 115, 112, 108, 104, 111, 112, 114; with two: 174, 156, 128, 123, 116, 114,
116. Four blocks of ViT-S/16: 121, 115, 109, 106, 107, 117, 118. Eight blocks of width 192 on 65 tokens with one thread: 30, 24, 21, 20, 19, 19, 20;
with two: 127, 85, 64, 43, 33, 29, 26. Fewer do not fill a product of matrices, more do not stay in the caches. Anew:
`python tests/benchmark/encoder_on_gpu.py --device cpu --compute fp32 --shape vit-b16 --batches --views 64 --repeats 3`."""
_CUDA_ROWS = 2**15
"""Tokens of one forward pass on a GPU: 56 views of CLIP-L/14-336, 166 of ViT-B/16 at 224 px. Enough rows for a matrix product to fill 132
multiprocessors 16 times over with tiles of 128 x 128 at a width of 1024; an estimate, which tests/benchmark/encoder_on_gpu.py tries."""
_CUDA_MEMORY_FRACTION = 0.5
"""Of the memory that is free when the first batch is made; the rest is for maps, staging and the allocator's losses."""
_LAUNCH_S, _LAUNCHES_PER_BLOCK, _ASSUMED_FLOP_S = 5e-6, 14, 3e14
"""Of a GPU: to start one kernel; kernels of one block run eagerly; what products of matrices reach in 16 bits. Recording a graph saves starts, which
are hidden where a block computes longer than it takes to start it."""

_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's allocators say without a type of their own: CUDA's through a library, and the CPU's."""


def automatic_batch_views(spec: EncoderSpec, device: str | torch.device, dtype: torch.dtype) -> int:
    """Views in one forward pass, where nobody says.

    Args:
        spec: of the encoder.
        device: where it computes; on CUDA the memory that is free now counts.
        dtype: of its hidden states.

    Returns:
        At least 1. On CUDA a multiple of 8 from 8 up.
    """
    tokens = spec.num_patches + spec.prefix_tokens
    if torch.device(device).type != "cuda":
        return max(1, _CPU_ROWS // tokens)
    # Alive at once in a block: its input, the normed one, queries, keys, values and their product, or the widened MLP twice; and a few maps in fp32.
    row_bytes = dtype.itemsize * (8 * spec.width + 2 * spec.mlp_width) + 4 * 4 * spec.width
    fitting = int(torch.cuda.mem_get_info(torch.device(device))[0] * _CUDA_MEMORY_FRACTION) // (tokens * row_bytes)
    return max(8, min(_CUDA_ROWS // tokens, fitting) // 8 * 8)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended, on a GPU or on the host."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OUT_OF_MEMORY_WORDS)


class BatchSize:
    """Views in one forward pass of an encoder: as told or automatic, and halved for the rest of the process where memory ends.

    Args:
        encoder: whose.
        told: as the settings say; None is automatic.
    """

    views: int

    def __init__(self, encoder: Encoder, told: int | None) -> None:
        self._encoder = encoder
        self._told = told
        self.views = automatic_batch_views(encoder.spec, encoder.device, encoder.dtype) if told is None else told

    def backing_off(self, work: Callable[[int], _Result], release: Callable[[], None] = lambda: None) -> _Result:
        """Do work that takes memory by the batch; where memory ends, from its beginning again with batches of half as many views.

        Args:
            work: takes the views in one forward pass. From its beginning, so that what it gives is of one batch size throughout.
            release: gives back what is held for batches of the size so far.

        Returns:
            What the work gives.

        Raises:
            EncoderError: memory ends at a single view.
        """
        while True:
            try:
                return work(self.views)
            except (RuntimeError, MemoryError) as error:  # torch.cuda.OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
                said = first_line(error)
                if self.views == 1:
                    raise EncoderError(f"{self._encoder.spec.model}: a forward pass of a single view runs out of memory ({said})") from error
            # Out of the except clause: its traceback would hold the tensors that have to go.
            release()
            if self._encoder.device.type == "cuda":
                torch.cuda.empty_cache()
            kind = "automatic batches" if self._told is None else f"encode_batch_views = {self._told}: batches"
            _LOG.warning("%s of %d views run out of memory (%s); from now on %d", kind, self.views, said, self.views // 2)
            self.views //= 2


class EncoderForward:
    """An encoder's forward pass as it is fastest here.

    Args:
        encoder: whose. On a CPU the weights of its blocks are packed in place, see model.packed_layers, unless it is compiled.
        compiled: whether torch.compile fuses it; None is on CUDA alone. Where compiling fails it runs as it is written, and the log says why.
        recorded: whether a CUDA graph replays it; None is where starting kernels would take longer than they compute. Views must then come in
            batches of one size. Nothing is recorded on a CPU.
    """

    def __init__(self, encoder: Encoder, *, compiled: bool | None = None, recorded: bool | None = None) -> None:
        self.encoder = encoder
        self.is_compiled = encoder.device.type == "cuda" if compiled is None else compiled
        self._recorded = recorded
        self._compiled: dict[tuple[MapSpec, ...], Callable[[Tensor], Maps]] = {}
        self._graphs: dict[tuple[tuple[MapSpec, ...], int], _Recording] = {}
        if encoder.device.type == "cpu" and not self.is_compiled and can_pack(encoder.dtype):
            pack_layers(encoder.blocks, encoder.spec.activation)

    @torch.inference_mode()
    def __call__(self, views_uint8: UInt8[Tensor, "batch 3 px px"], maps: Sequence[MapSpec]) -> Maps:
        """As Encoder.forward.

        Args:
            views_uint8: [batch, 3, view_px, view_px], on the encoder's device.
            maps: which; each map's layers must lie within what the encoder was loaded to.

        Returns:
            fp32 [batch, tokens, width] by map name, on the encoder's device.
        """
        wanted = tuple(maps)
        if not self._records(len(views_uint8)):
            return self._run(views_uint8, wanted)
        key = (wanted, len(views_uint8))
        if key not in self._graphs:
            try:
                self._graphs[key] = _Recording(lambda views: self._run(views, wanted), views_uint8)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                _LOG.warning("the forward pass cannot be recorded as a CUDA graph (%s); it runs without", first_line(error))
                self._recorded = False
                return self._run(views_uint8, wanted)
        return self._graphs[key](views_uint8)

    def release(self) -> None:
        """Give back the memory that recorded passes hold."""
        self._graphs.clear()

    def _records(self, num_views: int) -> bool:
        if self.encoder.device.type != "cuda":
            return False
        if self._recorded is None:
            per_block = encoder_flops(self.encoder.spec, self.encoder.deepest_layer) * num_views / max(1, self.encoder.deepest_layer)
            self._recorded = per_block / _ASSUMED_FLOP_S < _LAUNCHES_PER_BLOCK * _LAUNCH_S
        return self._recorded

    def _run(self, views: Tensor, maps: tuple[MapSpec, ...]) -> Maps:
        if not self.is_compiled:
            plain: Maps = self.encoder(views, list(maps))
            return plain
        if maps not in self._compiled:
            wanted = list(maps)
            self._compiled[maps] = torch.compile(lambda batch: self.encoder(batch, wanted), dynamic=False)
        try:
            return self._compiled[maps](views)
        except Exception as error:
            # Whatever a compiler raises: none there, one too old, code that it cannot take. The same pass without it shows what is not its fault.
            if is_out_of_memory(error):
                raise
            found: Maps = self.encoder(views, list(maps))
            _LOG.warning("the forward pass cannot be compiled (%s: %s); it runs as it is", type(error).__name__, first_line(error))
            self.is_compiled = False
            return found


class _Recording:
    """A forward pass as a CUDA graph: one launch in place of hundreds."""

    def __init__(self, run: Callable[[Tensor], Maps], views: Tensor) -> None:
        self._views = views.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, chooses kernels and takes memory outside of the recording
                run(self._views)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # What other threads do to other streams meanwhile is no part of it, and no error.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._maps = run(self._views)

    def __call__(self, views: Tensor) -> Maps:
        self._views.copy_(views)
        self._graph.replay()
        # The next replay writes where this one wrote, while a side stream may still copy from there.
        return {name: tokens.clone() for name, tokens in self._maps.items()}
