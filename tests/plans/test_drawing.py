"""Drawings of plans: every format and primitive, the labels, and the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from trajsurgery import Plan, draft_lv, drtune, latent, leapalign, leaps, noise, recorded, refl
from trajsurgery.errors import SurgeryError
from trajsurgery.plans.drawing.scene import PICTURES, Scene
from trajsurgery.plans.nodes import PRIMITIVES

FORMATS = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF", ".mmd": b"flowchart"}
ADVANCE = latent(18).advance(7, [latent(18).velocity(), latent(12).velocity().scale(0.25), recorded(9)])
PLANS = {
    "leapalign": leapalign(18, 7),
    "named": leapalign("k", "j", "alpha"),
    "refl": refl(5),
    "drtune": drtune(25, 8, {22, 10}),
    "draft_lv": draft_lv(2),
    "three leaps": leaps((20, 13, 6), 0.3),
    "advance": Plan(ADVANCE.connect().leap(0, discount=0.1).connect()),
    "noise": Plan(noise().leap(12).leap(0)),
    "recover": Plan(latent(0).renoise(14).velocity().detach().scale(2.0) and latent(0).renoise(14).leap(10).recover()),
    "detached": Plan(latent(9).leap(3, velocity=latent(9).velocity().detach()).connect().detach().leap(0)),
    "other field": Plan(latent(9).leap(3, velocity=latent(9).velocity("guided")).leap(0)),
    "not at 0": Plan(latent(20).leap(6), latent(20).leap(3)),
    "one step": Plan(latent(1).leap(0), steps=1),
    "few steps": drtune(6, 2, {5, 3}),
    "a call of a prediction": Plan(
        latent(10).advance(4, [latent(10).velocity(), latent(10).leap(7).velocity()]).leap(0)
    ),
}


def test_every_primitive_has_a_picture() -> None:
    assert set(PICTURES) == set(PRIMITIVES.values())


def test_the_drawn_plans_use_every_primitive() -> None:
    assert {node.op for plan in PLANS.values() for node in plan.nodes} == set(PRIMITIVES)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_is_drawn_without_overlap(name: str) -> None:
    from trajsurgery.plans.drawing.layout import Placing

    place = Placing(Scene(PLANS[name].outputs, PLANS[name].steps))
    marks = [(*place.point(mark), place.size(mark)[0]) for mark in place.scene.marks]
    for i, (x, y, width) in enumerate(marks):
        for a, b, other in marks[:i]:
            assert abs(x - a) >= (width + other) / 2 - 1e-6 or abs(y - b) > 0.25, (place.scene.marks, i)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("name", ["leapalign", "draft_lv", "advance"])
def test_every_format_is_written_and_the_same_twice(name: str, ending: str, tmp_path: Path) -> None:
    first = PLANS[name].draw(tmp_path / f"deep/plan{ending}")
    again = PLANS[name].draw(str(tmp_path / f"again{ending}"))
    assert first.read_bytes().startswith(FORMATS[ending])
    assert first.read_bytes() == again.read_bytes()


def test_the_svg_has_the_paper_s_labels(tmp_path: Path) -> None:
    text = leapalign("k", "j", 0.3).draw(tmp_path / "plan.svg").read_text()
    for label in (
        "x_{T}",
        "x_{k}",
        "x_{j}",
        r"\hat{x}_{j|k}",
        r"\hat{x}_{0|j}",
        r"v_\theta",
        r"\alpha = 0.3",
        "rollout",
    ):
        assert label in text


def test_mermaid_shows_what_carries_gradient() -> None:
    from trajsurgery.plans.drawing.draw import mermaid

    text = mermaid(Scene(leapalign("k", "j", "alpha").outputs, None))
    assert "x^_j|k" in text
    assert '-.->|"connect"|' in text
    assert '|"alpha"|' in text
    assert "#c8321f" in text
    stopped = mermaid(Scene(drtune(4, 2, {3}).outputs, 4))
    assert '|"sg"|' in stopped
    assert "v_4 recorded" in stopped


def test_what_carries_gradient_is_what_trains() -> None:
    scene = Scene(drtune(8, 3, {7, 5}).outputs, 8)
    assert {mark.column for mark in scene.lit if mark.kind == "call"} == {7, 5}
    alpha0 = Scene(leapalign(6, 3, 0.0).outputs, None)
    (discounted,) = [edge for edge in alpha0.edges if edge.notes]
    assert not discounted.live


def test_renoised_samples_show_x_0_beside_them() -> None:
    """Arrows from the rollout crossed the predictions in between."""
    from trajsurgery.plans.drawing.draw import mermaid

    scene = Scene(draft_lv(3).outputs, None)
    renoised = [edge for edge in scene.edges if edge.kind == "renoise"]
    assert [(edge.start.kind, edge.start.lane) for edge in renoised] == [("copy", lane) for lane in (2, 3, 4)]
    assert mermaid(scene).count('"x_0"') == 1
    (alone,) = (e for e in Scene(Plan(latent(0).renoise(14).leap(0)).outputs, None).edges if e.kind == "renoise")
    assert alone.start.kind == "real"


def test_straight_paths_are_drawn_where_an_operation_is_on_them() -> None:
    def straight(plan: Plan) -> list[tuple[bool, bool]]:
        return [(e.live, e.stopped) for e in Scene(plan.outputs, plan.steps).edges if e.kind == "straight"]

    assert straight(leapalign(6, 3)) == [(True, False)]  # from x_k the arrow through the call shows it
    x = latent("k").leap("j").connect()
    assert straight(Plan(x.detach().leap(0, velocity=x.velocity()))) == [(False, True)]  # Eq. 14
    assert len(straight(drtune(6, 2, {5, 3}))) == 5


def test_arrows_are_as_wide_as_their_coefficients(tmp_path: Path) -> None:
    from trajsurgery.plans.drawing.draw import weight_width

    weights = {e.kind: e.weight for e in Scene(leapalign(20, 5, 0.1).outputs, 20).edges if e.end.column == 0}
    assert weights["straight"] == weights["connect"] == 1
    assert weights["velocity"] == 0.25
    assert weight_width(0.1) < weight_width(0.25) < weight_width(1) == weight_width(3)
    text = leapalign(20, 5, 0.1).draw(tmp_path / "plan.svg").read_text()
    for label in ("gradient, coefficient 1", "gradient discounted", "connector"):
        assert label in text
    assert "lagrange" in PLANS["advance"].draw(tmp_path / "advance.svg").read_text()
    assert "noise, trained" in PLANS["noise"].draw(tmp_path / "noise.svg").read_text()


def test_names_without_an_order_are_drawn(tmp_path: Path) -> None:
    Plan(latent("a").leap("b"), latent("b").leap("a")).draw(tmp_path / "plan.svg")


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"the ending is the format, one of \.svg, \.png, \.pdf, \.mmd"):
        leapalign(6, 3).draw(tmp_path / "plan.gif")
