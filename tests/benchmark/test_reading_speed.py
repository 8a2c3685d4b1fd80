"""Claims guarded: cached features are read as fast as the file system gives bytes, in any order, and faster than the field's data loaders give the
same arrays.

Peers (webdataset, mosaicml-streaming, litdata, datasets) are measured where they are installed; they are no dependencies of Loupe:
`pip install webdataset mosaicml-streaming litdata datasets`. Run without the checks of types (`--jaxtyping-packages=`, as `make bench` does), which
cost a read five times its time. Each peer gets the arrays of an image in the way that its documentation shows; what it gives is put together to
batches, one array for each branch. Loupe also compares the checksum of every map, which none of them does. Rates are of the arrays' bytes, medians of
five rounds in turns.
"""

import importlib.util
import io
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from model.architectures import known_encoder
from model.specs import FeatureSpec, MapSpec
from model.views import Branch, ViewSpec, plan_views
from tests.s3_servers import seaweedfs
from workers.caching.codec import StoredMap
from workers.caching.encode import write_features
from workers.caching.layout import BRANCHES, features_table, index_table
from workers.caching.reader import CachedFeatures
from workers.caching.units import num_views
from workers.dataset.samples import ImageRef, Sample
from workers.storage import Store

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

NUM_IMAGES, PER_UNIT, BATCH, ROUNDS = 240, 16, 16, 5
MAPS = (MapSpec(layers=(11,)), MapSpec(layers=tuple(range(6))), MapSpec(layers=tuple(range(6, 12))))
NUM_TOKENS, WIDTH = 196, 768
Arrays = dict[str, np.ndarray]
"""Of an image, by branch: [views, maps, tokens, width]."""


def reading_spec() -> FeatureSpec:
    """ViT-B/16's maps for DCI, fp16, of both branches."""
    encoder = replace(known_encoder("openai/clip-vit-base-patch16"), weights_sha256="0" * 64)
    return FeatureSpec(dataset_fingerprint="0" * 64, encoder=encoder, views=ViewSpec(), global_maps=MAPS, local_maps=MAPS)


def samples_of(count: int) -> list[Sample]:
    chance = random.Random(0)
    made = []
    for number in range(count):
        image = ImageRef(sha256=f"{chance.getrandbits(256):064x}", path=f"images/{number}", width_px=448, height_px=448)
        made.append(
            Sample(sample_id=str(number), index=number, image=image, family="", source="", split="train", licence="", detail_score=0.0, turns=())
        )
    return made


def arrays_of(spec: FeatureSpec, sample: Sample) -> dict[str, np.ndarray]:
    """An image's maps: [maps, tokens, width] and [views, maps, tokens, width] in fp16, a function of the image."""
    generator = np.random.default_rng(int(sample.image_sha256[:8], 16))
    found = {}
    for branch in BRANCHES:
        shape = (num_views(spec, sample, branch), len(MAPS), spec.encoder.num_patches, spec.encoder.width)
        found[branch] = generator.integers(0, 15_000, shape, dtype=np.uint16).view(np.float16)
    return found


def stacked(spec: FeatureSpec, branch: Branch, arrays: list[np.ndarray]) -> dict[str, StoredMap]:
    """Each map over the views of several images."""
    return {item.name: StoredMap(values=np.concatenate([array[:, place] for array in arrays])) for place, item in enumerate(spec.maps(branch))}


def write_ours(store: Store, spec: FeatureSpec, samples: list[Sample]) -> None:
    table, index = features_table(store, spec), index_table(store, spec.encoding)
    table.ensure()
    index.ensure()
    for start in range(0, len(samples), PER_UNIT):
        part = samples[start : start + PER_UNIT]
        arrays = [arrays_of(spec, sample) for sample in part]
        stored = {branch: stacked(spec, branch, [found[branch] for found in arrays]) for branch in BRANCHES}
        rows = {}
        for branch in BRANCHES:
            stops = np.cumsum([num_views(spec, sample, branch) for sample in part]).tolist()
            rows[branch] = [(sample, stop - num_views(spec, sample, branch), stop) for sample, stop in zip(part, stops, strict=True)]
        files, index_files = write_features(store, spec, rows, stored)
        index.commit(index_files)
        table.commit(files)


def drop_page_cache(folder: Path) -> None:
    """Tell the kernel to forget the files, as far as a process may."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(store: Store, spec: FeatureSpec, samples: list[Sample], *, want_local: bool) -> Iterator[int]:
    """Reads batches, and tells their bytes."""
    source = CachedFeatures(store, spec)
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        found = source.fetch({"global": batch, "local": batch if want_local else []})
        yield sum(item.values.nbytes for maps in found.values() for item in maps.values())


def plain_files(folder: Path) -> Iterator[int]:
    """Every byte of a folder's files, one after the other: what the file system gives."""
    buffer = bytearray(8 * 2**20)
    for path in sorted(folder.glob("branch=*/**/*.parquet")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield count


def timed(read: Callable[[], Iterator[int]]) -> tuple[float, int]:
    started = time.perf_counter()
    num_bytes = sum(read())
    return time.perf_counter() - started, num_bytes


def write_webdataset(folder: Path, spec: FeatureSpec, samples: list[Sample]) -> None:
    for start in range(0, len(samples), PER_UNIT):
        with tarfile.open(folder / f"{start // PER_UNIT:06d}.tar", "w") as shard:
            for sample in samples[start : start + PER_UNIT]:
                for branch, array in arrays_of(spec, sample).items():
                    file = io.BytesIO()
                    np.save(file, array)
                    info = tarfile.TarInfo(f"{sample.image_sha256}.{branch}.npy")
                    info.size = len(file.getvalue())
                    shard.addfile(info, io.BytesIO(file.getvalue()))


def webdataset_reader(folder: Path, *, shuffled: bool) -> Iterator[Arrays]:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=100 if shuffled else False)
    if shuffled:
        dataset = dataset.shuffle(64)
    for sample in dataset.decode():
        yield {branch: sample[f"{branch}.npy"] for branch in BRANCHES}


def write_streaming(folder: Path, spec: FeatureSpec, samples: list[Sample]) -> None:
    from streaming import MDSWriter

    one = arrays_of(spec, samples[0])
    columns = {branch: f"ndarray:float16:{','.join(map(str, array.shape))}" for branch, array in one.items()}
    with MDSWriter(out=str(folder), columns=columns, size_limit=2**26) as writer:
        for sample in samples:
            writer.write(arrays_of(spec, sample))


def streaming_reader(folder: Path, *, shuffled: bool) -> Iterator[Arrays]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    yield from StreamingDataset(local=str(folder), shuffle=shuffled, batch_size=BATCH)


def write_datasets(folder: Path, spec: FeatureSpec, samples: list[Sample]) -> None:
    import datasets

    def rows() -> Iterator[dict[str, bytes]]:
        for sample in samples:
            yield {branch: array.tobytes() for branch, array in arrays_of(spec, sample).items()}

    features = datasets.Features({branch: datasets.Value("large_binary") for branch in BRANCHES})
    datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache"), writer_batch_size=4).save_to_disk(str(folder / "data"))


def datasets_reader(folder: Path, *, shuffled: bool) -> Iterator[Arrays]:
    import datasets

    dataset = datasets.load_from_disk(str(folder / "data"))
    for row in dataset.shuffle(seed=0) if shuffled else dataset:
        yield {branch: np.frombuffer(row[branch], dtype=np.float16).reshape(-1, len(MAPS), NUM_TOKENS, WIDTH) for branch in BRANCHES}


def write_litdata(folder: Path, spec: FeatureSpec, samples: list[Sample]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=2**26)
    for number, sample in enumerate(samples):
        writer[number] = arrays_of(spec, sample)
    writer.done()
    writer.merge(1)


def litdata_reader(folder: Path, *, shuffled: bool) -> Iterator[Arrays]:
    from litdata import StreamingDataset

    yield from StreamingDataset(str(folder), shuffle=shuffled)


def batches(read: Callable[[], Iterator[Arrays]]) -> Iterator[int]:
    """Images put together to batches, as a step of training takes them, and their bytes."""
    images = read()
    while some := list(islice(images, BATCH)):
        yield sum(np.concatenate([image[branch] for image in some]).nbytes for branch in BRANCHES)


PEERS = {
    "webdataset": ("webdataset", write_webdataset, webdataset_reader),
    "mosaicml-streaming": ("streaming", write_streaming, streaming_reader),
    "litdata": ("litdata", write_litdata, litdata_reader),
    "datasets": ("datasets", write_datasets, datasets_reader),
}


def test_features_are_read_at_the_rate_of_the_file_system(tmp_path: Path) -> None:
    spec, samples = reading_spec(), samples_of(NUM_IMAGES)
    assert len(plan_views(448, 448, spec.encoder.view_px, spec.views).local_views) == 4
    shuffled = samples[:]
    random.Random(1).shuffle(shuffled)
    store = Store(str(tmp_path / "ours"))
    write_ours(store, spec, samples)
    folder = store.local_path(features_table(store, spec).path)
    assert folder is not None
    ways: dict[str, tuple[Path, Callable[[], Iterator[int]]]] = {
        "the file system, sequential": (folder, lambda: plain_files(folder)),
        "loupe, sequential": (folder, lambda: ours(store, spec, samples, want_local=True)),
        "loupe, shuffled": (folder, lambda: ours(store, spec, shuffled, want_local=True)),
        "loupe, global only, sequential": (folder, lambda: ours(store, spec, samples, want_local=False)),
        "loupe, global only, shuffled": (folder, lambda: ours(store, spec, shuffled, want_local=False)),
    }
    for name, (module, write, read) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name} is not installed and not measured")
            continue
        place = tmp_path / name
        place.mkdir()
        try:
            write(place, spec, samples)
        except Exception as error:  # noqa: BLE001 - a peer that fails here is told, and is no reason to measure nothing
            print(f"{name} cannot write these arrays: {type(error).__name__}: {error}")
            continue
        for order in (False, True):
            label = f"{name}, {'shuffled' if order else 'sequential'}"
            ways[label] = (place, partial(batches, partial(read, place, shuffled=order)))
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for cold in (True, False):
        for name in ways:
            found[name] = []
        for _ in range(ROUNDS):
            for name, (place, way) in ways.items():
                if cold:
                    drop_page_cache(place)
                found[name].append(timed(way))
        reference = median(num_bytes / seconds for seconds, num_bytes in found["the file system, sequential"])
        print(f"\n{'from the disk' if cold else 'from the page cache'}, {NUM_IMAGES} images of 1 + 4 views, 3 maps of 196 x 768 in fp16")
        for name, rounds in found.items():
            rates = sorted(num_bytes / seconds for seconds, num_bytes in rounds)
            images = NUM_IMAGES / median(seconds for seconds, _ in rounds)
            middle = median(rates)
            spread = f"({rates[0] / 1e6:.0f} to {rates[-1] / 1e6:.0f})"
            print(f"{name:36} {middle / 1e6:7.0f} MB/s {spread:16} {images:6.0f} images/s  {middle / reference:.2f}")
    assert all(found.values())


def uploaded(folder: Path, url: str) -> list[str]:
    """Put a folder's files into a bucket; their names."""
    store = Store(url)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file() and "cache" not in path.parts]
    for name in names:
        store.write_bytes(name, (folder / name).read_bytes())
    return names


def webdataset_from_store(url: str, names: list[str], local: Path, *, shuffled: bool) -> Iterator[Arrays]:
    """By curl, as its documentation reads what is behind HTTP."""
    import botocore.session
    import webdataset

    client = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    shards = [f"pipe:curl -s '{client.generate_presigned_url('get_object', {'Bucket': bucket, 'Key': f'{prefix}/{name}'})}'" for name in names]
    dataset = webdataset.WebDataset(shards, shardshuffle=100 if shuffled else False)
    if shuffled:
        dataset = dataset.shuffle(64)
    for sample in dataset.decode():
        yield {branch: sample[f"{branch}.npy"] for branch in BRANCHES}


def streaming_from_store(url: str, names: list[str], local: Path, *, shuffled: bool) -> Iterator[Arrays]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    yield from StreamingDataset(remote=url, local=str(local), shuffle=shuffled, batch_size=BATCH)


def datasets_from_store(url: str, names: list[str], local: Path, *, shuffled: bool) -> Iterator[Arrays]:
    import datasets

    options = {
        "key": os.environ["AWS_ACCESS_KEY_ID"],
        "secret": os.environ["AWS_SECRET_ACCESS_KEY"],
        "client_kwargs": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
    }
    dataset = datasets.load_from_disk(f"{url}/data", storage_options=options)
    for row in dataset.shuffle(seed=0) if shuffled else dataset:
        yield {branch: np.frombuffer(row[branch], dtype=np.float16).reshape(-1, len(MAPS), NUM_TOKENS, WIDTH) for branch in BRANCHES}


def litdata_from_store(url: str, names: list[str], local: Path, *, shuffled: bool) -> Iterator[Arrays]:
    from litdata import StreamingDataset

    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    yield from StreamingDataset(url, cache_dir=str(local), storage_options=options, shuffle=shuffled)


STORE_READERS = {
    "webdataset": webdataset_from_store,
    "mosaicml-streaming": streaming_from_store,
    "litdata": litdata_from_store,
    "datasets": datasets_from_store,
}


def test_features_are_read_from_an_object_store(tmp_path: Path) -> None:
    """Peers that copy to a local folder first begin with an empty one each time; what is read from the server comes from its page cache."""
    spec, samples = reading_spec(), samples_of(NUM_IMAGES // 2)
    shuffled = samples[:]
    random.Random(1).shuffle(shuffled)
    with seaweedfs() as bucket:
        store = Store(f"{bucket}/reading")
        write_ours(store, spec, samples)
        ways: dict[str, Callable[[], Iterator[int]]] = {
            "loupe, sequential": lambda: ours(store, spec, samples, want_local=True),
            "loupe, shuffled": lambda: ours(store, spec, shuffled, want_local=True),
            "loupe, global only, sequential": lambda: ours(store, spec, samples, want_local=False),
            "loupe, global only, shuffled": lambda: ours(store, spec, shuffled, want_local=False),
        }
        for name, (module, write, _) in PEERS.items():
            if importlib.util.find_spec(module) is None:
                print(f"{name} is not installed and not measured")
                continue
            place, url = tmp_path / name, f"{bucket}/{name}"
            place.mkdir()
            write(place, spec, samples)
            names = uploaded(place, url)
            for order in (False, True):
                read = partial(STORE_READERS[name], url, names, shuffled=order)
                ways[f"{name}, {'shuffled' if order else 'sequential'}"] = partial(with_folder, tmp_path, read)
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name in list(ways):
                try:
                    found[name].append(timed(ways[name]))
                except Exception as error:  # noqa: BLE001 - a peer that fails here is told, and is no reason to measure nothing
                    print(f"{name}: {type(error).__name__}: {error}")
                    del ways[name], found[name]
        print(f"\nfrom SeaweedFS, {len(samples)} images of 1 + 4 views, 3 maps of 196 x 768 in fp16")
        for name, rounds in found.items():
            rates = sorted(num_bytes / seconds for seconds, num_bytes in rounds)
            print(f"{name:36} {median(rates) / 1e6:7.0f} MB/s ({rates[0] / 1e6:.0f} to {rates[-1] / 1e6:.0f})")
        assert len(found["loupe, shuffled"]) == ROUNDS


def with_folder(parent: Path, read: Callable[[Path], Iterator[Arrays]]) -> Iterator[int]:
    """Batches of a reader that gets an empty folder of this machine, and their bytes."""
    with tempfile.TemporaryDirectory(dir=parent) as local:
        yield from batches(lambda: read(Path(local)))
