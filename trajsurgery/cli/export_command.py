"""`trajsurgery export RUN --to FOLDER`: a run's weights in the form that others take, with a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Positional


@dataclass(frozen=True)
class Export:
    """Write a run's weights for others: a diffusers folder, one merged file, LoRA for diffusers or for ComfyUI."""

    run: Positional[Path]
    """The output folder of a training command that has ended."""
    to: Path
    """A new folder."""
    form: Literal["diffusers", "merged", "lora", "comfyui"] = "diffusers"
    """diffusers: a whole pipeline. merged: the transformer alone, adapters merged in, in one file. lora: for
    load_lora_weights. comfyui: the same under the names that ComfyUI reads (Flux, SD3)."""
    model: str | None = None
    """The base model, if it is not where the run's recipe says."""
    licence: str = "other"
    """For the model card, as the hub writes it (apache-2.0, ...): as a rule that of the base model."""
    push_to_hub: str | None = None
    """USER/NAME: also uploads the folder to the hub."""
    private: bool = False
    """Makes that repository private."""


def export(options: Export, console: Console) -> int:
    """Write the folder, and upload it if that was asked for.

    Raises:
        RecipeError: the run can't be written in this form.
        OutputError: the file system or the hub refuses.
    """
    from trajsurgery.runs.handover.forms import export as write_form
    from trajsurgery.runs.handover.model_card import write_card
    from trajsurgery.runs.handover.upload import upload
    from trajsurgery.runs.reports.run_folder import RunFolder
    from trajsurgery.training.components import quiet

    run = RunFolder.read(options.run)
    with quiet(), console.status("the weights are written"):
        names = write_form(run, options.to, options.form, options.model)
    card = write_card(run, options.to, options.form, options.licence, options.push_to_hub)
    console.print(f"In {options.to}: {', '.join([*names, card.name])}", highlight=False, soft_wrap=True)
    if options.push_to_hub is not None:
        with console.status(f"{options.push_to_hub} is uploaded"):
            address = upload(options.to, options.push_to_hub, options.private)
        console.print(address, highlight=False, soft_wrap=True)
    return 0
