"""Interpolants x_t = alpha_t x_0 + beta_t x_1, and the coefficients of leaps and of quadratures.

Every formula takes the namespace of its arithmetic, `xp` (torch, sympy or math), so that the same lines give tensors,
symbols and floats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Interpolant(ABC):
    """Noise and image, mixed: alpha(0) = beta(1) = 1, alpha(1) = beta(0) = 0. Times are sigmas in [0, 1]."""

    @abstractmethod
    def shares(self, t: Any, xp: Any = math) -> tuple[Any, Any, Any, Any]:
        """alpha_t, beta_t, d alpha / dt and d beta / dt: the shares of image and noise, and their rates."""

    def alpha(self, t: Any, xp: Any = math) -> Any:
        """The image's share at t."""
        return self.shares(t, xp)[0]

    def beta(self, t: Any, xp: Any = math) -> Any:
        """The noise's share at t."""
        return self.shares(t, xp)[1]

    def leap(self, k: Any, j: Any, xp: Any = math) -> tuple[Any, Any]:
        """A and B of the one-step prediction x_j = A x_k + B v_k: LeapAlign's Eq. 20, in a form finite at both ends.

        As printed, Eq. 20 divides by alpha_k, which is 0 at k = T; multiplied out, only the determinant
        alpha_k beta'_k - alpha'_k beta_k is left below, which no interpolant lets vanish.
        """
        (a_k, b_k, a_rate, b_rate), (a_j, b_j, _, _) = self.shares(k, xp), self.shares(j, xp)
        determinant = a_k * b_rate - a_rate * b_k
        return (a_j * b_rate - b_j * a_rate) / determinant, (a_k * b_j - b_k * a_j) / determinant


@dataclass(frozen=True)
class RectifiedFlow(Interpolant):
    """(1 - t, t): straight lines, Eq. 3. A = 1, B = -(k - j)."""

    def shares(self, t: Any, xp: Any = math) -> tuple[Any, Any, Any, Any]:
        return 1 - t, t, -1, 1

    def leap(self, k: Any, j: Any, xp: Any = math) -> tuple[Any, Any]:
        return 1, j - k


@dataclass(frozen=True)
class InvertedFlow(RectifiedFlow):
    """(t, 1 - t): rectified flow on times that rise from noise to image, as Mochi's. A = 1, B = j - k as above."""

    def shares(self, t: Any, xp: Any = math) -> tuple[Any, Any, Any, Any]:
        return t, 1 - t, 1, -1


@dataclass(frozen=True)
class Trigonometric(Interpolant):
    """(cos, sin) of pi t / 2. A = cos(pi (k - j) / 2), B = -(2 / pi) sin(pi (k - j) / 2)."""

    def shares(self, t: Any, xp: Any = math) -> tuple[Any, Any, Any, Any]:
        cos, sin = xp.cos(xp.pi * t / 2), xp.sin(xp.pi * t / 2)
        return cos, sin, -xp.pi / 2 * sin, xp.pi / 2 * cos

    def leap(self, k: Any, j: Any, xp: Any = math) -> tuple[Any, Any]:
        angle = xp.pi * (k - j) / 2
        return xp.cos(angle), -2 / xp.pi * xp.sin(angle)


@dataclass(frozen=True)
class Polynomial(Interpolant):
    """(1 - t^2, t)."""

    def shares(self, t: Any, xp: Any = math) -> tuple[Any, Any, Any, Any]:
        return 1 - t**2, t, -2 * t, 1


def weights(rule: str, supports: Sequence[Any], start: Any, to: Any) -> list[Any]:
    """The weights w_i of `advance`: how much each supported velocity counts between two sigmas.

    "lagrange" and "adams-bashforth": the integral from `start` to `to` of the i-th Lagrange polynomial through the
    supports' sigmas. "euler": each velocity is held from its own sigma (which falls with the order of the supports)
    down to the next support's.

    Args:
        supports: the sigmas of the velocities, distinct, noisiest first for "euler".
    """
    if rule == "euler":
        return [(after - at) for at, after in zip(supports, [*supports[1:], to])]
    return [_lagrange_integral(supports, i, start, to) for i in range(len(supports))]


def _lagrange_integral(supports: Sequence[Any], i: int, start: Any, to: Any) -> Any:
    """The integral of prod_{m != i} (s - s_m) / (s_i - s_m): the product is expanded about `start`, power by power."""
    powers: list[Any] = [1]
    scale: Any = 1
    for m, support in enumerate(supports):
        if m != i:
            root = support - start
            powers = [
                (powers[p - 1] if p > 0 else 0) - (root * powers[p] if p < len(powers) else 0)
                for p in range(len(powers) + 1)
            ]
            scale = scale * (supports[i] - support)
    width = to - start
    return sum(c * width ** (p + 1) / (p + 1) for p, c in enumerate(powers)) / scale
