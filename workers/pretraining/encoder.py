"""Train the small vision encoder that Loupe ships, in CLIPVisionModel format.

Pictures of the five families, seen through global, local and random views, with three objectives on every patch: which named colours cover it, which
glyphs stand in it, and its own pixels at half resolution. No pretrained weights are used and no third-party picture is shown.

    python -m workers.pretraining.encoder --output model/assets/vision-encoder

The record that is written beside the weights, and the card that `workers.pretraining.cards` makes of it, hold the measured accuracy on pictures that
were never trained on, and the legibility curve from which recipes take their limits.
"""

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from model.language_model import multiplies_bf16
from model.views import Box, View, ViewSpec, plan_views
from workers.dataset.rendering import FAMILIES, sketch
from workers.dataset.rendering.canvas import COLOURS, LATTICE_PX, OBJECTS, Canvas, FontStyle, load_font
from workers.pretraining.labels import COLOUR_CLASSES, GLYPH_CLASSES, READABLE_FROM_PX, colour_shares, place_glyphs

VIEW_PX = 112
PATCH_PX = 14
GRID = VIEW_PX // PATCH_PX
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FIRST_CLASSES = (*GLYPH_CLASSES[:10], *GLYPH_CLASSES[20:])
SECOND_CLASSES = GLYPH_CLASSES[10:20]
_HELD_OUT_FROM = 1_000_000
"""Picture numbers from here on are never trained on."""


@dataclass(frozen=True, slots=True)
class Views:
    """Views with their labels, as arrays over all views."""

    pixels: np.ndarray
    """uint8 [views, px, px, 3]."""
    colours: np.ndarray
    """bool [views, patches, colours]: the colour covers 12 % of the patch or more."""
    glyphs: np.ndarray
    """bool [views, patches, glyphs]."""
    ignored: np.ndarray
    """bool [views, patches]: a glyph too small to ask for stands here."""
    sizes: list[list[tuple[int, float, tuple[int, ...]]]]
    """Per view: (glyph, size in view pixels, patches) of every glyph."""


def _random_view(width: int, height: int, rng: np.random.Generator) -> View:
    side = float(rng.uniform(150, 520))
    stretch = float(rng.uniform(0.8, 1.5))
    left = float(rng.uniform(-20, max(width - side * stretch + 20, 1)))
    top = float(rng.uniform(-20, max(height - side + 20, 1)))
    source = Box(left=left, top=top, right=left + side * stretch, bottom=top + side)
    return View(branch="local", index=0, row=0, column=0, source=source, view_px=VIEW_PX)


def _cut(image: Image.Image, view: View) -> np.ndarray:
    box = (view.source.left, view.source.top, view.source.right, view.source.bottom)
    inside = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
    landed = view.project(Box(left=inside[0], top=inside[1], right=inside[2], bottom=inside[3]))
    width, height = max(round(landed.width_px), 1), max(round(landed.height_px), 1)
    tile = Image.new("RGB", (VIEW_PX, VIEW_PX))
    tile.paste(image.resize((width, height), Image.Resampling.BICUBIC, box=inside), (round(landed.left), round(landed.top)))
    return np.asarray(tile)


def _labelled(canvas: Canvas, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, float, tuple[int, ...]]]]:
    colours = colour_shares(canvas, view, GRID) >= 0.12
    glyphs = np.zeros((GRID * GRID, len(GLYPH_CLASSES)), dtype=bool)
    ignored = np.zeros(GRID * GRID, dtype=bool)
    placed = place_glyphs(canvas, view, GRID)
    for glyph in placed:
        for patch in glyph.patches:
            if glyph.size_px >= READABLE_FROM_PX:
                glyphs[patch, glyph.glyph] = True
            else:
                ignored[patch] = True
    return colours, glyphs, ignored, [(glyph.glyph, glyph.size_px, glyph.patches) for glyph in placed]


def _sheet(rng: np.random.Generator) -> Canvas:
    """A picture of the size of one local view's source, crowded with glyphs on plain and coloured grounds, one on most lattice centres."""
    paper = rng.integers(236, 256, size=3)
    side = 2 * VIEW_PX
    canvas = Canvas(side, side, (int(paper[0]), int(paper[1]), int(paper[2])), rng)
    colours = list(COLOURS)
    for _ in range(int(rng.integers(0, 5))):
        left, top = (float(value) for value in rng.uniform(-40, side, size=2))
        width, height = (float(value) for value in rng.uniform(20, 160, size=2))
        canvas.rectangle(Box(left=left, top=top, right=left + width, bottom=top + height), colours[int(rng.integers(len(colours)))])
    for row in range(side // LATTICE_PX):
        for column in range(side // LATTICE_PX):
            if rng.random() < 0.35:
                continue
            x, y = (LATTICE_PX * (place + 0.5) + float(rng.uniform(-2.0, 2.0)) for place in (column, row))
            colour = colours[int(rng.integers(len(colours)))]
            ground = rng.random()
            dark = False
            if ground < 0.5:
                reach = float(rng.uniform(13, 17))
                canvas.rectangle(Box(left=x - reach, top=y - reach, right=x + reach, bottom=y + reach), colour, radius_px=int(rng.integers(0, 6)))
                dark = sum(canvas.shade(colour)) < 330
            elif canvas.colour_raster[min(int(y), side - 1), min(int(x), side - 1)]:
                dark = bool(rng.random() < 0.5)
            ink = (255, 255, 255) if dark else (0, 0, 0)
            kind = rng.random()
            if kind < 0.35:
                canvas.text(x, y, str(int(rng.integers(10, 100))), load_font("sans-bold", int(rng.integers(18, 22))), ink)
            elif kind < 0.55:
                canvas.text(x, y, str(int(rng.integers(10))), load_font("sans-bold", int(rng.integers(23, 29))), ink)
            elif kind < 0.75:
                style: FontStyle = "sans-bold" if rng.random() < 0.5 else "serif-bold"
                canvas.text(x, y, chr(ord("A") + int(rng.integers(26))), load_font(style, int(rng.integers(23, 29))), ink)
            elif ground >= 0.5:
                canvas.pictograph(x, y, list(OBJECTS)[int(rng.integers(len(OBJECTS)))], int(rng.integers(25, 32)), colour)
    return canvas


def make_sheets(num_sheets: int, seed: int) -> Views:
    """Views of crowded sheets at the scale of a local view.

    Args:
        num_sheets: one view each.
        seed: of everything on them.

    Returns:
        The views with their labels.
    """
    rng = np.random.Generator(np.random.Philox(key=seed * 104729 + 1))
    view = View(branch="local", index=0, row=0, column=0, source=Box(left=0, top=0, right=2 * VIEW_PX, bottom=2 * VIEW_PX), view_px=VIEW_PX)
    views = []
    for _ in range(num_sheets):
        canvas = _sheet(rng)
        views.append((_cut(canvas.image, view), _labelled(canvas, view)))
    return _stack(views)


def _together(first: Views, second: Views) -> Views:
    return Views(
        np.concatenate([first.pixels, second.pixels]),
        np.concatenate([first.colours, second.colours]),
        np.concatenate([first.glyphs, second.glyphs]),
        np.concatenate([first.ignored, second.ignored]),
        [*first.sizes, *second.sizes],
    )


def _stack(views: list[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, float, tuple[int, ...]]]]]]) -> Views:
    pixels, labels = zip(*views, strict=True)
    colours, glyphs, ignored, sizes = zip(*labels, strict=True)
    return Views(np.stack(pixels), np.stack(colours), np.stack(glyphs), np.stack(ignored), list(sizes))


def make_views(first: int, num_pictures: int, seed: int, num_random: int = 1, *, planned: bool = True) -> Views:
    """Render pictures and cut each into its global, its local and some random views, leaving out most views with nothing on them.

    Args:
        first: number of the first picture in every family.
        num_pictures: pictures in all, over the families in turn.
        seed: of the pictures and of the random views.
        num_random: random views a picture.
        planned: whether the global and the local views are cut too.

    Returns:
        The views with their labels.
    """
    rng = np.random.Generator(np.random.Philox(key=seed * 7919 + first))
    kept = []
    for position in range(num_pictures):
        picture, _ = sketch(FAMILIES[position % len(FAMILIES)], first + position // len(FAMILIES), seed)
        image = picture.canvas.image
        plan = plan_views(image.width, image.height, VIEW_PX, ViewSpec())
        views = [*(plan.views if planned else ()), *(_random_view(image.width, image.height, rng) for _ in range(num_random))]
        for view in views:
            labelled = _labelled(picture.canvas, view)
            if not labelled[3] and rng.random() < 0.7:
                continue
            kept.append((_cut(image, view), labelled))
    return _stack(kept)


class Heads(nn.Module):
    """The objectives' linear heads; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.colours = nn.Linear(width, len(COLOUR_CLASSES))
        self.first = nn.Linear(width, 1 + len(FIRST_CLASSES))
        self.second = nn.Linear(width, 1 + len(SECOND_CLASSES))
        self.pixels = nn.Linear(width, 3 * 7 * 7)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of colours, of the first glyph and of a number's second digit (0 is none), and pixels, per patch."""
        hidden = self.norm(hidden)
        return self.colours(hidden), self.first(hidden), self.second(hidden), self.pixels(hidden)


def _class_targets(glyphs: np.ndarray, ignored: np.ndarray) -> tuple[Tensor, Tensor]:
    """Class of the first glyph and of the second digit per patch: 0 where there is none, -100 where nothing is asked."""
    second = glyphs[..., 10:20]
    first = np.concatenate([glyphs[..., :10], glyphs[..., 20:]], axis=-1)
    targets = []
    for labels in (first, second):
        target = np.where(labels.any(axis=-1), 1 + labels.argmax(axis=-1), 0)
        # Two glyphs of a kind in one patch leave no single right answer.
        target[(labels.sum(axis=-1) > 1) | (ignored & (target == 0))] = -100
        targets.append(torch.from_numpy(target))
    return targets[0], targets[1]


def _normalise(pixels: np.ndarray) -> Tensor:
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0
    return (scaled - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def _patch_pixels(normalised: Tensor) -> Tensor:
    """[batch, patches, 3 * 7 * 7]: each patch at half resolution."""
    small = nn.functional.avg_pool2d(normalised, 2)
    batch = small.shape[0]
    return small.view(batch, 3, GRID, 7, GRID, 7).permute(0, 2, 4, 1, 3, 5).reshape(batch, GRID * GRID, 3 * 49)


def train(arguments: argparse.Namespace) -> tuple[CLIPVisionModel, Heads, list[str]]:
    """Train from random weights.

    Args:
        arguments: the command line's.

    Returns:
        The encoder, the heads, and the log.
    """
    steps, batch_size, seed = arguments.steps, arguments.batch_size, arguments.seed
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=8, num_attention_heads=6, image_size=VIEW_PX, patch_size=PATCH_PX,
        hidden_act="gelu", projection_dim=192,
    )  # fmt: skip
    encoder = CLIPVisionModel(config)
    heads = Heads(config.hidden_size)
    started = time.monotonic()
    data = _together(make_views(0, arguments.pictures, seed), make_sheets(arguments.sheets, seed))
    log = [f"{len(data.pixels)} views of {arguments.pictures} pictures and {arguments.sheets} sheets rendered in {time.monotonic() - started:.0f} s"]
    print(log[-1], flush=True)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, total_steps=steps, pct_start=0.08)
    rng = np.random.Generator(np.random.Philox(key=seed + 1))
    order = np.concatenate([rng.permutation(len(data.pixels)) for _ in range(steps * batch_size // len(data.pixels) + 1)])
    none_weight = 0.05  # most patches hold nothing, and that is learned at once
    first_weight, second_weight = torch.ones(1 + len(FIRST_CLASSES)), torch.ones(1 + len(SECOND_CLASSES))
    first_weight[0] = second_weight[0] = none_weight
    for step in range(steps):
        rows = order[step * batch_size : (step + 1) * batch_size]
        normalised = _normalise(data.pixels[rows])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bf16("cpu")):
            hidden = encoder(normalised, output_hidden_states=True).hidden_states[-1][:, 1:]
        colour_logits, first_logits, second_logits, pixels = heads(hidden.float())
        colour_loss = nn.functional.binary_cross_entropy_with_logits(colour_logits, torch.from_numpy(data.colours[rows]).float())
        first, second = _class_targets(data.glyphs[rows], data.ignored[rows])
        glyph_loss = nn.functional.cross_entropy(first_logits.flatten(0, 1), first.flatten(), weight=first_weight)
        glyph_loss = glyph_loss + nn.functional.cross_entropy(second_logits.flatten(0, 1), second.flatten(), weight=second_weight)
        pixel_loss = nn.functional.mse_loss(pixels, _patch_pixels(normalised))
        loss = 5.0 * colour_loss + glyph_loss + 0.2 * pixel_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            log.append(
                f"step {step + 1}: colour {colour_loss.item():.4f} glyph {glyph_loss.item():.4f} pixel {pixel_loss.item():.3f} "
                f"({time.monotonic() - started:.0f} s)"
            )
            print(log[-1], flush=True)
    return encoder.eval(), heads.eval(), log


@torch.no_grad()
def measure(encoder: CLIPVisionModel, heads: Heads, num_pictures: int, seed: int) -> dict[str, object]:
    """Accuracy on pictures never trained on, and reading accuracy against glyph size.

    Args:
        encoder: trained.
        heads: trained with it.
        num_pictures: to draw.
        seed: of the pictures.

    Returns:
        `colour_f1` over planned views; and `legibility` per size bin in view pixels, for digits, letters and objects, the share read rightly (best
        class of its kind at the glyph's patches) with the number of glyphs: in `planned` views (global and local, as the pipeline cuts them) and in
        `random` crops.
    """
    colour_f1, num_views, planned = _read(encoder, heads, make_views(_HELD_OUT_FROM, num_pictures, seed, num_random=0))
    _, _, random = _read(encoder, heads, make_views(_HELD_OUT_FROM, num_pictures, seed, num_random=6, planned=False))
    return {"colour_f1": colour_f1, "legibility": {"planned": planned, "random": random}, "views": num_views}


_Curve = dict[str, dict[str, dict[str, float]]]


def _read(encoder: CLIPVisionModel, heads: Heads, data: Views) -> tuple[float, int, _Curve]:
    """The colours' F1, the number of views, and the share of glyphs read rightly by kind and size."""
    true_positive = false_positive = false_negative = 0
    bins: dict[str, dict[str, list[int]]] = {"digits": {}, "letters": {}, "objects": {}}
    groups = {"digits": slice(0, 10), "second digits": slice(10, 20), "letters": slice(20, 46), "objects": slice(46, len(GLYPH_CLASSES))}
    for start in range(0, len(data.pixels), 128):
        rows = slice(start, start + 128)
        hidden = encoder(_normalise(data.pixels[rows]), output_hidden_states=True).hidden_states[-1][:, 1:]
        colour_logits, first_logits, second_logits, _ = heads(hidden)
        glyph_logits = torch.cat([first_logits[..., 1:11], second_logits[..., 1:], first_logits[..., 11:]], dim=-1)
        found, truth = (colour_logits > 0).numpy(), data.colours[rows]
        true_positive += int((found & truth).sum())
        false_positive += int((found & ~truth).sum())
        false_negative += int((~found & truth).sum())
        for view, placed in enumerate(data.sizes[rows]):
            for glyph, size_px, patches in placed:
                group = next(name for name, classes in groups.items() if classes.start <= glyph < classes.stop)
                kind = group.removeprefix("second ")
                best = int(glyph_logits[view, list(patches)].amax(dim=0)[groups[group]].argmax())
                bin_name = f"{int(size_px * 2) / 2:.1f}" if size_px < 14 else "14.0"
                right_total = bins[kind].setdefault(bin_name, [0, 0])
                right_total[0] += int(best == glyph - groups[group].start)
                right_total[1] += 1
    curve = {
        kind: {
            name: {"accuracy": round(right / total, 4), "glyphs": total}
            for name, (right, total) in sorted(found.items(), key=lambda item: float(item[0]))
        }
        for kind, found in bins.items()
    }
    return round(2 * true_positive / (2 * true_positive + false_positive + false_negative), 4), len(data.pixels), curve


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--sheets", type=int, default=14000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--local-min-px", type=float, default=6.5, help="for the card: recipes take details of this size for readable")
    parser.add_argument("--global-max-px", type=float, default=6.0, help="for the card: and smaller ones than this for unreadable")
    arguments = parser.parse_args()
    started = time.monotonic()
    encoder, heads, log = train(arguments)
    seconds = time.monotonic() - started
    measured = measure(encoder, heads, 400, arguments.seed)
    print(json.dumps(measured, indent=1), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(arguments.output)
    CLIPImageProcessorPil(
        size={"shortest_edge": VIEW_PX}, crop_size={"height": VIEW_PX, "width": VIEW_PX}, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(arguments.output)
    weights = (arguments.output / "model.safetensors").read_bytes()
    record = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key != "output"},
        "seconds": round(seconds),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
        "limits": {"readable_from_px": READABLE_FROM_PX, "local_min_px": arguments.local_min_px, "global_max_px": arguments.global_max_px},
        "measured": measured,
        "log": log,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
