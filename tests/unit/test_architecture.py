"""The house's direction: pipelines -> workers -> model, nothing backwards, no cycles; and each check is shown to be able to fail."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "workers", "pipelines")

MAY_IMPORT = {"model": {"model"}, "workers": {"workers", "model"}, "pipelines": {"pipelines", "workers", "model"}}

# What model must do without: a notebook, an export's reader or a planner has no cluster and no store.
FOREIGN_TO_MODEL = ("ray", "prefect", "pyarrow", "deltalake", "fsspec", "s3fs", "deepspeed", "cyclopts")

# Standard library alone, so that planning needs no torch.
STDLIB_ONLY = (
    "model/errors.py",
    *(str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "model" / "specs").glob("*.py"))),
    "model/architectures.py",
    "model/views.py",
    "workers/errors.py",
    "workers/execution.py",
    "workers/dataset/spec.py",
)

# The only files that know Ray. Everything else is plain functions and classes, tested without a cluster.
KNOW_RAY = {
    "workers/runtime.py",
    "workers/dataset/build.py",
    "workers/caching/build.py",
    "workers/training/run.py",
    "workers/training/loop.py",
    "workers/evaluation.py",
}
KNOW_PREFECT = {"pipelines/flow.py", "pipelines/serve.py", "pipelines/flow_server.py"}
KNOW_DEEPSPEED = {"workers/training/engine.py"}


def _files(root: Path) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Absolute names of what a file imports; `from a import b` counts as a.b as well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if at_import_only:
        for node in ast.walk(tree):
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if lazy or typing_only:
                skipped.update(ast.walk(node))
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their direction; write the absolute one"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _backward_imports(root: Path) -> list[str]:
    found = []
    for path in _files(root):
        package = path.relative_to(root).parts[0]
        for name in _imports(path):
            top = name.split(".")[0]
            if top in PACKAGES and top not in MAY_IMPORT[package]:
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


def _cycles(root: Path) -> list[list[str]]:
    """Cycles among modules by what they import when imported (lazy and typing-only imports cannot deadlock an import)."""
    modules = {_module_name(path, root): path for path in _files(root)}
    graph = {
        name: sorted(target for target in _imports(path, at_import_only=True) if target in modules and target != name)
        for name, path in modules.items()
    }
    cycles: list[list[str]] = []
    state: dict[str, str] = {}

    def visit(name: str, trail: list[str]) -> None:
        state[name] = "open"
        for target in graph[name]:
            if state.get(target) == "open":
                cycles.append([*trail[trail.index(target) :], target])
            elif target not in state:
                visit(target, [*trail, target])
        state[name] = "done"

    for name in graph:
        if name not in state:
            visit(name, [name])
    return cycles


def _not_stdlib(root: Path, files: tuple[str, ...]) -> list[str]:
    allowed = {_module_name(root / file, root) for file in files}
    found = []
    for file in files:
        for name in _imports(root / file, at_import_only=True):
            own = any(name == module or name.startswith(f"{module}.") for module in allowed)
            if not own and name.split(".")[0] not in sys.stdlib_module_names:
                found.append(f"{file} imports {name}")
    return found


def _users(root: Path, library: str) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for path in _files(root)
        if any(name == library or name.startswith(f"{library}.") for name in _imports(path))
    }


def _import_everything_in_model(root: Path, foreign: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Import each module of model in a process where the foreign packages are as if not installed: libraries that look for them find nothing."""
    program = textwrap.dedent(
        f"""
        import importlib, pkgutil, sys
        class Without:
            def __init__(self, finder):
                self.finder = finder
            def __getattr__(self, name):
                return getattr(self.finder, name)
            def find_spec(self, name, path=None, target=None):
                return None if name.split(".")[0] in {foreign!r} else self.finder.find_spec(name, path, target)
        sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
        sys.path.insert(0, {str(root)!r})
        import model
        names = [info.name for info in pkgutil.walk_packages(model.__path__, "model.")]
        for name in names:
            importlib.import_module(name)
        print(len(names))
        """
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)


def test_imports_go_one_way() -> None:
    assert _backward_imports(REPOSITORY) == []


def test_no_import_cycles() -> None:
    assert _cycles(REPOSITORY) == []


def test_planning_modules_need_the_standard_library_alone() -> None:
    assert _not_stdlib(REPOSITORY, STDLIB_ONLY) == []


@pytest.mark.parametrize(("library", "allowed"), [("ray", KNOW_RAY), ("prefect", KNOW_PREFECT), ("deepspeed", KNOW_DEEPSPEED)])
def test_frameworks_stay_in_their_files(library: str, allowed: set[str]) -> None:
    assert _users(REPOSITORY, library) <= allowed


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    assert [path for path in _files(REPOSITORY) if path.stem in vague or vague & set(path.parent.parts)] == []


def test_model_imports_without_cluster_or_store() -> None:
    done = _import_everything_in_model(REPOSITORY, FOREIGN_TO_MODEL)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3


# ---- the checks can fail


@pytest.fixture
def crooked_house(tmp_path: Path) -> Path:
    """A small house in which everything is wrong."""
    sources = {
        "model/__init__.py": "",
        "model/specs.py": "import numpy\n",
        "model/early.py": "from workers import late\nimport pyarrow\n",
        "workers/__init__.py": "",
        "workers/late.py": "def work():\n    from pipelines import flow\n",
        "workers/one.py": "import workers.two\nimport ray.train\n",
        "workers/two.py": "from workers.one import anything\n",
        "pipelines/__init__.py": "",
        "pipelines/flow.py": "from workers import one\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_backward_imports_are_seen_even_inside_functions(crooked_house: Path) -> None:
    found = _backward_imports(crooked_house)
    assert any(line.startswith("model/early.py imports workers") for line in found)
    assert any(line.startswith("workers/late.py imports pipelines") for line in found)
    assert not any(line.startswith("pipelines/") for line in found)


def test_cycles_are_seen(crooked_house: Path) -> None:
    assert any(set(cycle) == {"workers.one", "workers.two"} for cycle in _cycles(crooked_house))


def test_third_party_imports_are_seen_in_planning_modules(crooked_house: Path) -> None:
    assert _not_stdlib(crooked_house, ("model/specs.py",)) == ["model/specs.py imports numpy"]


def test_framework_users_are_seen(crooked_house: Path) -> None:
    assert _users(crooked_house, "ray") == {"workers/one.py"}


def test_blocked_imports_fail(crooked_house: Path) -> None:
    (crooked_house / "model" / "specs.py").write_text("")
    (crooked_house / "model" / "early.py").write_text("import pyarrow\n")
    done = _import_everything_in_model(crooked_house, FOREIGN_TO_MODEL)
    assert done.returncode != 0
    assert "No module named 'pyarrow'" in done.stderr
