"""The commands behind `lrt COMMAND`; each reads its flags, calls the library, and prints."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lrt.cli.main import parse
from lrt.config.model import ModelConfig, require
from lrt.config.recipes import recipe
from lrt.config.run import DataConfig, RunConfig
from lrt.inference.prefill import DEFAULT_MODE
from lrt.inference.sampling import SamplingParams
from lrt.schedule import Curriculum

if TYPE_CHECKING:  # heavy imports wait until a command needs them
    from lrt.evaluation.bits_per_byte import BPB

Positional = tyro.conf.Positional
INFO_SCHEDULES = ("parallel", "interleaved-2", "interleaved-4", "refinement-1", "refinement-3", "settled-1..3")


@dataclass(frozen=True)
class Info:
    """Show what a recipe's model costs: parameters by group, FLOPs per token of every schedule, cache bytes."""

    model: ModelConfig
    """The model; flags override the recipe's."""
    recipe: str = "cpu_demo"
    """Recipe to start from."""
    length: int | None = None
    """Row length for the FLOP figures; by default the recipe's."""
    json: bool = False
    """Print one JSON object."""


def info(args: list[str]) -> int:
    from lrt.model.flops import describe

    base = recipe(_named(args, "--recipe", "cpu_demo"))
    given = parse(Info, args, "info", default=Info(base.model, base.name, base.train.length))
    schedules = dict.fromkeys((*INFO_SCHEDULES, base.train.schedule))
    facts = describe(given.model, given.length or base.train.length, schedules)
    print(json.dumps({"recipe": given.recipe} | facts) if given.json else _info_text(given, facts))
    return 0


def _info_text(given: Info, facts: dict) -> str:
    m, p = given.model, facts["parameters"]
    total, without = p["total"], p["total"] - p["memory"]
    shape = f"{given.recipe}: depth {m.depth}, width {m.d}, {m.h} heads ({m.k} key/value), vocabulary {m.vocab_size}"
    lines = [shape, f"memory: {m.memory.projection} projections, source block {m.source}", ""]
    lines += [f"{name:<18}{n:>16,}" for name, n in p.items()]
    lines.append(f"{'without memory':<18}{without:>16,}  ({without / 1e9:.3f} B)")
    lines.append(f"{'memory adds':<18}{facts['memory_overhead']:>16.3%}  ({total / 1e9:.3f} B)")
    lines.append(
        f"{'scaling parameters':<18}{facts['scaling_parameters']:>16,}  (matrices + head; R counts tokens per one)"
    )
    lines += [
        "",
        f"FLOPs per token, training, rows of {facts['length']} (every pass counted, backward twice the forward)",
    ]
    plain = facts["train_flops_per_token"]["parallel"]
    for name, flops in facts["train_flops_per_token"].items():
        lines.append(f"  {name:<16}{flops:>16.4g}  {flops / plain:.2f} x parallel")
    for position, flops in facts["decode_flops_per_token"].items():
        lines.append(f"  {'decode at ' + position:<16}{flops:>16.4g}")
    cache, memory = facts["cache_bytes_per_token"], facts["memory_bytes_per_sequence"]
    lines += ["", f"cache {cache:,} bytes per token, memory {memory:,} bytes per sequence (bfloat16)"]
    return "\n".join(lines)


def schedule(args: list[str]) -> int:
    from lrt.experiments import draw

    def draw_schedule(name: Positional[str], /, length: int = 16, out: Path | None = None) -> None:
        """Draw a schedule: passes down, positions across, the exact prefix marked.

        Args:
            name: such as interleaved-4, refinement-3, chunked-8, sequential, settled-1..3, interleaved-2:weights=0/1.
            length: positions of the row.
            out: write an SVG there too.
        """
        require(1 <= length <= 512, f"--length is {length}; a drawing takes 1 to 512 positions")
        found = Curriculum.parse(name).at_largest()
        print(draw.as_text(found, length))
        if out is not None:
            out.write_text(draw.as_svg(found, length), encoding="utf-8")

    parse(draw_schedule, args, "schedule")
    return 0


@dataclass(frozen=True)
class Tokenize:
    """Turn a text source into token shards, as `lrt train` would; prints the folder."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)


def tokenize(args: list[str]) -> int:
    from lrt.data import TaskRows
    from lrt.training.logging import Live
    from lrt.training.trainer import prepare_data

    given = parse(Tokenize, args, "tokenize")
    with Live() as live:
        prepared = prepare_data(RunConfig(data=given.data), [live])
    if isinstance(prepared.train, TaskRows) or isinstance(prepared.val, TaskRows):
        raise ValueError(f"{given.data.source} is drawn as it is needed; give a text")
    train, val = len(prepared.train), len(prepared.val)
    print(
        f"{prepared.folder}: {train:,} training and {val:,} validation tokens, "
        f"vocabulary {prepared.tokenizer.vocab_size}"
    )
    return 0


@dataclass(frozen=True)
class Train:
    """Train a recipe on your text. Any field of the recipe can be overridden; --resume continues a run as it was."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    recipe: str = "cpu_demo"
    """Recipe to start from (see docs/recipes.md)."""
    out: Path | None = None
    """Run folder; by default runs/NAME."""
    resume: Path | None = None
    """Continue the run in this folder from its newest valid checkpoint; no other flag may be given."""
    or_resume: bool = False
    """Continue the run if --out already holds a checkpoint of it, else begin: what restarted and requeued jobs need."""
    init_from: Path | None = None
    """Start from the weights of this run, of whatever step, with its model and tokenizer (see `lrt convert`)."""


def train(args: list[str]) -> int:
    from lrt.training import checkpoint
    from lrt.training.logging import Jsonl, Live
    from lrt.training.trainer import train as run_training

    base = recipe(_named(args, "--recipe", "cpu_demo"))
    origin = _named(args, "--init-from", "")
    base = replace(base, **_from_run(base, Path(origin))) if origin else base
    given = parse(Train, args, "train", default=Train(config=base, recipe=base.name))
    folder, config = given.out or Path("runs") / given.config.name, given.config
    if given.resume is not None:
        require(len(args) == 2 or "=" in args[0], "--resume takes its settings from the run; give no other flag")
        started, problems = checkpoint.newest_valid(given.resume, verify=False)  # the training verifies
        require(
            started is not None, f"{given.resume} holds no checkpoint to resume; {' '.join(problems) or 'train first'}"
        )
        assert started is not None
        folder, config = given.resume, started.config
    with Live() as live:
        resume = None if given.or_resume else given.resume is not None
        result = run_training(config, folder, resume=resume, sinks=[live, Jsonl(folder / "metrics.jsonl")])
    if result.first:
        print(f"{folder}: decoded BPB {result.bpb.decoded:.4f}, live gap {result.bpb.live_gap:+.4f}")
    return 0


def _from_run(base: RunConfig, run: Path) -> dict[str, Any]:
    """The parts of `base` that a run to start from replaces: model, tokenizer, and what must fit them."""
    from lrt.training.checkpoint import open_checkpoint

    found = open_checkpoint(run)
    length = min(base.train.length, found.config.model.context)
    return {
        "model": found.config.model,
        "data": replace(base.data, tokenizer=str(found.folder.parent.parent / "tokenizer")),
        "train": replace(base.train, init_from=str(run), length=length),
    }


def _named(args: list[str], flag: str, default: str) -> str:
    """The value of one flag, before the rest can be parsed."""
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(flag + "="):
            return arg.partition("=")[2]
    return default


@dataclass(frozen=True)
class Eval:
    """Bits per byte of a run on its validation text (or another text), in every mode."""

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    source: str | None = None
    """Score this text source instead of the run's validation split."""
    rows: int = 64
    """Rows to score."""
    length: int | None = None
    """Row length; by default the one trained with."""
    schedule: str | None = None
    """Schedule of the per-pass and merged figures; by default the one trained with."""
    tasks: tuple[str, ...] = ()
    """Run these lm-eval tasks instead (separated by commas or spaces), scored by the decoding engine."""
    include_path: Path | None = None
    """Folder with task files of your own; the harness's are then left out."""
    mode: str = DEFAULT_MODE
    """How tasks are scored: exact, jacobi, interleaved-G or zero_memory."""
    limit: int | None = None
    """Examples per task."""
    device: str = "auto"
    """cpu, cuda or auto."""
    json: bool = False
    """Print one JSON object."""


def evaluate(args: list[str]) -> int:
    from lrt.evaluation.bits_per_byte import evaluate as score_rows
    from lrt.evaluation.bits_per_byte import held_out_rows
    from lrt.training.checkpoint import load_model
    from lrt.utils.distributed import join

    given = parse(Eval, args, "eval")
    require(given.rows >= 1, f"--rows is {given.rows}; score at least 1")
    with join(given.device) as world:  # under torchrun each process scores its share of the rows
        loaded = load_model(given.run, world.device)
        if given.tasks:
            from lrt.evaluation.lm_eval_tasks import run

            return run(loaded, given.tasks, given.mode, given.include_path, given.limit, given.json)
        length = given.length or loaded.config.train.length
        context = loaded.config.model.context
        require(2 <= length <= context, f"--length is {length}; this model takes rows of 2 to {context} tokens")
        found = Curriculum.parse(given.schedule or loaded.config.train.schedule)
        rows = held_out_rows(loaded, given.source, rows=given.rows, length=length)
        bpb = score_rows(loaded.model, found, rows, world=world)
    where = {"run": str(given.run), "step": loaded.step, "length": length, "source": given.source or "validation"}
    if world.first:
        print(json.dumps(where | {"dtype": "float32"} | bpb.as_dict()) if given.json else _eval_text(where, bpb))
    return 0


def _eval_text(where: dict[str, Any], bpb: BPB) -> str:
    lines = [
        f"{where['run']} step {where['step']}, {bpb.rows} rows of {where['length']} ({where['source']}), float32, BPB"
    ]
    passes = "  ".join(f"{x:.4f}" for x in bpb.passes[:8]) + ("  ..." if len(bpb.passes) > 8 else "")
    for name, text in {
        "zero memory": f"{bpb.zero_memory:.4f}",
        f"passes of {bpb.schedule}": passes,
        "merged (parallel)": f"{bpb.merged:.4f}",
        "decoded (exact)": f"{bpb.decoded:.4f}",
        "live gap": f"{bpb.live_gap:+.4f}",
        "sweep residuals": "  ".join(f"{r:.1e}" for r in bpb.residuals) or "none (no memory)",
    }.items():
        lines.append(f"  {name:<28}{text}")
    lines.append("  decoded by position")
    lines += [f"    {label:<26}{x:.4f}" for label, x in bpb.by_position.items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Decoding:
    """How text is drawn; shared by `sample` and `chat`."""

    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingParams(temperature=0.8)
    )
    prefill: str = DEFAULT_MODE
    """How the prompt is taken in: exact, jacobi or interleaved-G."""
    device: str = "auto"
    """cpu, cuda or auto."""


@dataclass(frozen=True)
class Sample:
    """Continue a prompt, decoding with memory; the text streams to standard output."""

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    prompt: str = ""
    """The beginning of the document; `-` reads it from standard input."""
    samples: int = 1
    """Continuations, with seeds counting up."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)


def sample(args: list[str]) -> int:
    from lrt.inference.chat import complete
    from lrt.training.checkpoint import load_model
    from lrt.utils.hardware import resolve_device

    given = parse(Sample, args, "sample")
    require(given.samples >= 1, f"--samples is {given.samples}; draw at least 1")
    sampling, mode = given.decoding.sampling, given.decoding.prefill
    loaded = load_model(given.run, resolve_device(given.decoding.device))
    prompt = sys.stdin.read() if given.prompt == "-" else given.prompt
    for i in range(given.samples):
        print(f"--- seed {sampling.seed + i}\n" if given.samples > 1 else "", end="")
        once = replace(sampling, seed=sampling.seed + i)
        pieces = complete(loaded.model, loaded.tokenizer, prompt, once, mode=mode)
        print(prompt + next(pieces, ""), end="", flush=True)  # after the prompt has been taken in: it may be refused
        for text in pieces:
            print(text, end="", flush=True)
        print()
    return 0


@dataclass(frozen=True)
class Chat:
    """Talk to a model. Its state is kept between turns, so that nothing is taken in twice.

    A model that was trained on plain text continues the conversation as text: a turn is USER: ... BOT: ...
    """

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    template: str = "USER: {}\nBOT:"
    """What a turn becomes; {} is what you type. Use {} alone to talk in raw text."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Decoding(SamplingParams(temperature=0.8, stop=("\nUSER:",)))
    )


def chat(args: list[str]) -> int:
    from lrt.inference.chat import Conversation
    from lrt.training.checkpoint import load_model
    from lrt.utils.hardware import resolve_device

    given = parse(Chat, args, "chat")
    require("{}" in given.template, f"--template {given.template!r} has no place for your text; put {{}} into it")
    loaded = load_model(given.run, resolve_device(given.decoding.device))
    talk = Conversation(loaded.model, loaded.tokenizer, given.decoding.prefill)
    print("Type a line; /new forgets, end of input (Ctrl-D) leaves.", file=sys.stderr)
    for line in iter(_ask, None):
        if line.strip() == "/new":
            talk = Conversation(loaded.model, loaded.tokenizer, given.decoding.prefill)
            continue
        for text in talk.say(given.template.replace("{}", line), given.decoding.sampling):
            print(text, end="", flush=True)
        print()
    return 0


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def demo(args: list[str]) -> int:
    from lrt.experiments.demo import Demo, run_demo

    print(run_demo(parse(Demo, args, "demo")))
    return 0


def bench(args: list[str]) -> int:
    kinds = ("train", "decode", "serve")
    require(args[:1] != [] and args[0] in kinds, f"bench {' '.join(args[:1])}: choose one of {', '.join(kinds)}")
    return importlib.import_module(f"lrt.benchmarks.{args[0]}").main(args[1:])
