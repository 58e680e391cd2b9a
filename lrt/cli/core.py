"""`lrt core`: `lrt eval --suite core` in fewer words."""

from __future__ import annotations

from lrt.cli import eval as evaluation

FLAGS = evaluation.EvalFlags
SHORT_HELP = """\
usage: lrt core RUN --bundle FOLDER [--limit N] [--mode MODE] [--out FOLDER]

CORE of a run, decoded with memory: lrt eval RUN --suite core in fewer words.

  RUN               run folder, or one of its checkpoints
  --bundle FOLDER   the published evaluation bundle (core.yaml,
                    eval_meta_data.csv, eval_data/) or the gauntlet's task files
  --limit N         items of each task; by default all
  --mode MODE       exact, jacobi, interleaved-G or zero_memory; by default
                    interleaved-8
  --out FOLDER      of the record, core-MODE.jsonl; by default RUN/suites
  --json            print one JSON object

lrt help eval lists the rest."""


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    return evaluation.main([*args, "--suite", "core"], "core", SHORT_HELP)
