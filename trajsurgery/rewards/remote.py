"""A reward in another process or on another GPU or machine: `serve` there, `Remote` here.

What travels is JSON and safetensors, so nothing that is received is executed; there is no password and no encryption:
serve on a loopback address or inside a network that you trust. The server keeps nothing between two requests: the
backward pass sends the images again, so that the gradient is exact for any reward, and a server may be started anew
at any time.
"""

from __future__ import annotations

import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trajsurgery.errors import RewardError
from trajsurgery.rewards.contract import Reward

Message = tuple[dict[str, Any], dict[str, Tensor]]

MARK = b"trj1"
ABOUT = ("name", "scale", "threshold", "alpha", "learning_rate", "source", "licence")
"""What a reward says about itself."""


class Remote(Reward):
    """The reward that `serve` offers at an address, with its name, scale and numbers.

    Scores and gradients are those of the reward there, bit for bit; the backward pass costs it one forward pass more.
    A request that fails leaves nothing half done here: the next one connects again.

    Args:
        address: "host:port", as `serve` says it.
        timeout: seconds to wait for an answer.

    Raises:
        RewardError: no server, one that died, one that is too slow, or what the reward there refuses.
    """

    def __init__(self, address: str, timeout: float = 120.0) -> None:
        super().__init__()
        self._socket: socket.socket | None = None
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise RewardError(f"{address!r} is no address of a reward server: it is HOST:PORT, as the server says it.")
        self.address, self.timeout, self.name = address, timeout, f"remote {address}"
        self._place = host, int(port)
        about, _ = self.request({"ask": "about"}, {})
        for name in ABOUT:
            setattr(self, name, about[name])
        self.eval()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Float[batch], the scores there, on the images' device."""
        found: Any = _RemoteScores.apply(images, self, prompts)
        return found

    def request(self, words: dict[str, Any], tensors: dict[str, Tensor]) -> Message:
        """One question and its answer."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._place, self.timeout)
                self._socket.settimeout(self.timeout)
            _send(self._socket, words, tensors)
            answer = _receive(self._socket)
        except (OSError, EOFError, ValueError, struct.error) as error:
            self.close()
            raise RewardError(self._failed(error)) from error
        if "error" in answer[0]:
            raise RewardError(f"the reward server at {self.address} refused: {answer[0]['error']}")
        return answer

    def _failed(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            what = (
                f"did not answer within {self.timeout:g} s: it hangs or is too slow (a longer `timeout` waits longer)"
            )
        elif isinstance(error, ConnectionRefusedError):
            what = "is not there: nothing listens at that address"
        elif isinstance(error, EOFError | ConnectionError):
            what = "ended before it answered: its process has died, see its own output"
        else:
            what = f"can't be understood ({error}): is it a reward server of this version?"
        return (
            f"the reward server at {self.address} {what}. Nothing was changed here: start it again at the same address "
            "and ask again, or go on from the last checkpoint."
        )

    def close(self) -> None:
        """Ends the connection; the next request makes another."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_socket": None}


class _RemoteScores(torch.autograd.Function):
    """scores = r(images), computed elsewhere; backward: the vector-Jacobian product, computed elsewhere too."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, remote: Remote, prompts: list[str]) -> Tensor:
        ctx.remote, ctx.prompts = remote, prompts
        ctx.save_for_backward(images)
        _, found = remote.request({"ask": "scores", "prompts": prompts}, {"images": images})
        return found["scores"].to(images.device)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor, None, None]:
        (images,) = ctx.saved_tensors
        given = {"images": images, "cotangent": cotangents[0]}
        _, found = ctx.remote.request({"ask": "gradient", "prompts": ctx.prompts}, given)
        return found["gradient"].to(images), None, None


def serve(reward: Reward, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None] = print) -> None:
    """Answers the questions of any number of `Remote`s, one after the other, until the process ends.

    Args:
        reward: what is served, on its device.
        port: 0 takes a free one.
        ready: is told the address, "host:port".
    """
    turn = threading.Lock()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while True:
                try:
                    words, tensors = _receive(self.request)
                except (OSError, EOFError, ValueError, struct.error):
                    return  # it hung up, or is no Remote
                with turn:
                    answer = _answer(reward, words, tensors)
                try:
                    _send(self.request, *answer)
                except OSError:
                    return  # it waited no longer

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server((host, port), Handler) as server:
        ready(f"{host}:{server.server_address[1]}")
        server.serve_forever()


def _answer(reward: Reward, words: dict[str, Any], tensors: dict[str, Tensor]) -> Message:
    try:
        if words["ask"] == "about":
            return {name: getattr(reward, name) for name in ABOUT}, {}
        images, prompts = tensors["images"], words["prompts"]
        if words["ask"] == "scores":
            with torch.no_grad():
                return {}, {"scores": reward(images, prompts)}
        images.requires_grad_()
        scores = reward(images, prompts)
        (gradient,) = torch.autograd.grad(scores, images, tensors["cotangent"].to(scores))
        return {}, {"gradient": gradient}
    except Exception as error:  # whatever it is, it is told to who asked, and the server lives on
        return {"error": f"{type(error).__name__}: {error}"}, {}


def _send(to: socket.socket, words: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    said = json.dumps(words).encode()
    held = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    to.sendall(struct.pack("!4sQQ", MARK, len(said), len(held)) + said + held)


def _receive(of: socket.socket) -> Message:
    from safetensors.torch import load

    mark, said, held = struct.unpack("!4sQQ", _read(of, 20))
    if mark != MARK:
        raise ValueError(f"it said {mark!r}")
    return json.loads(_read(of, said)), load(_read(of, held))


def _read(of: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = of.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError("the connection was closed")
        parts += part
    return bytes(parts)
