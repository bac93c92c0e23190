"""Files of a run, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trajsurgery.training import ranks


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(partial_path)`, flush to disk and rename: if the process is killed, the old file stays.

    Of several ranks the first one writes.
    """
    if not ranks.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
