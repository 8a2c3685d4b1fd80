"""The image's file says what a deployment needs: pinned base, no root, no secrets, and the versions that pyproject names."""

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "infra" / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_bases_are_pinned_by_version() -> None:
    bases = re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)
    assert bases
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)


def test_it_does_not_run_as_root() -> None:
    assert re.findall(r"^USER (\S+)", TEXT, re.MULTILINE)[-1] == "10001"


def test_it_installs_with_the_constraints() -> None:
    assert "-c constraints.txt" in TEXT


def test_everything_copied_exists() -> None:
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE):
        for name in line.split():
            assert (REPOSITORY / name).exists(), name


def test_the_label_is_the_project_version() -> None:
    assert f'version="{PROJECT["version"]}"' in TEXT


def test_telemetry_is_off() -> None:
    for setting in ("RAY_USAGE_STATS_ENABLED=0", "DO_NOT_TRACK=1", "PREFECT_SERVER_ANALYTICS_ENABLED=false", "HF_HUB_DISABLE_TELEMETRY=1"):
        assert setting in TEXT
