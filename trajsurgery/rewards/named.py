"""The rewards of this package by the names that recipes and commands use: NAME, or NAME:WHERE for weights elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.weights import cached


@dataclass(frozen=True)
class PackagedReward:
    """Where a reward's class is, and what has to be in the local cache if no place is named."""

    module: str
    kind: str
    repository: str
    file: str
    place: str
    """The argument that WHERE is."""
    also: tuple[tuple[str, str], ...] = ()
    """Further arguments."""


LARGE = "openai/clip-vit-large-patch14"
NAMES = {
    "hpsv2.1": PackagedReward("hpsv2", "HPSv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt", "file"),
    "hpsv2.0": PackagedReward("hpsv2", "HPSv2", "xswu/HPSv2", "HPS_v2_compressed.pt", "file", (("version", "2.0"),)),
    "pickscore": PackagedReward("clip", "PickScore", "yuvalkirstain/PickScore_v1", "config.json", "model"),
    "clipscore": PackagedReward("clip", "CLIPScore", LARGE, "config.json", "model"),
    "aesthetic": PackagedReward("clip", "Aesthetic", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "head"),
    "imagereward": PackagedReward("imagereward", "ImageReward", "THUDM/ImageReward", "ImageReward.pt", "file"),
    "hpsv3": PackagedReward("hpsv3", "HPSv3", "MizzenAI/HPSv3", "HPSv3.safetensors", "file"),
    "unifiedreward": PackagedReward("judge", "Judge", "CodeGoat24/UnifiedReward-qwen-7b", "config.json", "model"),
}
ALIASES = {"hpsv2": "hpsv2.1"}
KNOWN = ", ".join((*NAMES, "each also as NAME:FILE", "remote:HOST:PORT"))
"""For errors."""


def is_packaged(asked: str) -> bool:
    """Whether a name is of this package."""
    name, _, where = asked.partition(":")
    return bool(where) if name == "remote" else ALIASES.get(name, name) in NAMES


def load_packaged(asked: str) -> Reward | None:
    """The reward of a name, on the CPU; None for a name that is not of this package.

    Raises:
        RewardError: its weights are not there, or the server is not.
    """
    name, _, where = asked.partition(":")
    if name == "remote":
        return import_module("trajsurgery.rewards.remote").Remote(where)
    found = NAMES.get(ALIASES.get(name, name))
    if found is None:
        return None
    given: dict[str, Any] = {**dict(found.also), **({found.place: where} if where else {})}
    return getattr(import_module(f"trajsurgery.rewards.{found.module}"), found.kind)(**given)


def is_differentiable(asked: str) -> bool:
    """Whether a gradient passes the reward of a name, as far as its class says; True for names of others."""
    name = asked.partition(":")[0]
    found = NAMES.get(ALIASES.get(name, name))
    if found is None:
        return True
    kind: type[Reward] = getattr(import_module(f"trajsurgery.rewards.{found.module}"), found.kind)
    return kind.differentiable


def missing_weights(asked: str) -> str | None:
    """What a name of this package lacks here, and the repair; None if nothing. Loads nothing, connects to nothing."""
    name, _, where = asked.partition(":")
    found = NAMES.get(ALIASES.get(name, name))
    if found is None or (Path(where).exists() if where else cached(found.repository, found.file)):
        return None
    file = "" if found.file == "config.json" else f" {found.file}"
    gone = f"there is no {where}" if where else f"the weights of {name} are not in the Hugging Face cache"
    return f"no reward: {gone}. Fetch them with `hf download {found.repository}{file}`, or pass {name}:FILE."
