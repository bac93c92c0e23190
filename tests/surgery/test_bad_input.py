"""Invalid fields, noise and sigmas are refused in every way of running."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trajsurgery import (
    PlanError,
    SamplerError,
    SurgeryError,
    Trajectory,
    apply,
    backward,
    distances,
    draft_lv,
    errors,
    leapalign,
    rollout,
    sample,
    values,
)
from trajsurgery.testing import MLP

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMAS = [1.0, 0.7, 0.4, 0.0]
FIELD: Any = MLP(4)
PARAMS = list(FIELD.parameters())
PLAN: Any = leapalign(3, 1)
RENOISING: Any = draft_lv(1)
ONES = torch.ones_like(X)


def rolled() -> Trajectory:
    return rollout(FIELD, X.clone(), SIGMAS)


def backpropagated(memory: Any) -> Callable[[Any], Any]:
    return lambda field: torch.autograd.backward(apply(PLAN, rolled(), field, memory, params=PARAMS), ONES)


WAYS: dict[str, Callable[[Any], Any]] = {
    "rollout": lambda field: rollout(field, X.clone(), SIGMAS),
    "sample": lambda field: sample(PLAN, field, X.clone(), SIGMAS),
    "sample recompute": lambda field: sample(PLAN, field, X.clone(), SIGMAS, memory="recompute"),
    "retain": backpropagated("retain"),
    "recompute": backpropagated("recompute"),
    "recompute, leaves looked up": lambda field: apply(PLAN, rolled(), lambda x, s: field(x, s), "recompute"),
    "staged": lambda field: backward(PLAN, rolled(), field, ONES),
    "values": lambda field: values(RENOISING, rolled(), field),
    "distances": lambda field: distances(RENOISING, rolled(), field),
    "evaluate": lambda field: PLAN.gradient().evaluate(rolled(), field, ONES, PARAMS),
}
"""Every function that calls a field."""


def changes_input(x: Tensor, sigma: Tensor) -> Tensor:
    x.mul_(0.5)
    return FIELD(x, sigma)


def changes_view(x: Tensor, sigma: Tensor) -> Tensor:
    x[:, :2] = 0
    return FIELD(x, sigma)


FIELDS: dict[str, tuple[Any, str]] = {
    "a number": (3, "can't be called"),
    "nothing": (None, "can't be called"),
    "a plan": (PLAN, "can't be called"),
    "of one argument": (lambda x: x, r"can't be called.*lambda x, sigma"),
    "that returns nothing": (lambda x, s: None, "returned a NoneType"),
    "that returns a tuple": (lambda x, s: (FIELD(x, s),), "returned a tuple"),
    "of another shape": (lambda x, s: FIELD(x, s)[:1], r"returned shape \(1, 4\) for a latent of shape \(2, 4\)"),
    "of integers": (lambda x, s: FIELD(x, s).long(), r"returned torch\.int64"),
    "of complex numbers": (lambda x, s: FIELD(x, s) + 0j, r"returned torch\.complex128"),
    "on another device": (lambda x, s: FIELD(x, s).to("meta"), "on meta for a latent on cpu"),
    "that changes its input": (changes_input, "in place"),
    "that changes a part of its input": (changes_view, "in place"),
}
"""Invalid fields, each with the regular expression of its error message."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mistake", FIELDS)
def test_an_invalid_field_is_refused(mistake: str, way: str) -> None:
    field, message = FIELDS[mistake]
    if way == "recompute, leaves looked up" and "can't be called" in message:
        return  # the lambda around it can be called
    with pytest.raises(SamplerError, match=message):
        WAYS[way](field)


@pytest.mark.parametrize("back", [lambda x, s: x, lambda x, s: x.view(4, 2).view(2, 4), lambda x, s: x.detach()])
def test_a_field_that_returns_its_input_is_refused(back: Any) -> None:
    trained = lambda x, s: FIELD(x, s) if float(s) > 0.5 else back(x, s)  # noqa: E731
    for way in ("rollout", "sample", "sample recompute"):
        with pytest.raises(SamplerError, match=r"its own input, or a view of it, at t = 3.*clone"):
            WAYS[way](back)
    for way in ("retain", "recompute", "staged", "values", "evaluate"):
        with pytest.raises(SamplerError, match="its own input"):
            WAYS[way](trained)
    copied = rollout(lambda x, s: back(x, s).clone(), X, SIGMAS)
    assert copied[3] is not copied.velocity(3)


def test_a_field_that_writes_into_one_buffer_is_refused() -> None:
    buffer = torch.empty_like(X)
    with pytest.raises(SamplerError, match=r"t = \[3, 2\] were changed in place.*one buffer"):
        rollout(lambda x, s: buffer.copy_(FIELD(x, s).detach()), X, SIGMAS)


def test_a_velocity_of_a_wider_dtype_than_the_latents_is_refused() -> None:
    """A float32 velocity would make float32 latents of bfloat16 noise, from the second step on."""
    wide = MLP(4, dtype=torch.float32)
    start = X.bfloat16()
    for run in (
        lambda: rollout(lambda x, s: wide(x.float(), s), start, SIGMAS),
        lambda: sample(PLAN, lambda x, s: wide(x.float(), s), start, SIGMAS),
        lambda: apply(PLAN, rollout(MLP(4, dtype=torch.bfloat16), start, SIGMAS), lambda x, s: wide(x.float(), s)),
    ):
        with pytest.raises(SamplerError, match=r"torch\.float32 for a latent of torch\.bfloat16, at t = 3.*v\.to\(x"):
            run()


def test_a_velocity_of_a_narrower_dtype_leaves_the_latents_dtype() -> None:
    """Under autocast a field returns bfloat16 velocities for float32 latents."""
    narrow = MLP(4, dtype=torch.bfloat16)
    trajectory = rollout(lambda x, s: narrow(x.bfloat16(), s), X.float(), SIGMAS)
    assert {a.dtype for a in trajectory.latents.values()} == {torch.float32}
    out: Any = apply(PLAN, trajectory, lambda x, s: narrow(x.bfloat16(), s), "recompute")
    assert out.dtype == torch.float32


def test_errors_raised_inside_the_field_pass_unchanged() -> None:
    def typed(x: Tensor, sigma: Tensor) -> Tensor:
        return x + None  # type: ignore[arg-type]

    for broken, error in ((typed, TypeError), (lambda x, s: x @ x, RuntimeError)):
        with pytest.raises(error) as err:
            rollout(broken, X, SIGMAS)
        assert not isinstance(err.value, SurgeryError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_velocity_that_is_not_finite_is_named(value: float) -> None:
    def field(x: Tensor, sigma: Tensor) -> Tensor:
        return FIELD(x, sigma) + torch.tensor([[value], [0.0]], dtype=x.dtype) * (1.0 if sigma == 0.7 else 0.0)

    broken = lambda x, s: torch.where(s == 0.7, field(x, s), FIELD(x, s))  # noqa: E731
    for run in (lambda: rollout(broken, X, SIGMAS), lambda: sample(PLAN, broken, X, SIGMAS)):
        with pytest.raises(SamplerError, match=r"v_2 is the first that does, in 1 of 2 samples"):
            run()
    assert not rollout(broken, X, SIGMAS, check=False)[0][0].isfinite().any()
    assert rollout(broken, X, SIGMAS, check=False)[0][1].isfinite().all()
    sample(PLAN, broken, X, SIGMAS, check=False)


def test_noise_that_is_not_finite_and_steps_that_overflow_are_named() -> None:
    with pytest.raises(SamplerError, match=r"the noise handed in is the first that does, in 2 of 2"):
        rollout(FIELD, X * math.nan, SIGMAS)
    with pytest.raises(SamplerError, match=r"x_2 is the first that does"):
        rollout(lambda x, s: torch.full_like(x, -60000.0), torch.full((1, 2), 60000.0).half(), SIGMAS)


NOISES: dict[str, tuple[Any, str]] = {
    "integers": (X.long(), r"torch\.int64"),
    "complex": (X + 0j, r"torch\.complex128"),
    "booleans": (X > 0, r"torch\.bool"),
    "a number": (torch.tensor(1.0), r"shape \(\)"),
    "a list": (X.tolist(), "is a list"),
    "nothing": (None, "is a NoneType"),
    "the field": (FIELD, "is a MLP"),
    "numpy's": (X.numpy(), "is a ndarray"),
}


@pytest.mark.parametrize("mistake", NOISES)
def test_invalid_noise_is_refused(mistake: str) -> None:
    bad, message = NOISES[mistake]
    for run in (lambda: rollout(FIELD, bad, SIGMAS), lambda: sample(PLAN, FIELD, bad, SIGMAS)):
        with pytest.raises(SamplerError, match=f"noise received.*{message}"):
            run()


SAMPLERS: tuple[Any, ...] = (
    *("abc", None, 1.0, ["a", "b"], [1, [0.5]], [None, 0.0], torch.tensor(1.0), torch.tensor([True, False])),
    *(
        torch.tensor([1 + 0j, 0]),
        torch.ones(3, device="meta"),
        [1.0, math.nan, 0.0],
        torch.tensor([1.0, math.nan, 0.0]),
    ),
)


@pytest.mark.parametrize("sigmas", SAMPLERS, ids=str)
def test_invalid_sigmas_are_refused(sigmas: Any) -> None:
    for run in (lambda: rollout(FIELD, X, sigmas), lambda: sample(PLAN, FIELD, X, sigmas)):
        with pytest.raises(SamplerError, match="sigmas"):
            run()


@pytest.mark.parametrize(
    "sigmas",
    [
        [1.0, 0.2, 0.5, 0.0],
        [1.0, 0.5, 0.5, 0.0],
        [2.0, 1.0, 0.5, 0.0],
        [1.0],
        [],
        [[1, 0]],
        "abc",
        1.0,
        [1, math.nan, 0],
    ],
)
def test_the_closed_form_refuses_invalid_sigmas(sigmas: Any) -> None:
    with pytest.raises(PlanError, match=r"sigmas.*strictly monotone"):
        PLAN.gradient(sigmas)


def test_the_closed_form_refuses_what_is_no_interpolant() -> None:
    rectified: Any = "rectified"
    with pytest.raises(PlanError, match="interpolant='rectified'"):
        PLAN.gradient(interpolant=rectified)


def test_whole_numbers_are_sigmas_too() -> None:
    for sigmas in ([1, 0], torch.tensor([1, 0])):
        assert rollout(FIELD, X, sigmas).sigmas.tolist() == [1.0, 0.0]


def test_every_error_of_the_library_is_a_surgery_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    assert len(kinds) >= 5
    assert all(issubclass(kind, SurgeryError) for kind in kinds)
