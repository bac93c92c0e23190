"""Measurements of the tiny SD3 and the tiny Wan: the base models' scores by the rules, at several guidances."""

from typing import Any

import torch
from torch import Generator

GUIDANCES = (1.0, 1.25, 1.5, 2.0)


def sd3(each: int, steps: int) -> dict[str, Any]:
    """Measure the tiny SD3, `each` pictures a category; guidance is chosen on the validation prompts."""
    from benchmarks.world import metrics
    from trajsurgery import tiny
    from trajsurgery.tiny.rules import judge
    from trajsurgery.tiny.sd3 import GUIDANCE

    pipe, reward = tiny.pipeline("sd3"), tiny.Reward()
    record: dict[str, Any] = {"steps": steps, "guidance": GUIDANCE}
    for guidance in GUIDANCES:
        prompts = metrics.even_prompts("validation", each)
        verdict = judge(metrics.draw(pipe, prompts, steps, seed=16, guidance_scale=guidance), prompts)
        record[f"base_validation_guidance_{guidance:g}"] = metrics.score_base(verdict)
    for split in ("train", "heldout"):
        prompts = metrics.even_prompts(split, each)
        images = metrics.draw(pipe, prompts, steps, seed=16, guidance_scale=GUIDANCE)
        verdict = judge(images, prompts)
        record[f"base_{split}"] = metrics.score_base(verdict)
        with torch.no_grad():
            record[f"ranking_{split}"] = metrics.ranking(reward(images, prompts), verdict)
    prompts = metrics.even_prompts("train", 10)
    record["leap_distances"] = metrics.leap_distances(pipe, prompts, steps, seed=17, guidance_scale=GUIDANCE)
    return record


def wan(each: int) -> dict[str, Any]:
    """Measure the tiny Wan, `each` videos a direction."""
    from benchmarks.world.fit_wan import STEPS, reconstructions, shoot
    from benchmarks.world.metrics import leap_distances, roc_area
    from benchmarks.world.motion_videos import film
    from trajsurgery import tiny
    from trajsurgery.tiny.video import FRAMES, GUIDANCE, Motion, motions
    from trajsurgery.tiny.video_reward import MotionReward
    from trajsurgery.tiny.video_rules import MotionVerdict, judge

    def base(verdict: MotionVerdict) -> dict[str, float]:
        shares = {name: float(getattr(verdict, name).float().mean()) for name in ("there", "moves", "junk")}
        return {**{name: share for name, (share, _) in verdict.table().items()}, **shares, "n": len(verdict.prompts)}

    def some(split: Any) -> list[Motion]:
        split_prompts = motions(split)
        return [split_prompts[i % len(split_prompts)] for i in range(4 * each)]

    pipe, reward = tiny.pipeline("wan"), MotionReward()
    prompts = some("heldout")
    clean = film(prompts, Generator().manual_seed(13))
    scores = reward(clean, prompts)
    record: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "threshold": reward.threshold}
    record["evaluator"] = base(judge(clean, prompts))
    with torch.no_grad():
        record["autoencoder"] = base(judge(reconstructions(pipe.vae, clean), prompts))
    record["reward_of_true_videos"] = {f"q{q:02d}": float(scores.quantile(q / 100)) for q in (5, 20, 50, 95)}
    for guidance in GUIDANCES:
        split_prompts = some("validation")
        record[f"base_validation_guidance_{guidance:g}"] = base(
            judge(shoot(pipe, split_prompts, 16, guidance), split_prompts)
        )
    for split in ("train", "heldout"):
        split_prompts = some(split)
        videos = shoot(pipe, split_prompts, 16, GUIDANCE)
        verdict, scores = judge(videos, split_prompts), reward(videos, split_prompts)
        record[f"base_{split}"] = base(verdict)
        record[f"ranking_{split}"] = {
            "area": roc_area(scores, verdict.correct),
            "area_of_moves": roc_area(scores, verdict.moves),
            "correct_mean": float(scores[verdict.correct].mean()),
            "incorrect_mean": float(scores[~verdict.correct].mean()),
        }
    options: dict[str, Any] = {"height": 32, "width": 32, "num_frames": FRAMES, "guidance_scale": GUIDANCE}
    record["leap_distances"] = leap_distances(pipe, some("train")[:48], STEPS, seed=17, **options)
    return record
