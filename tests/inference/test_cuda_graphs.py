"""What CUDA graphs ask of the compiled step, seen without a GPU.

A graph is skipped in silence if it would write to a tensor whose address may change. Its results lie in memory of its
own, which the next call writes over.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import config, randomised, tokens
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

from lrt.inference import prefill
from lrt.inference.prefill import compiled, next_logits
from lrt.model.kv_cache import KVCache
from lrt.model.recurrence import OneToken, advance

CONFIG = config(window=9, window_pattern="SL")


def decoded(run: OneToken, rows: int) -> list[Tensor]:
    """Logits of four steps, kept to the end."""
    model, ids = randomised(CONFIG).requires_grad_(False), tokens(CONFIG, rows, 4)
    cache, kept = KVCache.empty(model, rows, 12), []
    with torch.no_grad():
        for t in range(4):
            logits, cache = advance(model, ids[:, t], cache, None, run)
            kept.append(logits)
    return kept


def compiled_by(compiler: Any) -> tuple[OneToken, dict[str, Any]]:
    """`compiled` as on a GPU, by a function in place of torch's compiler; and how that was called."""
    asked: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(prefill, "graph_of", lambda f, **options: asked.update(options) or compiler(f))
        return compiled(), asked


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_every_tensor_that_the_step_fills_stays_where_it_is():
    filled = []

    def seen(graph: torch.fx.GraphModule, _: Any) -> Any:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        written = {node.args[0] for node in graph.graph.nodes if node.target is torch.ops.aten.copy_.default}
        context = TracingContext.get()
        assert context.fw_metadata is not None
        still = set(context.fw_metadata.static_input_indices)
        filled.extend(i in still for i, x in enumerate(inputs) if x in written)
        return graph

    backend = aot_autograd(fw_compiler=seen, inference_compiler=seen, keep_inference_input_mutations=True)
    run, asked = compiled_by(lambda f: torch.compile(f, fullgraph=True, backend=backend))
    torch._dynamo.reset()
    for got, expected in zip(decoded(run, 2), decoded(next_logits, 2), strict=True):
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
    assert asked["mode"] == "reduce-overhead"
    assert filled == [True] * 2 * CONFIG.depth, "keys and values of every block"


def test_results_outlive_the_next_step():
    """A graph writes over its last results, before it reads what it is given."""

    def replayed(step: Any) -> Any:
        last: list[Tensor] = []

        def run(*arguments: Any) -> Any:
            for x in last:
                x.fill_(-(2**20))
            logits, rows = step(*arguments)
            last[:] = [x.clone() for x in (logits, *rows)]
            return last[0], type(rows)(*last[1:])

        return run

    run, _ = compiled_by(replayed)
    for got, expected in zip(decoded(run, 2), decoded(next_logits, 2), strict=True):
        assert torch.equal(got, expected)
