"""Methods by name: those of the package, and users' own."""

from __future__ import annotations

from dataclasses import is_dataclass, make_dataclass
from typing import Any, get_args

from trajsurgery.errors import RecipeError, SurgeryError, suggest
from trajsurgery.rewards.user_code import error_text, import_named
from trajsurgery.training.recipe import Method

METHODS: dict[str, Any] = {method.__name__: method for method in get_args(Method)}


def load_method(name: str) -> Any:
    """Return the method of a name, with its default settings.

    Args:
        name: that of a class in `trajsurgery.methods`, capitals and underscores aside; or MODULE:NAME or FILE.py:NAME:
            a class or an instance that has `draw(steps, generator) -> Plan`, or such a function.

    Raises:
        RecipeError: there is no such method; it can't be imported or made; it draws nothing.
    """
    if ":" in name:
        return _users_method(name)
    spelt = {known.lower(): known for known in METHODS}
    plain = name.lower().replace("_", "").replace("-", "")
    if plain not in spelt:
        raise RecipeError(
            f"there is no method {name!r}.{suggest(plain, METHODS)} It is {', '.join(METHODS)}, or your own, "
            "MODULE:NAME or FILE.py:NAME."
        )
    return METHODS[spelt[plain]]()


def _users_method(name: str) -> Any:
    """Return the dataclass instance of a name; a plain class or a function becomes a dataclass without settings."""
    target = import_named(name)
    try:
        method = target() if isinstance(target, type) else target
    except SurgeryError:
        raise
    except Exception as error:
        raise RecipeError(f"method {name!r}: it could not be made, {error_text(error)}.") from error
    draw = getattr(method, "draw", method)
    if not callable(draw):
        raise RecipeError(
            f"method {name!r} is {type(method).__name__}: a method is a function draw(steps, generator) -> Plan, or "
            "what has one."
        )
    if is_dataclass(method):
        return method
    label = name.rpartition(":")[2]
    attributes = {"draw": staticmethod(draw), "weights_at": getattr(method, "weights_at", "none")}
    return make_dataclass(label, [], namespace=attributes, frozen=True)()
