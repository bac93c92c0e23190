"""Times and names: binding, "T", numbers of other libraries."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trajsurgery import Plan, PlanError, latent, leapalign, noise, recorded
from trajsurgery.testing import factors, plans

STEPS = 6


def named(plan: Plan) -> tuple[Plan, dict[str, float]]:
    """The plan with a name in place of every number that may be one, and the numbers by name."""
    data, values = plan.to_dict(), {}
    for entry in data["nodes"]:
        for key in ("time", "to", "a"):
            if isinstance(entry.get(key), int | float):
                name = ("a_" if key == "a" else "t_") + str(entry[key]).replace(".", "_").replace("-", "m")
                values[name] = entry[key]
                entry[key] = name
    return Plan.from_dict(data), values


@given(plans(STEPS))
def test_binding_every_name_gives_the_plan_with_numbers(plan):
    with_names, values = named(plan)
    assert set(with_names.names) == set(values)
    assert with_names.at(**values) == plan


@given(plans(STEPS))
def test_binding_in_two_steps_is_binding_in_one(plan):
    with_names, values = named(plan)
    half = dict(list(values.items())[::2])
    rest = {name: value for name, value in values.items() if name not in half}
    assert with_names.at(**half).at(**rest) == plan


def test_names_are_in_order_of_appearance():
    assert leapalign("k", "j", "alpha").names == ("k", "j", "alpha")
    assert leapalign(5, 2, 0.3).names == ()
    assert Plan(noise().leap("m")).names == ("m",)


def test_a_name_can_be_bound_to_another_name():
    assert leapalign("k", "j", "alpha").at(k="a", j="b") == leapalign("a", "b", "alpha")


@example(2, 1.0)  # np.float64 is a float, and made a separate node
@given(st.integers(2, 9), factors())
def test_numbers_of_other_libraries_may_be_bound(k, a):
    plan = leapalign("k", 1, "a")
    assert plan.at(k=np.int64(k), a=np.float64(a)) == leapalign(k, 1, a)
    assert plan.at(k=torch.tensor(k), a=torch.tensor(a, dtype=torch.float64)) == leapalign(k, 1, a)
    assert latent(k).discount(np.float64(a)) is latent(k).discount(a)


def test_an_unknown_name_is_refused():
    with pytest.raises(PlanError, match=r"\['m'\].*'k', 'j'"):
        leapalign("k", "j").at(m=3)


def test_t_is_bound_by_the_run():
    plan = Plan(latent("T").leap(0))
    assert plan.names == ()
    assert plan.prepared(7) == Plan(latent(7).leap(0))
    assert plan.at(T=4) == Plan(latent(4).leap(0))


def test_t_is_the_number_of_steps():
    assert Plan(latent("T").leap(0, velocity=latent(5).velocity())).prepared(5) == Plan(latent(5).leap(0))
    with pytest.raises(PlanError) as err:
        Plan(latent("T").leap(0, velocity=latent(4).velocity())).prepared(5)
    assert err.value.rules == ("velocity-time",)


def test_a_named_velocity_time_is_checked_once_bound():
    plan = Plan(latent("k").leap(0, velocity=latent("m").velocity()))
    assert plan.at(k=3, m=3) == Plan(latent(3).leap(0))
    with pytest.raises(PlanError) as err:
        plan.at(k=3, m=2)
    assert err.value.rules == ("velocity-time",)


def test_binding_keeps_steps():
    assert Plan(latent("k").leap(0), partly_recorded(), steps=9).at(k=4).steps == 9


def partly_recorded():
    """An output whose other velocity is recorded."""
    return latent(3).leap(2, velocity=recorded(3)).leap(0)
