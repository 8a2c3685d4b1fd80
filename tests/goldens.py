"""Golden files: what a computation gave when somebody last looked at it. `make golden` writes them anew; look at the difference before you commit."""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden"


def golden(name: str, value: Any) -> Any:
    """The golden value of that name; with LOUPE_WRITE_GOLDEN in the environment, this value becomes it."""
    path = FOLDER / f"{name}.json"
    if os.environ.get("LOUPE_WRITE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    return json.loads(path.read_text())
