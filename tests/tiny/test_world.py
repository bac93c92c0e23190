"""The embedded world's scenes, prompts and rules: pictures show what the prompt says, and the rules recognise it."""

import subprocess
import sys

import pytest
import torch
from torch import Generator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks.world.compose import compose
from benchmarks.world.hard_negatives import hard_negatives, mistakes
from benchmarks.world.render import render
from trajsurgery import tiny
from trajsurgery.tiny.prompt import (
    CATEGORIES,
    SPLITS,
    Prompt,
    Thing,
    draw_prompts,
    every_prompt,
    meanings,
    split_prompts,
    understand,
)
from trajsurgery.tiny.rules import is_true
from trajsurgery.tiny.scene import ABSENT, APART, SIDE, SLOTS, Scenes
from trajsurgery.tiny.segment import components, segment

torch.set_num_threads(1)


def scene(*objects: tuple[int, int, float, float]) -> Scenes:
    """One scene of (shape, colour, x, y) objects, each of radius 5."""
    blank = SLOTS - len(objects)
    return Scenes(
        torch.tensor([[o[0] for o in objects] + [ABSENT] * blank]),
        torch.tensor([[o[1] for o in objects] + [0] * blank]),
        torch.tensor([[[o[2], o[3]] for o in objects] + [[0.0, 0.0]] * blank]),
        torch.full((1, SLOTS), 5.0),
    )


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Prompt], Scenes, torch.Tensor]:
    prompts = list(every_prompt())
    scenes = compose(meanings(prompts), Generator().manual_seed(0))
    return prompts, scenes, render(scenes)


def test_splits_are_disjoint_and_each_has_every_category():
    seen: set[str] = set()
    for split in SPLITS:
        prompts = split_prompts(split)
        assert {prompt.category for prompt in prompts} == set(CATEGORIES)
        assert not seen & {prompt.text for prompt in prompts}
        seen |= {prompt.text for prompt in prompts}
    assert seen == {prompt.text for prompt in every_prompt()}
    assert len(seen) == len(every_prompt()), "two prompts read the same"


def test_training_prompts_come_in_the_papers_ratio():
    prompts = tiny.prompts("train", Generator().manual_seed(1), 8500)
    counts = [sum(p.category == c for p in prompts) for c in CATEGORIES]
    expected = dict(zip(CATEGORIES, (0, 500, 2500, 500, 3500, 1500)))
    for category, count in zip(CATEGORIES, counts):
        assert abs(count - expected[category]) <= 4 * expected[category] ** 0.5
    assert {p.text for p in prompts} <= {p.text for p in split_prompts("train")}


def test_training_prompts_come_in_a_custom_ratio():
    prompts = tiny.prompts("train", Generator().manual_seed(1), 1500, ratio=tiny.EVEN_RATIO)
    counts = {c: sum(p.category == c for p in prompts) for c in CATEGORIES}
    for category, share in tiny.EVEN_RATIO.items():
        assert abs(counts[category] - 100 * share) <= 4 * (100 * share) ** 0.5


def test_prompts_depend_on_their_generator_only():
    first, again = (draw_prompts("train", 50, {"position": 1}, Generator().manual_seed(2)) for _ in range(2))
    assert first == again
    assert first != draw_prompts("train", 50, {"position": 1}, Generator().manual_seed(3))


@pytest.mark.parametrize("wrong", [{"count": 3}, {"generator": Generator()}])
def test_count_without_generator_is_an_error(wrong: dict):
    with pytest.raises(ValueError, match="give both"):
        tiny.prompts("train", **wrong)


def test_unknown_split_and_unknown_text_are_errors():
    with pytest.raises(ValueError, match="heldout"):
        tiny.prompts("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="purple"):
        understand(["a purple circle"])


def test_every_scene_makes_its_prompt_true_and_its_hard_negatives_false(drawn):
    prompts, scenes, _ = drawn
    assert is_true(scenes, meanings(prompts)).all()
    for i in range(0, len(prompts), 7):
        near = hard_negatives(prompts[i])
        assert len(near) >= 3, prompts[i]
        copies = scenes[torch.full((len(near),), i)]
        assert not is_true(copies, meanings(near)).any(), prompts[i]


def test_pairwise_and_every_pair_agree(drawn):
    prompts, scenes, _ = drawn
    parsed = meanings(prompts)
    table = is_true(scenes[slice(0, 40)], parsed, every_pair=True)
    for i in range(40):
        assert torch.equal(table[i], is_true(scenes[torch.full((len(prompts),), i)], parsed))


@pytest.mark.parametrize(
    "text, objects, true",
    [
        ("a red circle left of a blue square", [(0, 0, 8, 8), (1, 2, 24, 8)], True),
        ("a red circle left of a blue square", [(1, 2, 24, 8), (0, 0, 8, 8)], True),
        ("a red circle left of a blue square", [(0, 0, 24, 8), (1, 2, 8, 8)], False),
        ("a red circle left of a blue square", [(0, 0, 8, 8), (1, 2, 8 + APART - 0.1, 24)], False),
        ("a red circle left of a blue square", [(0, 2, 8, 8), (1, 0, 24, 8)], False),
        ("a red circle left of a blue square", [(0, 0, 8, 8), (1, 2, 24, 8), (2, 1, 8, 24)], False),
        ("a circle above a square", [(0, 3, 8, 8), (1, 3, 8, 24)], True),
        ("a circle above a square", [(0, 3, 8, 24), (1, 3, 8, 8)], False),
        ("two red circles", [(0, 0, 8, 8), (0, 0, 24, 8)], True),
        ("two red circles", [(0, 0, 8, 8), (0, 0, 24, 8), (0, 0, 24, 24)], False),
        ("two red circles", [(0, 0, 8, 8), (0, 1, 24, 8)], False),
        ("two circles", [(0, 0, 8, 8), (0, 1, 24, 8)], True),
        ("a blue triangle", [(2, 2, 24, 24)], True),
        ("a blue triangle", [(2, 2, 24, 24), (2, 2, 8, 8)], False),
    ],
)
def test_scenes_and_their_pictures_are_judged_correctly(text, objects, true):
    composed = scene(*objects)
    assert bool(is_true(composed, meanings(understand([text])))) is true
    assert bool(tiny.judge(render(composed), [text]).correct) is true


def test_rules_are_right_on_renders_and_reject_hard_negatives(drawn):
    prompts, _, images = drawn
    assert tiny.judge(images, prompts).correct.float().mean() >= 0.99
    generator = Generator().manual_seed(4)
    picks = torch.rand(len(prompts), generator=generator).tolist()
    near = [hard_negatives(p)[int(u * len(hard_negatives(p)))] for p, u in zip(prompts, picks)]
    assert tiny.judge(images, near).correct.float().mean() <= 0.01


def test_rules_tolerate_blur_and_a_little_noise(drawn):
    prompts, _, images = drawn
    part, part_prompts = images[::3], prompts[::3]
    blurred = functional.avg_pool2d(functional.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)
    assert tiny.judge(blurred, part_prompts).correct.float().mean() >= 0.97
    noisy = (part + 0.04 * torch.randn(part.shape, generator=Generator().manual_seed(5))).clamp(0, 1)
    assert tiny.judge(noisy, part_prompts).correct.float().mean() >= 0.97


def test_segmentation_measures_what_was_drawn(drawn):
    _, scenes, images = drawn
    segmented, junk = segment(images[:100])
    assert junk.max() == 0
    assert torch.equal(segmented.count, scenes[slice(0, 100)].count)
    for i in range(100):
        expected = sorted((int(s), int(c), x) for s, c, x in _objects(scenes, i))
        seen = sorted((int(s), int(c), x) for s, c, x in _objects(segmented, i))
        assert [m[:2] for m in expected] == [s[:2] for s in seen]
        assert all(abs(m[2] - s[2]) < 0.6 for m, s in zip(expected, seen))


def _objects(scenes: Scenes, i: int) -> list[tuple[int, int, float]]:
    present = scenes.shape[i] != ABSENT
    rows = zip(scenes.shape[i][present], scenes.colour[i][present], scenes.centre[i, present, 0])
    return [(int(s), int(c), round(float(x), 1)) for s, c, x in rows]


def test_junk_is_measured_and_unknown_shapes_are_no_objects():
    purple = torch.full((1, 3, SIDE, SIDE), 0.5)
    purple[:, 0, :8, :8], purple[:, 1, :8, :8], purple[:, 2, :8, :8] = 0.9, 0.1, 0.9
    assert float(tiny.judge(purple, ["a circle"]).junk) == pytest.approx(64 / SIDE**2)
    speck = torch.full((1, 3, SIDE, SIDE), 0.5)
    speck[:, :, 3:5, 3:5] = torch.tensor([0.85, 0.12, 0.12]).view(1, 3, 1, 1)
    verdict = tiny.judge(speck, ["a red square"])
    assert float(verdict.junk) == pytest.approx(4 / SIDE**2)
    assert not verdict.correct
    bar = torch.full((1, 3, SIDE, SIDE), 0.5)
    bar[:, :, 14:17, 2:30] = torch.tensor([0.85, 0.12, 0.12]).view(1, 3, 1, 1)
    assert not any(tiny.judge(bar, [f"a red {shape}"]).correct for shape in ("circle", "square", "triangle"))


def test_components_follow_a_winding_blob_and_keep_neighbours_apart():
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, ::4] = True
    for row in range(0, SIDE - 4, 4):
        mask[0, row : row + 4, (SIDE - 1) * ((row // 4) % 2)] = True
    mask[0, 30:32, 10:20] = True
    label = components(mask)
    assert len(label.unique()) == 3
    assert (label == 0).equal(~mask)


def test_verdicts_have_a_table_and_wrong_shapes_are_errors(drawn):
    prompts, _, images = drawn
    table = tiny.judge(images, prompts).table()
    assert set(table) == {*CATEGORIES, "overall"}
    assert table["overall"][1] == len(prompts)
    with pytest.raises(ValueError, match="one prompt for each"):
        tiny.judge(images[:2], prompts[:3])
    with pytest.raises(ValueError, match="32, 32"):
        tiny.judge(images[:2, :, :16], prompts[:2])


def test_mistakes_keep_the_words_and_are_wrong():
    prompt = understand(["a red circle left of a blue square"])[0]
    wrong = mistakes(prompt)
    assert {sorted(p.things) == sorted(prompt.things) for p in wrong} == {True}
    assert "a red circle right of a blue square" in {p.text for p in wrong}
    assert "a blue square right of a red circle" not in {p.text for p in wrong}, "it means the same"
    swapped = mistakes(understand(["a red circle and a blue square"])[0])
    assert {frozenset(p.things) for p in swapped} == {frozenset({Thing("circle", "blue"), Thing("square", "red")})}


def test_the_world_is_imported_without_diffusers_or_open_clip():
    code = (
        "import sys, torch, trajsurgery.tiny as tiny; tiny.prompts('train'); tiny.judge(torch.full((1,3,32,32),.5), "
        "['a circle']); print([m for m in ('diffusers', 'transformers', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_images_on_a_gpu_are_judged_on_the_cpu(monkeypatch):
    class Segmented(Exception):  # noqa: N818
        """The images have come to where the rules look at them."""

    def tints(images):
        raise Segmented(images.device.type)

    monkeypatch.setattr("trajsurgery.tiny.segment.tints", tints)
    with FakeTensorMode():
        images = torch.zeros(1, 3, SIDE, SIDE, device="cuda")
    with pytest.raises(Segmented, match=r"^cpu$"):
        tiny.judge(images, ["a circle"])


@pytest.mark.parametrize("ratio", [{"postion": 1, "counting": 1}, {"counting": 0}, {}])
def test_a_ratio_of_no_category_is_refused(ratio):
    with pytest.raises(ValueError, match="it weighs some of the categories single object"):
        tiny.prompts("train", Generator(), 1, ratio)
