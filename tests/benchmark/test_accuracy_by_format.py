"""Claim guarded: what is stored in half the bytes, or in a quarter, trains as good a connector.

`ROOT=FOLDER pytest -m benchmark -s --jaxtyping-packages= tests/benchmark/test_accuracy_by_format.py` trains and asks `components/dci` from features
in fp16 and from the same features rounded to int8 without a calibration and to fp8 before they are stored, and `components/int8` and
`components/pooled`; SEEDS seeds each (3), some minutes a seed. It goes on where it stopped when it is given the same folder. FORMATS names some of
them, `fp16,fp8-plain`; differences are to the first.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from torch import Tensor

from pipelines.compare import compare_runs, find_run
from pipelines.recipe_files import load_recipe
from pipelines.settings import execution_settings
from pipelines.stages import open_experiment
from tests import commands
from tests.benchmark.formats import fp8, plain_int8
from workers.caching.build import cache_features
from workers.caching.codec import FeatureCodec
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]

NUM_SEEDS = int(os.environ.get("SEEDS", "3"))
FORMATS: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {
    "fp16": ("dci", None),
    "int8": ("int8", None),
    "int8-plain": ("dci", plain_int8),
    "fp8-plain": ("dci", fp8),
    "pooled": ("pooled", None),
}
UNCHECKED = """import importlib.util, sys

class Unchecked:
    def find_spec(self, name, path=None, target=None):
        if name != "workers.caching.reader":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        load = found.loader.exec_module

        def exec_module(module):
            load(module)
            module._CANARY_TOLERANCE = {"fp32": 1.0}

        found.loader.exec_module = exec_module
        return found

sys.meta_path.insert(0, Unchecked())
"""
"""Python's start in every process of a run on rounded features. Training encodes two images again and refuses a cache that is not what its encoder
gives, which features in a format that Loupe does not offer are not."""

CHOSEN = os.environ.get("FORMATS", ",".join(FORMATS)).split(",")


def recipe_of(folder: Path, name: str, base: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(f'extends = "components/{base}"\nname = "{name}"\ndescription = "Features in {name}."\nseeds = {list(range(NUM_SEEDS))}\n')
    return str(path)


def loupe(cache: Path, *words: str, start: str = "") -> None:
    environment = commands.environment(cache)
    (cache / "start").mkdir(parents=True, exist_ok=True)
    (cache / "start" / "sitecustomize.py").write_text(start)
    environment["PYTHONPATH"] = f"{cache / 'start'}{os.pathsep}{environment['PYTHONPATH']}"
    subprocess.run([*commands.LOUPE, *words], env=environment, check=True)


def cache_rounded(recipe: str, store: Store, rounding: Callable[[Tensor], Tensor]) -> None:
    """Features as another format would give them back, in fp16."""
    file = load_recipe(recipe)
    experiment = open_experiment(file, store, execution_settings({}, file.recipe))
    as_it_is = FeatureCodec.rounded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCodec, "rounded", lambda codec, branch, item, tokens: as_it_is(codec, branch, item, rounding(tokens)))
        record = cache_features(experiment.features, store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    quality = {place: f"{found['snr_db']:.1f} dB" for place, found in record.quality.items()}
    print(f"{recipe}: {quality}")


def test_accuracy_from_what_is_stored(tmp_path: Path) -> None:
    folder = Path(os.environ.get("ROOT", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for name in CHOSEN:
        base, rounding = FORMATS[name]
        recipe, root = recipe_of(folder, name, base), str(folder / name)
        if rounding is not None:
            loupe(folder / "cache", "build-dataset", recipe, "--root", root)
            cache_rounded(recipe, Store(root), rounding)
        loupe(folder / "cache", "evaluate", recipe, "--root", root, start=UNCHECKED if rounding else "")
        runs.append(find_run(recipe, Store(root)))
        seeds = [mean(row["exact_match"] for row in answers if row["mode"] == "both") for answers in runs[-1].answers]
        print(f"{name:12} both views, by seed: {', '.join(f'{100 * accuracy:.1f}' for accuracy in seeds)}", flush=True)
    rows = compare_runs(runs).rows
    (both,) = [row for row in rows if (row.mode, row.family, row.detail) == ("both", "", "")]
    for name, found in zip(CHOSEN, both.means, strict=True):
        print(f"{name:12} {100 * found.mean:.1f}")
    for name, against in zip(CHOSEN[1:], both.differences, strict=True):
        print(f"{name:12} {100 * against.difference:+.1f} ({100 * against.low:+.1f} to {100 * against.high:+.1f}) to {CHOSEN[0]}")
