"""The console command as tests start it: a process of its own, a session of its own, and nothing of the developer's own Prefect or Ray."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LOUPE = (sys.executable, "-m", "pipelines.cli")
PLAIN_LINE = re.compile(r"[a-z -]+: ")
"""A line of progress or of Loupe's own on standard error; what Ray's threads say begins otherwise."""


def environment(cache: Path) -> dict[str, str]:
    """The environment less any server or cluster that it points to; Loupe keeps its own things under `cache`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_HOME", "RAY_ADDRESS")}
    return {**kept, "LOUPE_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY)}


def start(cache: Path, *words: str) -> "subprocess.Popen[str]":
    """Start `loupe WORDS`; what it prints and complains can be read apart."""
    return subprocess.Popen(
        [*LOUPE, *words], env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def settings(*named: str) -> list[str]:
    """The words that give execution settings."""
    return [word for setting in named for word in ("--set", setting)]
