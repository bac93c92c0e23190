"""The training command on FLUX.1-dev at real size, with small text encoders and HPSv2.1's architecture, for gpu.py."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.gpu_measure import Meter, Record, attempted
from benchmarks.engine.gpu_models import SMALL, Scale, pipeline
from trajsurgery import LeapAlign, tiny
from trajsurgery.cli.train_command import main
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.hpsv2 import HPSv2
from trajsurgery.training.components import RunComponents, prepare_pipeline
from trajsurgery.training.presets import paper
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Evaluation, Trained


class RandomHPSv2(HPSv2):
    """HPSv2.1 with random weights."""

    def __init__(self, model: str, device: str) -> None:
        import open_clip

        Reward.__init__(self)
        self.name = "hpsv2.1"
        with torch.device(device):
            self.clip: Any = open_clip.create_model(model, device=device)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.side = int(self.clip.visual.image_size[0])
        self.eval().requires_grad_(False)


def text_parts(scale: Scale) -> dict[str, Any]:
    """Return encoders of one layer and the real widths, with the tokenizers of the embedded Flux."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    embedded: Any = tiny.pipeline()
    widths = SMALL["flux_1_dev"] if scale.small else {"joint_attention_dim": 4096, "pooled_projection_dim": 768}
    words, more_words = len(embedded.tokenizer), len(embedded.tokenizer_2)
    clip = CLIPTextConfig(vocab_size=words, hidden_size=widths["pooled_projection_dim"], intermediate_size=64,
                          num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    t5 = T5Config(vocab_size=more_words, d_model=widths["joint_attention_dim"], d_kv=16, d_ff=64, num_layers=1,
                  num_heads=2)  # fmt: skip
    embedded.tokenizer_2.model_max_length = 16 if scale.small else 512
    return {
        "text_encoder": CLIPTextModel(clip).to(scale.device, torch.bfloat16),
        "text_encoder_2": T5EncoderModel(t5).to(scale.device, torch.bfloat16),
        "tokenizer": embedded.tokenizer,
        "tokenizer_2": embedded.tokenizer_2,
    }


def settings(scale: Scale, memory: str, output: Path) -> Recipe:
    """Return the paper's recipe with LoRA, two images one at a time, two iterations, and one held-out image."""
    base, options = paper(LeapAlign(alpha=0.3), str(output)), {"memory": memory}
    rollout: Any = replace(base.rollout, batch=2, at_once=1, precision="float32", **options)
    steps = scale.steps[0]
    if scale.small:
        rollout = replace(rollout, steps=steps, size=64)
    return replace(
        base,
        rollout=rollout,
        train=Trained(what="lora", rank=32, keep_encoders=True),
        evaluation=Evaluation(images=1, steps=steps, batch=1, pictures=1),
        iterations=2,
        threads=torch.get_num_threads(),
    )


def run(scale: Scale, record: Record) -> None:
    """Train two iterations for each way of running, and record the lines of metrics.jsonl."""
    reward = RandomHPSv2("ViT-B-32" if scale.small else "ViT-H-14", scale.device)
    record.add("reward parameters", sum(p.numel() for p in reward.parameters()))
    texts = tuple(str(prompt.text) for prompt in tiny.prompts("train"))[:8]
    meter = Meter(scale)
    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline("flux_1_dev", scale, **text_parts(scale))
        prepare_pipeline(pipe, settings(scale, "staged", Path(folder)))
        scene = RunComponents(
            pipe,
            reward,
            texts,
            lambda count, generator: [texts[i % len(texts)] for i in range(count)],
            (Prompt(texts[0], "one"),),
        )
        for memory in ("staged", "split"):
            output = Path(folder) / memory

            def train(memory: str = memory, output: Path = output) -> None:
                figures = meter.run(lambda: main(settings(scale, memory, output), scene))
                lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
                iterations = [line for line in lines if line["kind"] == "iteration"]
                keys = ("reward", "loss", "grad_norm", "seconds", "skipped")
                rows = [{key: line[key] for key in keys} for line in iterations]
                record.add(memory, {"run": figures, "iterations": rows, "memory": memory})

            attempted(record, memory, train)
