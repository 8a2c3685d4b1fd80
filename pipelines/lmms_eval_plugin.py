"""A Loupe export as a model of lmms-eval: `--model loupe --model_args pretrained=EXPORT_FOLDER`.

lmms-eval finds `manifest` by the entry point group `lmms_eval.models`; what it then runs is `pipelines.lmms_eval_model`, the only module that imports
lmms-eval. Here is what that model does, without lmms-eval: requests become batches of greedy answers.

Handled: one image or none per request (without one the question is asked blind), `max_new_tokens`, stop strings (`until`), log-likelihoods.
Refused, each with what was found: several images, videos and sound, sampling, beams, and generation settings that Loupe does not know.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import PluginError

if TYPE_CHECKING:
    from model.export import ExportedModel
    from model.vision_language import Mode

__all__ = ["GenerationRules", "Request", "answers", "batch_size_of", "generation_rules", "likelihood", "manifest"]

DEFAULT_MAX_NEW_TOKENS = 64
IMAGE_PLACE = "<image>"

_WITHOUT_EFFECT = frozenset({"do_sample", "image_aspect_ratio", "num_beams", "seed", "temperature", "top_k", "top_p"})
"""Settings that change nothing where the likeliest token is always taken, and that of the image, which Loupe's views replace."""


def manifest() -> Any:
    """What lmms-eval registers; called by it, so that lmms-eval is there.

    Returns:
        Its ModelManifest.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="loupe", simple_class_path="pipelines.lmms_eval_model.LoupeExport")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question of a task."""

    question: str
    settings: Mapping[str, Any]
    """The task's generation_kwargs."""
    visuals: Callable[[], Any]
    """Gives what the question is about; called when its turn comes, since a task's images do not fit memory together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRules:
    """How answers are made."""

    max_new_tokens: int
    until: tuple[str, ...]
    """An answer ends before the first of these."""

    def cut(self, text: str) -> str:
        """An answer up to the first stop string."""
        ends = [place for stop in self.until if (place := text.find(stop)) >= 0]
        return text[: min(ends)].rstrip() if ends else text


def generation_rules(settings: Mapping[str, Any]) -> GenerationRules:
    """A task's settings, checked.

    Args:
        settings: its generation_kwargs.

    Returns:
        What of them Loupe does.

    Raises:
        PluginError: they ask for something that Loupe does not do; the answers would be others than the task means.
    """
    if settings.get("do_sample") or (settings.get("do_sample") is None and (settings.get("temperature") or 0) > 0):
        raise PluginError(
            f"the task asks for sampled answers (do_sample {settings.get('do_sample')}, temperature {settings.get('temperature')}), but a Loupe "
            "export answers greedily; run it with --gen_kwargs do_sample=False,temperature=0"
        )
    if (settings.get("num_beams") or 1) != 1:
        raise PluginError(
            f"the task asks for {settings['num_beams']} beams, but a Loupe export answers greedily; run it with --gen_kwargs num_beams=1"
        )
    unknown = sorted(set(settings) - _WITHOUT_EFFECT - {"max_new_tokens", "until"})
    if unknown:
        raise PluginError(f"the task sets {', '.join(unknown)}, which a Loupe export does not do; allowed: max_new_tokens, until and greedy decoding")
    number = settings.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise PluginError(f"the task sets max_new_tokens to {number!r}; allowed: a whole number from 1 up")
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in stops):
        raise PluginError(f"the task sets until to {until!r}; allowed: a text or a list of texts")
    return GenerationRules(max_new_tokens=number, until=tuple(stop for stop in stops if stop))


def batch_size_of(value: Any) -> int:
    """The batch size that was asked for.

    Args:
        value: of lmms-eval's command line.

    Returns:
        Questions at once.

    Raises:
        PluginError: it is no number from 1 up, such as `auto`.
    """
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise PluginError(f"--batch_size: found {value!r}; allowed: a whole number from 1 up")
    return number


def image_bytes(visuals: Any) -> bytes | None:
    """The one image of a request as PNG bytes.

    Args:
        visuals: what the task gives: None, an image, or a list of them, which may be nested.

    Returns:
        The bytes; None where there is nothing.

    Raises:
        PluginError: there are several, or something that is no image.
    """
    from PIL import Image

    found = list(_flat(visuals))
    if not found:
        return None
    if strange := next((item for item in found if not isinstance(item, Image.Image)), None):
        raise PluginError(f"the task asks about a {type(strange).__name__} ({strange!r:.60}), but a Loupe export answers about still images alone")
    if len(found) > 1:
        raise PluginError(f"the task asks about {len(found)} images at once, but a Loupe export answers about one; choose a task with one image each")
    image = found[0] if found[0].mode in ("1", "L", "LA", "P", "RGB", "RGBA") else found[0].convert("RGB")
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def _flat(visuals: Any) -> Iterator[Any]:
    if isinstance(visuals, list | tuple):
        for item in visuals:
            yield from _flat(item)
    elif visuals is not None:
        yield visuals


def _question(text: str) -> str:
    """A task's text without the mark of the image's place: an export has a place of its own for it, before the question."""
    return text.replace(IMAGE_PLACE, "").strip()


def answers(
    exported: "ExportedModel", requests: Sequence[Request], mode: "Mode", batch_size: int, tell: Callable[[int, str], None] | None = None
) -> list[str]:
    """Greedy answers to all requests.

    Args:
        exported: answers.
        requests: in any mixture of settings; those with the same ones are asked together.
        mode: which views the language model sees.
        batch_size: questions at once.
        tell: called with the place and text of each answer.

    Returns:
        Texts in the order of the requests, each cut before its first stop string.

    Raises:
        PluginError: a request asks for what Loupe does not do; settings are checked before the first question is asked.
    """
    groups: dict[GenerationRules, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(generation_rules(request.settings), []).append(place)
    given: dict[int, str] = {}
    for rules, places in groups.items():
        for start in range(0, len(places), batch_size):
            some = places[start : start + batch_size]
            asked = [(image_bytes(requests[place].visuals()), _question(requests[place].question)) for place in some]
            found = exported.ask_many(asked, mode, max_new_tokens=rules.max_new_tokens, may_end_early=True)
            for place, answer in zip(some, found, strict=True):
                given[place] = rules.cut(answer.text)
                if tell is not None:
                    tell(place, given[place])
    return [given[place] for place in range(len(requests))]


def likelihood(exported: "ExportedModel", question: str, continuation: str, visuals: Any, mode: "Mode") -> tuple[float, bool]:
    """The log-likelihood of an answer with its end, and whether it is the greedy answer.

    Args:
        exported: answers.
        question: of the task.
        continuation: the answer; blanks around it are not part of it.
        visuals: as for `image_bytes`.
        mode: which views the language model sees.

    Returns:
        Natural logarithm, and whether.

    Raises:
        PluginError: as for `image_bytes`.
    """
    return exported.log_likelihood(image_bytes(visuals), _question(question), continuation.strip(), mode)
