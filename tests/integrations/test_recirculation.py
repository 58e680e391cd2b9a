"""Memory without training: what `lrt convert --memory recirculation` writes computes its definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import config, differ, near, outcome, passes, randomised, tiny
from torch import Tensor

from lrt.cli.main import main
from lrt.config.conversion import Conversion
from lrt.config.model import MEMORY_OFF, MemoryConfig
from lrt.config.recipes import cpu_demo_plain
from lrt.inference.generate import score
from lrt.integrations.convert import add_memory, convert
from lrt.model.lrt import LRT
from lrt.model.run_passes import run_passes
from lrt.schedule import Schedule
from lrt.training.checkpoint import load_model
from lrt.training.trainer import train

IDS = torch.tensor([[0, 5, 7, 3, 0, 4, 9, 2]])
"""Two documents of one row."""


def streams(model: LRT, block: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Token by token: what enters block `block` (1..) but for the memory, what it works on, and every source state."""
    entered, taken, sources = [], [], []
    chosen, last = model.blocks[block - 1], model.blocks[model.config.source - 1]

    def seen(part, inputs, out) -> None:
        x, context = inputs
        entered.append(part.alpha * x + part.beta * context.x0)
        taken.append(out)

    hooks = [
        chosen.injection.register_forward_hook(seen),  # pyright: ignore
        last.register_forward_hook(lambda part, inputs, out: sources.append(out[0])),
    ]
    list(run_passes(model, IDS, Schedule.parse("sequential").passes(IDS.shape[1]), model.starts(IDS)))
    for hook in hooks:
        hook.remove()
    return entered, taken, sources


@pytest.mark.parametrize("keep", [0.75, 1.0], ids=["share", "matched"])
def test_a_block_takes_in_a_share_of_the_previous_state_at_its_own_length(keep: float):
    way = "share" if keep < 1 else "matched"
    memory = MemoryConfig(projection="none", source=3, blocks=(2, 2), injection=way)
    plain = randomised(config(depth=4, memory=MEMORY_OFF))
    model = LRT(config(depth=4, memory=memory)).double()
    add_memory(model, dict(plain.state_dict()), "small", 0.25, 0)
    with torch.no_grad():
        entered, taken, sources = streams(model, 2)
    for t, (y, x) in enumerate(zip(entered, taken, strict=True)):
        expected = y
        if IDS[0, t] != model.config.bos:
            z = sources[t - 1]
            expected = keep * y + 0.25 * (y.norm() / z.norm()) * z
            assert (expected - y).norm() > 0.05 * y.norm()
        assert (x - expected).norm() < 1e-4 * y.norm()  # norms add a little to squares
    others = [block.injection.gamma for i, block in enumerate(model.blocks, 1) if i != 2]  # pyright: ignore
    assert others == [None] * 3


def test_no_block_keeps_less_of_itself_where_there_is_no_memory():
    cfg = config(injection="share", projection="none", source=3)
    model, plain = randomised(cfg), LRT(config(memory=MEMORY_OFF)).double()
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if "gamma" not in n})
    with torch.no_grad():
        blind, seeing = (run(model, name) for name in ("parallel", "sequential"))
        expected = run(plain, "sequential")
    assert near(blind, expected) and near(seeing[:, 0], expected[:, 0])
    assert differ(seeing[:, 1:], expected[:, 1:]).min() > 1e-3


def run(model: LRT, schedule: str) -> Tensor:
    """Logits of every position under a schedule."""
    return model.logits(outcome(model, IDS, passes(schedule, IDS.shape[1])).hidden)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    book = folder / "book.txt"
    book.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    train(tiny(cpu_demo_plain(), book, steps=3), folder / "run")
    return folder / "run"


def test_a_run_gains_it_and_is_scored_against_itself(plain_run: Path, tmp_path: Path, capsys):
    out = tmp_path / "late"
    assert main(["convert", str(plain_run), "--out", str(out), "--memory", "recirculation", "--share", "0.2"]) == 0
    assert "with memory" in capsys.readouterr().out
    before, after = load_model(plain_run).model, load_model(out).model
    (extra,) = after.state_dict().keys() - before.state_dict().keys()
    cfg = after.config.memory
    assert (cfg.source, cfg.blocks, cfg.injection, cfg.projection) == (1, (1, 1), "share", "none")
    assert extra == "blocks.0.injection.gamma" and after.state_dict()[extra] == pytest.approx(0.2)
    assert all(torch.equal(after.state_dict()[name], value) for name, value in before.state_dict().items())
    scores = {}
    for run in (plain_run, out):  # on what the run held out, which the new one remembers
        assert main(["eval", str(run), "--rows", "2", "--json"]) == 0
        scores[run] = json.loads(capsys.readouterr().out)
    assert scores[out]["zero_memory"] == pytest.approx(scores[plain_run]["decoded"], abs=1e-6)
    assert abs(scores[out]["decoded"] - scores[out]["zero_memory"]) > 1e-5


def test_it_travels_to_transformers_and_back(plain_run: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    from lrt.integrations.hf.export import wrapped

    out, there, back = (tmp_path / name for name in ("late", "there", "back"))
    convert(plain_run, out, Conversion(memory="recirculation", share=0.3, mixture="matched"))
    loaded = load_model(out)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        logits = wrapped(loaded, prefill="exact")(ids).logits
        expected = score(loaded.model, ids[:, :-1], ids[:, 1:]).nats
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert torch.allclose(nats, expected[0], atol=1e-5)
    assert main(["export", str(out), str(there)]) == main(["convert", str(there), "--out", str(back)]) == 0
    assert load_model(back).model.config == loaded.model.config


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"share": 0.2}, "--share belongs to --memory recirculation"),
        ({"memory": "shared", "memory_block": 1}, "--memory-block belongs to"),
        ({"memory": "recirculation", "share": 1.0}, "--share is 1.0"),
        ({"memory": "recirculation", "start": "copy"}, "--start belongs to"),
    ],
)
def test_what_does_not_belong_together_is_one_line(how: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Conversion(**how)


def test_a_block_that_is_not_there_is_named(plain_run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"model.memory.blocks is \(9, 9\)"):
        convert(plain_run, tmp_path / "no", Conversion(memory="recirculation", memory_block=9))


def test_an_injection_without_a_stream_to_enter_is_refused():
    with pytest.raises(ValueError, match="model.memory.injection is share, but model.memory.residual is off"):
        MemoryConfig(residual=False, injection="share")
