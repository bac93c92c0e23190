"""The errors that users see. Each says what was received, where, which rule it breaks and how to mend it."""


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
