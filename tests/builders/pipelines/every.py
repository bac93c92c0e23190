"""All small pipelines by name: the tests of every pipeline and the benchmark use this table."""

from __future__ import annotations

from collections.abc import Callable

from tests.builders.pipelines import flux, images, newer, video
from tests.builders.pipelines.parts import Small

BUILDERS: dict[str, Callable[[], Small]] = {**flux.BUILDERS, **images.BUILDERS, **video.BUILDERS, **newer.BUILDERS}
