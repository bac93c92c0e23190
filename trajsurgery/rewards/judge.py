"""Judges: models that look at an image and answer in text, such as UnifiedReward. They have no gradient."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import RewardError
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.weight_files import find_folder

QUESTION = (
    "You are given a text caption and a generated image. Judge how well the image matches the caption, and how good "
    "the image itself is, and assign one score from 1 (worst) to 5 (best) after 'Final Score:'.\n"
    "Text Caption: [{prompt}]"
)
"""The default question; `{prompt}` stands for the caption."""

ANSWER = r"Final Score:?\**\s*\[?(-?\d+(?:\.\d+)?)"
"""Finds the number in the answer."""


class Judge(Reward):
    """The number that a vision-language model writes after "Final Score:" (UnifiedReward, arXiv 2503.05236).

    It has no gradient: recipes refuse it as a reward; evaluation.metrics and `trajsurgery score` accept it. The image
    is rounded to bytes, and decoding is greedy.

    Args:
        model: a folder, or a hub id in the local cache, of any image-text-to-text model of transformers, with its
            processor and chat template.
        question: contains {prompt} once.
        answer: a regular expression whose first group is the number; the last match in the answer counts.
        length: the most tokens it may write.
        dtype: of the model.

    Raises:
        RewardError: no such model; an answer without a number; images that require a gradient.
    """

    name = "unifiedreward"
    scale = "the judge's own, 1 to 5 for UnifiedReward"
    source = "https://github.com/CodeGoat24/UnifiedReward, arXiv 2503.05236"
    licence = "MIT (UnifiedReward); that of the judge's own card for others"
    differentiable = False

    def __init__(
        self,
        model: str | Path = "CodeGoat24/UnifiedReward-qwen-7b",
        question: str = QUESTION,
        answer: str = ANSWER,
        length: int = 512,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if question.count("{prompt}") != 1 or re.compile(answer).groups < 1:
            raise RewardError("a judge's question holds {prompt} once, and its answer's pattern a group: (...).")
        folder = find_folder("Judge", model)
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            self.processor: Any = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
        except ImportError as error:
            raise RewardError(f"judges need `pip install 'trajsurgery[judges]'`: {error}") from error
        self.model: Any = AutoModelForImageTextToText.from_pretrained(str(folder), local_files_only=True, dtype=dtype)
        self.question, self.answer, self.length = question, re.compile(answer), length
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = [self.number(self.said(image, prompt)) for image, prompt in zip(images, prompts)]
        return torch.tensor(scores, device=images.device)

    def said(self, image: Tensor, prompt: str) -> str:
        """Return the judge's answer about one image, [3, h, w]."""
        from torchvision.transforms.functional import to_pil_image

        picture = to_pil_image((image.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8))
        question = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
        turn = [{"role": "user", "content": [{"type": "image"}, question]}]
        text = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=[picture], return_tensors="pt").to(self.model.device)
        written = self.model.generate(**inputs, max_new_tokens=self.length, do_sample=False)
        return self.processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def number(self, answer: str) -> float:
        """Return the score in an answer.

        Raises:
            RewardError: there is none.
        """
        hits = [hit.group(1) for hit in self.answer.finditer(answer)]
        try:
            return float(hits[-1])
        except (IndexError, ValueError) as error:
            raise RewardError(
                f"{self.name} answered without a score ({self.answer.pattern}): {answer[-300:]!r}. Allow it more words "
                "(`length`), or give the `question` and the `answer` pattern that this judge was trained with."
            ) from error
