"""A pipeline, a reward or prompts given as objects instead of by their names in the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trajsurgery.errors import RecipeError
from trajsurgery.rewards.loading import Reward
from trajsurgery.tiny.pipe import FOLDERS
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Recipe

GIVEN = "given in code"
"""What a recipe's dict says of prompts that came as a list."""


@dataclass(frozen=True)
class OwnParts:
    """What of a run comes as objects; None: the recipe names it."""

    pipe: Any = None
    reward: Reward | None = None
    prompts: Sequence[str] | None = None
    heldout: Sequence[str] | None = None

    def named(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the objects' names.

        Raises:
            RecipeError: prompts without held-out ones, or an empty list.
        """
        for name, texts in (("prompts", self.prompts), ("heldout", self.heldout)):
            items: list[Any] = [] if texts is None or isinstance(texts, str) else list(texts)
            if texts is not None and not (items and all(isinstance(text, str) for text in items)):
                raise RecipeError(f"{name}= is a list of texts; a file of them is named so: Recipe({name}=FILE).")
        if self.prompts is not None and self.heldout is None and recipe.heldout == "tiny":
            raise RecipeError(
                "prompts= needs heldout= beside it: prompts that are not trained on, for the evaluation before and "
                "after; or name a file, Recipe(heldout=...)."
            )
        names: dict[str, Any] = {}
        if self.pipe is not None:
            names["model"] = _model_name(self.pipe)
            names["train"] = replace(recipe.train, keep_encoders=True)  # the pipeline is the caller's, and stays whole
        if self.reward is not None:
            names["reward"] = str(getattr(self.reward, "__qualname__", None) or type(self.reward).__qualname__)
        names |= {name: GIVEN for name in ("prompts", "heldout") if getattr(self, name) is not None}
        return replace(recipe, **names)

    @property
    def fields(self) -> frozenset[str]:
        """The recipe's fields that these objects stand for."""
        values = {"model": self.pipe, "reward": self.reward, "prompts": self.prompts, "heldout": self.heldout}
        return frozenset(name for name, value in values.items() if value is not None)

    @property
    def heldout_prompts(self) -> tuple[Prompt, ...] | None:
        """The held-out prompts, of one category."""
        return None if self.heldout is None else tuple(map(Prompt, self.heldout))


def _model_name(pipe: Any) -> str:
    """Return where a pipeline was loaded from: an embedded model's name, a folder, a hub id; else its class."""
    place = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
    embedded = {str(folder): "tiny" if name == "flux" else f"tiny:{name}" for name, folder in FOLDERS.items()}
    return embedded.get(place, place)
