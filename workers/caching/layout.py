"""Where features lie: one table for each encoding, shared by all datasets and all maps, and what its files hold.

    features/<encoding>/spec.json                                        what the numbers depend on, for people and for `loupe verify`
    features/<encoding>/branch=local/maps=layer_7-mean_0_5/<hh>/<digest>.parquet
    features/<encoding>/calibrations/<branch>/<map>.json                 of int8: which centres and scales the map is stored behind, for good
    features/<encoding>/_index/                                          a table of its own: where in which file every image's maps begin

A file holds some maps of some images' views of one branch: a row is a view, a map is a column of opaque bytes, an image is a row group. So another
map of images that are there is another file and leaves the old ones as they are. Each column chunk is one page without compression: the numbers
lie in the file as they lie in memory, and one read at a known place fetches them. Folders of two hexadecimal digits spread a table's objects over
256 prefixes, since object stores bound requests by prefix.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from model.specs import EncodingSpec, FeatureSpec, MapSpec, canonical_json, fingerprint, spec_differences
from model.views import Branch
from workers.errors import ObjectNotFoundError, SpecChangedError
from workers.storage import Store
from workers.tables import Table

__all__ = [
    "BRANCHES",
    "INDEX_SCHEMA",
    "check_table",
    "encoding_folder",
    "features_table",
    "file_metadata",
    "file_name",
    "file_schema",
    "index_table",
    "lock_encoding",
    "map_fields",
    "map_set",
    "map_sets",
    "maps_in",
]

BRANCHES: tuple[Branch, ...] = ("global", "local")

_ARROW_DTYPE = {"fp32": "float32", "fp16": "float16", "int8": "int8"}

_SET_CHARS = 180
"""A name in a path may have 255 bytes; more maps than fit go into files of their own."""

_VIEW_FIELDS = [
    pa.field("image_sha256", pa.string(), nullable=False),
    pa.field("view_index", pa.int32(), nullable=False),
    pa.field("row", pa.int32(), nullable=False),
    pa.field("column", pa.int32(), nullable=False),
    pa.field("left_px", pa.float64(), nullable=False),
    pa.field("top_px", pa.float64(), nullable=False),
    pa.field("right_px", pa.float64(), nullable=False),
    pa.field("bottom_px", pa.float64(), nullable=False),
]

INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_sha256", pa.binary(), nullable=False),  # 32 bytes
        pa.field("file", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("num_views", pa.int32(), nullable=False),
        pa.field("offsets", pa.binary(), nullable=False),  # int64, little-endian, two for each map: where in the file its numbers and its steps begin
        pa.field("checksums", pa.binary(), nullable=False),  # uint64, little-endian: xxh3 of each map's bytes
    ]
)


def encoding_folder(encoding: EncodingSpec) -> str:
    """The folder of an encoding's table, relative to the root."""
    return f"features/{fingerprint(encoding)[:16]}"


def lock_encoding(store: Store, encoding: EncodingSpec) -> None:
    """Put on record what a table's numbers depend on, or hold it against the record.

    Args:
        store: where the table lies.
        encoding: its spec.

    Raises:
        SpecChangedError: the record says something else, field by field in the message.
    """
    path = f"{encoding_folder(encoding)}/spec.json"
    asked = {"type": type(encoding).__name__, "spec": json.loads(canonical_json(encoding))}
    if store.create_json(path, asked):
        return
    if differences := spec_differences(store.read_json(path), asked):
        raise SpecChangedError(
            f"{store.url(path)} says that these features are of another encoding. Differences: {'; '.join(differences)}. Restore the file, or use "
            "another root.",
            differences,
        )


def check_table(store: Store, folder: str, encoding: EncodingSpec) -> None:
    """Refuse an encoding whose features lie elsewhere than where they are expected.

    Args:
        store: where the table lies.
        folder: of the table that is expected, relative to the root.
        encoding: that is asked for.

    Raises:
        SpecChangedError: it is of another table; the message tells field by field how that one differs, or that it is not there.
    """
    if folder == encoding_folder(encoding):
        return
    path = f"{folder}/spec.json"
    try:
        stored = store.read_json(path)
    except ObjectNotFoundError as error:
        raise SpecChangedError(
            f"features.table: found {folder}, which {store.root} does not hold; these features would lie in {encoding_folder(encoding)}. `loupe gc` "
            "lists the tables that are there."
        ) from error
    differences = spec_differences(stored, {"type": type(encoding).__name__, "spec": json.loads(canonical_json(encoding))})
    raise SpecChangedError(
        f"features.table: found {folder}, but these features are of another encoding and would lie in {encoding_folder(encoding)}. Differences: "
        f"{'; '.join(differences)}. Change them back, or leave features.table out to compute these anew.",
        differences,
    )


def map_sets(maps: Sequence[MapSpec]) -> Iterator[tuple[MapSpec, ...]]:
    """Maps in the portions that share a file, in an order that depends on the maps alone.

    Args:
        maps: of one branch.

    Yields:
        Portions; one, but for very many maps.
    """
    portion: list[MapSpec] = []
    for item in sorted(set(maps), key=lambda item: (item.layers, item.pool)):
        if portion and len(map_set([*portion, item])) > _SET_CHARS:
            yield tuple(portion)
            portion = []
        portion.append(item)
    if portion:
        yield tuple(portion)


def map_set(maps: Sequence[MapSpec]) -> str:
    """The name of maps that share files, as the partition `maps` has it."""
    return "-".join(item.name for item in maps)


def maps_in(name: str) -> tuple[str, ...]:
    """The names of the maps that a `map_set` names, in the order of their columns."""
    return tuple(name.split("-"))


def file_name(encoding: EncodingSpec, branch: Branch, images: Sequence[str], checksums: Mapping[str, Sequence[int]]) -> str:
    """A file's name below its partition: a function of what is in it, to the last bit.

    Two drivers that encode a unit on different machines have numbers that are rounded differently, and the outcome of one is on record: the other
    must not write over its files.

    Args:
        encoding: of the table.
        branch: of the views.
        images: digests, in order.
        checksums: of the file's maps, by name, one for each image.
    """
    content = [fingerprint(encoding), branch, *images]
    for name, values in checksums.items():
        content += [name, *map(str, values)]
    digest = hashlib.sha256(":".join(content).encode()).hexdigest()
    return f"{digest[:2]}/{digest[:32]}.parquet"


def file_metadata(encoding: EncodingSpec) -> dict[str, str]:
    """What every file of a table says of itself.

    Args:
        encoding: of the table.
    """
    return {
        "loupe.encoding": fingerprint(encoding),
        "loupe.encoder_sha256": encoding.encoder.weights_sha256,
        "loupe.format_version": str(encoding.format_version),
    }


def file_schema(spec: FeatureSpec, branch: Branch, maps: Sequence[MapSpec]) -> pa.Schema:
    """Columns of a file: what a view is, then the maps.

    Args:
        spec: tells precision and shapes.
        branch: of the views.
        maps: the file's.
    """
    return pa.schema([*_VIEW_FIELDS, *(field for item in maps for field in map_fields(spec, branch, item))])


def map_fields(spec: FeatureSpec, branch: Branch, item: MapSpec) -> tuple[pa.Field, ...]:
    """The columns of a map of a branch: its numbers, and of int8 its tokens' steps in `<map>__steps`.

    Opaque bytes of a fixed size: Arrow's list and tensor types are 13 to 40 times slower to read.

    Args:
        spec: tells precision and shapes.
        branch: of the views.
        item: the map.
    """
    tokens, precision = item.num_tokens(spec.encoder.num_patches), spec.stored_as(branch, item)
    metadata = {
        "map": item.name,
        "layers": json.dumps(list(item.layers)),
        "dtype": _ARROW_DTYPE[precision],
        "pool": str(item.pool),
        "shape": json.dumps([tokens, spec.encoder.width]),
    }
    values = pa.field(item.name, pa.binary(spec.value_bytes(branch, item)), metadata=metadata)
    if precision != "int8":
        return (values,)
    steps = {"steps_of": item.name, "dtype": "float16", "shape": json.dumps([tokens])}
    return values, pa.field(f"{item.name}__steps", pa.binary(spec.step_bytes(branch, item)), metadata=steps)


def features_table(store: Store, spec: FeatureSpec) -> Table:
    """The table of an encoding's features: a row per view and portion of maps, partitioned by branch and by the maps that a file holds.

    Args:
        store: where it lies.
        spec: whose maps it must have columns for.
    """
    fields = {field.name: field for branch in BRANCHES for item in spec.maps(branch) for field in map_fields(spec, branch, item)}
    return Table(
        store,
        encoding_folder(spec.encoding),
        pa.schema([*_VIEW_FIELDS, *fields.values()]),
        ("branch", "maps"),
        grows=True,
    )


def index_table(store: Store, encoding: EncodingSpec) -> Table:
    """The table that says where every image's maps lie: a row per image, branch and portion of maps. Everything in it can be told from the files.

    Args:
        store: where it lies.
        encoding: of the features.
    """
    return Table(store, f"{encoding_folder(encoding)}/_index", INDEX_SCHEMA, ("branch", "maps"))
