"""A reward in another process, on another GPU or another machine, over HTTP: `serve` there, `Remote` here.

GET /about returns JSON. POST /scores and POST /gradient take and return safetensors, with the prompts as JSON in the
metadata; nothing that is received is executed. The server keeps nothing between requests: the backward pass sends the
images again, so gradients are exact for any reward, and a server may be restarted at any time. Both sides limit the
size of a body and the time to read it. HTTP is not encrypted: use loopback, a trusted network, or a tunnel.

Needs the extra `remote` (starlette, uvicorn, httpx).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trajsurgery.errors import RewardError
from trajsurgery.rewards.contract import Reward

ABOUT = ("name", "scale", "threshold", "alpha", "learning_rate", "source", "licence")
"""What a server says about its reward."""
LIMIT = 2**30
"""Bytes of a body that either side accepts by default."""
TOKEN = "TRAJSURGERY_REWARD_TOKEN"
"""The environment variable that holds the bearer token, on both sides."""
EXTRA = "remote rewards need the extra `remote`: pip install 'trajsurgery[remote]'."


class Remote(Reward):
    """The reward that `serve` offers at an address, with its name, scale and numbers.

    Scores and gradients are those of the reward there, bit for bit; the backward pass costs it one more forward pass.

    Args:
        address: "host:port", as `serve` prints it.
        timeout: seconds for one request, from sending it to the last byte of the answer.
        token: the server's bearer token; by default that of the environment variable TRAJSURGERY_REWARD_TOKEN.
        limit: the most bytes of an answer.

    Raises:
        RewardError: no server, one that died, is too slow, wants another token or sends too much; what the reward there
            refuses; httpx is not installed.
    """

    def __init__(self, address: str, timeout: float = 120.0, *, token: str | None = None, limit: int = LIMIT) -> None:
        super().__init__()
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise RewardError(f"{address!r} is no address of a reward server: it is HOST:PORT, as the server says it.")
        self.address, self.timeout, self.limit, self.name = address, timeout, limit, f"remote {address}"
        self._token = os.environ.get(TOKEN) if token is None else token
        with self._report_problems():
            about = json.loads(self._request("GET", "about"))
            for name in ABOUT:
                setattr(self, name, about[name])
        self.eval()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return the server's scores, Float[batch], on the images' device."""
        scores: Any = _RemoteScores.apply(images, self, prompts)
        return scores

    def ask(self, path: str, prompts: list[str], tensors: dict[str, Tensor]) -> Tensor:
        """Return the tensor that the server answers with."""
        with self._report_problems():
            return _unpack(self._request("POST", path, _pack(tensors, prompts)))[0]["result"]

    def _request(self, method: str, path: str, body: bytes = b"") -> bytes:
        import httpx

        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        how: dict[str, Any] = {"headers": headers, "timeout": self.timeout, "trust_env": False}
        answer, deadline = bytearray(), time.monotonic() + self.timeout
        with httpx.stream(method, f"http://{self.address}/{path}", content=body, **how) as response:
            if int(response.headers.get("content-length", 0)) > self.limit:
                raise self._problem(f"announced more than limit = {self.limit} bytes")
            for chunk in response.iter_raw():
                answer += chunk
                if len(answer) > self.limit:
                    raise self._problem(f"sent more than limit = {self.limit} bytes")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("")
        if response.is_success:
            return bytes(answer)
        reason = answer.decode(errors="replace")[:2000] or response.reason_phrase
        raise RewardError(f"the reward server at {self.address} refused: {reason}")

    @contextlib.contextmanager
    def _report_problems(self) -> Generator[None]:
        """Turn what goes wrong with a request or with the content of its answer into a RewardError."""
        try:
            import httpx
        except ImportError as error:
            raise RewardError(EXTRA) from error
        from safetensors import SafetensorError

        try:
            yield
        except httpx.TimeoutException as error:
            slow = f"did not answer within {self.timeout:g} s: it hangs or is too slow"
            raise self._problem(f"{slow} (a longer `timeout` waits longer)") from error
        except httpx.ConnectError as error:
            raise self._problem("is not there: nothing listens at that address") from error
        except (httpx.HTTPError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, httpx.NetworkError) or "disconnected" in str(error):
                raise self._problem("ended before it answered: its process has died, see its own output") from error
            raise self._problem(f"can't be understood ({error}): is it a reward server of this version?") from error

    def _problem(self, what: str) -> RewardError:
        return RewardError(
            f"the reward server at {self.address} {what}. Nothing was changed here: start it again at the same address "
            "and ask again, or go on from the last checkpoint."
        )


class _RemoteScores(torch.autograd.Function):
    """scores = r(images), computed elsewhere; backward: the vector-Jacobian product, also computed there."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, remote: Remote, prompts: list[str]) -> Tensor:
        ctx.remote, ctx.prompts = remote, prompts
        ctx.save_for_backward(images)
        return remote.ask("scores", prompts, {"images": images}).to(images.device)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor, None, None]:
        (images,) = ctx.saved_tensors
        gradient = ctx.remote.ask("gradient", ctx.prompts, {"images": images, "cotangent": cotangents[0]})
        return gradient.to(images), None, None


def serve(
    reward: Reward,
    host: str = "127.0.0.1",
    port: int = 0,
    ready: Callable[[str], None] = print,
    *,
    token: str | None = None,
    limit: int = LIMIT,
    deadline: float = 60.0,
) -> None:
    """Serve a reward to any number of `Remote`s, one request after the other, until the process ends.

    Args:
        reward: on its device.
        host: loopback by default; another one needs a token.
        port: 0 takes a free one.
        ready: called with the address, "host:port".
        token: clients must send it as a bearer token; by default that of TRAJSURGERY_REWARD_TOKEN, if set.
        limit: the most bytes of a request's body.
        deadline: seconds within which a client must have sent it.

    Raises:
        RewardError: another host than loopback without a token; starlette or uvicorn is not installed.
    """
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import JSONResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise RewardError(EXTRA) from error
    token = os.environ.get(TOKEN) if token is None else token
    if not token and not _is_loopback(host):
        raise RewardError(f"serve on {host} is open to others: set a token, with `token=` or {TOKEN}, on both sides.")
    one_at_a_time = threading.Lock()

    async def answer(request: Request) -> Response:
        if not secrets.compare_digest(request.headers.get("authorization", ""), f"Bearer {token}" if token else ""):
            return PlainTextResponse(f"another bearer token is needed ({TOKEN})", 401)
        if request.url.path == "/about":
            return JSONResponse({name: getattr(reward, name) for name in ABOUT})
        too_large = PlainTextResponse(f"the request has more than {limit} bytes", 413)
        if int(request.headers.get("content-length", 0)) > limit:
            return too_large
        body = bytearray()
        try:
            async with asyncio.timeout(deadline):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        return too_large
        except TimeoutError:
            return PlainTextResponse(f"the request was not there within {deadline:g} s", 408, {"Connection": "close"})
        try:
            return Response(await run_in_threadpool(work, request.url.path, bytes(body)))
        except Exception as error:  # the client gets whatever went wrong, and the server lives on
            return PlainTextResponse(f"{type(error).__name__}: {error}", 422)

    def work(path: str, body: bytes) -> bytes:
        tensors, prompts = _unpack(body)
        with one_at_a_time:
            if path == "/scores":
                with torch.no_grad():
                    return _pack({"result": reward(tensors["images"], prompts)})
            images = tensors["images"].requires_grad_()
            scores = reward(images, prompts)
            return _pack({"result": torch.autograd.grad(scores, images, tensors["cotangent"].to(scores))[0]})

    paths = {"/about": "GET", "/scores": "POST", "/gradient": "POST"}
    app = Starlette(routes=[Route(path, answer, methods=[method]) for path, method in paths.items()])
    with socket.create_server((host, port)) as listener:
        ready(f"{host}:{listener.getsockname()[1]}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pack(tensors: dict[str, Tensor], prompts: list[str] | None = None) -> bytes:
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, {"prompts": json.dumps(prompts or [])})


def _unpack(body: bytes) -> tuple[dict[str, Tensor], list[str]]:
    from safetensors.torch import load

    tensors = load(body)  # checks the header
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    return tensors, json.loads(header["__metadata__"]["prompts"])
