"""The kind of each term in tables and LaTeX, and gradient norms by kind."""

import io

import pytest
import torch
from rich.console import Console

from tests.builders.problems import problem
from tests.tolerances import GRADIENT
from trajsurgery import Plan, latent, leapalign, leaps, noise, reno
from trajsurgery.testing import MLP

ROLLED = problem(MLP(4, seed=11), 6)


def printed(shown) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(shown)
    return console.file.getvalue()


def test_kinds_are_the_paper_s_words():
    kinds = [term.kind for term in leaps((6, 5, 3, 2), 0.5).gradient().terms]
    words = ("single-step", "nested once", "nested twice", "nested 3 times")
    assert {word: kinds.count(word) for word in words} == dict(zip(words, (4, 6, 4, 1), strict=True))
    assert [term.kind for term in Plan(noise().leap(0)).gradient().terms] == ["single-step", "straight", "nested once"]


def test_eq_8_in_latex_with_its_braces():
    latex = leapalign("k", "j", 1.0).gradient().latex(braces=True)
    assert (
        r"\frac{\partial x_{0}}{\partial\theta} = \underbrace{- j \frac{\partial v_\theta(x_{j})}{\partial\theta}"
        in latex
    )
    assert r"}_{\text{single-step gradients at $k$ and $j$}} + \underbrace{j \left(k - j\right)" in latex
    assert latex.endswith(r"}_{\text{nested gradient}}")
    assert r"}_{\text{nested twice}}" in leaps(("a", "b", "c")).gradient().latex(braces=True)
    assert r"single-step gradient at $t$" in Plan(latent("t").leap(0)).gradient().latex(braces=True)


def test_numbers_are_short():
    sigmas = [1 - i / 25 for i in range(26)]
    expansion = leapalign(18, 7, 0.3).gradient(sigmas)
    assert str(expansion) == (
        "dx_0/dtheta = - 0.28 dv(x_7)/dtheta - 0.44 dv(x_18)/dtheta + 0.03696 dv/dx_7 dv(x_18)/dtheta"
    )
    assert "+ 0.3 sigma_7 (sigma_18 - sigma_7) dv/dx_7" in str(leapalign(18, 7, 0.3).gradient())
    tiny = leapalign(18, 7, 1e-9).gradient(sigmas).latex()
    assert r"1.232 \cdot 10^{-10} \frac" in tiny


def test_a_factor_before_a_sum_is_not_multiplied_out():
    plan = Plan(latent("k").leap("j", velocity=latent("k").velocity().scale(0.25)))
    assert str(plan.gradient()) == "dx_j/dtheta = - 0.25 (k - j) dv(x_k)/dtheta"


def test_the_gradient_of_x_t_is_a_separate_line():
    """noise(), as in ReNO, has its terms on a second line."""
    expansion = Plan(noise().leap("j").leap(0)).gradient()
    assert str(expansion).splitlines()[1] == ("dx_0/dx_T = 1 - j dv/dx_j - (T - j) dv/dx_T + j (T - j) dv/dx_j dv/dx_T")
    assert expansion.latex().splitlines()[1].startswith(r"\frac{\partial x_{0}}{\partial x_{T}} = I - j \frac")
    assert "dx_0/dtheta, dx_0/dx_T" in printed(expansion)


def test_a_table_has_a_row_for_each_term_listed():
    shown = printed(leapalign("k", "j", "alpha").gradient())
    for row in ("alpha j (k - j) │ dv/dx_j   │ dv(x_k)/dtheta │ nested once", "- (k - j) │           │ dv(x_k)/dtheta"):
        assert row in shown
    x = latent(50)
    for t in range(50, 0, -1):
        x = x.leap(t - 1)
    assert "1125899906842623 terms, 3 of them listed" in printed(Plan(x).gradient(limit=3))
    assert "output" in printed(Plan(latent(5).leap(0), latent(3).leap(0)).gradient())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_alpha_scales_the_norm_of_the_nested_terms_only(alpha):
    """Fig. 4a and 6."""
    c = torch.ones_like(ROLLED.noise)
    gradient = leapalign(5, 2, alpha).gradient().evaluate(ROLLED.trajectory, ROLLED.field, c)
    whole = leapalign(5, 2, 1.0).gradient().evaluate(ROLLED.trajectory, ROLLED.field, c)
    assert gradient.by_kind["single-step"] == pytest.approx(whole.by_kind["single-step"], rel=GRADIENT)
    nested = gradient.by_kind.get("nested once", 0.0)
    assert nested == pytest.approx(alpha * whole.by_kind["nested once"], rel=GRADIENT)
    assert whole.by_kind["nested once"] == pytest.approx(whole.norms[2], rel=GRADIENT)
    shown = printed(gradient)
    assert all(f"{norm:.3g}" in shown for norm in gradient.norms)


def test_kinds_sum_to_the_gradient():
    expansion = leaps((6, 4, 2), 0.5).gradient()
    gradient = expansion.evaluate(ROLLED.trajectory, ROLLED.field, torch.ones_like(ROLLED.noise))
    for i, whole in enumerate(gradient):
        parts = sum(term[i] for term in gradient.terms)
        torch.testing.assert_close(parts, whole, rtol=GRADIENT, atol=GRADIENT)
    assert set(gradient.by_kind) == {"single-step", "nested once", "nested twice"}
    assert gradient.by_kind["nested twice"] == pytest.approx(gradient.norms[-1], rel=GRADIENT)


def test_kinds_of_a_frozen_field_are_zero():
    """The noise trains alone: the terms of the weights hold no gradient at all."""
    field = MLP(4).requires_grad_(False)
    p = problem(field)
    gradient = reno(3).gradient().evaluate(p.trajectory, field, torch.ones_like(p.noise))
    assert len(gradient) == 0
    assert gradient.by_kind == {"single-step": 0.0, "nested once": 0.0}
