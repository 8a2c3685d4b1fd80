"""Video without training on any: some frames of it stand in for a picture.

`frames`: every frame is a global view; its tokens are pooled and follow those of the frame before, in the one place that a picture has.
`grid`: the frames tile the canvas of a picture, each one local view, and the mean of their features is the global view.

Input: a video's bytes, or frames. Output: frames to encode, and what becomes of their tokens. Invariant: the same bytes give the same frames; a video
shorter than the wanted number of frames repeats some.

Source: `frames`: FreeVA as Dense Connector uses it (section 3.4 and its evaluation code). `grid`: SliME's note on video.
"""

import io
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageSequence
from torch import Tensor

from model.chat import tokenise_question
from model.errors import ExportError, ImageError, SpecError
from model.export import Answer, ExportedModel
from model.images import DEFAULT_LIMITS, ImageLimits, cut_views, decoding_error, open_image, upright_rgb
from model.views import ViewPlan, ViewSpec, most_square_grid, plan_views
from model.vision_language import Mode, VisualLayout, VisualTokens, lay_out_images, plan_sequences

__all__ = ["POOL", "VideoLayout", "ask_video", "frame_places", "grid_plan", "pool_frames", "read_frames"]

VideoLayout = Literal["frames", "grid"]

POOL = 2
"""Neighbouring tokens of a frame that become one, as Dense Connector's evaluation has it."""

MAX_FRAMES = 100_000
"""An hour at 28 frames a second. What promises more is refused before it is decoded."""


def frame_places(num_frames: int, wanted: int) -> tuple[int, ...]:
    """The middle frames of equal parts of a video.

    Args:
        num_frames: of the video.
        wanted: how many.

    Returns:
        Places from 0, ascending; some repeat where there are fewer frames than wanted.

    Raises:
        SpecError: no frames, or none wanted.

    Source: FreeVA's sampling: the parts' borders are rounded, and so is what lies between two.
    """
    if num_frames < 1 or wanted < 1:
        raise SpecError(f"a video needs at least one frame, and at least one must be wanted; found {num_frames} and {wanted}")
    borders = [round(part * (num_frames - 1) / wanted) for part in range(wanted + 1)]
    return tuple((first + last) // 2 for first, last in pairwise(borders))


def pool_frames(tokens: Float[Tensor, "frames tokens hidden"], pool: int) -> Float[Tensor, "one pooled hidden"]:
    """Every frame's tokens, the largest of each `pool` neighbours, one frame behind the other.

    Args:
        tokens: visual tokens of the frames as global views.
        pool: neighbours along the flattened raster; 1 keeps all. Tokens that fill no pool are dropped.

    Returns:
        [1, frames * (tokens // pool), hidden]: as one picture's.

    Raises:
        SpecError: a pool larger than a frame.

    Source: Dense Connector section 3.4 (kernel and stride of 2: 576 tokens to 288).
    """
    if not 1 <= pool <= tokens.shape[1]:
        raise SpecError(f"a frame has {tokens.shape[1]} tokens, of which pools of {pool} cannot be made; use 1 to {tokens.shape[1]}")
    pooled = F.max_pool1d(tokens.transpose(1, 2), kernel_size=pool, stride=pool).transpose(1, 2)
    return pooled.flatten(0, 1)[None]


def grid_plan(num_frames: int, view_px: int) -> ViewPlan:
    """A canvas that so many frames tile, row by row, as close to a square as their number allows, wider than high: 8 make 4 x 2.

    Args:
        num_frames: how many.
        view_px: side of the encoder's view.

    Returns:
        The plan of a picture whose local views the frames are.
    """
    rows, columns = most_square_grid(num_frames)
    return plan_views(columns * view_px, rows * view_px, view_px, ViewSpec.anyres(grids=((columns, rows),)))


def read_frames(data: bytes, wanted: int, limits: ImageLimits = DEFAULT_LIMITS) -> list[Image.Image]:
    """Some frames of a video or of an animated picture.

    Args:
        data: the file. Animated GIF, WebP, PNG and TIFF are read by Pillow, all else by PyAV (extra `video`).
        wanted: how many frames; see `frame_places`.
        limits: what to refuse, per frame; a file may have ten times as many bytes as a picture's.

    Returns:
        Upright RGB frames, `wanted` of them.

    Raises:
        ImageError: the bytes are no video that can be read, or too large.
    """
    if len(data) > 10 * limits.max_bytes:
        raise ImageError("too_many_bytes", f"the file has {len(data)} bytes; at most {10 * limits.max_bytes} are allowed for a video")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = open_image(data, replace(limits, max_bytes=10 * limits.max_bytes))
        except ImageError as error:
            if error.reason != "not_an_image":
                raise
            return _video_frames(data, wanted, limits)
        with picture:
            try:
                return _animation_frames(picture, wanted)
            except (ImageError, MemoryError):
                raise
            except Exception as error:
                raise decoding_error(error, limits) from error


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"its frames have {width}x{height} pixels; at most {limits.max_pixels} are allowed")


def _check_number(num_frames: int) -> None:
    if num_frames > MAX_FRAMES:
        raise ImageError("too_many_pixels", f"it has {num_frames} frames; at most {MAX_FRAMES} are allowed: cut it")


def _animation_frames(picture: Image.Image, wanted: int) -> list[Image.Image]:
    num_frames = int(getattr(picture, "n_frames", 1))
    _check_number(num_frames)
    places = frame_places(num_frames, wanted)
    chosen = {place: upright_rgb(frame) for place, frame in enumerate(ImageSequence.Iterator(picture)) if place in places}
    return [chosen[place] for place in places]


def _video_frames(data: bytes, wanted: int, limits: ImageLimits) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImageError(
            "not_an_image",
            "it is no picture that Pillow knows, and videos are read by PyAV, which is not installed: in Loupe's checkout, pip install -e '.[video]'",
        ) from error
    try:
        # Counted by its packets first, which costs no decoding; containers often do not say how many frames they hold.
        container: Any
        with av.open(io.BytesIO(data)) as container:
            stream = _video_stream(container, limits)
            num_frames = sum(packet.size > 0 for packet in container.demux(stream))
        _check_number(num_frames)
        places = frame_places(num_frames, wanted)
        with av.open(io.BytesIO(data)) as container:
            stream = _video_stream(container, limits)
            chosen: dict[int, Image.Image] = {}
            last: Any = None
            for place, frame in enumerate(_decoded(container, stream, places[-1])):
                last = frame
                if place in places:
                    chosen[place] = _turned(frame)
    except av.FFmpegError as error:
        raise ImageError("undecodable", f"it cannot be read as a video: {error}") from error
    if last is None:
        raise ImageError("undecodable", "it holds no frame that can be decoded")
    end = _turned(last)  # packets that gave no frame leave fewer than were counted
    return [chosen.get(place, end) for place in places]


def _video_stream(container: Any, limits: ImageLimits) -> Any:
    if not container.streams.video:
        raise ImageError("not_an_image", "it holds no video, sound alone perhaps")
    stream = container.streams.video[0]
    _check_size(stream.codec_context.width, stream.codec_context.height, limits)
    return stream


def _decoded(container: Any, stream: Any, last: int) -> Iterator[Any]:
    for place, frame in enumerate(container.decode(stream)):
        yield frame
        if place >= last:
            return


def _turned(frame: Any) -> Image.Image:
    """As a player shows it: telephones write how they were held, and turn nothing."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


@torch.no_grad()
def ask_video(
    exported: ExportedModel,
    frames: Sequence[Image.Image],
    question: str,
    layout: VideoLayout | None = None,
    *,
    pool: int = POOL,
    max_new_tokens: int = 64,
) -> Answer:
    """Answer a question about some frames of a video, greedily.

    Args:
        exported: the model; it was trained on pictures.
        frames: from `read_frames`, in order.
        question: about the video.
        layout: how frames stand in for a picture; None is `grid` for a connector with a local branch, `frames` for one without.
        pool: of `frames`: neighbouring tokens of a frame that become one.
        max_new_tokens: the answer ends here at the latest.

    Returns:
        The answer.

    Raises:
        ConversationError: the question does not fit, or holds a mark of the prompt.
        ExportError: the layout needs a local branch and there is none.
        SpecError: there are no frames, too many, or the pool is larger than a frame.
    """
    started = time.monotonic()
    if not frames:
        raise SpecError("a video needs at least one frame, found none")
    spec, encoder, model = exported.config.connector, exported.config.encoder, exported.model
    if layout is None:
        layout = "frames" if spec.local_branch is None else "grid"
    views = np.concatenate([_whole(exported, frame) for frame in frames])
    mode: Mode
    if layout == "frames":
        num_visual = len(frames) * (model.connector.tokens_per_global_view // max(pool, 1))
        shown = VisualLayout(
            tokens_per_global_view=num_visual,
            tokens_per_local_view=0,
            separator=False,
            global_index=(0,),
            first_view=(0,),
            local_orders=(np.zeros(0, dtype=np.int64),),
        )
        maps = plan_sequences([], [], [], shown, global_maps=exported.maps_of(views, spec.global_branch.fusion.maps))
        found = model.visual_tokens(maps.to(model.device)).global_tokens
        assert found is not None
        visual = VisualTokens(global_tokens=pool_frames(found, pool), local_tokens=None)
        mode = "global"
    else:
        if spec.local_branch is None:
            raise ExportError("this export has no local branch, so frames cannot tile a grid of local views; use the layout 'frames'")
        plan = grid_plan(len(frames), encoder.view_px)
        shown = lay_out_images(model.connector, [True], [plan])
        whole = {name: values.mean(dim=0, keepdim=True) for name, values in exported.maps_of(views, spec.global_branch.fusion.maps).items()}
        maps = plan_sequences([], [], [], shown, global_maps=whole, local_maps=exported.maps_of(views, spec.local_branch.fusion.maps))
        visual = model.visual_tokens(maps.to(model.device))
        num_visual = model.connector.tokens_per_global_view + len(shown.local_orders[0]) + shown.separator
        mode = "both"
    room = model.max_tokens - max_new_tokens - num_visual
    if room <= 0:
        raise SpecError(f"{len(frames)} frames make {num_visual} visual tokens, but a sequence holds {model.max_tokens}; show fewer frames")
    conversation = tokenise_question(model.tokenizer, question, room)
    selects = mode == "both" and exported.config.selects
    batch = plan_sequences([conversation], [mode], [0], shown, pad_left=True, selects=selects)
    tokens = model.generate(batch.to(model.device), max_new_tokens, visual)[0]
    return Answer(
        text=model.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        mode=mode,
        seconds=time.monotonic() - started,
        num_visual_tokens=num_visual,
        num_answer_tokens=len(tokens),
    )


def _whole(exported: ExportedModel, frame: Image.Image) -> Any:
    """A frame as the global view of a picture."""
    encoder = exported.config.encoder
    plan = plan_views(frame.width, frame.height, encoder.view_px, exported.config.views)
    return cut_views(frame, plan, "global", mean_colour=encoder.mean_colour)
