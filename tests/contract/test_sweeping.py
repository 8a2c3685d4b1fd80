"""What serves nobody goes, and what came into use since it was listed stays, in every kind of store."""

import pyarrow as pa

from workers.storage import Store
from workers.sweeping import find_leftovers, remove_leftovers
from workers.tables import Table

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False)])
EVERYTHING = {"older_than_s": -1e6}


def test_an_orphan_goes_unless_it_was_written_or_committed_since(store_root):
    store = Store(store_root)
    table = Table(store, "features/0123456789abcdef", SCHEMA, ("branch", "maps"))
    table.ensure()

    def write(name, num_rows=1):
        rows = pa.table({"id": pa.array(range(num_rows), pa.int64())}, schema=SCHEMA)
        return table.write_file({"branch": "local", "maps": "layer_5"}, f"aa/{name}.parquet", [rows])

    files = {name: write(name) for name in ("held", "written", "committed", "orphan", "another")}
    places = {name: f"{table.path}/{file.path}" for name, file in files.items()}
    table.commit([files["held"]])
    found = find_leftovers(store, store.list_objects(), **EVERYTHING)
    assert {path for item in found for path in item.paths} == {places[name] for name in places if name != "held"}
    assert find_leftovers(store, store.list_objects()) == []  # written a moment ago
    write("written", num_rows=1000)
    table.commit([files["committed"]])
    removed = {path for item in remove_leftovers(store, found) for path in item.paths}
    assert removed == {places["orphan"], places["another"]}
    assert set(store.list(f"{table.path}/branch=local")) == {places[name] for name in ("held", "written", "committed")}
    assert remove_leftovers(store, found) == []
