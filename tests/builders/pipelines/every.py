"""All small pipelines, by name: a new family enters every test and the benchmark by its line here."""

from __future__ import annotations

from collections.abc import Callable

from tests.builders.pipelines import flux, images, newer, video
from tests.builders.pipelines.parts import Small

BUILDERS: dict[str, Callable[[], Small]] = {**flux.BUILDERS, **images.BUILDERS, **video.BUILDERS, **newer.BUILDERS}
