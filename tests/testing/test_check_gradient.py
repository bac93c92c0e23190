"""`check_gradient` proves plans, methods and functions of times; it names the term and the factor of a planted bug."""

import pytest
import torch

from trajsurgery import (
    DRTune,
    LeapAlign,
    Plan,
    PlanError,
    apply,
    drtune,
    latent,
    leapalign,
    noise,
    rollout,
)
from trajsurgery.plans.nodes import Detach
from trajsurgery.surgery import autograd_functions, node_values
from trajsurgery.surgery.execution import Execution
from trajsurgery.testing import MLP, Proof, check_gradient

CHECKS = {"values", "retain", "recompute", "staged", "split", "checkpointed", "jvp", "differences"}
STOPPED = Plan(latent(5).leap(2).connect().leap(0, velocity=latent(5).leap(2).connect().detach().velocity()))


@pytest.mark.parametrize(
    "subject",
    [
        *(leapalign(5, 2), leapalign, leapalign("k", "j", 0.2), LeapAlign(leaps=3), DRTune(), STOPPED),
        Plan(noise().leap(3).connect().leap(0, discount=0.4)),
        Plan(latent(0).renoise(6).leap(3, velocity=latent(0).renoise(6).velocity("guided")).recover()),
    ],
    ids=lambda subject: getattr(subject, "__name__", str(subject)),
)
def test_correct_plans_and_methods_are_proved(subject):
    proof = check_gradient(subject, draws=2)
    assert isinstance(proof, Proof)
    assert set(proof.misses) == CHECKS
    assert max(proof.misses.values()) < 1e-9
    assert len(proof.gradients) == 4  # two draws, on the MLP and on the Gaussian
    assert all(any(g.abs().max() > 0 for g in gradient) for gradient in proof.gradients)
    assert "proved" in str(proof)


def test_the_order_of_field_and_trajectory_does_not_matter():
    field = MLP(4)
    trajectory = rollout(field, torch.randn(2, 4, dtype=torch.float64), torch.linspace(1, 0, 9))
    for arguments in ((trajectory, field), (field, trajectory), (field,)):
        assert len(check_gradient(leapalign(5, 2), *arguments, draws=1).gradients) == 1
    check_gradient(leapalign(5, 2), field=field, trajectory=trajectory)
    assert all(p.grad is None for p in field.parameters())


def test_a_float32_function_may_be_the_field():
    inner = MLP(4, dtype=torch.float32)
    trajectory = rollout(inner, torch.randn(2, 4), torch.linspace(1, 0, 9))
    proof = check_gradient(leapalign(5, 2), trajectory, lambda x, sigma: inner(x, sigma))
    assert set(proof.misses) == CHECKS - {"jvp"}


def test_skipped_checks_are_left_out():
    assert set(check_gradient(leapalign(5, 2), draws=1, skip=("jvp", "values")).misses) == CHECKS - {"jvp", "values"}


@pytest.mark.parametrize("subject", [drtune, rollout, lambda k: k])
def test_what_is_no_plan_is_refused(subject):
    with pytest.raises(PlanError, match=r"an object with \.draw"):
        check_gradient(subject)


def failure(plan, **settings) -> str:
    with pytest.raises(AssertionError) as caught:
        check_gradient(plan, draws=1, **settings)
    return str(caught.value)


def test_alpha_applied_twice_is_reported(monkeypatch):
    """The nested term has alpha^2; the single-step terms are right."""
    scale = autograd_functions.scale
    monkeypatch.setattr(autograd_functions, "scale", lambda x, factor: scale(x, factor**2))
    message = failure(leapalign)
    assert "retain misses the closed form" in message
    assert "the nested term alpha j (k - j) dv/dx_j dv(x_k)/dtheta" in message
    assert "carries alpha^2 instead of alpha: a factor 0.3 = alpha" in message
    assert "single-step" not in message
    three = failure(LeapAlign(alpha=0.1, leaps=3))
    assert three.count("carries alpha^2 instead of alpha") == 3
    assert three.count("carries alpha^4 instead of alpha^2") == 1


def test_a_missing_discount_is_reported(monkeypatch):
    monkeypatch.setattr(autograd_functions, "scale", lambda x, factor: x)
    message = failure(leapalign(5, 2, 0.4))
    assert "nested term alpha sigma_2 (sigma_5 - sigma_2) dv/dx_2 dv(x_5)/dtheta (at t = 5, through the input at t = 2)" in message  # fmt: skip  # noqa: E501
    assert "carries no alpha instead of alpha" in message


@pytest.mark.parametrize("factor, fault", [(0.0, "is missing"), (-1.0, "has the wrong sign"), (2.0, "is counted twice"),
                                          (0.7, "is off by a factor 0.7")])  # fmt: skip
def test_a_connector_that_changes_the_gradient_is_reported(monkeypatch, factor, fault):
    connect = autograd_functions.connect
    monkeypatch.setattr(autograd_functions, "connect", lambda x, real: connect(factor * x, real))
    message = failure(Plan(latent(5).leap(2).connect().leap(0)))
    assert message.count(fault) == 2
    assert "the single-step term - (sigma_5 - sigma_2) dv(x_5)/dtheta (at t = 5)" in message
    assert "the nested term sigma_2 (sigma_5 - sigma_2) dv/dx_2 dv(x_5)/dtheta" in message
    assert "dv(x_2)/dtheta" not in message


def test_a_leap_of_the_wrong_sign_is_reported(monkeypatch):
    predict = node_values.predict
    monkeypatch.setattr(node_values, "predict", lambda path, x, v, k, j: 2 * x - predict(path, x, v, k, j))
    message = failure(leapalign("k", "j"))
    assert message.count("has the wrong sign (factor -1)") == 2
    assert "- (k - j) dv(x_k)/dtheta" in message
    assert "nested" not in message  # two signs cancel


def test_a_missing_detach_is_reported(monkeypatch):
    def compute(self, node):
        faithful = self.is_recorded(node)
        self.tensors[node] = node_values.node_value(node, self.tensors, self.trajectory, faithful, self.generator)
        self.faithful |= {node} if faithful else set()

    monkeypatch.setattr(Execution, "_compute", compute)
    monkeypatch.setitem(node_values._VALUES, Detach, lambda node, of, *_: of[node.x])
    message = failure(STOPPED)
    assert "the nested term sigma_2 (sigma_5 - sigma_2) dv/dx_2 dv(x_5)/dtheta" in message
    assert "is there, 1 times, though the plan stops it" in message
    assert "single-step" not in message


def test_a_tangent_that_is_not_scaled_is_reported(monkeypatch):
    """Only forward mode detects it."""
    monkeypatch.setattr(autograd_functions._Edit, "jvp", staticmethod(lambda ctx, tangent, *_: tangent))
    message = failure(leapalign)
    assert message.startswith("jvp misses")
    assert "carries no alpha instead of alpha" in message


def test_a_formula_that_is_wrong_in_execution_and_closed_form_is_reported(monkeypatch):
    """Execution and closed form share the coefficients of a leap; the differences do not."""
    monkeypatch.setattr(
        "trajsurgery.plans.interpolants.RectifiedFlow.leap", lambda self, k, j, xp=None: (1, 0.5 * (j - k))
    )
    message = failure(Plan(latent(5).leap(2).connect()))
    assert message.startswith("differences misses")
    assert "is counted twice" in message


def test_a_connector_that_rounds_is_reported(monkeypatch):
    """The textbook's straight-through estimator does not have the rollout's value."""
    monkeypatch.setattr(autograd_functions, "connect", lambda x, real: x + (real - x).detach())
    with pytest.raises(AssertionError, match=r"is not the rollout's x_0|is not made on the rollout's x_\d"):
        check_gradient(leapalign)


def test_a_trajectory_of_other_weights_is_reported():
    field, other = MLP(4), MLP(4, seed=1)
    trajectory = rollout(other, torch.randn(2, 4, dtype=torch.float64), torch.linspace(1, 0, 9))
    assert "other weights made the rollout" in failure(leapalign(5, 2), field=field, trajectory=trajectory)


def test_a_field_whose_calls_differ_is_reported():
    """No factors of the terms explain its gradient, and the message says so."""

    class WrongGradient(MLP):
        calls = 0

        def forward(self, x, sigma):
            self.calls += 1
            v = super().forward(x, sigma)
            return v if self.calls % 3 else v.detach() + 0.5 * (v - v.detach())

    assert "no factors of the terms explain it" in failure(leapalign(5, 2), field=WrongGradient(4))


def test_the_parameters_are_as_before():
    field = MLP(4)
    before = [p.detach().clone() for p in field.parameters()]
    check_gradient(leapalign(5, 2), field, draws=1)
    assert all(torch.equal(a, b) for a, b in zip(before, field.parameters(), strict=True))
    trajectory = rollout(field, torch.randn(2, 4, dtype=torch.float64), torch.linspace(1, 0, 9))
    assert torch.equal(apply(leapalign(5, 2), trajectory, field), trajectory[0])


def test_a_proof_of_nothing_is_refused():
    with pytest.raises(PlanError, match="draws=0"):
        check_gradient(leapalign, draws=0)
