"""lrt analyze: switches take away exactly what they say; reach and contraction are those of the decoded recurrence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import BOTH, SHIFT, config, fixed, randomised, tokens

from lrt.cli.main import main
from lrt.config.model import MEMORY_OFF, ModelConfig
from lrt.evaluation.bits_per_byte import Rows
from lrt.evaluation.memory_analysis import (
    ablations,
    analyse,
    contraction,
    gates,
    influence,
    layerwise,
    norms,
    switches,
    tables,
)
from lrt.inference.generate import score
from lrt.inference.prefill import decode_step
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT

CONFIG = config(projection="shared", source=3, window_pattern="L", kv_heads=2)


def some_rows(cfg: ModelConfig = CONFIG, length: int = 12) -> Rows:
    ids = tokens(cfg, 3, length + 1, seed=4)
    ids[:, :] = ids.clamp(min=1)
    return Rows(ids[:, :-1], ids[:, 1:], ids[:, :-1] == 0, torch.ones_like(ids[:, 1:]))


def test_the_layerwise_copy_is_the_same_function():
    model, rows = fixed(CONFIG), some_rows()
    copy = layerwise(model)
    assert copy.config.memory.projection == "layerwise"
    a, b = (score(m, rows.tokens, rows.targets, mode="exact").nats for m in (model, copy))
    assert torch.allclose(a, b, atol=1e-10)


def test_switching_all_off_leaves_the_loss_of_zero_memory_and_the_model_as_it_was():
    model, rows = fixed(CONFIG), some_rows()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = ablations(model, rows)
    zero = float(score(model, rows.tokens, rows.targets, mode="zero_memory").nats.mean())
    assert found["loss"] + found["all memory"] == pytest.approx(zero, abs=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {"ResidualInjection", "KVProjection", "layer 3", "layer 1, head 2"} <= set(found)
    assert len({round(x, 9) for x in found.values()}) == len(found)  # each does something of its own


def test_a_heads_switch_zeroes_what_only_that_head_gets():
    copy = layerwise(fixed(CONFIG))
    memory = torch.randn(2, 5, CONFIG.d, dtype=torch.float64)
    for part in switches(copy)["layer 2, head 1"]:
        part.zero_()
    keys, values = copy.blocks[1].attention.projection(memory)
    for x in (keys, values):
        assert x[:, :, 0].abs().max() == 0 and x[:, :, 1].abs().min() > 0
    assert copy.blocks[0].attention.projection(memory)[0].abs().min() > 0


def test_gates_are_one_where_the_weights_are_zero():
    model, rows = randomised(CONFIG, seed=1), some_rows()
    with torch.no_grad():
        model.blocks[0].attention.gate.weight.zero_()
    found = gates(model, rows)
    assert found[0]["local"] == pytest.approx([1, 1]) and found[0]["memory"] == pytest.approx([1, 1])
    assert found[1]["memory"] != pytest.approx([1, 1])
    assert not model.blocks[0].attention.gate._forward_hooks


def test_gates_are_means_over_decoded_positions():
    model, rows, inputs = fixed(CONFIG), some_rows(), []
    gate = model.blocks[1].attention.gate
    hook = gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    cache = KVCache.empty(model, *rows.tokens.shape)
    for t in range(rows.tokens.shape[1]):
        _, cache = decode_step(model, rows.tokens[:, t], cache)
    hook.remove()
    each = 2 / (1 + torch.exp(-(torch.cat(inputs, dim=1) @ gate.weight.T)))
    local, memory, *_ = each.flatten(0, 1).mean(0).split(CONFIG.k)
    assert gates(model, rows)[1]["local"] == pytest.approx(local.tolist(), rel=1e-9)
    assert gates(model, rows)[1]["memory"] == pytest.approx(memory.tolist(), rel=1e-9)


def test_influence_is_the_gradient_of_the_loss():
    model, rows = fixed(CONFIG), some_rows()
    found = influence(model, rows, reach=6)
    assert len(found) == 6 and all(x > 0 for x in found)
    # The loss of the next token, when the newest memory is moved by a small step along one channel.
    from lrt.inference.prefill import prefill

    ids = rows.tokens[:1, :12]
    cache = prefill(model, ids[:, :11], mode="exact", capacity=12).cache
    gradient = torch.zeros(CONFIG.d, dtype=torch.float64)
    for channel in range(CONFIG.d):
        for sign in (1, -1):
            memory = cache.memory.clone()
            memory[0, channel] += sign * 1e-5
            moved = KVCache(tuple(k.clone() for k in cache.keys), tuple(v.clone() for v in cache.values), memory,
                          cache.length, cache.last_token, cache.document_start, cache.longest)  # fmt: skip
            logits, _ = decode_step(model, ids[:, 11], moved)
            gradient[channel] += sign * -torch.log_softmax(logits[0].double(), 0)[rows.targets[0, 11]].item() / 2e-5
    one = Rows(*(x[:1] for x in rows))
    assert influence(model, one, reach=6)[0] == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_the_streams_size_is_that_of_the_next_blocks_input_as_decoded():
    cfg = config(depth=2, loops=2, source=3, window_pattern="L")
    model, rows, seen = randomised(cfg), some_rows(cfg), []
    cache = KVCache.empty(model, *rows.tokens.shape)
    hook = model.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    for t in range(12):
        _, cache = decode_step(model, rows.tokens[:, t], cache)
    hook.remove()
    sizes = torch.stack(
        [x.pow(2).mean(-1).sqrt().mean() for x in seen[1::2]]
    )  # block 4 of a step: block 2, second loop
    expected = {str(low): float(sizes[low - 1 : 2 * low - 1].mean()) for low in (1, 2, 4, 8)}
    assert norms(model, rows) == pytest.approx(expected, rel=1e-9)
    assert len({round(x, 3) for x in expected.values()}) > 1


def test_contraction_is_the_factor_per_sweep():
    assert contraction([0.8, 0.4, 0.2, 0.1]) == pytest.approx(0.5)
    assert contraction([0.3]) == 0.0


@pytest.mark.parametrize(("cfg", "columns"), [(SHIFT, 1), (BOTH, 2)], ids=["shift", "both"])
def test_a_token_shift_is_analysed_too(cfg: ModelConfig, columns: int):
    model, rows = fixed(cfg), some_rows(cfg)
    found = analyse(model, rows)
    assert len(found["scalars"][0]) == 2 + columns
    assert abs(found["ablations"]["token shift"]) > 1e-6
    assert bool(found["influence"]) == bool(found["sweep_residuals"]) == cfg.memory.recurrent
    whole = found["ablations"]["loss"] + found["ablations"]["all memory"]
    gates = replace(cfg, memory=replace(cfg.memory, projection="gates", residual=False, shift=False))
    control = LRT(gates).double()
    control.load_state_dict({k: v for k, v in model.state_dict().items() if k in control.state_dict()})
    assert whole == pytest.approx(float(score(control, rows.tokens, rows.targets).nats.mean()), abs=1e-9)
    shown = dict(tables(found))["switched off"].markdown()
    assert ("recurrence and token shift" in shown) == ("all memory" not in shown) == cfg.memory.recurrent
    if cfg.memory.recurrent:  # what other commands call zero memory: the shift stays
        without = score(model, rows.tokens, rows.targets, mode="zero_memory").nats.mean()
        assert found["ablations"]["loss"] + found["ablations"]["recurrence"] == pytest.approx(float(without), abs=1e-9)


def test_a_model_without_memory_is_refused():
    plain = randomised(ModelConfig(depth=1, width=16, heads=1, vocab_size=19, memory=MEMORY_OFF))
    with pytest.raises(ValueError, match="has no memory"):
        analyse(plain, some_rows())


def test_the_command_prints_tables_and_draws_a_heat_map(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "".join(f"def function_{i}(x):\n    return [x] * {i}\n\n" for i in range(400))
    (tmp_path / "text.py").write_text(text, encoding="utf-8")
    small = "--model.depth 2 --model.width 32 --model.heads 2 --model.context 64 --train.length 64 --train.batch 4"
    data = "--data.source text.py --data.tokenizer bytes --data.validation 0.2 --train.horizon steps=2"
    assert main(["train", *small.split(), *data.split(), "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["analyze", "run", "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("gamma", "layer 2, head 2", "m_{t-k}", "sweeps contract by"))
    assert (tmp_path / "run" / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert main(["analyze", "run", "--rows", "2", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"scalars", "gates", "ablations", "influence", "contraction"}
