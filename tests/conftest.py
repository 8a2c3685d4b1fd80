"""What every test starts from: no telemetry, no network, homes of its own, and one Ray for the session.

Do not import model, workers or pipelines at the top of this file: jaxtyping's import hook has to be in place first.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import tests.typechecker  # noqa: F401 - jaxtyping's hook looks it up as an attribute of `tests`

_SESSION_HOME = Path(tempfile.mkdtemp(prefix="loupe-test-", dir="/tmp"))  # short: Ray puts sockets below it

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables are as wide as it says

# Before anything imports Ray, Prefect or transformers: they read their environment when imported, and their workers inherit it.
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # a loopback cluster that lives for this session; else Ray writes a token into the developer's home
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(_SESSION_HOME / "prefect"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(_SESSION_HOME / "huggingface"),
        "LOUPE_CACHE": str(_SESSION_HOME / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(_SESSION_HOME / "torch-extensions"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "MPLCONFIGDIR": str(_SESSION_HOME / "matplotlib"),
    }
)


# A machine that does other things too is no error: tests time nothing.
settings.register_profile("loupe", deadline=None)
settings.load_profile("loupe")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Heavy, benchmark and GPU tests run only when asked for by name of marker."""
    asked = config.getoption("-m")
    for item in items:
        for marker in ("heavy", "benchmark"):
            if item.get_closest_marker(marker) and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=f"asked for by -m {marker}"))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _session_home() -> Iterator[Path]:
    """Homes of the libraries for this session, deleted at its end."""
    import shutil

    yield _SESSION_HOME
    shutil.rmtree(_SESSION_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests of the session that need it: a start costs 5 s."""
    from workers.execution import ExecutionSettings
    from workers.runtime import ray_runtime

    with ray_runtime(ExecutionSettings(num_cpus=2)):
        yield


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP vision tower of 6 blocks, width 32, 56 px views, in a folder."""
    from tests.tiny import write_tiny_encoder

    return write_tiny_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture(scope="session")
def tiny_language_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers, width 64, with its tokenizer, in a folder."""
    from tests.tiny import write_tiny_language_model

    return write_tiny_language_model(tmp_path_factory.mktemp("tiny-language-model"))


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A fresh root URL."""
    return (tmp_path / "root").as_uri()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The tokenizer of the tiny language model."""
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()
