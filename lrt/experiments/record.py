"""One line per finished run: everything a table or figure may want, measured once and written down."""

from __future__ import annotations

import platform
import subprocess
import time
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt import __version__
from lrt.config.decoding import SamplingParams
from lrt.config.run import TASK, RunConfig, to_dict
from lrt.data.synthetic import TaskRows
from lrt.evaluation.bits_per_byte import bits_per_byte
from lrt.evaluation.held_out import held_out
from lrt.evaluation.in_context import in_context_score
from lrt.evaluation.score_names import read_result, share_text
from lrt.evaluation.task_accuracy import by_length
from lrt.inference.generate import generate, score
from lrt.inference.loaded import Loaded
from lrt.model.flops import decode_flops_per_token, parameters_by_group, scaling_parameters
from lrt.model.lrt import LRT
from lrt.model.shapes import IGNORE
from lrt.training.checkpoint import load_model
from lrt.utils.hardware import accelerator, resolve_device
from lrt.utils.require import require

LONGER = (2, 4)
"""Multiples of the trained length at which decoded BPB is measured too."""


def record(folder: Path, longer: bool = True) -> dict[str, Any]:
    """What a finished run in `folder` cost and reached; `longer`: also at multiples of the trained length."""
    result = read_result(folder / "result.json")
    loaded = load_model(folder, resolve_device("auto"))
    p, bpb, model = result["progress"], result["bpb"], loaded.model
    same = p["step"] == loaded.step
    require(same, f"{folder / 'result.json'} is of step {p['step']}, the newest checkpoint of {loaded.step}; resume it")
    wall, cpu = decoding_speed(model)
    each, t = loaded.tokenizer.positions, loaded.config.train
    scaling = scaling_parameters(model.config)
    return {
        "name": result["name"],
        "seed": t.seed,
        "schedule": t.schedule,
        "projection": model.config.memory.projection,
        "source": model.config.source if model.config.memory.on else None,
        "shift": model.config.memory.shifted,
        "parameters": sum(parameters_by_group(model.config).values()),
        "memory_parameters": parameters_by_group(model.config)["memory"],
        "scaling_parameters": scaling,
        "forwards_per_token": each * model.config.loops,
        "tokens": p["tokens"],
        "token_forwards": p["token_forwards"],
        "effective_compute": p["effective_forwards"],
        "flops": p["flops"],
        "wall_seconds": p["seconds"],
        "cpu_seconds": p["cpu_seconds"],
        "bpb": {mode: bpb[mode] for mode in ("zero_memory", "passes", "merged", "decoded")},
        "scored": share_text(bpb),
        "normalised": bool(bpb.get("normalised")),
        "live_gap": bpb["live_gap"],
        "bpb_by_position": bpb["by_position"],
        "sweep_residuals": bpb["residuals"],
        **{name: bpb[name] for name in ("contraction", "kv_errors", "argmax_agreement", "kl")},
        "decode_tokens_per_second": wall / each,
        "decode_tokens_per_cpu_second": cpu / each,
        "decode_flops_per_token": each * decode_flops_per_token(model.config, t.length - 1),
        "peak_memory_bytes": result["peak_memory_bytes"],
        **(scored(loaded) if longer else {}),
        **origin(loaded.config),
    }  # fmt: skip


@torch.no_grad()
def scored(loaded: Loaded) -> dict[str, Any]:
    """In-context score, decoded BPB in bfloat16 and at multiples of the trained length (float32): exact recurrence.

    Of a task's run, accuracy at multiples of the trained length.
    """
    t, source, decoded_at = loaded.config.train, loaded.config.data.source, {}
    if source.startswith(TASK):
        task = TaskRows(source.removeprefix(TASK), 1)
        return {"task": task.name, "accuracy": by_length(loaded.model, task, t.length)}

    def nats(model: LRT, times: int) -> tuple[Tensor, Tensor, float]:
        rows = held_out(loaded, None, rows=max(1, t.eval_rows // times), length=times * t.length).rows
        tokens, targets = rows.tokens.to(model.device), rows.targets.to(model.device)
        each = score(model, tokens, targets, mode="exact").nats.cpu()
        return each, rows.targets != IGNORE, bits_per_byte(each, rows.bytes)

    each, scored, decoded_at["1"] = nats(loaded.model, 1)
    decoded_at |= {str(times): nats(loaded.model, times)[-1] for times in LONGER}
    *_, rounded = nats(deepcopy(loaded.model).to(torch.bfloat16), 1)
    return {
        "in_context_score": in_context_score(each, scored) * loaded.tokenizer.positions,
        "decoded_at_length": decoded_at,
        "decoded_bfloat16": rounded,
    }


def decoding_speed(model: LRT) -> tuple[float, float]:
    """Greedy tokens of one row per second of wall-clock and of this process's CPU time, after the first few."""
    free = SamplingParams(max_new_tokens=100, temperature=0.0, stop_tokens=())
    clocks = [(time.perf_counter(), time.process_time()) for _ in generate(model, [[0]], free)]
    skipped = min(10, len(clocks) - 2)
    (wall, cpu), (first_wall, first_cpu) = clocks[-1], clocks[skipped]
    done = len(clocks) - 1 - skipped
    return done / (wall - first_wall), done / (cpu - first_cpu)


def origin(config: RunConfig) -> dict[str, Any]:
    """Where a record comes from: version, commit, date, machine, configuration without its folders."""
    settings = to_dict(config)
    settings["data"].pop("folder")
    machine = (platform.machine(), f"{torch.get_num_threads()} thread(s)", f"torch {torch.__version__}", accelerator())
    return {
        "version": __version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": ", ".join(filter(None, machine)),
        "config": settings,
    }


def commit() -> str:
    """The commit that this code stands at, with a + if files differ from it; empty outside a repository."""
    folder = Path(__file__).parent
    outputs = [
        subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    return outputs[0] + ("+" if outputs[1] else "")
