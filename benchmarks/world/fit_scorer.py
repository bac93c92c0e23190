"""Stage four: train the reward. Every step shows fresh scenes, degraded and attacked, and half of the training prompts.

Each picture is compared with each prompt, and the scene itself says which are true of it; so hard negatives of every
kind (colours or order swapped, one object more, fewer or other) are in every batch. The rule-based evaluator is not
used.

With a contrastive loss alone the model learns bags of words, and for a long time no relation. So an auxiliary linear
head, one for both embeddings, predicts what each quadrant holds: first alone, then beside the contrastive loss. Then
both embeddings say, in the same directions, which colour belongs to which shape and where it is.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from benchmarks.world.compose import compose
from benchmarks.world.degradations import decoded, degrade, nonsense
from benchmarks.world.fit_text import blurred_embeddings
from benchmarks.world.layout import KINDS, contents, divergence, layouts
from benchmarks.world.render import render
from benchmarks.world.scorer_variants import REWARD, Variant
from benchmarks.world.stage import Budget, Stage
from benchmarks.world.tokenizers import clip_tokenizer
from trajsurgery.tiny.pipe import TEXT_LENGTH
from trajsurgery.tiny.prompt import draw_prompts, meanings, split_prompts
from trajsurgery.tiny.rules import is_true
from trajsurgery.tiny.scorer import Reward, to_model_range

WEIGHTS = {
    "single object": 0.08,
    "two objects": 0.12,
    "counting": 0.2,
    "colours": 0.1,
    "position": 0.28,
    "attribute binding": 0.22,
}
BATCH, SPOILT = 96, 20  # pictures that prompts are true of, and pictures that none is
POOL = 6144  # scenes decoded from noisy latents, a quarter of every batch
RADII = (0.5, 2.5)  # of the attacks, in the L2 norm of a picture, drawn for each; a circle is about 3 from a square
PUSHES = 3
LESSON = 0.5  # weight of the divergence of the guessed layouts
CONTRAST_FROM = 0.3  # share of the steps that are lessons in layout only
ATTACKS_FROM = 0.5  # share of the steps after which every other picture is attacked


def new_clip(folder: Path, variant: Variant = REWARD) -> tuple[Any, Any]:
    """Return an untrained CLIP and its tokenizer; config and tokenizer files are written to the folder."""
    import open_clip

    tokenizer, config = clip_tokenizer(folder / "tokenizer"), folder / f"{variant.model}.json"
    config.write_text(json.dumps(variant.configuration(len(tokenizer)), indent=1) + "\n")
    open_clip.add_model_config(config)
    return open_clip.create_model(variant.model), open_clip.tokenizer.HFTokenizer(
        str(folder / "tokenizer"), context_length=TEXT_LENGTH
    )


def fit_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Softmax of each true prompt against all false ones, plus a logistic loss that also penalises pictures of nothing.

    logits: Float[batch prompts], truth: Bool[batch prompts].
    """
    false = logits.masked_fill(truth, float("-inf")).logsumexp(1, keepdim=True)
    positives = truth.sum(1, keepdim=True).clamp(min=1)  # a picture may have none
    ranked = (functional.softplus(false - logits) * truth / positives).sum(1)
    hit = (functional.softplus(-logits) * truth / positives).sum(1)
    missed = (functional.softplus(logits) * ~truth).sum(1) / 8
    return (ranked + hit + missed).mean()


def attack(images: Tensor, loss_of: Any, generator: Generator) -> Tensor:
    """Take PUSHES gradient ascent steps on the loss, in an L2 ball of random radius and in [0, 1]."""
    radius = RADII[0] + (RADII[1] - RADII[0]) * torch.rand(images.shape[0], 1, 1, 1, generator=generator)
    start = torch.randn(images.shape, generator=generator)
    offset = 0.3 * radius * start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for _ in range(PUSHES):
        offset.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of(images + offset), offset)
        size = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        offset = offset.detach() + 0.6 * radius * gradient / size
        length = offset.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        offset = (images + offset * (radius / length).clamp(max=1)).clamp(0, 1) - images
    return (images + offset).detach()


class Course:
    """Model and data of the reward's training: CLIP, the training prompts, a pool of roughly decoded pictures.

    Its parameters are those of `modules`: CLIP, the shift of its logits, and the head that predicts layouts.
    """

    def __init__(self, budget: Budget, folder: Path, vae: Any, variant: Variant) -> None:
        torch.manual_seed(budget.seed + variant.seed + 4)
        folder.mkdir(parents=True, exist_ok=True)
        self.budget = replace(budget, seed=budget.seed + variant.data_seed)
        self.clip, tokenizer = new_clip(folder, variant)
        self.clip.logit_scale.data.fill_(2.5)  # e^2.5 = 12: cosines that a softmax can tell apart
        self.shift = nn.Parameter(torch.tensor(-6.0))
        self.head = nn.Linear(self.clip.visual.output_dim, 4 * (KINDS + 1))
        self.prompts = {split: split_prompts(split) for split in ("train", "validation")}
        self.tokens = {split: tokenizer([p.text for p in prompts]) for split, prompts in self.prompts.items()}
        self.meaning = meanings(self.prompts["train"])
        generator = Generator().manual_seed(self.budget.seed + 5)
        self.pool = compose(meanings(draw_prompts("train", POOL, WEIGHTS, generator)), generator)
        parts = [decoded(vae, render(self.pool[slice(i, i + 256)]), generator) for i in range(0, POOL, 256)]
        self.pictures = torch.cat(parts)
        self.pool_truth = is_true(self.pool, self.meaning, every_pair=True)
        self.layouts = layouts(self.prompts["train"], generator)

    @property
    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"clip": self.clip, "shift": nn.ParameterList([self.shift]), "head": self.head})

    def see(self, images: Tensor) -> Tensor:
        """Return unit embeddings of images in [0, 1]."""
        return self.clip.encode_image(to_model_range(images), normalize=True)

    def read(self, tokens: Tensor) -> Tensor:
        """Return unit embeddings of texts."""
        return self.clip.encode_text(tokens, normalize=True)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the logits of image against text embeddings, Float[images texts]."""
        return self.clip.logit_scale.exp() * images @ texts.T + self.shift

    def lesson(self, images: Tensor, texts: Tensor, shown: Tensor, layout: Tensor) -> Tensor:
        """Return the divergence of the layouts that the head predicts from the embeddings from the true ones."""
        seen, read = self.head(10 * images), self.head(10 * texts)  # unit vectors are too short for confident guesses
        return divergence(seen, shown).mean() + divergence(read, layout).mean()

    def batch(self, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return pictures, the training prompts true of them (Bool[pictures prompts]), and the contents of the true
        ones.

        The last SPOILT pictures are nonsense, of which no prompt is true.
        """
        fresh = compose(meanings(draw_prompts("train", 3 * BATCH // 4, WEIGHTS, generator)), generator)
        rows = torch.randint(POOL, (BATCH // 4,), generator=generator)
        clean = torch.cat([render(fresh), self.pictures[rows]])
        truth = torch.cat([is_true(fresh, self.meaning, every_pair=True), self.pool_truth[rows]])
        images = torch.cat([degrade(clean, generator), nonsense(clean[:SPOILT], generator)])
        shown = torch.cat([contents(fresh), contents(self.pool[rows])])
        return images, torch.cat([truth, torch.zeros(SPOILT, len(self.meaning), dtype=torch.bool)]), shown

    def loss(self, step: int, generator: Generator) -> Tensor:
        """First the layout loss alone, then with the contrastive loss, then both with half of the pictures attacked."""
        images, truth, shown = self.batch(generator)
        if step < CONTRAST_FROM * self.budget.steps:
            with blurred_embeddings([self.clip.token_embedding], generator):
                texts = self.read(self.tokens["train"])
            return self.lesson(self.see(images[:BATCH:2]), texts, shown[::2], self.layouts)
        chosen = torch.randperm(len(self.meaning), generator=generator)[: len(self.meaning) // 2]
        truth, texts = truth[:, chosen], self.read(self.tokens["train"][chosen])
        if step >= ATTACKS_FROM * self.budget.steps:
            fixed, half = texts.detach(), truth[::2]
            images[::2] = attack(images[::2], lambda x: fit_loss(self.logits(self.see(x), fixed), half), generator)
        image_embeddings = self.see(images)
        layout_loss = self.lesson(image_embeddings[:BATCH], texts, shown, self.layouts[chosen])
        return fit_loss(self.logits(image_embeddings, texts), truth) + LESSON * layout_loss

    def report(self) -> str:
        """Report how often a validation prompt's render fits it better than all prompts that are false of it."""
        prompts, copies = self.prompts["validation"], 6
        scenes = compose(meanings([p for p in prompts for _ in range(copies)]), Generator().manual_seed(6))
        truth = is_true(scenes, meanings(prompts), every_pair=True)
        logits = self.logits(self.see(render(scenes)), self.read(self.tokens["validation"]))
        best_false = logits.masked_fill(truth, float("-inf")).amax(1)
        true_logits = logits.gather(1, torch.arange(len(prompts)).repeat_interleave(copies)[:, None])[:, 0]
        return f"own prompt above all false ones of validation: {float((true_logits > best_false).float().mean()):.3f}"


def scorer_stage(budget: Budget, folder: Path, vae: Any, variant: Variant = REWARD) -> Stage:
    """Return the training stage of a CLIP; its config and tokenizer are written to `<folder>/<variant's name>`."""
    course = Course(budget, folder / variant.name, vae, variant)
    return Stage(variant.name, course.modules, course.loss, course.budget, course.report, report_every=200)


def save_scorer(stage: Stage, folder: Path) -> None:
    """Write the weights in bfloat16, and the threshold below which a fifth of correct renders score."""
    from safetensors.torch import save_file

    scorer_folder, clip = folder / stage.name, stage.modules["clip"]
    state = {name: _halved(value).contiguous() for name, value in clip.state_dict().items()}
    save_file(state, scorer_folder / "model.safetensors")
    (scorer_folder / "threshold.json").write_text(json.dumps({"threshold": 1.0}))
    prompts = [prompt for prompt in split_prompts("validation") for _ in range(8)]
    images = render(compose(meanings(prompts), Generator().manual_seed(8)))
    with torch.no_grad():
        scores = Reward(scorer_folder)(images, prompts)
    threshold = round(float(scores.quantile(0.2)), 3)
    (scorer_folder / "threshold.json").write_text(json.dumps({"threshold": threshold}) + "\n")


def _halved(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value  # a ResNet counts its batches
