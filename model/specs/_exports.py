"""The forms in which a trained connector leaves."""

from typing import Literal

__all__ = ["ExportForm", "StockForm"]

ExportForm = Literal["folder", "llava", "llava-hf", "llava-next-hf", "loupe"]
"""What an export is written as. `folder`: what `loupe ask` reads. `llava`: the authors' `mm_projector.bin` and its kin. `llava-hf`, `llava-next-hf`:
transformers' own LLaVA and LLaVA-NeXT. `loupe`: a transformers model of Loupe's own classes."""

StockForm = Literal["llava-hf", "llava-next-hf"]
"""Forms that need no code of Loupe's."""
