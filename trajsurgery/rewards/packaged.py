"""The rewards of this package by name: NAME, or NAME:WHERE for weights elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.weight_files import cached_file, is_local


@dataclass(frozen=True)
class PackagedReward:
    """A reward's class, and the file that has to be in the local cache if no place is given."""

    module: str
    kind: str
    repository: str
    file: str
    place: str
    """The argument that receives WHERE."""
    also: tuple[tuple[str, str], ...] = ()
    """Further arguments."""

    @property
    def reward_class(self) -> Any:
        """The class, imported when asked for."""
        return getattr(import_module(f"trajsurgery.rewards.{self.module}"), self.kind)


NAMES = {
    "hpsv2.1": PackagedReward("hpsv2", "HPSv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt", "file"),
    "hpsv2.0": PackagedReward("hpsv2", "HPSv2", "xswu/HPSv2", "HPS_v2_compressed.pt", "file", (("version", "2.0"),)),
    "pickscore": PackagedReward("clip", "PickScore", "yuvalkirstain/PickScore_v1", "config.json", "model"),
    "clipscore": PackagedReward("clip", "CLIPScore", "openai/clip-vit-large-patch14", "config.json", "model"),
    "aesthetic": PackagedReward("clip", "Aesthetic", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "head"),
    "imagereward": PackagedReward("imagereward", "ImageReward", "THUDM/ImageReward", "ImageReward.pt", "file"),
    "hpsv3": PackagedReward("hpsv3", "HPSv3", "MizzenAI/HPSv3", "HPSv3.safetensors", "file"),
    "unifiedreward": PackagedReward("judge", "Judge", "CodeGoat24/UnifiedReward-qwen-7b", "config.json", "model"),
}
ALIASES = {"hpsv2": "hpsv2.1"}
KNOWN = ", ".join((*NAMES, "each also as NAME:FILE", "remote:HOST:PORT"))
"""For error messages."""


def is_packaged(reward: str) -> bool:
    """Whether the name is one of this package's rewards."""
    packaged, name, where = _look_up(reward)
    return packaged is not None or (name == "remote" and bool(where))


def load_packaged(reward: str) -> Reward | None:
    """Load a reward of this package, on the CPU; None for another name.

    Raises:
        RewardError: its weights are missing, or the server does not answer.
    """
    packaged, name, where = _look_up(reward)
    if name == "remote":
        return import_module("trajsurgery.rewards.remote").Remote(where)
    if packaged is None:
        return None
    return packaged.reward_class(**{**dict(packaged.also), **({packaged.place: where} if where else {})})


def is_differentiable(reward: str) -> bool:
    """Whether a reward's class passes gradients; True for rewards of others."""
    packaged, _, _ = _look_up(reward)
    return packaged is None or packaged.reward_class.differentiable


def missing_weights(reward: str) -> str | None:
    """Return which weights are missing and how to get them; None if nothing. Loads and connects to nothing."""
    packaged, name, where = _look_up(reward)
    if packaged is None or (Path(where).exists() if where else cached_file(packaged.repository, packaged.file)):
        return None
    file = "" if packaged.file == "config.json" else f" {packaged.file}"
    if where and (packaged.place != "model" or is_local(where)):
        takes = f"takes{file or ' the folder'} of the hub's {packaged.repository}"
        return f"no reward: there is no {where}. {name}:FILE {takes}."
    return (
        f"no reward: the weights of {name} are not in the Hugging Face cache. Fetch them with `hf download "
        f"{where or packaged.repository}{file}`, or pass {name}:FILE."
    )


def _look_up(reward: str) -> tuple[PackagedReward | None, str, str]:
    name, _, where = reward.partition(":")
    return NAMES.get(ALIASES.get(name, name)), name, where
