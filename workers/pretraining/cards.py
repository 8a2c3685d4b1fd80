"""Write the cards of the shipped models from the records that their training left beside the weights.

Usage: `python -m workers.pretraining.cards model/assets/vision-encoder model/assets/language-model`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

_ENCODER = """\
# Loupe vision encoder

A small vision transformer in `CLIPVisionModel` format: 8 blocks, width 192, 6 heads, views of 112 px, patches of 14 px (8 x 8 patches and a
class token), {weights_mib:.1f} MiB of fp32 safetensors. Licence: Apache-2.0, as the rest of Loupe.

**What it is for.** The demonstration and the tests of Loupe, so that they run without any download. It reads small digits, letters,
pictographs and colours in drawn pictures. It is *not* CLIP: it has seen no photograph and no caption, and its features mean nothing outside
of such pictures. For anything real, name a pretrained CLIP or SigLIP in the recipe: `[encoder] model = "openai/clip-vit-large-patch14-336"`
or a folder.

**How it was trained.** From random weights, by `{command}`, seed {seed}: {steps} steps of
{batch_size} views, cut from {pictures} pictures and {sheets} sheets crowded with glyphs that Loupe drew itself (bar charts, maps, collages,
pages and triangles; see `workers/dataset/rendering`), {minutes:.0f} minutes on
{threads} CPU thread(s). Each picture gives its global view, its local views and a random one. Three objectives on every patch of the
last block's output: which of eight named colours cover it, which glyph stands in it (cross entropy), and its own pixels at half
resolution (squared error). The class token has no objective. Nothing of a third party is in the weights but what the pictures show: values
of public tables, boundaries of US states, paragraphs of Python's documentation, glyphs of the DejaVu fonts.

**How good it is**, on {views} views of pictures that were never trained on: colours of patches F1 {colour_f1:.3f}. Glyphs read rightly (the
best class of its kind, by the training heads) against glyph size, the geometric mean of the ink's sides in view pixels:

{planned}

These are the global and the local views that the pipeline cuts; the drawings put their glyphs on a lattice, at the centres of the local views'
patches. In crops at random places and scales, where glyphs lie across patches, next to nothing is read:

{random}

A dash means fewer than {min_glyphs} glyphs of that size. Glyphs under {readable_from_px} px carried no label in training. The shipped recipes take
a detail for *small* when it is at least {local_min_px} px in a local view and less than {global_max_px} px in the global one.

Weights: sha256 `{weights_sha256}`. The whole record, with the loss curve, is in `training.json`.

{notes}
"""

_LANGUAGE_MODEL = """\
# Loupe language model

A small causal language model in Llama format: {layers} layers, width {width}, {num_tokens} tokens, {weights_mib:.1f} MiB of fp16
safetensors, with its own tokenizer and chat template. Licence: Apache-2.0, as the rest of Loupe.

**What it is for.** Connector training on CPUs and studies with many seeds. It answers the question kinds of Loupe's five families of
pictures and knows nothing else; it is no general language model. For anything real, name another model in the recipe: `[language_model]
model = "smollm2-135m-instruct"`, a folder or a hub id.

**How it was trained.** From random weights, on text alone, by `{command}`, seed {seed}: {steps} steps of {batch_size} conversations about
{pictures} pictures, {minutes:.0f} minutes on {threads} CPU thread(s). It never saw a pixel: pictures were written down as *layout text*,
the words that stand at each place (colours, digits, letters, names of pictographs), 64 places of the global view and 6 x 16 of the local
views in the order in which a connector later hands over visual tokens, with words at one place summed and noise of {noise} of the
embeddings' scale added. Details too small for the global view stand in the local places only. One step in ten was plain prose
(documentation strings of Python's standard library, PSF licence). {shares}

**How good it is**: share of single questions answered exactly right (greedy), about layouts of pictures that were never trained on. `blind`
is what the question alone gives away.

| kind of question | both | local | global | blind |
|---|---|---|---|---|
{table}

This is an upper bound for what a connector in front of it can reach without changing it, and no measure of vision.

Weights: sha256 `{weights_sha256}`. The whole record, with the loss curve, is in `training.json`.

{notes}
"""

_MIN_GLYPHS = 30


def _curve(curve: dict[str, Any]) -> str:
    """A table of reading accuracy by size, without the sizes that few glyphs have."""

    def cell(kind: str, name: str) -> str:
        found = curve.get(kind, {}).get(name)
        return f"{found['accuracy']:.2f}" if found and found["glyphs"] >= _MIN_GLYPHS else "-"

    rows = []
    for name in sorted({name for kind in curve.values() for name in kind}, key=float):
        cells = [cell(kind, name) for kind in ("digits", "letters", "objects")]
        if set(cells) != {"-"}:
            rows.append(f"| {name}{'+' if name == '14.0' else ''} | {' | '.join(cells)} |")
    return "\n".join(("| size, px | digits | letters | pictographs |", "|---|---|---|---|", *rows))


def _encoder_card(record: dict[str, Any]) -> str:
    measured = record["measured"]
    return _ENCODER.format(
        command="python -m workers.pretraining.encoder",
        weights_mib=record["weights_bytes"] / 2**20,
        minutes=record["seconds"] / 60,
        views=measured["views"],
        colour_f1=measured["colour_f1"],
        **{cut: _curve(curve) for cut, curve in measured["legibility"].items()},
        min_glyphs=_MIN_GLYPHS,
        weights_sha256=record["weights_sha256"],
        notes=record.get("notes", ""),
        **record["limits"],
        **{name: record["arguments"][name] for name in ("seed", "steps", "batch_size", "pictures", "sheets", "threads")},
    )


def _language_model_card(record: dict[str, Any]) -> str:
    measured = record["measured"]
    modes = ("both", "local", "global", "blind")
    names = {"overall": "**all**"}
    rows = [f"| {names.get(kind, kind)} | {' | '.join(f'{measured[mode][kind]:.2f}' for mode in modes)} |" for kind in measured["both"]]
    return _LANGUAGE_MODEL.format(
        command="python -m workers.pretraining.language_model",
        weights_mib=record["weights_bytes"] / 2**20,
        minutes=record["seconds"] / 60,
        table="\n".join(rows),
        weights_sha256=record["weights_sha256"],
        notes=record.get("notes", ""),
        num_tokens=record["num_tokens"],
        shares=record["shares"],
        **{name: record["arguments"][name] for name in ("seed", "steps", "batch_size", "pictures", "threads", "layers", "width", "noise")},
    )


def write_card(folder: Path) -> None:
    """Write README.md beside the weights in a folder.

    Args:
        folder: with the `training.json` that the training script wrote.
    """
    record = json.loads((folder / "training.json").read_text())
    card = _encoder_card(record) if "legibility" in record["measured"] else _language_model_card(record)
    (folder / "README.md").write_text("\n".join(line.rstrip() for line in card.splitlines()) + "\n")


def main() -> None:
    """Write the cards of the folders named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        write_card(folder)


if __name__ == "__main__":
    main()
