"""From bytes to views: decode an image safely, cut the views of a plan, measure how much detail a squashed view loses.

Bytes are probed before they are decoded: a header that promises too many pixels is refused while it is still cheap. Every accepted image comes
out as upright 8-bit RGB. Invariants: refused bytes raise ImageError with one of REASONS; views come out in the plan's order; the same bytes and
plan give the same pixels on every machine with the same Pillow.
"""

import io
import re
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from model.errors import ImageError, SpecError
from model.views import Branch, ViewPlan

__all__ = [
    "DEFAULT_LIMITS",
    "REASONS",
    "ImageLimits",
    "Reason",
    "cut_views",
    "decode_image",
    "decoding_error",
    "detail_score",
    "open_image",
    "shown_size",
    "upright_rgb",
]

Reason = Literal["empty", "too_many_bytes", "not_an_image", "too_many_pixels", "extreme_aspect", "truncated", "undecodable"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Everything that can be wrong with an image's bytes; the quarantine's reason codes of the decoder."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are tried (a camera's MPO opens as JPEG). Others that Pillow knows (EPS, PSD, ...) start programs or are no pictures."""


_LYING = (5, 6, 7, 8)
"""EXIF's orientations of pictures that lie on their side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is refused before it is decoded."""

    max_bytes: int = 100 * 2**20
    max_pixels: int = 64_000_000
    """64 Mpx. Pillow's own limits warn at 89 Mpx and refuse at 179."""
    max_aspect: float = 100.0
    """Longer to shorter side; beyond it every view is a smear."""


DEFAULT_LIMITS = ImageLimits()


def _refuse(reason: Reason, message: str) -> ImageError:
    return ImageError(reason, message)


def _too_many_pixels(error: Image.DecompressionBombError, limits: ImageLimits) -> ImageError:
    """Pillow refuses what is far too large before it gives a size, and names a limit of its own; what is allowed here is what ours says."""
    counted = re.search(r"\(([0-9]+) pixels\)", str(error))
    many = counted.group(1) if counted else "far too many"
    return _refuse("too_many_pixels", f"the image has {many} pixels; at most {limits.max_pixels} are allowed")


def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read a picture's header, and refuse what it promises before any pixel is decoded.

    Args:
        data: the file.
        limits: what to refuse.

    Returns:
        The picture, not decoded yet; close it.

    Raises:
        ImageError: with a reason out of REASONS.
    """
    if not data:
        raise _refuse("empty", "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise _refuse("too_many_bytes", f"the file has {len(data)} bytes; at most {limits.max_bytes} are allowed")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise _refuse("not_an_image", f"the bytes are none of {', '.join(_FORMATS)}; they start with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(error, limits) from error
    except MemoryError:
        raise  # this machine's lack, not the image's fault
    except Exception as error:
        # Headers are hostile input: Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error, IndexError, zlib.error ...
        raise _refuse("undecodable", f"the header cannot be read: {type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _refuse("too_many_pixels", f"the image has {width}x{height} pixels; at most {limits.max_pixels} are allowed")
    if min(width, height) < 1 or max(width, height) > limits.max_aspect * min(width, height):
        raise _refuse("extreme_aspect", f"the image is {width}x{height}; one side may be at most {limits.max_aspect:g} times the other")
    return image


def shown_size(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """How large `decode_image` will find a picture, by what stands before its pixels; these are not decoded.

    Args:
        data: the file.
        limits: what to refuse.

    Returns:
        Width and height in pixels, upright.

    Raises:
        ImageError: with a reason out of REASONS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(data, limits) as image:
            try:
                # By the base class: a PNG's own method decodes its pixels, to look for EXIF behind them.
                orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            except MemoryError:
                raise
            except Exception as error:
                raise decoding_error(error, limits) from error
            # A TIFF's size is that of the upright picture already.
            return (image.height, image.width) if orientation in _LYING and image.format != "TIFF" else image.size


def decoding_error(error: Exception, limits: ImageLimits = DEFAULT_LIMITS) -> ImageError:
    """What an error of Pillow's says about the picture whose pixels it was decoding.

    Args:
        error: any but a MemoryError, which says something of the machine.
        limits: for the message.

    Returns:
        The error to raise in its place.
    """
    if isinstance(error, Image.DecompressionBombError):  # a frame may be larger than its file's header says
        return _too_many_pixels(error, limits)
    text = str(error)
    truncated = "truncated" in text.lower() or "broken data stream" in text or isinstance(error, EOFError)
    reason: Reason = "truncated" if truncated else "undecodable"
    return _refuse(reason, f"the pixels cannot be decoded: {type(error).__name__}: {text}")


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode bytes into an upright RGB image.

    Of an animation the first frame is taken, EXIF rotation is applied, an embedded colour profile is converted to sRGB (a broken one is ignored,
    as browsers do), transparency is laid on black, 16-bit greys are scaled to 8 bits.

    Args:
        data: the file.
        limits: what to refuse.

    Returns:
        Mode RGB, at least 1 x 1.

    Raises:
        ImageError: with a reason out of REASONS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata and about sizes that are limited here anyway
        with open_image(data, limits) as image:
            try:
                image.seek(0)
                image.load()
                return upright_rgb(image)
            except MemoryError:
                raise
            except Exception as error:
                raise decoding_error(error, limits) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened picture, or the frame it stands at, upright and in RGB; see `decode_image`.

    Args:
        image: in any mode.

    Returns:
        Mode RGB.

    Raises:
        ValueError: 32-bit samples, which have no defined white.
    """
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F"):
        raise ValueError("32-bit samples have no defined white")
    if upright.mode.startswith("I;16"):
        # Scaled by the format's range, not by the picture's: the same scene must not change with its brightest pixel.
        upright = Image.fromarray((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        # Laid on black, like the padding of local views; plain convert() would show whatever lies under transparent pixels.
        layer = upright.convert("RGBA")
        base = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(base, layer).convert("RGB")
    elif upright.mode == "P":
        upright = upright.convert("RGB")
    if profile and upright.mode in ("RGB", "CMYK", "L"):
        upright = _to_srgb(upright, profile)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if converted is None else converted


_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def cut_views(
    image: Image.Image, plan: ViewPlan, branch: Branch | None = None, *, mean_colour: tuple[int, int, int] | None = None
) -> UInt8[np.ndarray, "views 3 px px"]:
    """Cut the views of a plan out of an image.

    Args:
        image: RGB, of the size that the plan was made for.
        plan: which views.
        branch: only the global or only the local views; None is all, global first.
        mean_colour: red, green, blue, 0 to 255, that a padded global view is filled up with: `EncoderSpec.mean_colour`.

    Returns:
        uint8 array [views, 3, view_px, view_px], in the plan's order.

    Raises:
        SpecError: the plan is for an image of another size, or pads its global view and there is no colour to pad with.

    Source: SliME's code: bicubic resize of the whole image into the canvas, black padding, tiles row by row; the global view is a bicubic squash.
    LLaVA's code for a padded one: the image on a square of the encoder's mean colour, then a bicubic resize.
    """
    if image.size != (plan.image_width_px, plan.image_height_px):
        raise SpecError(f"the plan is for an image of {plan.image_width_px}x{plan.image_height_px} px, found {image.size[0]}x{image.size[1]}")
    side = plan.view_px
    parts = []
    if branch != "local":
        whole = image if plan.global_fit == "squash" else _padded(image, plan, mean_colour)
        parts.append(np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC), dtype=np.uint8)[None])
    if branch != "global":
        scaled = np.asarray(image.resize((plan.scaled_width_px, plan.scaled_height_px), Image.Resampling.BICUBIC), dtype=np.uint8)
        canvas = np.zeros((plan.canvas_height_px, plan.canvas_width_px, 3), dtype=np.uint8)
        top, left = plan.offset_y_px, plan.offset_x_px
        canvas[top : top + plan.scaled_height_px, left : left + plan.scaled_width_px] = scaled
        tiles = canvas.reshape(plan.rows, side, plan.columns, side, 3).transpose(0, 2, 1, 3, 4)
        parts.append(tiles.reshape(plan.rows * plan.columns, side, side, 3))
    return np.ascontiguousarray(np.concatenate(parts).transpose(0, 3, 1, 2))


def _padded(image: Image.Image, plan: ViewPlan, mean_colour: tuple[int, int, int] | None) -> Image.Image:
    if mean_colour is None:
        raise SpecError("a padded global view is filled up with the encoder's mean colour, found none; pass mean_colour")
    place = plan.global_view.source
    square = Image.new("RGB", (round(place.width_px), round(place.height_px)), mean_colour)
    square.paste(image, (-round(place.left), -round(place.top)))
    return square


def detail_score(image: Image.Image, view_px: int) -> float:
    """Share of a picture's contrast that a squashed view of it loses.

    Args:
        image: RGB.
        view_px: side of the view.

    Returns:
        0 (the view shows everything) to 1: the mean absolute difference between the image's luminance and the view scaled back, over the mean
        absolute deviation of the luminance.
    """
    grey = image.convert("L")
    back = grey.resize((view_px, view_px), Image.Resampling.BICUBIC).resize(grey.size, Image.Resampling.BICUBIC)
    full = np.asarray(grey, dtype=np.float32)
    contrast = float(np.abs(full - full.mean()).mean())
    lost = float(np.abs(full - np.asarray(back, dtype=np.float32)).mean())
    return 0.0 if contrast < 1e-6 else min(1.0, lost / contrast)
