"""A training spec's parts put together in one process: model, feature source, trained weights.

Input: a TrainingSpec and a store. Output: what the loop, the evaluation and the export work with. Invariant: the same spec gives the same initial
bytes in every process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
import torch
import torch.distributed as dist

from model.connector import build_connector
from model.language_model import embedding_rms, hold_rounded, load_language_model, multiplies_bf16
from model.lora import add_adapters
from model.specs import fingerprint
from model.vision_language import VisionLanguageModel
from workers.caching.reader import OTHER_POLICIES, CachedFeatures, FeatureSource, LiveFeatures, SplitFeatures
from workers.dataset.samples import Sample, read_samples
from workers.errors import MissingFeaturesError, TrainingError
from workers.execution import ExecutionSettings
from workers.language_models import verified_folder
from workers.quarantine import read_quarantine
from workers.storage import Store
from workers.training.batches import needed_maps
from workers.training.checkpoints import load_weights, read_checked
from workers.training.spec import TrainingSpec

__all__ = ["TrainingData", "assemble_model", "final_folder", "load_trained", "open_features", "set_threads", "training_data"]


def set_threads(execution: ExecutionSettings) -> None:
    """Let torch use the run's CPUs in this process.

    Args:
        execution: num_cpus counts.
    """
    torch.set_num_threads(execution.num_cpus or os.cpu_count() or 1)


def assemble_model(spec: TrainingSpec, *, freeze_language_model: bool, device: torch.device | str = "cpu") -> VisionLanguageModel:
    """The model with its initial weights.

    Args:
        spec: of the run.
        freeze_language_model: hold it rounded to the run's precision, without gradients; else in fp32 and whole, or rounded below the spec's
            adapters, which are fp32.
        device: where it goes.

    Returns:
        The model, its connector's inputs not measured yet.

    Raises:
        LanguageModelError: the language model is missing or another by now.
    """
    language_model = load_language_model(verified_folder(spec.language_model), spec.language_model.template)
    connector = build_connector(
        spec.connector,
        spec.features.encoder,
        hidden=language_model.hidden,
        embedding_rms=embedding_rms(language_model.network),
        seed=spec.schedule.seed,
    )
    network = language_model.network
    if (freeze_language_model or spec.lora is not None) and spec.precision == "bf16":
        hold_rounded(network, native=_multiply_bf16(device))
    if freeze_language_model:
        network.requires_grad_(requires_grad=False)
    elif spec.lora is not None:
        add_adapters(network, spec.lora, seed=spec.schedule.seed)
    return VisionLanguageModel(connector, language_model, precision=spec.precision).to(device)


def _multiply_bf16(device: torch.device | str) -> bool:
    """Whether the devices of all ranks do: ranks that share a model out must hold it in one type."""
    native = multiplies_bf16(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return native
    agreed = torch.tensor(int(native), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)


def open_features(spec: TrainingSpec, store: Store, execution: ExecutionSettings, device: str = "cpu") -> FeatureSource:
    """The run's feature source, giving the connector's maps.

    Args:
        spec: of the run.
        store: where the cache and the images are.
        execution: missing_features, feature_cache_bytes and encode_batch_views count.
        device: for encoding.

    Returns:
        Cached features, live ones, or both, by branch.

    Raises:
        MissingFeaturesError: there is no cache.
    """
    global_maps, local_maps = needed_maps(spec.connector)
    batch_views = execution.encode_batch_views
    if spec.cache is None:
        return LiveFeatures(store, spec.features, device, global_maps=global_maps, local_maps=local_maps, batch_views=batch_views)
    cached = CachedFeatures(
        store,
        spec.cache,
        global_maps=global_maps,
        local_maps=local_maps if spec.cache.local_maps else (),
        device=device,
        batch_views=batch_views,
        policy=execution.missing_features,
        disk_cache_bytes=execution.feature_cache_bytes,
    )
    if spec.cache == spec.features:
        return cached
    rest = spec.features.only("local").unpacked()
    return SplitFeatures(cached, LiveFeatures(store, rest, device, global_maps=(), local_maps=local_maps, batch_views=batch_views))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """One split with its features."""

    samples: list[Sample]
    source: FeatureSource


def training_data(
    spec: TrainingSpec,
    store: Store,
    split: Literal["train", "held_out"],
    execution: ExecutionSettings,
    *,
    device: str = "cpu",
    verify: bool = False,
) -> TrainingData:
    """The samples of a split whose features can be had.

    Args:
        spec: of the run.
        store: where everything is.
        split: which side of the dataset.
        execution: as open_features takes it.
        device: for encoding.
        verify: encode a few cached images again and refuse a cache that no longer is what its encoder gives.

    Returns:
        Samples in frozen order, and their features.

    Raises:
        StaleCacheError: the cache does not fit its encoder.
        MissingFeaturesError: the cache neither holds an image nor has refused it, and `missing_features` is `fail`.
    """
    samples: Sequence[Sample] = read_samples(store, spec.dataset_fingerprint, split)
    source = open_features(spec, store, execution, device)
    if spec.cache is not None:
        cached = source.cached if isinstance(source, SplitFeatures) else source
        assert isinstance(cached, CachedFeatures)
        refused = {row.bytes_sha256 for row in read_quarantine(store, "cache-features", fingerprint(spec.cache)[:16])}
        held = dict(zip([sample.index for sample in samples], cached.holds(samples), strict=True))
        samples = [sample for sample in samples if held[sample.index] or sample.image_sha256 not in refused]
        lost = [sample for sample in samples if not held[sample.index]]
        if lost and execution.missing_features == "fail":
            raise MissingFeaturesError(
                f"the cache holds no features of {len(lost)} of {len(samples)} images that it has not refused, first of {lost[0].image_sha256[:12]} "
                f"({lost[0].sample_id}). Run `loupe verify` with --repair and then the run again, or {OTHER_POLICIES}.",
                lost[0].image_sha256,
            )
        if verify:
            cached.verify(samples)
    return TrainingData(samples=list(samples), source=source)


def final_folder(spec: TrainingSpec) -> str:
    """Where a run's trained weights lie, relative to the root."""
    return f"checkpoints/{fingerprint(spec)[:16]}/final"


def load_trained(spec: TrainingSpec, store: Store, *, device: torch.device | str = "cpu") -> VisionLanguageModel:
    """The model with its trained weights.

    Args:
        spec: of the run.
        store: where its weights are.
        device: where it goes.

    Returns:
        The model, without gradients.

    Raises:
        TrainingError: the run has not ended, or its weights are damaged.
    """
    folder = final_folder(spec)
    files = read_checked(store, folder)
    if files is None:
        raise TrainingError(f"{store.url(folder)} holds no whole trained weights; run train-connector (remove the folder first if it is damaged)")
    tensors: dict[str, Any] = {}
    for part in ("connector", "language_model"):
        if f"{part}.safetensors" in files:
            loaded = safetensors.torch.load(files[f"{part}.safetensors"])
            tensors |= {f"{part}.{name}": tensor for name, tensor in loaded.items()}
    trains_language_model = "language_model.safetensors" in files
    model = assemble_model(spec, freeze_language_model=not trains_language_model, device=device)
    load_weights(model, tensors)
    model.requires_grad_(requires_grad=False)
    return model
