"""The errors that users see. Each says what was received, where, which rule it breaks and how to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches


class SurgeryError(Exception):
    """Whatever trajsurgery refuses."""


class PlanError(SurgeryError, ValueError):
    """A plan that breaks a rule of the language, or that does not fit the trajectory it is run on.

    `rules` holds the ids of the broken rules (`trajsurgery.plans.rules.RULES`).
    """

    def __init__(self, message: str, rules: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.rules = rules


class SamplerError(SurgeryError, RuntimeError):
    """A sampler, a field or a pipeline that the surgery can't be performed on."""


class RewardError(SurgeryError, ValueError):
    """A reward, or what was handed to it, that can't give a gradient."""


class RecipeError(SurgeryError, ValueError):
    """A recipe whose run can't start, or can't go on."""


class DivergedError(RecipeError):
    """A run whose loss or gradient is not finite any more; its last finite weights are saved."""


class OutOfMemoryError(SurgeryError):
    """A run that a GPU or the machine has no memory for: in which part, and what takes less."""


class OutputError(SurgeryError):
    """A file of a run that can't be written: a full disk, a read-only folder, a file where a folder should be."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'hpsv2.1'?" for the known name that is spelt most like this one; "" if none is like it.

    A name that is part of a known one is like it: 'flux' and 'black-forest-labs/FLUX.1-dev'.
    """
    names = {each.lower(): each for each in known}
    part_of = [each for each in names if len(name) > 2 and name.lower() in each]
    close = get_close_matches(name.lower(), names, 1) or part_of
    return f" Did you mean {names[close[0]]!r}?" if close else ""
