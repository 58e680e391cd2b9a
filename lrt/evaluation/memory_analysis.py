"""Where the memory acts, how far back it reaches, and how fast its sweeps contract.

Nothing is computed by a second forward: what is switched off is switched off in the weights of a copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lrt.evaluation.bits_per_byte import Rows, sweep_residuals
from lrt.evaluation.contraction import contraction
from lrt.evaluation.score_names import signed
from lrt.inference.generate import score
from lrt.model.blocks import Block, gate_values
from lrt.model.loss import token_nats
from lrt.model.lrt import LRT
from lrt.model.parameters import role
from lrt.model.run_passes import run_passes
from lrt.model.shapes import IGNORE
from lrt.schedule import Schedule
from lrt.utils.hooks import while_hooked
from lrt.utils.require import require
from lrt.utils.tables import Table

REACH = 16
"""Positions back that the gradient is followed."""


def layerwise(model: LRT) -> LRT:
    """The same function with a projection per layer, so that each can be switched off; a copy in any case."""
    config = model.config
    if config.memory.projection == "shared":
        config = replace(config, memory=replace(config.memory, projection="layerwise"))
    copy, weights = LRT(config, model.device).to(model.stream_dtype), dict(model.state_dict())
    for name in [n for n in weights if role(n) == "memory matrix" and not n.startswith("blocks.")]:
        shared = weights.pop(name)
        weights |= {f"blocks.{i}.attention.{name}": shared for i in range(config.depth) if config.reads_memory(i)}
    copy.load_state_dict(weights)
    return copy.eval()


def _blocks(model: LRT) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def switches(model: LRT) -> dict[str, list[Tensor]]:
    """Weights (or parts of them) that are zeroed to switch something off, by what that is. `model` is `layerwise`."""
    switched: dict[str, list[Tensor]] = {
        "all memory": [],
        "ResidualInjection": [],
        "KVProjection": [],
        "recurrence": [],
        "token shift": [],
    }
    for i, block in enumerate(_blocks(model), 1):
        injection, attention = block.injection, block.attention
        gammas = [injection.gamma, injection.shift_gamma]
        projections = [attention.projection, attention.shift_projection]
        pairs = [[p.key.weight.data, p.value.weight.data] if p is not None else [] for p in projections]
        gamma, matrices = [g.data for g in gammas if g is not None], pairs[0] + pairs[1]
        switched["ResidualInjection"] += gamma
        switched["KVProjection"] += matrices
        for name, own, pair in zip(("recurrence", "token shift"), gammas, pairs, strict=True):
            switched[name] += pair + ([own.data] if own is not None else [])
        switched[f"layer {i}"] = gamma + matrices
        for head in range(model.config.k if matrices else 0):
            rows = slice(head * model.config.e, (head + 1) * model.config.e)
            switched[f"layer {i}, head {head + 1}"] = [w[rows] for w in matrices]
    switched["all memory"] = switched["ResidualInjection"] + switched["KVProjection"]
    if not switched["token shift"]:  # then the recurrence is all memory
        del switched["recurrence"]
    return {name: parts for name, parts in switched.items() if parts}


@torch.no_grad()
def ablations(model: LRT, rows: Rows) -> dict[str, float]:
    """Decoded loss in nats per token with everything on, and the increase when each switch is off."""
    copy = layerwise(model)

    def loss() -> float:
        return float(
            score(copy, rows.tokens, rows.targets).nats.cpu().double().sum() / (rows.targets != IGNORE).sum().cpu()
        )

    base, increases = loss(), {}
    for name, parts in switches(copy).items():
        saved = [part.clone() for part in parts]
        for part in parts:
            part.zero_()
        increases[name] = loss() - base
        for part, before in zip(parts, saved, strict=True):
            part.copy_(before)
    return {"loss": base} | increases


@torch.no_grad()
def gates(model: LRT, rows: Rows) -> list[dict[str, list[float]]]:
    """Gates by layer, `local`, `memory` and, where there is a value embedding, `value`: means by key/value head.

    They are means over the rows' positions, decoded token by token.
    """
    seen: list[list[Tensor]] = [[] for _ in _blocks(model)]
    hooks = [
        block.attention.gate.register_forward_hook(_keeper(outputs))
        for block, outputs in zip(_blocks(model), seen, strict=True)
        if block.attention.gate is not None
    ]
    with while_hooked(hooks):
        score(model, rows.tokens, rows.targets, mode="exact")  # a pass a position, so that each counts once
    names = ("local", "memory", "value")
    return [
        dict(zip(names, torch.stack(outputs).mean(0).view(-1, model.config.k).tolist(), strict=False))
        if outputs
        else {}
        for outputs in seen
    ]


def _keeper(outputs: list[Tensor]) -> Any:
    def keep(module: nn.Module, inputs: Any, out: Tensor) -> None:
        outputs.append(gate_values(out).flatten(0, -2).mean(0))

    return keep


def influence(model: LRT, rows: Rows, reach: int = REACH) -> list[float]:
    """Norm of the gradient of the last position's loss with respect to m_{t-k}, k = 1.., mean over rows; exact.

    Of rows whose last target counts. Empty without recurrence, or without such a row.
    """
    tokens, targets = rows.tokens[:, : 2 * reach], rows.targets[:, : 2 * reach]
    counted = targets[:, -1] != IGNORE
    if not model.config.memory.recurrent or not counted.any():
        return []
    tokens, targets = tokens[counted], targets[counted]
    with torch.enable_grad():
        passes = Schedule.parse("sequential").passes(tokens.shape[1])
        written = [w for _, w, _ in run_passes(model, tokens, passes, model.starts(tokens))]
        last = written[-1].hidden
        assert last is not None
        loss = token_nats(model, last, targets[:, -1:]).sum()
        before = [w.memory for w in reversed(written[-1 - reach : -1])]
        gradients = torch.autograd.grad(loss, before, allow_unused=True)
    return [0.0 if g is None else float(g.norm(dim=-1).mean()) for g in gradients]


@torch.no_grad()
def norms(model: LRT, rows: Rows) -> dict[str, float]:
    """Root mean square of the stream that the memory is normalised from, by position in doubling buckets; decoded.

    Empty without recurrence.
    """
    if not model.config.memory.recurrent:
        return {}
    passes, length = Schedule.parse("sequential").passes(rows.tokens.shape[1]), rows.tokens.shape[1]
    loop, block = divmod(model.config.source - 1, model.config.depth)
    streams: list[Tensor] = []
    hook = model.blocks[block].register_forward_hook(lambda module, inputs, out: streams.append(out[0]))
    written = []
    with while_hooked([hook]):
        for _ in run_passes(model, rows.tokens, passes, model.starts(rows.tokens)):
            written.append(streams[loop].pow(2).mean(dim=-1).sqrt().mean())
            streams.clear()
    values = torch.stack(written)
    edges = [1 << i for i in range(length.bit_length()) if 1 << i <= length]
    return {str(low): float(values[low - 1 : 2 * low - 1].mean()) for low in edges}


def analyse(model: LRT, rows: Rows) -> dict[str, Any]:
    """Everything `lrt analyze` tells, as plain data. ValueError: a model without memory."""
    require(model.config.memory.on, "this model has no memory to analyse; give an LRT")
    residuals = sweep_residuals(model, rows.tokens, model.starts(rows.tokens))
    scalars = [{name: p.item() for name, p in b.injection.named_parameters()} for b in _blocks(model)]
    return {
        "scalars": scalars, "gates": gates(model, rows), "ablations": ablations(model, rows),
        "influence": influence(model, rows), "stream_rms_by_position": norms(model, rows),
        "sweep_residuals": residuals, "contraction": contraction(residuals),
    }  # fmt: skip


def tables(findings: dict[str, Any]) -> list[tuple[str, Table]]:
    """The findings as tables under headings."""
    scalars = [
        [str(i), *(f"{s[n]:.3f}" if n in s else "" for n in ("alpha", "beta", "gamma", "shift_gamma"))]
        for i, s in enumerate(findings["scalars"], 1)
    ]
    opened = [
        [str(i), *(" ".join(f"{x:.2f}" for x in g.get(n, [])) for n in ("local", "memory", "value"))]
        for i, g in enumerate(findings["gates"], 1)
    ]
    parts = {"all memory": "recurrence and token shift"} if "recurrence" in findings["ablations"] else {}
    changes = [[parts.get(name, name), signed(x)] for name, x in findings["ablations"].items() if name != "loss"]
    more = f"nats per token more than {findings['ablations']['loss']:.4f}"
    reach = [[str(k), f"{x:.2e}"] for k, x in enumerate(findings["influence"], 1)]
    sizes = [[k, f"{x:.4f}"] for k, x in findings["stream_rms_by_position"].items()]
    sweeps = [[str(k), f"{x:.2e}"] for k, x in enumerate(findings["sweep_residuals"], 1)]
    return [
        ("scalars", Table(["layer", "alpha", "beta", "gamma", "shift gamma"], scalars)),
        ("mean gates by head", Table(["layer", "local", "memory", "value"], opened)),
        ("switched off", Table(["off", more], changes)),
        ("reach of the memory", Table(["k", "norm of the loss's gradient at m_{t-k}"], reach)),
        ("the stream before it is normalised to the memory", Table(["from position", "root mean square"], sizes)),
        (f"sweeps contract by {findings['contraction']:.3f}", Table(["sweep", "largest relative change"], sweeps)),
    ]


def heat_map(findings: dict[str, Any]) -> Figure:
    """Loss increase with a head's memory switched off (left), and its mean memory gate (right), layers by heads."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    depth, heads = len(findings["gates"]), max(len(g.get("memory", ())) for g in findings["gates"])
    require(heads > 0, "this model has no KVProjection, so there is no heat map by head")
    cells = [(i, h) for i in range(depth) for h in range(heads)]
    losses = [[findings["ablations"][f"layer {i}, head {h}"] for h in range(1, heads + 1)] for i in range(1, depth + 1)]
    opened = [g["memory"] for g in findings["gates"]]
    for axes, values, title in zip(
        figure.subplots(1, 2), (losses, opened), ("nats per token more without it", "mean memory gate"), strict=True
    ):
        image = axes.imshow(values, cmap="viridis", aspect="auto")
        figure.colorbar(image, ax=axes)
        axes.set(title=title, xlabel="key/value head", ylabel="layer")
        axes.set_xticks(range(heads), range(1, heads + 1))
        axes.set_yticks(range(depth), range(1, depth + 1))
        for i, h in cells if depth * heads <= 64 else ():
            dark = values[i][h] < (max(map(max, values)) + min(map(min, values))) / 2
            axes.text(h, i, f"{values[i][h]:.3f}", ha="center", va="center", color="w" if dark else "k", fontsize=8)
    return figure
