import pytest

from tests import small_data
from tests.fault.cache_runs import UNDISTURBED, rows
from workers.caching.build import cache_features
from workers.execution import SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_encoder_folder):
    """The spec, and the rows that every run must end with."""
    store = Store(str(tmp_path_factory.mktemp("undisturbed")))
    dataset = small_data.dataset_spec()
    small_data.build(store, dataset)
    spec = small_data.feature_spec(dataset, tiny_encoder_folder)
    cache_features(spec, store, UNDISTURBED, SilentProgress(), cluster=InlineCluster())
    return spec, rows(store, spec)
