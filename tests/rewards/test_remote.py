"""A reward in another process: scores and gradients bit for bit; servers that die, hang, refuse or are others."""

from __future__ import annotations

import contextlib
import pickle
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trajsurgery import RewardError
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.remote import Remote, serve

TEXTS = ["a cat", "two dogs"]

SLOW_SERVER = """
import time
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.remote import serve

class Slow(Reward):
    name, scale, source, licence = "slow", "none", "here", "Apache-2.0"
    def score(self, images, prompts):
        if prompts[0] == "wait":
            print("received", flush=True)
            time.sleep(600)
        return images.mean((1, 2, 3))

serve(Slow(), ready=lambda address: print(address, flush=True))
"""


class Coupled(Reward):
    """A reward whose scores depend on all images of the batch: the gradient of their sum would not be enough."""

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


def start_server(reward: Reward, port: int = 0, **options: Any) -> str:
    """Start a server in a thread of this process and return its address."""
    addresses: queue.Queue[str] = queue.Queue()
    arguments = (reward, "127.0.0.1", port, addresses.put)
    threading.Thread(target=serve, args=arguments, kwargs=options, daemon=True).start()
    return addresses.get(timeout=30)


@pytest.fixture(scope="module")
def served() -> Coupled:
    return Coupled()


@pytest.fixture(scope="module")
def address(served: Coupled) -> str:
    return start_server(served)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_and_gradients_are_those_of_the_served_reward(served: Coupled, address: str, dtype: torch.dtype) -> None:
    remote, pixels = Remote(address), images(dtype)
    cotangent = torch.tensor([0.3, -1.7], dtype=dtype)
    actual, expected = remote(pixels, TEXTS), served(pixels, TEXTS)
    assert torch.equal(actual, expected)
    assert actual.dtype == dtype
    ours, theirs = (torch.autograd.grad(scores, pixels, cotangent)[0] for scores in (actual, expected))
    assert torch.equal(ours, theirs)
    assert float(ours.abs().sum()) > 0
    with torch.no_grad():
        assert torch.equal(remote(pixels, TEXTS), expected)


def test_a_remote_reward_has_the_attributes_of_the_served_one(address: str) -> None:
    remote = Remote(address)
    assert (remote.name, remote.scale, remote.licence) == ("coupled", "none", "Apache-2.0")
    assert (remote.threshold, remote.alpha, remote.learning_rate) == (0.25, 0.1, 1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(remote))(images(), TEXTS), remote(images(), TEXTS))


def test_several_clients_score_at_once(served: Coupled, address: str) -> None:
    results: list[Tensor] = []

    def request() -> None:
        remote = Remote(address)
        results.extend(remote(images(), TEXTS).detach() for _ in range(5))

    threads = [threading.Thread(target=request) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    assert all(torch.equal(scores, served(images(), TEXTS)) for scores in results)


def test_errors_of_the_served_reward_are_raised_by_the_client(address: str) -> None:
    remote = Remote(address)
    with pytest.raises(RewardError, match=r"refused: ZeroDivisionError: on purpose"):
        remote(images(), ["crash", "now"])
    with pytest.raises(RewardError, match="coupled received images with NaN"):
        remote(images() * float("nan"), TEXTS)
    assert remote(images(), TEXTS).shape == (2,)  # both sides still work


def test_a_slow_server_is_reported_and_can_be_used_again(served: Coupled, address: str) -> None:
    remote = Remote(address, timeout=0.3)
    served.wait.clear()
    with pytest.raises(RewardError, match=r"did not answer within 0.3 s.*Nothing was changed here"):
        remote(images(), TEXTS)
    served.wait.set()
    remote.timeout, other = 30, ["another", "question"]  # the late answer to the first request is not taken for theirs
    assert torch.equal(remote(images(), other), served(images(), other))
    assert not torch.equal(served(images(), other), served(images(), TEXTS))


def test_a_killed_server_is_reported_and_another_can_take_its_place() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        remote, pixels = Remote(address), images()
        assert torch.equal(remote(pixels, TEXTS), pixels.mean((1, 2, 3)))
        scores = remote(pixels, TEXTS)
        killer = threading.Thread(target=lambda: (process.stdout.readline(), process.kill()))  # type: ignore[union-attr]
        killer.start()
        since = time.monotonic()
        with pytest.raises(RewardError, match=re.escape(f"{address} ended before it answered: its process has died")):
            remote(pixels, ["wait", "here"])
        assert time.monotonic() - since < 60
        killer.join()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    with pytest.raises(RewardError, match="nothing listens at that address"):
        torch.autograd.grad(scores.sum(), pixels)
    assert pixels.grad is None
    assert start_server(Mean(), int(address.rpartition(":")[2])) == address
    assert torch.allclose(torch.autograd.grad(remote(pixels, TEXTS).sum(), pixels)[0], torch.full_like(pixels, 1 / 126))
    assert torch.allclose(torch.autograd.grad(scores.sum(), pixels)[0], torch.full_like(pixels, 1 / 126))


class Mean(Coupled):
    """The reward that the killed process served."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))


@contextlib.contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """The address of a server that answers one connection with these bytes and waits until the client leaves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1000)
                connection.sendall(answer)
                connection.recv(1000)

        thread = threading.Thread(target=reply)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("text", ["here", "here:", ":80", "here:http"])
def test_an_address_is_host_and_port(text: str) -> None:
    with pytest.raises(RewardError, match="HOST:PORT"):
        Remote(text)


def test_an_address_where_nothing_listens_is_reported() -> None:
    with raw_server(b"") as address, contextlib.suppress(RewardError):
        Remote(address, timeout=0.2)
    with pytest.raises(RewardError, match="nothing listens") as error:
        Remote(address)
    assert str(error.value).count("Nothing was changed here") == 1


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"],
    ids=["SSH", "a web page"],
)
def test_a_server_of_another_kind_is_reported(answer: bytes) -> None:
    with raw_server(answer) as address, pytest.raises(RewardError, match="can't be understood"):
        Remote(address)


def test_an_answer_that_announces_too_much_is_refused_unread() -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {2**60}\r\n\r\n".encode()
    with raw_server(head) as address, pytest.raises(RewardError, match="announced more than limit"):
        Remote(address)


def test_an_endless_answer_is_cut_off() -> None:
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n"
    with raw_server(chunks) as address, pytest.raises(RewardError, match="sent more than limit = 1000 bytes"):
        Remote(address, limit=1000)


def exchange(address: str, request: bytes) -> bytes:
    """Send raw bytes to a server; return the first part of its answer."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def test_a_request_that_announces_2_to_the_60_bytes_is_refused_unread(address: str) -> None:
    answer = exchange(address, f"POST /scores HTTP/1.1\r\nHost: x\r\nContent-Length: {2**60}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_request_in_chunks_is_cut_off_at_the_limit() -> None:
    small = start_server(Mean(), limit=2000)
    head = b"POST /scores HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(small, head + 3 * (b"400\r\n" + b"x" * 1024 + b"\r\n")).startswith(b"HTTP/1.1 413")
    with pytest.raises(RewardError, match="more than 2000 bytes"):
        Remote(small)(images().repeat(2, 1, 4, 4), TEXTS * 2)


def test_a_slow_sender_is_cut_off() -> None:
    impatient = start_server(Mean(), deadline=0.3)
    since = time.monotonic()
    answer = exchange(impatient, b"POST /scores HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nslowly")
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - since < 10
    assert Remote(impatient)(images(), TEXTS).shape == (2,)


@pytest.mark.parametrize(
    "body", [b"no safetensors", pickle.dumps({"images": 1}), b""], ids=["text", "a pickle", "nothing"]
)
def test_a_body_that_is_no_safetensors_is_refused(address: str, body: bytes) -> None:
    head = f"POST /scores HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert exchange(address, head + body).startswith(b"HTTP/1.1 422")
    assert Remote(address)(images(), TEXTS).shape == (2,)


def test_a_token_is_needed_where_the_server_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = start_server(Mean(), token="s3cret")
    for wrong in (None, "", "other"):
        with pytest.raises(RewardError, match=r"refused: another bearer token is needed \(TRAJSURGERY_REWARD_TOKEN\)"):
            Remote(guarded, token=wrong)
    assert Remote(guarded, token="s3cret")(images(), TEXTS).shape == (2,)
    monkeypatch.setenv("TRAJSURGERY_REWARD_TOKEN", "s3cret")
    assert Remote(guarded)(images(), TEXTS).shape == (2,)


def test_a_server_open_to_others_needs_a_token() -> None:
    with pytest.raises(RewardError, match=r"serve on 0\.0\.0\.0 is open to others: set a token"):
        serve(Mean(), "0.0.0.0")


@pytest.mark.parametrize("package", ["httpx", "uvicorn"])
def test_a_missing_extra_is_reported(address: str, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RewardError, match=r"pip install 'trajsurgery\[remote\]'"):
        Remote(address) if package == "httpx" else serve(Mean())
