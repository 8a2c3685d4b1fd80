"""Claim guarded: caching a dataset takes little longer than the encoder's bare forward passes over the same views, and an encoding process does not
grow.

`make bench` prints both, alternating in one run: the shipped encoder over drawn pictures in one process; ViT-B/16 with random weights over JPEGs of 2
million pixels by Ray, to a folder and to SeaweedFS. Beside it stand its bare forward passes at the batch size that does best, as Loupe executes them
(EncoderForward), and once as torch does where nobody packs its layers. THREADS sets torch's threads, IMAGES and TURNS how much is measured.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
import torch

from model.encoder import describe_encoder, load_encoder
from model.encoder_execution import EncoderForward, automatic_batch_views
from model.images import cut_views, decode_image
from model.specs import DCISpec, FeatureSpec, MapSpec, fingerprint
from model.views import ViewSpec, plan_views
from tests.benchmark.caching import MAPS, VIEWS, write_photographs, write_vit
from tests.s3_servers import seaweedfs
from workers.caching.build import CacheRecord, cache_features
from workers.dataset.build import build_dataset
from workers.dataset.samples import read_samples
from workers.dataset.spec import DatasetSpec, LegibilitySpec, RenderedSourceSpec
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import InlineCluster, ray_runtime
from workers.storage import Store

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]
NUM_RUNS = 5
NUM_PHOTOGRAPHS, NUM_TURNS = int(os.environ.get("IMAGES", "128")), int(os.environ.get("TURNS", "3"))


def test_caching_against_bare_forward_passes(tmp_path):
    threads = int(os.environ.get("THREADS", "2"))
    torch.set_num_threads(threads)
    execution = ExecutionSettings(encoder_threads=threads)
    store = Store(str(tmp_path / "data"))
    dataset = DatasetSpec(
        sources=(RenderedSourceSpec(family="collages", num_images=60),),
        seed=0,
        held_out_fraction=0.1,
        view_px=112,
        views=ViewSpec(),
        legibility=LegibilitySpec(local_min_px=6.5, global_max_px=6.0),
    )
    build_dataset(dataset, store, execution, SilentProgress(), cluster=InlineCluster())
    maps = DCISpec(base=7, groups=((0, 3), (4, 7))).maps
    samples = read_samples(store, fingerprint(dataset))
    images = [decode_image(store.read_bytes(sample.image_path)) for sample in samples]
    views = np.concatenate([cut_views(image, plan_views(image.width, image.height, 112, ViewSpec())) for image in images])
    ratios, bare_times, caching_times = [], [], []
    for run in range(NUM_RUNS + 1):
        spec = FeatureSpec(
            dataset_fingerprint=fingerprint(dataset),
            encoder=describe_encoder("builtin:vision-encoder"),
            views=dataset.views,
            global_maps=maps,
            local_maps=maps,
        )
        encoder = EncoderForward(load_encoder(spec.encoder, spec.deepest_layer))
        started = time.monotonic()
        batch = automatic_batch_views(spec.encoder, "cpu", torch.float32)
        for start in range(0, len(views), batch):
            encoder(torch.from_numpy(views[start : start + batch]), list(maps))
        bare = time.monotonic() - started
        fresh = Store(str(tmp_path / f"run-{run}"))
        build_dataset(dataset, fresh, execution, SilentProgress(), cluster=InlineCluster())
        record = cache_features(spec, fresh, execution, SilentProgress(), cluster=InlineCluster())
        assert record.num_cached == len(samples)
        if run:  # the first run warms up
            bare_times.append(bare)
            caching_times.append(record.seconds)
            ratios.append(record.seconds / bare)
    print(
        f"\n{len(views)} views, {threads} threads: bare forward {len(views) / median(bare_times):.0f} views/s, caching "
        f"{len(views) / median(caching_times):.0f} views/s (prepare {record.prepare_seconds:.2f} s, encode {record.encode_seconds:.2f} s, write "
        f"{record.write_seconds:.2f} s of the last run); caching / bare {median(ratios):.2f} (of {NUM_RUNS}: {min(ratios):.2f} to {max(ratios):.2f})"
    )


def bare_seconds(encoder: Callable[[torch.Tensor, Sequence[MapSpec]], object], views: np.ndarray, batch_views: int) -> float:
    """Of the forward passes alone, maps reduced."""
    started = time.monotonic()
    for start in range(0, len(views), batch_views):
        encoder(torch.from_numpy(views[start : start + batch_views]), list(MAPS))
    return time.monotonic() - started


def test_vit_over_photographs_against_bare_forward_passes(tmp_path: Path) -> None:
    """Ray is up before; the encoder's process, which imports and loads, is not, and a line apart says what its start takes."""
    threads = int(os.environ.get("THREADS", "2"))
    torch.set_num_threads(threads)
    dataset = write_photographs(tmp_path / "photographs", NUM_PHOTOGRAPHS)
    spec = FeatureSpec(
        dataset_fingerprint=fingerprint(dataset),
        encoder=describe_encoder(str(write_vit(tmp_path / "encoder"))),
        views=VIEWS,
        global_maps=MAPS,
        local_maps=MAPS,
    )
    execution = ExecutionSettings(encoder_threads=threads, num_cpus=threads)
    paths = sorted((tmp_path / "photographs" / "images").glob("*.jpg"))
    images = [decode_image(path.read_bytes()) for path in paths]
    views = np.concatenate([cut_views(image, plan_views(image.width, image.height, 224, VIEWS)) for image in images])
    encoder = EncoderForward(load_encoder(spec.encoder, spec.deepest_layer))
    sizes = (1, 2, 4, 8, 10, 20, 40)
    tried = {size: min(bare_seconds(encoder, views[:40], size) for _ in range(2)) for size in sizes}
    best = min(tried, key=lambda size: tried[size])
    print(f"\nviews/s of the bare forward by batch: {', '.join(f'{size}: {40 / seconds:.2f}' for size, seconds in tried.items())}")
    plain = load_encoder(spec.encoder, spec.deepest_layer)
    print(f"without packed layers, in batches of 8: {40 / min(bare_seconds(plain, views[:40], 8) for _ in range(2)):.2f}")
    del plain
    found: dict[str, list[tuple[float, CacheRecord]]] = {"a folder": [], "SeaweedFS": []}
    bare: list[float] = []
    with seaweedfs() as bucket, ray_runtime(execution) as cluster:
        for turn in range(NUM_TURNS):
            bare.append(bare_seconds(encoder, views, best))
            for name, root in (("a folder", str(tmp_path / f"data-{turn}")), ("SeaweedFS", f"{bucket}/caching-{turn}")):
                store = Store(root)
                build_dataset(dataset, store, execution, SilentProgress(), cluster=InlineCluster())
                started = time.monotonic()
                record = cache_features(spec, store, execution, SilentProgress(), cluster=cluster)
                found[name].append((time.monotonic() - started, record))
                assert record.num_cached == NUM_PHOTOGRAPHS
    print(f"{len(views)} views of ViT-B/16, {threads} threads: bare forward {len(views) / median(bare):.2f} views/s in batches of {best}")
    for name, runs in found.items():
        ratios = sorted(seconds / alone for (seconds, _), alone in zip(runs, bare, strict=True))
        _, record = runs[-1]
        parts = f"last run: prepare {record.prepare_seconds:.1f} s beside, encode {record.encode_seconds:.1f} s, write {record.write_seconds:.1f} s"
        rest = record.seconds - record.encode_seconds
        print(
            f"to {name}: caching / bare {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}); encode alone / bare "
            f"{record.encode_seconds / bare[-1]:.3f}; {parts}; all else {rest:.1f} s"
        )


def test_an_encoding_process_does_not_grow(tmp_path: Path) -> None:
    """10,000 views by the shipped encoder; resident memory of the process that encodes, once a second."""
    dataset = DatasetSpec(
        sources=tuple(RenderedSourceSpec(family=family, num_images=720) for family in ("collages", "geometry")),
        seed=0,
        held_out_fraction=0.1,
        view_px=112,
        views=ViewSpec(),
        legibility=LegibilitySpec(local_min_px=6.5, global_max_px=6.0),
    )
    maps = DCISpec(base=7, groups=((0, 3), (4, 7))).maps
    execution = ExecutionSettings()
    store = Store(str(tmp_path / "data"))
    samples: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.name().startswith("ray::_Finisher"):
                        samples.append((time.monotonic(), process.memory_info().rss))

    with ray_runtime(execution) as cluster:
        build_dataset(dataset, store, execution, SilentProgress(), cluster=cluster)
        spec = FeatureSpec(
            dataset_fingerprint=fingerprint(dataset),
            encoder=describe_encoder("builtin:vision-encoder"),
            views=dataset.views,
            global_maps=maps,
            local_maps=maps,
        )
        watcher = threading.Thread(target=watch)
        watcher.start()
        record = cache_features(spec, store, execution, SilentProgress(), cluster=cluster)
        over.set()
        watcher.join()
    resident = [rss for _, rss in samples]
    quarters = [max(resident[len(resident) * part // 4 : len(resident) * (part + 1) // 4]) / 2**20 for part in range(4)]
    views = record.num_global_views + record.num_local_views
    print(f"\n{views} views: resident memory of the encoding process, highest in each quarter: {', '.join(f'{q:.0f}' for q in quarters)} MiB")
    assert views >= 10_000
