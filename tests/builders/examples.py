"""Numbers of examples for properties whose examples are slow."""

from hypothesis import settings


def few_examples(count: int) -> settings:
    """Return settings that draw `count` examples, whatever the profile; under the profile "thorough" all of its own."""
    thorough = settings.get_profile("thorough").max_examples
    return settings(max_examples=thorough if settings.default.max_examples == thorough else count)
