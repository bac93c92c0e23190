"""How the VAE decodes with gradient: tiles, slices, recomputation, precision, and where its weights are meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch import Tensor

from tests.builders import toy_world
from tests.tolerances import VALUE
from trajsurgery import RecipeError
from trajsurgery.training.settings import Decoder
from trajsurgery.training.vae_decoding import OffloadedModule, prepare_vae, vae_dtype


@pytest.fixture
def vae() -> Any:
    torch.set_num_threads(1)
    return toy_world.pipeline().vae.requires_grad_(False).eval()


def decoded(vae: Any, settings: Decoder, side: int = 24) -> tuple[Tensor, Tensor, int]:
    """Images of two latents, the gradient of their squares, and the bytes that the graph kept."""
    prepare_vae(vae, settings)
    z = torch.randn(2, 4, side, side + 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    own = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        images = vae.decode(z, return_dict=False)[0]
    size = sum(n for place, n in kept.items() if place not in own)
    (gradient,) = torch.autograd.grad(images.square().sum(), z)
    return images.detach(), gradient, size


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < VALUE[torch.float32]


@pytest.mark.parametrize("tiling", [None, 16])
def test_recomputation_changes_neither_images_nor_gradient_and_keeps_little(vae: Any, tiling: int | None) -> None:
    plain = decoded(vae, Decoder(tiling=tiling))
    again = decoded(toy_world.pipeline().vae.requires_grad_(False), Decoder(tiling=tiling, checkpointing=True))
    assert torch.equal(plain[0], again[0])
    assert close(again[1], plain[1])
    assert again[2] < 0.1 * plain[2]


def test_slices_change_neither_images_nor_gradient(vae: Any) -> None:
    plain = decoded(vae, Decoder())
    sliced = decoded(toy_world.pipeline().vae.requires_grad_(False), Decoder(slicing=True))
    assert close(sliced[0], plain[0])
    assert close(sliced[1], plain[1])


def test_tiles_are_of_the_side_that_is_asked_for(vae: Any) -> None:
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(max(args[0].shape[-2:])))
    images, _, _ = decoded(vae, Decoder(tiling=16))
    assert max(seen) == 8  # latents of this VAE are half as wide as images
    assert len(seen) > 1
    assert images.shape == (2, 3, 48, 64)


def test_precision() -> None:
    """A VAE that is known to overflow, or says nothing of it, decodes in float32 beside a bfloat16 transformer."""

    class Says:
        def __init__(self, **config: bool) -> None:
            self.config = type("Config", (), config)()

    auto = Decoder()
    assert vae_dtype(Says(force_upcast=True), auto, autocast=True) == torch.float32
    assert vae_dtype(Says(), auto, autocast=True) == torch.float32
    assert vae_dtype(Says(force_upcast=False), auto, autocast=True) == torch.bfloat16
    assert vae_dtype(Says(force_upcast=False), auto, autocast=False) == torch.float32
    assert vae_dtype(Says(force_upcast=False), Decoder(precision="float32"), autocast=True) == torch.float32
    assert vae_dtype(Says(force_upcast=True), Decoder(precision="bfloat16"), autocast=False) == torch.bfloat16


def test_a_bfloat16_vae_takes_float32_latents_and_gives_them_their_gradient(vae: Any) -> None:
    _, gradient, _ = decoded(vae, Decoder(precision="bfloat16"))
    assert vae.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    _, wanted, _ = decoded(toy_world.pipeline().vae.requires_grad_(False), Decoder())
    assert float((gradient - wanted).norm() / wanted.norm()) < VALUE[torch.bfloat16]


def test_a_guest_is_there_from_its_work_to_its_backward_pass(vae: Any) -> None:
    z = torch.randn(1, 4, 8, 8).requires_grad_()
    wanted = torch.autograd.grad(vae.decode(z).sample.square().sum(), z)[0]
    guest = OffloadedModule(vae, torch.device("cpu"))
    assert not guest.here
    with torch.no_grad():
        vae.decode(z)
    assert not guest.here
    first, second = vae.decode(z).sample, vae.decode(2 * z).sample
    assert guest.here
    assert torch.equal(torch.autograd.grad(first.square().sum(), z)[0], wanted)
    assert guest.here  # the second image's gradient is still to come
    second.sum().backward()
    assert not guest.here


def test_a_guest_leaves_after_a_graph_that_nobody_ran(vae: Any) -> None:
    guest = OffloadedModule(vae, torch.device("cpu"))
    z = torch.randn(1, 4, 8, 8).requires_grad_()
    images = vae.decode(z).sample
    assert guest.here
    del images
    with torch.no_grad():
        vae.decode(z)
    assert not guest.here


def test_what_a_vae_lacks_is_said() -> None:
    with pytest.raises(RecipeError, match="at least 8 pixels"):
        prepare_vae(toy_world.pipeline().vae, Decoder(tiling=4))
    other = VQModel(block_out_channels=(8,), norm_num_groups=4)
    for settings, lacks in {Decoder(tiling=64): "no tiles of a given side", Decoder(slicing=True): "no slices"}.items():
        with pytest.raises(RecipeError, match=lacks):
            prepare_vae(other, settings)
