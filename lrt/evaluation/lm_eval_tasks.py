"""`lrt eval RUN --tasks ..`: lm-eval's tasks, run and printed with the mode that scored them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lrt.training.checkpoint import Loaded


def run(
    loaded: Loaded,
    tasks: Sequence[str],
    mode: str,
    include: Path | None,
    limit: int | None,
    *,
    plain: bool,
    normalised: bool = False,
) -> int:
    """Score `tasks` (names, or several in one with commas) and print a table, or one JSON object if `plain`."""
    try:
        from lrt.evaluation.lm_eval import run_tasks
    except ImportError:
        raise ValueError("--tasks needs lm-eval: pip install 'latent-recurrent-transformer[eval]'") from None
    names = [name for part in tasks for name in part.split(",") if name]
    done = run_tasks(loaded, names, mode=mode, include=include, limit=limit, normalised=normalised)
    if plain:
        print(json.dumps({"run": str(loaded.run), "step": loaded.step} | done, default=str))
        return 0
    of = " of the normalised text" if done["lost"] else ""
    print(f"{loaded.run} step {loaded.step}, scored by {done['mode']}{of}")
    for task, metrics in done["results"].items():
        numbers = {k.partition(",")[0]: v for k, v in metrics.items() if isinstance(v, float)}
        print(f"  {task:<28}" + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return 0
