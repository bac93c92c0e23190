"""VAE decoding with gradient: tiles, slices, recomputation, precision, offloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch import Tensor

from tests.builders import toy_world
from tests.tolerances import VALUE
from trajsurgery import RecipeError
from trajsurgery.training.model.vae_decoding import OffloadedModule, prepare_vae, vae_dtype
from trajsurgery.training.settings import Decoder


@pytest.fixture
def vae() -> Any:
    torch.set_num_threads(1)
    return toy_world.pipeline().vae.requires_grad_(False).eval()


def decode_with_gradient(vae: Any, settings: Decoder, side: int = 24) -> tuple[Tensor, Tensor, int]:
    """Decode two latents: the images, the gradient of their squares, and the bytes that the graph saved."""
    prepare_vae(vae, settings)
    z = torch.randn(2, 4, side, side + 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    parameters = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        images = vae.decode(z, return_dict=False)[0]
    saved_bytes = sum(n for pointer, n in saved.items() if pointer not in parameters)
    (gradient,) = torch.autograd.grad(images.square().sum(), z)
    return images.detach(), gradient, saved_bytes


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < VALUE[torch.float32]


@pytest.mark.parametrize("tiling", [None, 16])
def test_recomputation_changes_neither_images_nor_gradient_and_saves_little(vae: Any, tiling: int | None) -> None:
    plain = decode_with_gradient(vae, Decoder(tiling=tiling))
    recomputed = decode_with_gradient(
        toy_world.pipeline().vae.requires_grad_(False), Decoder(tiling=tiling, checkpointing=True)
    )
    assert torch.equal(plain[0], recomputed[0])
    assert close(recomputed[1], plain[1])
    assert recomputed[2] < 0.1 * plain[2]


def test_slices_change_neither_images_nor_gradient(vae: Any) -> None:
    plain = decode_with_gradient(vae, Decoder())
    sliced = decode_with_gradient(toy_world.pipeline().vae.requires_grad_(False), Decoder(slicing=True))
    assert close(sliced[0], plain[0])
    assert close(sliced[1], plain[1])


def test_tiles_have_the_requested_side(vae: Any) -> None:
    sides: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda module, args: sides.append(max(args[0].shape[-2:])))
    images, _, _ = decode_with_gradient(vae, Decoder(tiling=16))
    assert max(sides) == 8  # latents of this VAE are half as wide as images
    assert len(sides) > 1
    assert images.shape == (2, 3, 48, 64)


def test_the_precision_of_the_vae() -> None:
    """If the config forces upcasting or says nothing, the VAE decodes in float32 beside a bfloat16 transformer."""

    class ConfiguredVAE:
        def __init__(self, **config: bool) -> None:
            self.config = type("Config", (), config)()

    auto = Decoder()
    assert vae_dtype(ConfiguredVAE(force_upcast=True), auto, autocast=True) == torch.float32
    assert vae_dtype(ConfiguredVAE(), auto, autocast=True) == torch.float32
    assert vae_dtype(ConfiguredVAE(force_upcast=False), auto, autocast=True) == torch.bfloat16
    assert vae_dtype(ConfiguredVAE(force_upcast=False), auto, autocast=False) == torch.float32
    assert vae_dtype(ConfiguredVAE(force_upcast=False), Decoder(precision="float32"), autocast=True) == torch.float32
    assert vae_dtype(ConfiguredVAE(force_upcast=True), Decoder(precision="bfloat16"), autocast=False) == torch.bfloat16


def test_a_bfloat16_vae_takes_float32_latents_and_returns_their_gradient(vae: Any) -> None:
    _, gradient, _ = decode_with_gradient(vae, Decoder(precision="bfloat16"))
    assert vae.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    _, expected, _ = decode_with_gradient(toy_world.pipeline().vae.requires_grad_(False), Decoder())
    assert float((gradient - expected).norm() / expected.norm()) < VALUE[torch.bfloat16]


def test_an_offloaded_module_is_loaded_until_its_backward_pass(vae: Any) -> None:
    z = torch.randn(1, 4, 8, 8).requires_grad_()
    expected = torch.autograd.grad(vae.decode(z).sample.square().sum(), z)[0]
    module = OffloadedModule(vae, torch.device("cpu"))
    assert not module.here
    with torch.no_grad():
        vae.decode(z)
    assert not module.here
    first, second = vae.decode(z).sample, vae.decode(2 * z).sample
    assert module.here
    assert torch.equal(torch.autograd.grad(first.square().sum(), z)[0], expected)
    assert module.here  # the second image's backward pass is still to come
    second.sum().backward()
    assert not module.here


def test_an_offloaded_module_leaves_after_an_unused_graph(vae: Any) -> None:
    module = OffloadedModule(vae, torch.device("cpu"))
    z = torch.randn(1, 4, 8, 8).requires_grad_()
    images = vae.decode(z).sample
    assert module.here
    del images
    with torch.no_grad():
        vae.decode(z)
    assert not module.here


def test_unsupported_vae_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least 8 pixels"):
        prepare_vae(toy_world.pipeline().vae, Decoder(tiling=4))
    other = VQModel(block_out_channels=(8,), norm_num_groups=4)
    for settings, message in {
        Decoder(tiling=64): "no tiles of a given side",
        Decoder(slicing=True): "no slices",
    }.items():
        with pytest.raises(RecipeError, match=message):
            prepare_vae(other, settings)
