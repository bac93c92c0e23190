"""SRPO (Shen et al., 2025, arXiv 2509.06942): known noise put on the image, one step with gradient, and taken off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import Method, uniform, window_times
from trajsurgery.plans.nodes import Draw, Leap, Recover, Time
from trajsurgery.plans.plan import Plan, latent

if TYPE_CHECKING:
    import torch

GUIDED = "guided"
"""The name of the field that takes SRPO's step, if its rollout has another guidance."""


def srpo(k: Time, j: Time, field: str | None = None, draw: Draw = "rollout") -> Plan:
    """x_0 ~> x_k -> x^_j|k ~> x^_0: noise injection, one step from k to j, analytic recovery with the same noise.

    Gradient, k and j standing for their sigmas: - (k - j) / (1 - j) dv(x_k)/dtheta, at the renoised x_k. With j > k it
    is the inversion: the step rises, and the gradient, (j - k) / (1 - j) dv(x_k)/dtheta, has the other sign.

    Args:
        k: the time of the step, in 1..T - 1, or a name.
        j: the time it leads to, another one in 1..T - 1, or a name.
        field: the name of the field that takes the step (SRPO's is guided, its rollout is not); the rollout's own if
            left out.
        draw: the noise; the original's is the one that the rollout began with.
    """
    x_k = latent(0).renoise(k, draw)
    return Plan(x_k.leap(j, velocity=x_k.velocity(field)).recover(draw))


def relative(reward: Any, positive: str, negative: str, k: float) -> Callable[[Any, Sequence[str]], Any]:
    """SRPO's reward, (1 + k) r(image, p+) - r(image, p-): the prompts with a control word before them, if there is one.

    Args:
        reward: r(images, prompts) -> scores.
    """

    def score(word: str, images: Any, prompts: Sequence[str]) -> Any:
        return reward(images, [f"{word}. {prompt}" if word else str(prompt) for prompt in prompts])

    return lambda images, prompts: (1 + k) * score(positive, images, prompts) - score(negative, images, prompts)


@dataclass(frozen=True)
class SRPO(Method):
    """Draws a time m of the window; the step lands there, from `step` above and, in the inversion, from `step` below.

    With control words the outputs' rewards are relative: (1 + k) r(p+) - r(p-) after the step down, and, as the
    original's regulariser, (1 + k') r(p-) - r(p+) after the step up. Without words both the inversion and the
    difference are left out, and what is left is Direct-Align.

    Deviations from the authors' code: times are the sampler's (theirs are a thousand between 0.5 T and 0.9 T of a
    sampler of 50 steps, a step a tenth of these: the same length as `step=1` of 25); words are drawn, not taken in
    turn; the two losses are summed, not averaged; both branches are of one rollout, as theirs are, but a batch has a
    noise for each image; the image is decoded and graded in the precision of the recipe.

    Args:
        positive: control words, one drawn for each rollout (the authors', for HPSv2.1: Natural-lighting, Detail,
            Detailed, Real).
        negative: the same (Concept art, Painting, Anime, Flat, Oil).
        discount: k where the window is least noisy, and where it is noisiest; linear between them.
        discount_inversion: k', likewise.
        inversion: whether the step up is taken, too.
        step: the step's length in steps of the sampler.
        window: the range of m, as shares of T.
        rollout_guidance: the guidance of the rollout, if it is not the recipe's: 1 in the original, whose step has 3.5.
            Only for models whose guidance is an input, such as FLUX.1-dev.
    """

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    discount: tuple[float, float] = (0.1, 0.25)
    discount_inversion: tuple[float, float] = (0.3, 0.01)
    inversion: bool = True
    step: int = 1
    window: tuple[float, float] = (0.5, 0.9)
    rollout_guidance: float | None = None

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        self._check()
        both, times = self.inversion and self._relative, window_times(self.window, steps)
        free = [m for m in times if m + self.step < steps and m > self.step * both]  # at T nothing of the image is left
        if not free:
            raise PlanError(
                f"SRPO(step={self.step}, window={self.window}) on {steps} steps: of the times {list(times)} none is "
                f"{self.step} steps below a time under T{' and as many above one over 0' * both}. Widen the window, "
                "shorten the step, or take more steps."
            )
        m, field = free[uniform(len(free), generator)], None if self.rollout_guidance is None else GUIDED
        down, up = srpo(m + self.step, m, field), srpo(m - self.step, m, field) if both else None
        return Plan(*down.outputs, *(up.outputs if up else ()))

    def graded(self, plan: Plan, reward: Any, generator: torch.Generator | None = None) -> tuple[Any, ...]:
        """What grades each output of a plan that was drawn here: (images, prompts) -> scores."""
        if not self._relative:
            return tuple(reward for _ in plan.outputs)
        words = [w[uniform(len(w), generator)] if w else "" for w in (self.positive, self.negative)]
        return tuple(self._grader(output, reward, words, plan.steps or 0) for output in plan.outputs)

    def _grader(self, output: Any, reward: Any, words: Sequence[str], steps: int) -> Any:
        assert isinstance(output, Recover), "a plan of SRPO ends in a recovery"
        assert isinstance(output.x, Leap), "of a step"
        start, to = int(output.x.x.t), int(output.x.to)
        times = window_times(self.window, steps)
        share = (min(start, to) - times[0]) / max(1, times[-1] - times[0])
        first, last = self.discount if to < start else self.discount_inversion
        k = first + (last - first) * min(max(share, 0.0), 1.0)
        wanted, unwanted = words if to < start else reversed(words)
        return relative(reward, wanted, unwanted, k)

    @property
    def _relative(self) -> bool:
        return bool(self.positive or self.negative)

    def _check(self) -> None:
        if self.step < 1 or not all(0 <= k < float("inf") for k in (*self.discount, *self.discount_inversion)):
            raise PlanError(f"{self}: the step is at least 1; the discounts are finite and at least 0.")
        if self._relative and set(self.positive or ("",)) == set(self.negative or ("",)):
            raise PlanError(f"{self}: the control words that are wanted and those that are not are the same.")
