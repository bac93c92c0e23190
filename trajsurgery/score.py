"""`python -m trajsurgery.score`: `trajsurgery score` by another name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trajsurgery import command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return command.main(["score", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
