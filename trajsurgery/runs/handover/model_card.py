"""The model card of exported weights: what they are, what they gained, how to load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trajsurgery.runs.handover.forms import COMFYUI_FILE, Form
from trajsurgery.runs.reports.html_report import figure_cells
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.runs.reports.run_report import table_rows, verdict
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.recipe import EMBEDDED

CARD = "README.md"

_LOAD = {
    "diffusers": 'pipe = DiffusionPipeline.from_pretrained("{here}")',
    "merged": '{base}\ntuned = type(pipe.transformer).from_pretrained("{here}", dtype=pipe.transformer.dtype)\n'
    "pipe.register_modules(transformer=tuned)",
    "lora": '{base}\npipe.load_lora_weights("{here}", weight_name="pytorch_lora_weights.safetensors")',
    "comfyui": "",
}


def write_card(run: RunFolder, folder: Path, form: Form, licence: str, name: str | None = None) -> Path:
    """Write README.md into an exported folder, and samples.png beside it; return its path.

    Args:
        licence: an identifier of the hub, such as apache-2.0: that of the base model, as a rule.
        name: USER/NAME on the hub; left out, the snippet loads from the folder.
    """
    from huggingface_hub import ModelCard

    if (run.path / "samples.png").exists():
        shutil.copyfile(run.path / "samples.png", folder / "samples.png")
    path = folder / CARD
    here = name or str(folder)
    text = f"---\n{_data(run, form, licence).to_yaml()}\n---\n\n{_body(run, form, licence, here)}"
    card = ModelCard(text, ignore_metadata_errors=False)
    write_atomically(path, lambda partial: partial.write_text(str(card), encoding="utf-8"))
    return path


def _data(run: RunFolder, form: Form, licence: str) -> Any:
    """Return the card's metadata. An embedded model is no model of the hub: it is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    model, evaluation = str(run.recipe["model"]), run.evaluation or {}
    on_hub = model not in EMBEDDED and not Path(model).exists() and "/" in model
    task = "text-to-video" if run.recipe["rollout"].get("frames") else "text-to-image"
    dataset = str(run.recipe["heldout"])
    results = [
        EvalResult(task, dataset, dataset, name, round(record[f"{field}_after"], 4), metric_name=name)
        for name, record, field in (table_rows(evaluation) if evaluation else [])
        if record.get(f"{field}_after") is not None
    ]
    tags = ["trajsurgery", run.method.lower(), *(["lora"] if form in ("lora", "comfyui") else [])]
    return ModelCardData(
        base_model=model if on_hub else None,
        library_name="diffusers",
        license=licence,
        pipeline_tag=task,
        tags=tags,
        model_name=run.name,
        eval_results=results or None,
    )


def _body(run: RunFolder, form: Form, licence: str, here: str) -> str:
    recipe, evaluation = run.recipe, run.evaluation or {}
    has_pictures = (run.path / "samples.png").exists()
    pictures = ["![The same prompts and noise before and after](samples.png)"] if has_pictures else []
    parts = [
        f"# {run.name}",
        f"{_base_name(run)}, fine-tuned with {run.method} on the reward `{recipe['reward']}` by "
        f"trajsurgery, for {recipe['iterations']} iterations of "
        f"{recipe['rollout']['batch']} images. {_form_name(form)}",
        *([verdict(evaluation) + "."] if evaluation else []),
        *pictures,
        "## How to load",
        _how_to_load(run, form, here),
        "## Figures",
        _figures(run),
        "## Method",
        f"The plan of the first iteration, and the gradient that it gives:\n\n```text\n{run.plan.strip()}\n```"
        if run.plan
        else run.method,
        "## Data",
        f"Training prompts: `{recipe['prompts']}`. Held-out prompts: `{recipe['heldout']}`.",
        "## Settings",
        f"```json\n{json.dumps(recipe, indent=1)}\n```",
        "## Licence",
        f"`{licence}`. The licence of the base model holds for weights that are tuned from it.",
    ]
    return "\n\n".join(parts) + "\n"


def _form_name(form: Form) -> str:
    names = {
        "diffusers": "A whole pipeline.",
        "merged": "The transformer alone, adapters merged in.",
        "lora": "LoRA for diffusers.",
        "comfyui": "LoRA for ComfyUI.",
    }
    return names[form]


def _base_name(run: RunFolder) -> str:
    model = str(run.recipe["model"])
    return f"`{model}`, a model that trajsurgery embeds" if model in EMBEDDED else f"`{model}`"


def _how_to_load(run: RunFolder, form: Form, here: str) -> str:
    if form == "comfyui":
        return f"Put `{COMFYUI_FILE}` into ComfyUI's `models/loras`, and load it with the node `Load LoRA`."
    model = str(run.recipe["model"])
    embedded = f'pipe = tiny.pipeline("{model.partition(":")[2] or "flux"}")'
    base = embedded if model in EMBEDDED else f'pipe = DiffusionPipeline.from_pretrained("{model}")'
    code = _LOAD[form].format(base=base, here=here)
    needed = ["from trajsurgery import tiny"] if "tiny." in code else []
    needed += ["from diffusers import DiffusionPipeline"] if "DiffusionPipeline" in code else []
    size = "\n\nCall it with `height=32, width=32, max_sequence_length=12`, as the embedded world is."
    return "```python\n" + "\n".join([*needed, "", code]) + "\n```" + (size if model in EMBEDDED else "")


def _figures(run: RunFolder) -> str:
    if run.evaluation is None:
        return "The run has no evaluation."
    lines = [
        f"{run.evaluation['images']} held-out images, the same prompts and noise; the interval is two paired standard "
        "errors of the gain.",
        "",
        "| | before | after | gain | interval |",
        "|---|---|---|---|---|",
        *(
            f"| {label} | {' | '.join(figure_cells(record, name))} |"
            for label, record, name in table_rows(run.evaluation)
        ),
    ]
    return "\n".join(lines)
