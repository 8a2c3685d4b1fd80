"""The repository keeps what its documents promise: pins without addresses, commands that exist, nothing that must not be committed."""

import re
import subprocess
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_constraints_pin_exact_versions_and_name_no_address() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][^+ ]*", line) for line in lines)
    pins = {line.split("==")[0].lower().replace("_", "-"): line.split("==")[1] for line in lines}
    assert pins["torch"] == "2.13.0"
    assert tuple(map(int, pins["fastapi"].split("."))) < (0, 151)
    assert pins["sqlalchemy"].startswith("2.0.")


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = {line.split("==")[0].lower().replace("_", "-") for line in (REPOSITORY / "constraints.txt").read_text().splitlines()}
    wanted = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    names = {re.split(r"[\[<>=!]", item)[0].lower() for item in wanted} - {"loupe"}
    assert names <= pins


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    for target in phony.group(1).split():
        assert f"make {target} " in done.stdout
    assert {"help", "demo", "test", "test-all", "check", "bench", "golden"} <= set(phony.group(1).split())


def test_committed_text_is_ascii() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\n")
    wanted = [name for name in files if name.endswith((".py", ".toml", ".md", ".j2", ".txt", "Makefile", "Dockerfile", "run"))]
    assert wanted
    strange = [name for name in wanted if (REPOSITORY / name).is_file() and not (REPOSITORY / name).read_bytes().isascii()]
    assert strange == []


def test_no_pickles_are_loaded() -> None:
    suspicious = re.compile(r"(?<!safetensors\.)\b(pickle\.loads?|torch\.load|joblib\.load|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True)")
    found = []
    for package in ("model", "workers", "pipelines"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if suspicious.search(line) and "weights_only=True" not in line:
                    found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}")
    assert found == []
