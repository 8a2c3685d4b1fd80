"""The class that lmms-eval runs. It is imported by lmms-eval alone: nothing else in Loupe needs that package. What it does: `lmms_eval_plugin`.

Source: lmms_eval.api.model.lmms of lmms-eval 0.7.3, a simple model: requests hold a text, settings and a function from a document to its images.
"""

import os
from collections.abc import Callable
from typing import Any, get_args

from lmms_eval.api.model import lmms
from tqdm import tqdm

from pipelines.errors import PluginError
from pipelines.lmms_eval_plugin import Request, answers, batch_size_of, likelihood

__all__ = ["LoupeExport"]


class LoupeExport(lmms):  # type: ignore[misc] # lmms-eval has no types
    """A Loupe export under lmms-eval.

    Args:
        pretrained: folder of the export, as `loupe export` writes it.
        mode: which views the language model sees: blind, global, local or both.
        device: where it computes; a GPU where there is one when absent.
        batch_size: questions at once.
        max_batch_size: of lmms-eval's search for a batch size, which is not done here.
    """

    is_simple = True

    def __init__(
        self, pretrained: str = "", mode: str = "both", device: str | None = None, batch_size: int | str | None = 1, max_batch_size: int | None = None
    ) -> None:
        super().__init__()
        del max_batch_size
        if not pretrained:
            raise PluginError(
                "--model loupe needs --model_args pretrained=FOLDER, an export folder; `loupe export RECIPE` writes one and prints its path"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise PluginError(f"--model loupe runs in one process, found WORLD_SIZE={os.environ['WORLD_SIZE']}; start lmms-eval without a launcher")
        import torch

        from model.export import load_export
        from model.vision_language import MODES, Mode

        if mode not in get_args(Mode):
            raise PluginError(f"--model_args mode: found {mode!r}; allowed: {', '.join(MODES)}")
        self.batch_size = batch_size_of(1 if batch_size is None else batch_size)
        self.mode: Mode = next(name for name in MODES if name == mode)
        self.exported = load_export(str(pretrained), device=device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy answers, batched.

        Args:
            requests: instances with (text, settings, document to images, document, task, split).

        Returns:
            An answer each.
        """
        asked = [self._request(*request.args) for request in requests]
        with tqdm(total=len(asked), desc="asking") as bar:

            def tell(place: int, text: str) -> None:
                bar.update()
                self.cache_hook.add_partial("generate_until", (asked[place].question, asked[place].settings), text)

            return answers(self.exported, asked, self.mode, self.batch_size, tell)

    def _request(self, text: str, settings: dict[str, Any], to_visual: Callable[[Any], Any], document: int, task: str, split: str) -> Request:
        return Request(question=text, settings=settings, visuals=lambda: to_visual(self.task_dict[task][split][document]))

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-likelihoods of answers, each with its end token, one by one.

        Args:
            requests: instances with (text, answer or document to answer, document to images, document, task, split).

        Returns:
            Natural logarithm, and whether it is the greedy answer.
        """
        found = []
        for text, target, to_visual, document, task, split in (request.args for request in requests):
            row = self.task_dict[task][split][document]
            answer = target(row) if callable(target) else target
            found.append(likelihood(self.exported, text, str(answer), to_visual(row), self.mode))
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not done: an export answers one question at a time.

        Args:
            requests: of the task.

        Raises:
            PluginError: always.
        """
        raise PluginError(f"the task asks in several rounds ({len(requests)} requests), but a Loupe export answers one question at a time")
