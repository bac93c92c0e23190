"""`trajsurgery export`: every form is loaded again by those who take it, and makes the run's images."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from trajsurgery import Recipe, Trainer, tiny
from trajsurgery.cli import main
from trajsurgery.runs.handover.forms import tuned_pipeline
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.training.settings import Evaluation, ModelSource, Objective, Optimiser, Rollout, Trained

ROOT = Path(__file__).parents[2]
FUSED = 1e-5
"""Largest difference of a pixel where adapters were added into the weights, in float32."""


def run_of(folder: Path, model: str, what: Any) -> Path:
    recipe = Recipe(
        model=model,
        train=Trained(what, rank=4),
        rollout=Rollout(steps=4, batch=2),
        optimiser=Optimiser(rate=1e-2 if what == "lora" else 1e-4),
        objective=Objective(threshold=1.0, tau=0.02),
        ema=0.0,
        iterations=2,
        evaluation=Evaluation(images=4, steps=4, batch=4, pictures=4, metrics=(), sheet_every=None),
        output=folder,
    )
    assert Trainer(recipe, console=Console(quiet=True)).train() is not None
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA of the embedded Flux, one of the embedded SD3, and all weights of the Flux."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"lora": ("tiny", "lora"), "sd3": ("tiny:sd3", "lora"), "full": ("tiny", "full")}
    return {name: run_of(folder / name, *kind) for name, kind in kinds.items()}


def images(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 12}
    call["output_type"] = "pt"
    return pipe("a red circle left of a blue square", **call, generator=torch.Generator().manual_seed(0)).images


def expected(run: Path) -> Tensor:
    """The images of the run's own weights; they differ from the base's."""
    read = RunFolder.read(run)
    tuned = images(tuned_pipeline(read, ModelSource(read.recipe["model"])))
    base = images(tiny.pipeline(read.recipe["model"].partition(":")[2] or "flux"))
    assert (tuned - base).abs().max() > 100 * FUSED
    return tuned


def exported(run: Path, to: Path, *words: str) -> Path:
    assert main(["export", str(run), "--to", str(to), *words]) == 0
    return to


def loaded_by_card(folder: Path) -> Any:
    """The pipeline that the card's own snippet loads."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names["pipe"]


@pytest.mark.parametrize(
    "kind, form, exact",
    [
        ("full", "diffusers", True),
        ("full", "merged", True),
        ("lora", "lora", True),
        ("sd3", "lora", True),
        ("lora", "diffusers", False),
        ("lora", "merged", False),
        ("sd3", "merged", False),
    ],
)
def test_the_card_s_snippet_loads_the_tuned_model(
    kind: str, form: str, exact: bool, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = exported(runs[kind], tmp_path / "out", "--form", form)
    difference = (images(loaded_by_card(folder)) - expected(runs[kind])).abs().max()
    assert difference == 0 if exact else difference <= FUSED


def test_comfyui_s_lora_is_read_back_by_diffusers_converter(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(runs["lora"], tmp_path / "out", "--form", "comfyui")
    with safe_open(folder / "comfyui_lora.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "lora_transformer_transformer_blocks_0_attn_to_out_0.lora_down.weight" in names
    assert {name.rpartition(".")[2] for name in names} == {"weight", "alpha"}
    pipe = tiny.pipeline()
    pipe.load_lora_weights(str(folder), weight_name="comfyui_lora.safetensors", local_files_only=True)
    assert torch.equal(images(pipe), expected(runs["lora"]))


def test_comfyui_s_names_of_sd3_are_the_layers_with_their_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    """ComfyUI finds a layer by lora_transformer_ and diffusers' name, its dots as underscores."""
    folder = exported(runs["sd3"], tmp_path / "out", "--form", "comfyui")
    with (
        safe_open(folder / "comfyui_lora.safetensors", framework="pt") as converted,
        safe_open(runs["sd3"] / "transformer/pytorch_lora_weights.safetensors", framework="pt") as saved,
    ):
        sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
        for name in saved.keys():  # noqa: SIM118
            layer, side, _ = name.rsplit(".", 2)
            key = f"lora_{layer.replace('.', '_')}"
            assert torch.equal(converted.get_tensor(f"{key}.{sides[side]}.weight"), saved.get_tensor(name))
            assert converted.get_tensor(f"{key}.alpha") == 4
        assert len(list(converted.keys())) == 3 * len(list(saved.keys())) // 2


def test_a_lora_file_says_what_it_is(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(runs["lora"], tmp_path / "out", "--form", "lora")
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert {"model": "tiny", "reward": "tiny", "rank": "4", "alpha": "4"}.items() <= metadata.items()
    assert json.loads(metadata["method"])["name"] == "LeapAlign"
    adapter = json.loads(metadata["lora_adapter_metadata"])  # what diffusers reads
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (4, 4)
    pipe = tiny.pipeline()
    pipe.load_lora_weights(str(folder), local_files_only=True)
    assert pipe.transformer.peft_config["default_0"].r == 4


def test_the_card_says_what_was_done(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(runs["full"], tmp_path / "out", "--licence", "apache-2.0", "--form", "merged")
    card = ModelCard.load(folder / "README.md")
    evaluation = RunFolder.read(runs["full"]).evaluation
    assert evaluation is not None
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None  # an embedded model
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["reward"] == round(evaluation["reward_after"], 4)
    for words in ("x^_0|", "dx_0/dtheta", f"{evaluation['reward_gain']:+.4f}", "samples.png", '"rate": 0.0001'):
        assert words in card.text
    assert (folder / "samples.png").exists()


def test_a_hub_model_is_the_card_s_base(runs: dict[str, Path], tmp_path: Path) -> None:
    recipe = json.loads((runs["lora"] / "recipe.json").read_text())
    path = runs["lora"].parent / "hub"
    os.makedirs(path, exist_ok=True)
    for name in ("transformer", "metrics.jsonl"):
        if not (path / name).exists():
            (path / name).symlink_to(runs["lora"] / name)
    (path / "recipe.json").write_text(json.dumps({**recipe, "model": "black-forest-labs/FLUX.1-dev"}))
    card = ModelCard.load(exported(path, tmp_path / "out", "--form", "lora") / "README.md")
    assert card.data.base_model == "black-forest-labs/FLUX.1-dev"
    assert 'DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")' in card.text
    assert "lora" in card.data.tags


@pytest.mark.parametrize(
    "kind, words, message",
    [
        ("full", ["--form", "lora"], "trained all weights, not adapters"),
        ("full", ["--form", "comfyui"], "trained all weights, not adapters"),
        ("lora", ["--model", "nowhere"], "nowhere"),
        ("unfinished", [], "has not ended"),
        ("nothing", [], "is no run's output folder"),
    ],
)
def test_what_can_t_be_written_is_refused(
    kind: str, words: list[str], message: str, runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    run = runs.get(kind, tmp_path / kind)
    if kind == "unfinished":
        run.mkdir()
        (run / "metrics.jsonl").write_text("")
        (run / "recipe.json").write_text((runs["full"] / "recipe.json").read_text())
    assert main(["export", str(run), "--to", str(tmp_path / "out"), *words]) == 1
    assert message in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.glob("out*"))  # nothing half written
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert main(["export", str(runs["full"]), "--to", str(tmp_path / "full")]) == 1


def test_a_model_that_comfyui_knows_by_other_names_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    words = ["--form", "comfyui", "--model", "tiny:wan"]
    assert main(["export", str(runs["lora"]), "--to", str(tmp_path / "out"), *words]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "of WanTransformer3DModel ComfyUI knows the layers by other names" in said
    assert "Take --form merged or lora" in said
    assert not (tmp_path / "out/comfyui_lora.safetensors").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as an upload needs; files of the commit are kept."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            address = f"http://{self.headers['Host']}/user/name"
            return self.reply({"url": address, "name": "user/name", "id": "user/name"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.reply(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/user/name/commit/1"
            return self.reply({"commitUrl": address, "commitOid": "1", "success": True})
        return self.reply({})

    def do_GET(self) -> None:
        self.reply({"id": "user/name", "sha": "1", "siblings": []})

    def reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("ThisHub", (Hub,), {"files": {}, "created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def push(run: Path, to: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, since the hub's client reads the environment as it is imported."""
    words = ["export", str(run), "--to", str(to), "--form", "lora", "--push-to-hub", "user/name", "--private"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-m", "trajsurgery", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=False, timeout=120
    )


def test_an_upload_sends_every_file(runs: dict[str, Path], tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    address, handler = hub
    done = push(runs["lora"], tmp_path / "out", HF_ENDPOINT=address, HF_TOKEN="hf_x", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert handler.created[0]["name"] == "name"
    assert handler.created[0].get("visibility", handler.created[0].get("private")) in ("private", True)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert handler.files == written
    assert "pytorch_lora_weights.safetensors" in written
    assert 'load_lora_weights("user/name"' in handler.files["README.md"].decode()


def test_without_a_network_the_folder_is_whole_and_the_command_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    done = push(runs["lora"], tmp_path / "out", HF_HUB_OFFLINE="1", HF_TOKEN="hf_x")
    said = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "OutputError: user/name was not uploaded" in said
    assert f"hf upload user/name {tmp_path / 'out'}" in said
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").exists()
