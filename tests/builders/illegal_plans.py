"""For every rule of the language, a mutation of a legal plan that breaks this rule only.

A mutation appends nodes to the plan's dict, with choices from Hypothesis's `draw`, and returns what the message must
name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

STEPS = 6


@dataclass
class Mutant:
    """A plan's dict under mutation."""

    draw: Any
    data: dict[str, Any]
    times: list[int]
    """The time of each node, as a number."""

    def add(self, op: str, **settings: Any) -> int:
        """Append a node and return its index."""
        self.data["nodes"].append({"op": op, **settings})
        self.times.append(-99)
        return len(self.data["nodes"]) - 1

    def output(self, index: int) -> None:
        """Replace one of the outputs by the node."""
        outputs = self.data["outputs"]
        outputs[self.draw(st.integers(0, len(outputs) - 1))] = index

    def start(self, low: int = 1, high: int = STEPS) -> tuple[int, int]:
        """A latent of the plan at a time in the range, or a fresh one: its index and time."""
        kinds = ("latent", "leap", "connect", "discount", "detach", "advance", "renoise")
        latents = [i for i, t in enumerate(self.times) if low <= t <= high and self.data["nodes"][i]["op"] in kinds]
        if latents and self.draw(st.booleans()):
            index = self.draw(st.sampled_from(latents))
            return index, self.times[index]
        t = self.draw(st.integers(low, high))
        return self.add("latent", time=t), t

    def leap(self, x: int, to: int = 0, **velocity: Any) -> int:
        """A leap from a latent by its velocity, scaled if a factor is passed."""
        v = self.add("velocity", x=x)
        if velocity:
            v = self.add("scale", v=v, **velocity)
        return self.add("leap", x=x, v=v, to=to)

    def any(self, *values: Any) -> Any:
        """One of the values."""
        return self.draw(st.sampled_from(values))


Mutation = Callable[[Mutant], str]


def kinds(m: Mutant) -> str:
    x, _ = m.start()
    m.output(m.add("leap", x=x, v=x, to=0))
    return "leap of a latent"


def time_type(m: Mutant) -> str:
    t = m.any(2.5, "a b", "", None, True)
    m.output(m.leap(m.add("latent", time=t)))
    return repr(t)


def time_range(m: Mutant) -> str:
    t = m.any(STEPS + 1, STEPS + 9, -1, -4)
    m.output(m.leap(m.add("latent", time=t)) if t > 0 else m.leap(m.start()[0], to=t))
    return str(t)


def model_time(m: Mutant) -> str:
    x, _ = m.start()
    bad = m.any(None, m.start(0, 0)[0])
    v = m.add("recorded", time=0) if bad is None else m.add("velocity", x=bad)
    m.output(m.add("advance", x=x, velocities=[m.add("velocity", x=x), v], to=0))
    return "recorded at t = 0" if bad is None else "velocity at t = 0"


def falling(m: Mutant) -> str:
    x, t = m.start()
    to = m.draw(st.integers(t, STEPS))
    v = m.add("velocity", x=x)
    advance = m.add("advance", x=x, velocities=[v], to=to)
    may_rise = m.data["nodes"][x]["op"] == "renoise"  # SRPO's inversion leaps to a later time from a renoised image
    m.output(advance if may_rise else m.any(m.add("leap", x=x, v=v, to=to), advance))
    return f"from t = {t} to t = {to}"


def velocity_time(m: Mutant) -> str:
    x, t = m.start()
    other = m.draw(st.sampled_from([s for s in range(1, STEPS + 1) if s != t]))
    m.output(m.add("leap", x=x, v=m.add("recorded", time=other), to=0))
    return f"a latent at t = {t} with a velocity at t = {other}"


def factor_type(m: Mutant) -> str:
    a = m.any(None, True, "not a name", "", "T")
    m.output(m.any(m.leap(m.start()[0], a=a), m.add("discount", x=m.start(0)[0], a=a)))
    return repr(a)


def finite(m: Mutant) -> str:
    a = m.any(float("inf"), float("-inf"), float("nan"))
    m.output(m.any(m.leap(m.start()[0], a=a), m.add("discount", x=m.start(0)[0], a=a)))
    return str(a)


def discount_range(m: Mutant) -> str:
    a = m.draw(st.floats(1.001, 9) | st.floats(-9, -0.001))
    m.output(m.add("discount", x=m.start(0)[0], a=a))
    return f"discount({a})"


def scale_range(m: Mutant) -> str:
    a = m.draw(st.floats(-9, -0.001))
    m.output(m.leap(m.start()[0], a=a))
    return f"scale({a})"


def field_name(m: Mutant) -> str:
    name = m.any(3, True, 0.5)
    x, _ = m.start()
    m.output(m.add("leap", x=x, v=m.add("velocity", x=x, field=name), to=0))
    return repr(name)


def renoise_start(m: Mutant) -> str:
    x, t = m.start()
    m.output(m.add("renoise", x=x, to=STEPS))
    return f"renoise from t = {t}"


def renoise_to(m: Mutant) -> str:
    m.output(m.add("renoise", x=m.start(0, 0)[0], to=0))
    return "renoise to t = 0"


def recover_start(m: Mutant) -> str:
    m.output(m.add("recover", x=m.start(0, 0)[0], draw=m.any("rollout", 77)))
    return "recover from t = 0"


def draw(m: Mutant) -> str:
    bad = m.any(-1, "other", 1.5, True, None)
    m.output(m.add("renoise", x=m.start(0, 0)[0], to=STEPS, draw=bad))
    return f"draw={bad!r}"


def recover_draw(m: Mutant) -> str:
    first, second = m.any((2, 3), (5, 1), (4, 2))
    up = m.add("renoise", x=m.start(0, 0)[0], to=first, draw=9)
    again = m.add("renoise", x=m.leap(up), to=second, draw=9)
    m.output(m.add("recover", x=again, draw=9))
    return "recover(draw=9)"


def noise_time(m: Mutant) -> str:
    t = m.draw(st.integers(1, STEPS - 1))
    m.output(m.add("noise", time=t))
    return f"noise at t = {t}"


def quadrature(m: Mutant) -> str:
    x, _ = m.start()
    rule = m.any("simpson", "Lagrange", None, 3)
    m.output(m.add("advance", x=x, velocities=[m.add("velocity", x=x)], to=0, rule=rule))
    return f"rule={rule!r}"


def supports(m: Mutant) -> str:
    x, t = m.start(2, STEPS - 1)
    same, below, above = (m.add("recorded", time=s) for s in (t, t - 1, t + 1))
    rule, velocities, received = m.any(
        ("lagrange", [], "no velocity"),
        ("lagrange", [same, below, m.add("velocity", x=x)], "one time twice"),
        ("adams-bashforth", [above], "none at the latent's"),
        ("adams-bashforth", [same, below], "below the latent's"),
        ("euler", [below], "none at the latent's"),
        ("euler", [same, above], "outside"),
    )
    m.output(m.add("advance", x=x, velocities=velocities, to=0, rule=rule))
    return received


RULES: dict[str, Mutation] = {
    "kinds": kinds,
    "time-type": time_type,
    "time-range": time_range,
    "model-time": model_time,
    "falling": falling,
    "velocity-time": velocity_time,
    "factor-type": factor_type,
    "finite": finite,
    "discount-range": discount_range,
    "scale-range": scale_range,
    "field-name": field_name,
    "renoise-start": renoise_start,
    "renoise-to": renoise_to,
    "recover-start": recover_start,
    "draw": draw,
    "recover-draw": recover_draw,
    "noise-time": noise_time,
    "quadrature": quadrature,
    "supports": supports,
}
"""A mutation for each rule of a node."""
