"""Prompts and images are encoded once: text encoders and tokenizers of transformers, built in the test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tests.builders.pipelines.checks import flat, gap, gradient, transformers
from tests.builders.pipelines.every import BUILDERS
from tests.builders.pipelines.parts import Small, small
from tests.tolerances import STOCK, VALUE
from trajsurgery import backward, leapalign, operate, refl, tiny


def with_text() -> Small:
    """Sana with a Gemma of one layer and a tokenizer of eight words."""
    plain = BUILDERS["Sana"]()
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "a", "red", "cat", "dog", "bad"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        bos_token_id=2,
        eos_token_id=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = SanaPipeline(wrapped, Gemma2Model(config).eval(), plain.pipe.vae, plain.pipe.transformer, scheduler)
    return small(
        pipe,
        prompt=["a red cat", "a dog"],
        negative_prompt="bad",
        height=32,
        width=32,
        max_sequence_length=8,
        complex_human_instruction=None,
        use_resolution_binning=False,
    )


def counted(module: Any, name: str) -> list[int]:
    """Replace the method by one that counts its calls; returns the count."""
    count, function = [0], getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return function(*args, **kwargs)

    setattr(module, name, call)
    return count


@pytest.mark.parametrize("memory", ["retain", "recompute"])
def test_a_prompt_is_encoded_once(memory: Any) -> None:
    text = with_text()
    plain = text()[0]
    count = counted(text.pipe.text_encoder, "forward")
    params = transformers(text)
    with operate(text.pipe, leapalign(4, 2), memory) as surgery:
        assert torch.equal(text()[0], plain)
        assert count[0] == 2  # the prompts, and the negative ones
        cotangent = torch.ones_like(surgery.outputs[0])
        grads = flat(gradient(surgery.outputs, [cotangent], params))
    backward(leapalign(4, 2), surgery.trajectory, surgery.field, cotangent)  # after the block
    assert torch.equal(surgery.decode(surgery.trajectory[0]), plain)
    assert count[0] == 2
    staged = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    assert gap(staged, grads) < STOCK
    assert all(p.grad is None for p in text.pipe.text_encoder.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_several_encoders_run_once_also_when_the_rollout_ends_early(whole: bool) -> None:
    """Flux's CLIP and T5 are not called by recompute's backward pass, nor by `backward` after the block."""
    torch.set_num_threads(1)
    pipe = tiny.pipeline()
    pipe.set_progress_bar_config(disable=True)
    encoders = [counted(encoder, "forward") for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    calls = counted(pipe.transformer, "forward")
    params = [p for p in pipe.transformer.parameters() if p.requires_grad]
    plan, arguments = refl(3), {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "latent"}
    with operate(pipe, plan, "recompute", whole=whole) as surgery:
        pipe(["a red circle", "a blue square"], **arguments)
    assert calls == [4 if whole else 2]
    cotangent = torch.ones_like(surgery.outputs[0])
    grads = flat(gradient(surgery.outputs, [cotangent], params))
    backward(plan, surgery.trajectory, surgery.field, cotangent, params=params)
    assert calls == [6 if whole else 4]
    assert encoders == [[1], [1]]
    staged = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    assert gap(staged, grads) < VALUE[torch.float32]


@pytest.mark.parametrize("name", ["Flux Kontext", "Flux inpaint", "Wan image-to-video"])
def test_an_image_is_encoded_once(name: str) -> None:
    photo = BUILDERS[name]()
    with operate(photo.pipe) as surgery:
        photo()
    count = counted(photo.pipe.vae, "encode")
    steps = surgery.trajectory.steps
    for t in range(1, steps + 1):
        v = surgery.field(surgery.trajectory[t], surgery.trajectory.sigma(t))
        assert torch.equal(v, surgery.trajectory.velocity(t))
    assert count[0] == 0
