"""Ask an exported model about an image. What is wrong with question, image or folder is said before the model is loaded, which takes seconds."""

import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model.errors import ConversationError, ImageError
from pipelines.errors import NothingThereError, SettingError
from workers.errors import ObjectNotFoundError
from workers.storage import Store, open_url, translated

if TYPE_CHECKING:
    from PIL import Image

    from model.export import Answer
    from model.video import VideoLayout

__all__ = ["FrameChoice", "ask_export"]

_REMEDIES = {"too_many_bytes": "make it smaller", "too_many_pixels": "make it smaller", "extreme_aspect": "crop it"}
"""What to do about an image, by the reason of its refusal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameChoice:
    """Which frames of a video are shown, and how; as on the command line.

    Raises:
        SettingError: a number that cannot be, or words about frames where none are asked for.
    """

    num: int = 0
    """So many frames, at even distances; 0 takes the file for an image."""
    layout: "VideoLayout | None" = None
    """Absent, the export's own: `grid` where it has local views, else `frames`."""
    pool: int | None = None
    """Neighbouring tokens of a frame that become one, of the layout `frames`; absent, 2."""

    def __post_init__(self) -> None:
        if self.num < 0:
            raise SettingError(f"ask: --frames: found {self.num}; allowed: 1 or more, or 0 for an image")
        for word, value in (("--layout", self.layout), ("--pool", self.pool)):
            if value is not None and not self.num:
                raise SettingError(f"ask: {word}: found {value}, but no frames are asked for; add --frames 8 for a video, or leave it out")
        if self.pool is not None and self.pool < 1:
            raise SettingError(f"ask: --pool: found {self.pool}; allowed: 1 (keep every token) or more")
        if self.pool is not None and self.layout == "grid":
            raise SettingError("ask: --pool: of layout grid the connector itself sets the number of tokens; leave it out, or give --layout frames")


ONE_IMAGE = FrameChoice()


def ask_export(
    export: str, image: str, question: str, mode: Literal["blind", "global", "local", "both"], frames: FrameChoice = ONE_IMAGE
) -> "Answer":
    """Load an export and ask it one question.

    Args:
        export: folder or URL of the export.
        image: path or URL of an image file.
        question: what to ask.
        mode: which views the model sees.
        frames: what of a video is shown.

    Returns:
        The answer.

    Raises:
        ConversationError: there is no question.
        ImageError: the image is none that Loupe accepts, or the video cannot be read.
        NothingThereError: no such export or image.
        SettingError: a mode is asked for that frames do not have.
        StorageError: one of them cannot be read.
    """
    if frames.num and mode != "both":
        raise SettingError(f"ask: --mode: found {mode} with --frames; frames are shown as --layout says, so leave it out")
    if not question.strip():
        raise ConversationError(
            "conversation_empty", f"ask: found the question {question!r}; write one, such as 'Which number stands on the brown bar?'"
        )
    file_bytes = _file_bytes(image)
    pictures = _frames(image, file_bytes, frames.num)
    if not export.strip():
        raise NothingThereError(f"ask: found {export!r} where the export folder should stand; `loupe export RECIPE` writes one and prints its path")
    store = Store(export)
    local = store.local_path()
    if local is not None:
        _check_export_folder(local)
    from model.export import load_export

    def ask(folder: Path) -> "Answer":
        exported = load_export(folder)
        if not frames.num:
            return exported.ask(file_bytes, question, mode=mode)
        from model.video import POOL, ask_video

        if frames.pool is not None and frames.layout is None and exported.config.connector.local_branch is not None:
            raise SettingError("ask: --pool: this export has local views, so its frames are laid out as grid; leave it out, or give --layout frames")
        return ask_video(exported, pictures, question, frames.layout, pool=frames.pool or POOL)

    if local is not None:
        return ask(local)
    with tempfile.TemporaryDirectory(prefix="loupe-export-") as folder:
        store.download_folder("", Path(folder))
        return ask(Path(folder))


def _file_bytes(image: str) -> bytes:
    images, name = open_url(image)
    try:
        return images.read_bytes(name)
    except ObjectNotFoundError as error:
        raise NothingThereError(f"ask: found no image file {image}; give the path or URL of a PNG or JPEG") from error


def _frames(name: str, file_bytes: bytes, num_frames: int) -> "list[Image.Image]":
    """The frames that are shown; of an image none, but it is decoded, so that a broken one is told before a model is loaded."""
    try:
        if num_frames:
            from model.video import read_frames

            return read_frames(file_bytes, num_frames)
        from model.images import decode_image

        decode_image(file_bytes)
    except ImageError as error:
        what, remedy = (
            ("video", "give a whole video or animation") if num_frames else ("image", "give a whole PNG or JPEG, or --frames 8 for a video")
        )
        raise ImageError(error.reason, f"ask: {what} {name}: {error}; {_REMEDIES.get(error.reason, remedy)}") from error
    return []


def _check_export_folder(folder: Path) -> None:
    """Refuse what is no export, and name one where the folder holds some. One that was begun is for `load_export` to refuse."""
    from model.export import CONFIG, MANIFEST

    with translated("look for", folder.as_uri()):
        if not folder.is_dir():
            raise NothingThereError(f"ask: found no export folder {folder}; `loupe export RECIPE` writes one and prints its path")
        if (folder / MANIFEST).is_file() or (folder / CONFIG).is_file():
            return
        inside = [manifest.parent for pattern in ("*", "exports/*") for manifest in folder.glob(f"{pattern}/{MANIFEST}")]
        newest = max(inside, key=lambda export: (export / MANIFEST).stat().st_mtime, default=None)
    found = f"ask: {folder} is no export folder: it has no {MANIFEST}"
    if newest is None:
        raise NothingThereError(f"{found}; `loupe export RECIPE` writes an export folder and prints its path")
    more = "" if len(inside) == 1 else f", the newest of {len(inside)}"
    raise NothingThereError(f"{found}; there is one inside it{more}, give {shlex.quote(str(newest))}")
