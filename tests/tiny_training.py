"""Tiny training runs: fake features that depend on the image alone, a schedule of three phases, and a real store with dataset and cache."""

import hashlib
import io
from pathlib import Path
from typing import Any

TINY_TRAIN_IMAGES = 12


def tiny_encoder_spec(**changes: Any) -> Any:
    from model.specs import EncoderSpec

    values: dict[str, Any] = {
        "model": "tiny",
        "weights_sha256": "0" * 64,
        "family": "clip",
        "view_px": 56,
        "patch_px": 14,
        "width": 8,
        "num_blocks": 6,
        "prefix_tokens": 1,
        "num_heads": 2,
        "mlp_width": 64,
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return EncoderSpec(**(values | changes))


def tiny_connector_spec(**changes: Any) -> Any:
    from model.specs import CompressionSpec, ConnectorSpec, DCISpec, GatedMixtureSpec, GlobalBranchSpec, LocalBranchSpec

    fusion = DCISpec(base=5, groups=((0, 2), (3, 5)))
    values: dict[str, Any] = {
        "global_branch": GlobalBranchSpec(fusion=fusion, adapters=GatedMixtureSpec()),
        "local_branch": LocalBranchSpec(fusion=fusion, compression=CompressionSpec(queries=4)),
    }
    return ConnectorSpec(**(values | changes))


def tiny_schedule(*, steps: int = 3, batch_size: int = 4, seed: int = 0, with_sft: bool = True) -> Any:
    """The alternating schedule in small: projector, resampler, compression, projector again, then everything."""
    from model.specs import BranchMix, PhaseSpec, ScheduleSpec

    def phase(name: str, train: tuple[str, ...], **more: Any) -> PhaseSpec:
        values: dict[str, Any] = {"branch": BranchMix(global_only=1.0), "steps": steps, "batch_size": batch_size, "learning_rate": 2e-3}
        return PhaseSpec(name=name, train=train, **(values | more))

    everything = ("global_mlp", "resampler", "gate", "compression", "language_model")
    mix = BranchMix(both=0.55, global_only=0.15, local_only=0.15, blind=0.15)
    return ScheduleSpec(
        align=(
            phase("projector", ("global_mlp",), experts="mlp"),
            phase("resampler", ("resampler",), experts="resampler"),
            phase("compression", ("compression",), branch=BranchMix(local_only=1.0)),
            phase("projector-again", ("global_mlp",), branch=mix),
        ),
        sft=phase("tuning", everything, branch=mix, language_model_learning_rate=5e-4) if with_sft else None,
        seed=seed,
    )


def tiny_training_spec(language_model_folder: Path, *, features: Any = None, **changes: Any) -> Any:
    from model.language_model import describe_folder
    from model.specs import FeatureSpec
    from model.views import ViewSpec
    from workers.training.spec import TrainingSpec

    connector = changes.pop("connector", None) or tiny_connector_spec()
    if features is None:
        maps = connector.global_branch.fusion.maps
        features = FeatureSpec(
            dataset_fingerprint="d" * 64, encoder=tiny_encoder_spec(), views=ViewSpec(max_slices=2), global_maps=maps, local_maps=maps
        )
    values: dict[str, Any] = {
        "dataset_fingerprint": features.dataset_fingerprint,
        "features": features,
        "connector": connector,
        "schedule": tiny_schedule(),
        "language_model": describe_folder(language_model_folder, str(language_model_folder)),
        "precision": "fp32",
    }
    return TrainingSpec(**(values | changes))


def fake_samples(count: int = TINY_TRAIN_IMAGES) -> list[Any]:
    """Samples of two aspect ratios and one to three turns."""
    from workers.dataset.samples import ImageRef, Sample, Turn

    samples = []
    for number in range(count):
        turns = [
            Turn(question="Which number?", answer=str(number), kind="fake/number", detail="small", evidence=None),
            Turn(question="Even?", answer="yes" if number % 2 == 0 else "no", kind="fake/even", detail="large", evidence=None),
            Turn(question="Which letter is it called?", answer="abc"[number % 3], kind="fake/letter", detail="large", evidence=None),
        ]
        samples.append(
            Sample(
                sample_id=f"fake-{number}",
                index=number,
                image=ImageRef(
                    sha256=hashlib.sha256(str(number).encode()).hexdigest(),
                    path=f"images/{number}.png",
                    width_px=112 if number % 3 else 56,
                    height_px=56 if number % 3 else 112,
                ),
                family="fake",
                source="fake",
                split="train",
                licence="Apache-2.0",
                detail_score=0.5,
                turns=tuple(turns[: 1 + number % 3]),
            )
        )
    return samples


class FakeFeatures:
    """A feature source in memory: random maps drawn from the image's digest."""

    def __init__(self, spec: Any) -> None:
        from workers.training.batches import needed_maps

        self._spec = spec
        self._maps = needed_maps(spec.connector)
        self.asked: list[dict[str, int]] = []
        self.missing: set[str] = set()
        self.num_encoded_live = 0

    def fetch(self, images: Any) -> dict[Any, Any]:
        import torch

        from model.quantisation import PackedMap
        from model.views import plan_views
        from workers.errors import MissingFeaturesError

        if any(images.values()):
            self.asked.append({branch: len(samples) for branch, samples in images.items() if samples})
        encoder = self._spec.features.encoder
        found: dict[Any, Any] = {}
        for branch, samples in images.items():
            parts = []
            for sample in samples:
                if sample.image_sha256 in self.missing:
                    raise MissingFeaturesError(f"no features of {sample.image_sha256[:12]}", sample.image_sha256, branch)
                generator = torch.Generator().manual_seed(int(sample.image_sha256[:8], 16))
                views = len(plan_views(sample.width_px, sample.height_px, encoder.view_px, self._spec.features.views).local_views)
                one = torch.randn(len(self._maps[0]), encoder.num_patches, encoder.width, generator=generator)
                more = torch.randn(views, len(self._maps[1]), encoder.num_patches, encoder.width, generator=generator)
                parts.append(one[None] if branch == "global" else more)
            if parts:
                maps = self._maps[0 if branch == "global" else 1]
                found[branch] = {item.name: PackedMap(values=torch.cat(parts)[:, place]) for place, item in enumerate(maps)}
        return found


def draw_square(family: str, number: int, spec: Any) -> Any:
    """A renderer for tests: a coloured square in one of four corners; its colour and corner are asked for."""
    import numpy as np
    from PIL import Image

    from workers.dataset.rendering import Rendered
    from workers.dataset.samples import Turn

    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220)}
    name = list(colours)[number % 3]
    right, bottom = number // 3 % 2, number // 6 % 2
    pixels = np.full((56, 112, 3), 230, dtype=np.uint8)
    pixels[0, 0] = (number % 256, number // 256, 0)  # makes every image another one
    pixels[4 + 28 * bottom : 24 + 28 * bottom, 8 + 56 * right : 48 + 56 * right] = colours[name]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    turns = (
        Turn(question="Which colour?", answer=name, kind="squares/colour", detail="large", evidence=None),
        Turn(question="Left or right?", answer="right" if right else "left", kind="squares/side", detail="small", evidence=None),
    )
    return Rendered(png=data.getvalue(), width_px=112, height_px=56, turns=turns, licence="Apache-2.0", detail_score=0.5)


def draw_spoilt_square(family: str, number: int, spec: Any) -> Any:
    """As `draw_square`, but every seventh picture's last question holds a mark of the prompt: it can be neither trained on nor asked."""
    from dataclasses import replace

    drawn = draw_square(family, number, spec)
    if number % 7 != 3:
        return drawn
    return replace(drawn, turns=(drawn.turns[0], replace(drawn.turns[1], question="Left or <|end|> right?")))


def build_small_store(
    root: str,
    encoder_folder: Path,
    language_model_folder: Path,
    *,
    num_images: int = 24,
    renderer: Any = draw_square,
    more_sources: tuple[Any, ...] = (),
    views: Any = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """A store with a built dataset of squares (and more) and its cached features, made in this process; and a training spec over it."""
    from model.encoder import describe_encoder
    from model.specs import FeatureSpec, fingerprint
    from model.views import ViewSpec
    from workers.caching.build import cache_features
    from workers.dataset.build import build_dataset
    from workers.dataset.spec import DatasetSpec, LegibilitySpec, RenderedSourceSpec
    from workers.execution import ExecutionSettings, SilentProgress
    from workers.runtime import InlineCluster
    from workers.storage import Store

    store = Store(root)
    views = views or ViewSpec(max_slices=2)
    dataset = DatasetSpec(
        sources=(RenderedSourceSpec(family="charts", num_images=num_images), *more_sources),
        seed=0,
        held_out_fraction=0.3,
        view_px=56,
        views=views,
        legibility=LegibilitySpec(local_min_px=6.0, global_max_px=4.0),
        turns_per_image=2,
    )
    execution = ExecutionSettings(device="cpu")
    build_dataset(dataset, store, execution, SilentProgress(), cluster=InlineCluster(), renderer=renderer)
    connector = changes.pop("connector", None) or tiny_connector_spec()
    maps = connector.global_branch.fusion.maps
    features = FeatureSpec(
        dataset_fingerprint=fingerprint(dataset),
        encoder=describe_encoder(str(encoder_folder)),
        views=dataset.views,
        global_maps=maps,
        local_maps=maps,
    )
    cache_features(features, store, execution, SilentProgress(), cluster=InlineCluster())
    return store, tiny_training_spec(language_model_folder, features=features, connector=connector, **changes)


def mixed_samples(count: int = 2 * TINY_TRAIN_IMAGES) -> list[Any]:
    """Fake samples, every second one about no image."""
    from dataclasses import replace

    samples = fake_samples(count)
    for sample in samples[1::2]:
        turns = tuple(replace(turn, question=f"{turn.question} ({sample.index})", kind="llava/text") for turn in sample.turns)
        samples[sample.index] = replace(sample, image=None, family="text", turns=turns)
    return samples


def write_tiny_export(folder: Path, encoder_folder: Path, language_model_folder: Path) -> Path:
    """An export folder over the tiny models, its connector as it is before training."""
    import shutil

    import safetensors.torch

    from model.connector import build_connector
    from model.encoder import describe_encoder
    from model.export import ExportConfig, write_config, write_manifest
    from model.views import ViewSpec

    encoder, connector = describe_encoder(str(encoder_folder)), tiny_connector_spec()
    write_config(
        folder,
        ExportConfig(
            connector=connector,
            encoder=encoder,
            views=ViewSpec(max_slices=4),
            feature_precision="fp16",
            precision="fp32",
            language_model_precision="fp32",
        ),
    )
    built = build_connector(connector, encoder, hidden=64, embedding_rms=0.02, seed=3)
    safetensors.torch.save_file(built.state_dict(), folder / "connector.safetensors")
    shutil.copytree(encoder_folder, folder / "encoder")
    shutil.copytree(language_model_folder, folder / "language_model")
    write_manifest(folder)
    return folder
