"""`lrt export`: a run for transformers, or as another family's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lrt.cli.parse import names_of, parse
from lrt.utils.require import require
from lrt.utils.terminal import show


@dataclass(frozen=True)
class ExportFlags:
    """Write a run for transformers, as small weights to pass on, or, while its memory is off, for another family."""

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    folder: Positional[Path]
    """Folder to make."""
    to: Literal["hf", "run", "llama", "mistral", "qwen2", "qwen3", "gguf"] = "hf"
    """`hf`: an LRT with its own code; `run`: weights in bfloat16 for lrt's own commands, without the optimizer's state;
    a family whose backbone this model has; or `gguf`: one file for llama.cpp, of a model that is of such a family."""
    prefill: Literal["sweeps", "exact", "zero_memory"] = "sweeps"
    """How the exported model's forward computes a whole sequence; kept in its config.json."""


FLAGS = ExportFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(ExportFlags, args, "export")
    kept = flags.to == "hf" or "--prefill" not in names_of(args)
    require(kept, f"--prefill is kept in an export for transformers, not in one --to {flags.to}; leave it out")
    require(not flags.folder.exists(), f"{flags.folder} exists; remove it or choose another folder")

    from transformers.utils.logging import disable_progress_bar

    from lrt.integrations.convert import save_family
    from lrt.integrations.families import FAMILIES
    from lrt.integrations.gguf_file import FILE, save_gguf
    from lrt.integrations.hf.export import save_export
    from lrt.integrations.hf.fast_tokenizer import fast_tokenizer, save_tokenizer
    from lrt.training.checkpoint import load_model, write_weights
    from lrt.utils.checksums import write_sums
    from lrt.utils.new_folder import new_folder

    loaded = load_model(flags.run)
    if flags.to == "run":
        with new_folder(flags.folder) as aside:
            write_weights(loaded, aside)
        show(f"{flags.folder}: step {loaded.step} of {flags.run}, weights in bfloat16")
        return 0
    if flags.to == "gguf":
        with new_folder(flags.folder) as aside:
            save_gguf(loaded, aside)
            write_sums(aside)
        show(f"{flags.folder / FILE}: step {loaded.step} of {flags.run}, weights in float32")
        return 0
    disable_progress_bar()  # a bar for one file says nothing
    tokenizer = fast_tokenizer(loaded)
    with new_folder(flags.folder) as aside:
        if flags.to in FAMILIES:
            save_family(loaded, aside, flags.to)
        else:
            save_export(loaded, aside, flags.prefill)
        save_tokenizer(tokenizer, aside)
        write_sums(aside)
    show(f"{flags.folder}: step {loaded.step} of {flags.run} as {flags.to}")
    return 0
