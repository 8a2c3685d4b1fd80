"""Claim guarded: caching a dataset takes little longer than the encoder's bare forward passes over the same views.

`make bench` prints both, alternating in one run: 60 drawn pictures of 672 x 448 px, 1 + 6 views of 112 px, the shipped encoder, batches as they
are chosen, one process; THREADS sets torch's threads.
"""

import os
import time
from statistics import median

import numpy as np
import pytest
import torch

from model.encoder import describe_encoder, load_encoder
from model.encoder_execution import automatic_batch_views
from model.images import cut_views, decode_image
from model.specs import DCISpec, FeatureSpec, fingerprint
from model.views import ViewSpec, plan_views
from workers.caching.build import cache_features
from workers.dataset.build import build_dataset
from workers.dataset.samples import read_samples
from workers.dataset.spec import DatasetSpec, LegibilitySpec, RenderedSourceSpec
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]
NUM_RUNS = 5


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
        encoder = load_encoder(spec.encoder, spec.deepest_layer)
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
