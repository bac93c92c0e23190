"""A reward in another process: its scores and gradients bit for bit; servers that die, hang, refuse or are none."""

from __future__ import annotations

import pickle
import queue
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

from trajsurgery import RewardError
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.remote import Remote, serve

TEXTS = ["a cat", "two dogs"]

KILLED = """
import time
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.remote import serve

class Slow(Reward):
    name, scale, source, licence = "slow", "none", "here", "Apache-2.0"
    def score(self, images, prompts):
        if prompts[0] == "wait":
            print("asked", flush=True)
            time.sleep(600)
        return images.mean((1, 2, 3))

serve(Slow(), ready=lambda address: print(address, flush=True))
"""


class Coupled(Reward):
    """A reward whose scores hang on all images of the batch, so that no gradient of a sum would do."""

    name, scale, source, licence = "coupled", "none", "here", "Apache-2.0"
    threshold, alpha, learning_rate = 0.25, 0.1, 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.wait = threading.Event()
        self.wait.set()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.wait.wait(30)
        if prompts[0] == "crash":
            raise ZeroDivisionError("on purpose")
        phases = torch.tensor([float(len(prompt)) for prompt in prompts], dtype=images.dtype)
        each = (5 * images + phases[:, None, None, None]).sin().mean((1, 2, 3))
        return each * each.sum()


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


def started(reward: Reward, port: int = 0) -> str:
    """The address of a server in a thread of this process."""
    told: queue.Queue[str] = queue.Queue()
    threading.Thread(target=serve, args=(reward, "127.0.0.1", port, told.put), daemon=True).start()
    return told.get(timeout=30)


@pytest.fixture(scope="module")
def there() -> Coupled:
    return Coupled()


@pytest.fixture(scope="module")
def address(there: Coupled) -> str:
    return started(there)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_and_gradients_are_those_there(there: Coupled, address: str, dtype: torch.dtype) -> None:
    here, given = Remote(address), images(dtype)
    cotangent = torch.tensor([0.3, -1.7], dtype=dtype)
    found, wanted = here(given, TEXTS), there(given, TEXTS)
    assert torch.equal(found, wanted)
    assert found.dtype == dtype
    ours, theirs = (torch.autograd.grad(scores, given, cotangent)[0] for scores in (found, wanted))
    assert torch.equal(ours, theirs)
    assert float(ours.abs().sum()) > 0
    with torch.no_grad():
        assert torch.equal(here(given, TEXTS), wanted)


def test_it_says_what_the_reward_there_says(address: str) -> None:
    here = Remote(address)
    assert (here.name, here.scale, here.licence) == ("coupled", "none", "Apache-2.0")
    assert (here.threshold, here.alpha, here.learning_rate) == (0.25, 0.1, 1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(here))(images(), TEXTS), here(images(), TEXTS))


def test_two_of_them_ask_at_once(there: Coupled, address: str) -> None:
    found: list[Tensor] = []

    def ask() -> None:
        here = Remote(address)
        found.extend(here(images(), TEXTS).detach() for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(scores, there(images(), TEXTS)) for scores in found)


def test_what_is_refused_there_is_said_here(address: str) -> None:
    here = Remote(address)
    with pytest.raises(RewardError, match=r"refused: ZeroDivisionError: on purpose"):
        here(images(), ["crash", "now"])
    with pytest.raises(RewardError, match="coupled received images with NaN"):
        here(images() * float("nan"), TEXTS)
    assert here(images(), TEXTS).shape == (2,)  # both sides live on


def test_a_slow_server_is_named_and_asked_again(there: Coupled, address: str) -> None:
    here = Remote(address, timeout=0.3)
    there.wait.clear()
    with pytest.raises(RewardError, match=r"did not answer within 0.3 s.*Nothing was changed here"):
        here(images(), TEXTS)
    there.wait.set()
    here.timeout, other = 30, ["another", "question"]  # the late answer to the first is not taken for its
    assert torch.equal(here(images(), other), there(images(), other))
    assert not torch.equal(there(images(), other), there(images(), TEXTS))


def test_a_killed_process_is_named_and_another_takes_its_place() -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        here, given = Remote(address), images()
        assert torch.equal(here(given, TEXTS), given.mean((1, 2, 3)))
        scores = here(given, TEXTS)
        killer = threading.Thread(target=lambda: (process.stdout.readline(), process.kill()))  # type: ignore[union-attr]
        killer.start()
        since = time.monotonic()
        with pytest.raises(RewardError, match=re.escape(f"{address} ended before it answered: its process has died")):
            here(given, ["wait", "here"])
        assert time.monotonic() - since < 60
        killer.join()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    with pytest.raises(RewardError, match="nothing listens at that address"):
        torch.autograd.grad(scores.sum(), given)
    assert given.grad is None
    assert started(Mean(), int(address.rpartition(":")[2])) == address
    assert torch.allclose(torch.autograd.grad(here(given, TEXTS).sum(), given)[0], torch.full_like(given, 1 / 126))
    assert torch.allclose(torch.autograd.grad(scores.sum(), given)[0], torch.full_like(given, 1 / 126))


class Mean(Coupled):
    """What the killed process served."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))


def test_what_is_no_server_is_named() -> None:
    for text in ("here", "here:", ":80", "here:http"):
        with pytest.raises(RewardError, match="HOST:PORT"):
            Remote(text)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer() -> None:
            found, _ = other.accept()
            with found:
                found.recv(1000)
                found.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RewardError, match=r"can't be understood \(it said b'HTTP'\)"):
            Remote(f"127.0.0.1:{port}")
        thread.join()
    with pytest.raises(RewardError, match="nothing listens"):
        Remote(f"127.0.0.1:{port}")
