"""Small models with randomised weights: zero-initialised projections would make equality tests pass for nothing."""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from lrt.cli.main import main
from lrt.config.model import MEMORY_OFF, BackboneConfig, MemoryConfig, ModelConfig, RopeScaling
from lrt.config.run import RunConfig
from lrt.inference.generate import generate
from lrt.model.lrt import LRT
from lrt.model.reference import Position, _logits, _memories, _token, reference
from lrt.model.run_passes import run_passes
from lrt.passes import Pass, check
from lrt.schedule import Schedule

_PORTS = itertools.count(7 * os.getpid())
"""Where this process looks next for a port."""
MEMORY = ("projection", "source", "gate_width", "residual", "shift", "start", "blocks", "injection")


def config(**overrides) -> ModelConfig:
    """A 3-layer model that exercises everything: grouped queries, a window, value embeddings, a middle source layer."""
    memory = MemoryConfig(
        **{"projection": "layerwise", "source": 2, "gate_width": 7}
        | {k: overrides.pop(k) for k in MEMORY if k in overrides}
    )
    full = {
        "depth": 3, "width": 24, "heads": 4, "kv_heads": 2, "context": 64, "vocab_size": 19, "bos": 0,
        "window_pattern": "SL", "window": 4, "value_embeddings": "alternating",
    }  # fmt: skip
    return ModelConfig(**full | {"memory": memory} | overrides)


PLAIN_OPTIONS = {"kv_heads": 4, "window_pattern": "L", "value_embeddings": "none"}
VARIANTS = [
    config(projection=projection, residual=residual, source=source, **options)
    for (projection, residual), source, options in itertools.product(
        [("layerwise", True), ("shared", True), ("shared", False), ("none", True)], [3, 2], [{}, PLAIN_OPTIONS]
    )
    if source == 2 or options
]
LLAMA = BackboneConfig(
    mlp="swiglu", mlp_width=20, tied=True, norm_weights=True, norm_eps=1e-2, embedding_norm=False, qk_norm="none",
    rope=RopeScaling(kind="llama3", factor=4.0, low=1.0, high=3.0, original=30),
)  # fmt: skip
QWEN = BackboneConfig(
    head_width=8, mlp="swiglu", biases="qkv", norm_weights=True, embedding_norm=False, qk_norm="before"
)
OTHER = BackboneConfig(
    head_width=4, mlp_width=10, biases="all", qk_norm="none", rope=RopeScaling(kind="linear", factor=2.5)
)
SHIFT = config(source=0, projection="shared")
"""A token shift without recurrence."""
BOTH = config(shift=True, source=3)
"""A token shift beside the recurrence, a W_K, W_V and gamma each."""
CORNERS = [
    SHIFT,
    BOTH,
    config(source=3),
    config(depth=2, loops=2, source=3),
    config(source=1, residual=False, residual_scalars=False, softcap=None, gate_width=None, value_embeddings="all"),
    config(window_pattern="SSL", window=1, kv_heads=1, projection="shared", rope_theta=50.0),
    config(backbone=LLAMA, source=3, softcap=None, residual_scalars=False, value_embeddings="none"),
    config(backbone=QWEN, projection="shared", softcap=None, residual_scalars=False),
    config(window_pattern="S", last_layer="S", window=2, source=3),
    config(window_pattern="S", last_layer="S", shift=True, document_attention=True, projection="shared"),
    config(backbone=OTHER, source=3, window_pattern="L"),
    config(source=0, backbone=QWEN, residual_scalars=False),
    config(shift=True, source=3, depth=2, loops=2),
    config(shift=True, projection="shared"),
    config(shift=True, source=3, residual_scalars=False, value_embeddings="all"),
    config(shift=True, projection="none", source=0.34, softcap=None, backbone=LLAMA, value_embeddings="none"),
    config(blocks=(2, 3), source=3, projection="shared", depth=4),
    config(blocks=(2, 2), shift=True, window_pattern="L"),
    config(document_attention=True, source=3, projection="shared"),
    config(document_attention=True, shift=True, window_pattern="L"),
    config(injection="share", projection="none", blocks=(2, 2), source=3, backbone=LLAMA, residual_scalars=False),
    config(injection="share", shift=True, projection="shared"),
    config(injection="matched", source=3, depth=2, loops=2),
    replace(config(), memory=MEMORY_OFF),
]
"""What the variants leave out: every option at another value, and no memory at all."""

BELOW = [
    config(blocks=(3, 4), source=4, depth=5, projection="shared"),
    config(blocks=(2, 3), source=2, depth=4, shift=True, document_attention=True, window_pattern="SSL"),
    config(blocks=(2, 2), source=3, depth=2, loops=2),
    config(blocks=(3, 3), source=2, depth=4, kv_heads=4),
]
"""Blocks that no memory reaches: below a source far up, one, in a looped stack, below a source that reads none."""

CODE = "".join(f"def f{i}(x, y):\n    return x * {i} + y\n\n" for i in range(400))
"""A text to train on."""

TOLERANCE = 1e-10
"""Of equality in float64."""
SCHEDULES = [
    "parallel", "interleaved-1", "interleaved-2", "interleaved-3:settle=1", "refinement-2", "chunked-3", "sequential",
    "settled-0", "settled-2", "interleaved-2:weights=0/1", "refinement-1:detach",
]  # fmt: skip


def label(cfg: ModelConfig) -> str:
    """A readable test id."""
    m = cfg.memory
    options = [
        f"kv{cfg.k}",
        cfg.window_pattern + (cfg.last_layer == "S") * "!",
        cfg.value_embeddings,
        m.projection,
        "residual" if m.residual else "-",
    ]
    back = {id(LLAMA): "llama", id(QWEN): "qwen", id(OTHER): "other"}.get(id(cfg.backbone), "nanochat")
    options += ["documents"] * cfg.document_attention + ["shift"] * m.shift + [f"blocks{m.blocks}" if m.blocks else ""]
    options += [m.injection] * (m.injection != "scaled")
    return "/".join([*options, f"source{cfg.source}", back])


def randomised(cfg: ModelConfig, seed: int = 0, scale: float = 0.6) -> LRT:
    """A float64 model with every parameter drawn: none is zero, no gate neutral, no injection absent."""
    model = LRT(cfg, seed=seed).double()
    random = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        deviation = scale if p.ndim < 2 else scale if "embedding" in name else scale / p.shape[1] ** 0.5 * 2
        with torch.no_grad():
            p.normal_(0.3 if p.ndim < 2 else 0.0, deviation, generator=random)
    return model


fixed = functools.cache(randomised)
"""The same model every time, for tests that leave it as it is."""


def tokens(cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens with some BOS among them, so that documents start inside rows."""
    return torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens; row r has a BOS at position (r + 3) mod length and nowhere else, row 1 none at all."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, cfg.vocab_size, (rows, length), generator=random)
    for r in range(rows):
        if r != 1:
            ids[r, (r + 3) % length] = 0
    return ids


def passes(text: str, length: int) -> tuple[Pass, ...]:
    """The passes of a schedule given as text."""
    return Schedule.parse(text).passes(length)


class Outcome(NamedTuple):
    """The last-written states of a row's positions, in order."""

    hidden: Tensor
    """[B, T, D]; zero where no pass ran to the top."""
    source: Tensor
    """[B, T, D]"""
    keys: Tensor
    """Of the blocks up to the source block, [L, B, K, T, E]."""
    values: Tensor


def outcome(model: LRT, ids: Tensor, run: Sequence[Pass]) -> Outcome:
    """Fold the passes and keep the last writer of every position, without the help of `Buffer`."""
    c, (rows, length) = model.config, ids.shape
    hidden, source = (torch.zeros(rows, length, c.d, dtype=torch.float64) for _ in range(2))
    keys, values = (torch.zeros(c.source, rows, c.k, length, c.e, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for p, written, _ in run_passes(model, ids, run, model.starts(ids)):
            at = list(p.positions)
            source[:, at] = written.memory
            hidden[:, at] = 0.0 if written.hidden is None else written.hidden
            for i in range(c.source):
                keys[i][:, :, at], values[i][:, :, at] = written.keys[i], written.values[i]
    return Outcome(hidden, source, keys, values)


def generated(model: LRT, prompts, sampling, **options) -> list[list[tuple[int, float]]]:
    """Tokens and log-probabilities of every row that `generate` makes."""
    rows: list[list[tuple[int, float]]] = [[] for _ in range(len(prompts) * options.get("samples", 1))]
    for made in generate(model, prompts, sampling, **options):
        for e in made.emissions:
            rows[e.row].append((e.token, e.logprob))
    return rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def same(a: Outcome, b: Outcome) -> bool:
    return all(near(x, y) for x, y in zip(a, b, strict=True))


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Per row and position, the largest difference of the last axis."""
    return (a - b).abs().amax(-1)


def slow_passes(model: LRT, row: list[int], run: Sequence[Pass]) -> list[tuple[Tensor, Tensor]]:
    """The oracle of any pass list: per-token loops over `reference`'s step.

    Each position reads the memory as it stood before its pass, its own pass's keys and values where they are newer, and
    the earlier passes' elsewhere. Returns logits [N, V] and memories [N, D] of every pass; each runs to the top.
    """
    c, w = model.config, {name: p.detach() for name, p in model.named_parameters()}
    zero = torch.zeros(c.d, dtype=torch.float64)
    past: list[list] = [[None] * len(row) for _ in range(c.layers)]
    memory: list[Tensor] = [zero] * len(row)
    found = []
    for p in run:
        before, logits = list(memory), []
        for t in p.positions:
            first = t == 0 or row[t] == c.bos
            carried, token_before = (zero, None) if first else (before[t - 1], row[t - 1])
            begins = [i for i in range(t + 1) if c.document_attention and row[i] == c.bos] or [0]
            seen = [layer[begins[-1] : t] for layer in past]
            position = Position(row[t], t, _memories(w, c, token_before, carried), seen)
            x, memory[t] = _token(w, c, position)
            for layer, extended in zip(past, seen, strict=True):
                layer[t] = extended[-1]
            logits.append(_logits(w, c, x))
        found.append((torch.stack(logits), torch.stack([memory[t] for t in p.positions])))
    return found


def slices(length: int) -> st.SearchStrategy[range]:
    """Non-empty slices start:stop:step of a row: any, long strided ones, and the whole row."""
    starts, steps = st.integers(0, length - 1), st.integers(1, 4)
    some = st.tuples(starts, st.integers(0, length), steps).map(lambda x: range(x[0], max(x[0] + 1, x[1]), x[2]))
    strided = st.tuples(st.integers(0, min(3, length - 1)), steps).map(lambda x: range(x[0], length, x[1]))
    return st.one_of(strided, some, st.just(range(length)))


@st.composite
def pass_lists(draw, most: int = 8) -> tuple[int, tuple[Pass, ...]]:
    """A row length and a list of passes over it that `check` accepts, the rows covered or not."""
    length = draw(st.integers(1, most))
    kept: list[Pass] = []
    for at in draw(st.lists(slices(length), min_size=1, max_size=7)):
        front = max((p.positions[-1] + 1 for p in kept), default=0)
        candidates = [at, range(front, max(front, at[-1]) + 1), range(length)]  # the slice, or what makes it valid
        kept.append(Pass(next(c for c in candidates if _accepted([*kept, Pass(c)]) and c[-1] < length)))
    return length, tuple(_dress(draw, p) for p in kept)


def _accepted(run: list[Pass]) -> bool:
    try:
        check(run)
    except ValueError:
        return False
    return True


def _dress(draw, p: Pass) -> Pass:
    grad = draw(st.booleans())
    return Pass(p.positions, draw(st.sampled_from([0.0, 1.0, 0.3])) if grad else 0.0, grad, draw(st.booleans()))


def tiny(base: RunConfig, source: Path, steps: int = 12, **training) -> RunConfig:
    """A recipe shrunk to a second of training, from the last stage of its schedule: few steps would not reach it."""
    model = replace(base.model, depth=2, width=32, heads=2, kv_heads=1, context=64)
    chosen = {
        "horizon": f"steps={steps}",
        "schedule": base.train.schedule.rpartition(",")[2],
        "batch": 8,
        "length": 32,
        "eval_every": 0,
        "eval_rows": 4,
        "log_every": 4,
        "dtype": "float32",
    }
    config = replace(base, model=model, train=replace(base.train, **chosen | training))
    return replace(
        config, data=replace(base.data, source=str(source), tokenizer="bytes", folder=str(source.parent / "data"))
    )


class PowerCut(BaseException):
    """The end of a process that nothing hears of."""


def power_cut(step: int) -> Callable[[dict], None]:
    """A sink that ends a training after a step."""

    def cut(event: dict) -> None:
        if event["kind"] == "train" and event["step"] == step:
            raise PowerCut

    return cut


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [e for e in map(json.loads, lines) if e["kind"] == kind]


def lossy_tokenizer(folder: Path, kind: str, texts: list[str]) -> Path:
    """A folder with a tokenizer that loses text: `unknown words`, `WordPiece`, or the name of a normaliser."""
    words = sorted({word for text in texts for word in text.split() if word.isascii()})
    if kind == "unknown words":
        known = {word: i for i, word in enumerate(["<unk>", "<s>", *words])}
        core = tokenizers.Tokenizer(models.WordLevel(known, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "WordPiece":
        inside = (f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz.é")
        known = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", "<s>", *words, *inside, *"TcaféiﬁxE"]))}
        core = tokenizers.Tokenizer(models.WordPiece(known, unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece("##", cleanup=False)
    else:
        core = tokenizers.Tokenizer(models.BPE())
        made = [getattr(normalizers, kind)()]
        core.normalizer = normalizers.Sequence([normalizers.NFD(), *made] if kind == "StripAccents" else made)
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        core.train_from_iterator(texts, trainer)
    core.add_special_tokens(["<unk>", "<s>"])
    folder.mkdir(parents=True)
    core.save(str(folder / "tokenizer.json"))
    return folder


def byte_bpe(texts: list[str], *specials: str, size: int = 300, prefix: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE of another library; with `prefix` it puts a space in front."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*specials], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return core


def truth(model: LRT, rows: Tensor) -> Tensor:
    """The reference loop's logits, [B, T, V]."""
    weights = dict(model.state_dict())
    return torch.stack([reference(weights, model.config, row.tolist()).logits for row in rows])


def close(a: Tensor, b: Tensor) -> None:
    """`near`, as an assertion that says where they differ."""
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def refusal(capsys, arguments: list[str]) -> str:
    """The one line with which a command refuses; it prints nothing else, and ends with 2."""
    capsys.readouterr()  # what was said before
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("lrt")
    return line


def free_port() -> int:
    """A port of 127.0.0.1 to listen at a little later: none that the system meanwhile gives to a connection."""
    while True:
        port = 20_000 + next(_PORTS) % 12_000  # below those that are given to whoever asks for any
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
