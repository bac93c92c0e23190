"""The price of several plans a rollout: at the share that pays, variance times time is that of one plan."""

from __future__ import annotations

import pytest

from benchmarks.study.plans_per_rollout import Options, price, relative_time, share_that_pays


@pytest.mark.parametrize("count", [2, 4, 8])
def test_at_the_share_that_pays_nothing_is_gained_or_lost(count: int) -> None:
    share = share_that_pays(2.5, 0.85, count)
    assert (1 - share + share / count) * relative_time(2.5, 0.85, count) == pytest.approx(1)


def test_a_measurement_is_priced_with_the_large_model_s_seconds() -> None:
    row = {"variance": 30.0, "variance_by_time_interval": [0.5, 2.0]}
    seconds = {"rollout": {"cpu": 3.0}, "shared": {"cpu": 1.0}}
    plans = {"shared 1": {"variance": 60.0}, "shared 2": row, "per-sample 1": row}
    parts = {"of the times": {"variance": 45.0}, "of prompts and noise": {"variance": 15.0}}
    priced = price({"seconds": seconds, "plans": plans, "parts": parts}, Options(rollout=1.0, plan=1.0))
    assert priced["share_of_the_times"] == 0.75
    assert priced["plans"].keys() == {"2"}
    assert priced["plans"]["2"]["time"] == 1.5  # 3 s instead of 2
    assert priced["plans"]["2"]["variance_by_time"] == 0.75
    assert priced["plans"]["2"]["interval"] == [0.6, 2.4]  # measured at 5 s instead of 4
