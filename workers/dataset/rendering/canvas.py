"""A drawing surface that remembers what it drew: pixels for the encoder, and the truth about them for questions and labels.

Beside the RGB picture it keeps (1) a raster that holds, per pixel, which named colour was drawn there, and (2) a list of marks: every character and
pictograph with its ink box. Questions are answered from what was drawn, never from pixels; encoder labels and legibility checks read the same record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.views import Box

__all__ = ["COLOURS", "LATTICE_PX", "OBJECTS", "Canvas", "Colour", "Mark", "load_font", "on_lattice"]

Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"]

COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (242, 214, 30),
    "green": (44, 150, 60),
    "blue": (40, 95, 200),
    "purple": (130, 70, 170),
    "pink": (245, 150, 200),
    "brown": (125, 80, 45),
}
"""The colours that a question may name. Drawn with a jitter of up to 12 levels a channel, which never makes two names swap."""

OBJECTS: dict[str, str] = {
    "umbrella": "\u2602",
    "cloud": "\u2601",
    "star": "\u2605",
    "telephone": "\u260e",
    "cup": "\u2615",
    "skull": "\u2620",
    "anchor": "\u2693",
    "scissors": "\u2702",
    "airplane": "\u2708",
    "envelope": "\u2709",
    "heart": "\u2665",
    "snowflake": "\u2744",
    "moon": "\u263e",
    "sun": "\u2600",
    "flag": "\u2691",
    "crown": "\u265b",
    "flower": "\u273f",
    "clover": "\u2663",
    "diamond": "\u2666",
    "gear": "\u2699",
}
"""Pictographs of DejaVu Sans by the word that names them."""

_COLOUR_NUMBERS = {name: number for number, name in enumerate(COLOURS, start=1)}

LATTICE_PX = 28
"""Marks to be read stand on the centres of a lattice of this width: the patches of a local view of 112 px in patches of 14, at half scale. A small
encoder learns to read a glyph that one patch holds in minutes, and one that may lie across four patches only in days."""

FontStyle = Literal["sans", "sans-bold", "serif", "serif-bold", "mono", "mono-bold"]
_FONT_FILES: dict[FontStyle, str] = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
}


@cache
def load_font(style: FontStyle, size_px: int) -> ImageFont.FreeTypeFont:
    """A DejaVu font, from the copy that matplotlib carries (free licence, the same bytes on every machine).

    Args:
        style: family and weight.
        size_px: em size in pixels; a digit's ink is about 0.73 of it high.

    Returns:
        The font, kept for the next call.
    """
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / _FONT_FILES[style]), size_px)


def on_lattice(position_px: float) -> float:
    """The lattice centre nearest to a coordinate."""
    return LATTICE_PX / 2 + LATTICE_PX * round((position_px - LATTICE_PX / 2) / LATTICE_PX)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One character or pictograph that was drawn to be read."""

    word: str
    """The character itself, or the pictograph's name."""
    box: Box
    """Its ink, in image pixels."""
    role: int
    """Place within its string: 0 for the first character."""


class Canvas:
    """An RGB picture with a record of what is on it."""

    def __init__(self, width_px: int, height_px: int, background: tuple[int, int, int], rng: np.random.Generator) -> None:
        """Start an empty picture.

        Args:
            width_px: picture width.
            height_px: picture height.
            background: fill.
            rng: source of the colour jitter; passed, never global.
        """
        self.image = Image.new("RGB", (width_px, height_px), background)
        self.marks: list[Mark] = []
        self._raster = Image.new("L", (width_px, height_px), 0)
        self._draw = ImageDraw.Draw(self.image)
        self._draw_raster = ImageDraw.Draw(self._raster)
        self._draw_raster.fontmode = "1"  # an antialiased edge would be recorded as a colour between two numbers
        self._shades = {
            name: tuple(int(level) for level in np.clip(np.array(value) + rng.integers(-12, 13, size=3), 0, 255)) for name, value in COLOURS.items()
        }

    @property
    def colour_raster(self) -> np.ndarray:
        """uint8 [height, width]: 0 where nothing named was drawn, else 1 + the colour's place in COLOURS."""
        return np.asarray(self._raster)

    def shade(self, colour: Colour) -> tuple[int, int, int]:
        """The RGB value of a named colour in this picture."""
        red, green, blue = self._shades[colour]
        return red, green, blue

    def rectangle(
        self,
        box: Box,
        fill: Colour | tuple[int, int, int] | None,
        *,
        outline: tuple[int, int, int] | None = None,
        radius_px: int = 0,
        width_px: int = 1,
    ) -> None:
        """Draw a rectangle; a named fill is recorded, an RGB fill clears the record below it."""
        corners = (box.left, box.top, box.right, box.bottom)
        self._draw.rounded_rectangle(corners, radius=radius_px, fill=self._paint(fill), outline=outline, width=width_px)
        if fill is not None:
            self._draw_raster.rounded_rectangle(corners, radius=radius_px, fill=_number(fill))

    def polygon(
        self, points: Sequence[tuple[float, float]], fill: Colour | tuple[int, int, int], *, outline: tuple[int, int, int] | None = None
    ) -> None:
        """Draw a filled polygon; recorded as `rectangle` does."""
        self._draw.polygon(list(points), fill=self._paint(fill), outline=outline)
        self._draw_raster.polygon(list(points), fill=_number(fill))

    def ellipse(
        self, box: Box, fill: Colour | tuple[int, int, int] | None, *, outline: tuple[int, int, int] | None = None, width_px: int = 1
    ) -> None:
        """Draw an ellipse inscribed in a box; recorded as `rectangle` does."""
        corners = (box.left, box.top, box.right, box.bottom)
        self._draw.ellipse(corners, fill=self._paint(fill), outline=outline, width=width_px)
        if fill is not None:
            self._draw_raster.ellipse(corners, fill=_number(fill))

    def line(self, points: Sequence[tuple[float, float]], colour: Colour | tuple[int, int, int], width_px: int) -> None:
        """Draw a polyline; recorded as `rectangle` does."""
        self._draw.line(list(points), fill=self._paint(colour), width=width_px, joint="curve")
        self._draw_raster.line(list(points), fill=_number(colour), width=width_px)

    def arc(self, box: Box, start_degrees: float, end_degrees: float, colour: tuple[int, int, int], width_px: int) -> None:
        """Draw an arc, clockwise from 3 o'clock as Pillow counts."""
        self._draw.arc((box.left, box.top, box.right, box.bottom), start_degrees, end_degrees, fill=colour, width=width_px)

    def prose(self, x_px: float, y_px: float, text: str, font: ImageFont.FreeTypeFont, colour: tuple[int, int, int]) -> None:
        """Draw running text that no question asks for; not recorded."""
        self._draw.text((x_px, y_px), text, font=font, fill=colour)

    def text(self, centre_x_px: float, centre_y_px: float, text: str, font: ImageFont.FreeTypeFont, colour: tuple[int, int, int] | Colour) -> Box:
        """Draw a short string to be read, centred by its ink, and record every character.

        Args:
            centre_x_px: of the ink.
            centre_y_px: of the ink.
            text: the string.
            font: as `load_font` gives it.
            colour: of the ink; a named one is not recorded as a colour, it is too thin to be asked for.

        Returns:
            The ink box of the whole string, in image pixels.
        """
        left, top, right, bottom = font.getbbox(text)
        origin_x = round(centre_x_px - (left + right) / 2)
        origin_y = round(centre_y_px - (top + bottom) / 2)
        self._draw.text((origin_x, origin_y), text, font=font, fill=self._paint(colour))
        for role, character in enumerate(text):
            if character == " ":
                continue
            start = origin_x + font.getlength(text[:role])
            ink = font.getbbox(character)
            self.marks.append(
                Mark(word=character, role=role, box=Box(left=start + ink[0], top=origin_y + ink[1], right=start + ink[2], bottom=origin_y + ink[3]))
            )
        return Box(left=origin_x + left, top=origin_y + top, right=origin_x + right, bottom=origin_y + bottom)

    def pictograph(self, centre_x_px: float, centre_y_px: float, name: str, size_px: int, colour: Colour) -> Box:
        """Draw a named pictograph in a named colour, centred by its ink, and record both.

        Args:
            centre_x_px: of the ink.
            centre_y_px: of the ink.
            name: a key of OBJECTS.
            size_px: em size.
            colour: of the ink.

        Returns:
            Its ink box, in image pixels.
        """
        font = load_font("sans", size_px)
        glyph = OBJECTS[name]
        left, top, right, bottom = font.getbbox(glyph)
        origin = (round(centre_x_px - (left + right) / 2), round(centre_y_px - (top + bottom) / 2))
        self._draw.text(origin, glyph, font=font, fill=self._paint(colour))
        self._draw_raster.text(origin, glyph, font=font, fill=_number(colour))
        box = Box(left=origin[0] + left, top=origin[1] + top, right=origin[0] + right, bottom=origin[1] + bottom)
        self.marks.append(Mark(word=name, role=0, box=box))
        return box

    def _paint(self, colour: Colour | tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        return self.shade(colour) if isinstance(colour, str) else colour


def _number(colour: Colour | tuple[int, int, int]) -> int:
    return _COLOUR_NUMBERS[colour] if isinstance(colour, str) else 0
