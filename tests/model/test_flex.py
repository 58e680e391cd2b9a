"""FlexAttention in its eager form on the CPU, against one dense mask: values and gradients, in float64.

torch refuses the gradient on a CPU although its eager form has one, so tests lift that guard.
"""

from __future__ import annotations

import pytest
import torch
from helpers import config, label, packed, randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from model.test_attention import Case, attended, cases, outcome, require_same
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import lrt.model.flex
from lrt.config.model import Execution, ModelConfig
from lrt.model.attention import attention_mask
from lrt.model.flex import block_mask
from lrt.model.lrt import LRT
from lrt.model.run_passes import run_passes
from lrt.schedule import Schedule

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),  # dynamo's look
]


@pytest.fixture
def graded(monkeypatch):
    """FlexAttention's gradient on the CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *inputs: None)


def listed(mask: BlockMask, full: bool) -> Tensor:
    """Which blocks of keys a block of queries has, boolean [B, n, m]."""
    count, index = (mask.full_kv_num_blocks, mask.full_kv_indices) if full else (mask.kv_num_blocks, mask.kv_indices)
    assert count is not None and index is not None
    first = torch.arange(index.shape[-1]) < count[..., None]
    return torch.zeros_like(first).scatter(-1, index.long(), first)[:, 0]


@settings(max_examples=150)
@given(cases(40), st.integers(1, 6))
def test_blocks_hold_everything_that_is_seen(case: Case, size: int):
    """A full block is seen whole, and what is seen lies in a block; where keys rise, no block is listed for nothing."""
    own, keys = (torch.tensor([t for part in parts for t in part]) for parts in (case.slices[:1], case.slices))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lrt.model.flex, "SIZE", size)
        mask = block_mask(own, keys, case.window, case.document_start)
    seen = attention_mask(own, keys, case.window, case.document_start)
    seen = seen[:, 0] if seen.dim() == 4 else seen[None]
    rows, n, m = len(seen), -(-len(own) // size), -(-len(keys) // size)
    wide = torch.zeros(rows, n * size, m * size, dtype=torch.bool)
    wide[:, : len(own), : len(keys)] = seen
    tiles = wide.unflatten(2, (m, size)).unflatten(1, (n, size)).transpose(2, 3).flatten(3)
    full, partial = listed(mask, full=True), listed(mask, full=False)
    assert not (full & partial).any()
    assert (tiles.any(-1) <= (full | partial)).all()
    assert (full <= tiles.all(-1)).all()
    if len(case.slices) == 1 and case.window is None and case.document_start is None:
        assert torch.equal(tiles.any(-1), full | partial)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("own", [range(17), range(1, 17, 2), range(9, 17)])
@pytest.mark.usefixtures("graded")
def test_values_and_gradients_are_those_of_one_mask(own: range, documents: bool, window: int | None):
    rest = [t for t in range(own[-1] + 1) if t not in own]
    start = torch.tensor([[0 if t < 6 else 6 for t in own], [0 if t < 3 else 3 if t < 11 else 11 for t in own]])
    case = Case([own, rest] if rest else [own], window, start if documents else None, (4, 2))
    require_same(attended(case, block_mask), attended(case, attention_mask))


MODELS = [config(projection="shared"), config(window=3, kv_heads=1, document_attention=True)]


@pytest.mark.parametrize("cfg", MODELS, ids=label)
@pytest.mark.parametrize("text", ["interleaved-2", "settled-1"])
@pytest.mark.usefixtures("graded")
def test_a_schedule_has_the_same_loss_and_gradients(text: str, cfg: ModelConfig):
    model, ids = randomised(cfg), packed(cfg, 2, 11)
    slow_loss, slow = outcome(model, text, ids, Execution(attention="masked"))
    loss, grads = outcome(model, text, ids, Execution(attention="flex"))
    torch.testing.assert_close(loss, slow_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, slow, rtol=1e-10, atol=1e-10)


def test_without_a_gradient_on_the_cpu_it_says_so_and_without_need_of_one_it_runs():
    model, ids = randomised(config()), packed(config(), 2, 11)
    with pytest.raises(ValueError, match="attention flex has no gradient on cpu .*; take attention masked"):
        outcome(model, "interleaved-2", ids, Execution(attention="flex"))
    scores = []
    for attention in ("masked", "flex"):
        model.execution = Execution(attention=attention)
        scores.append(model(ids, mode="interleaved-3", tolerance=0.0) if not model.requires_grad_(False) else None)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_kernel_of_the_cpu_skips_no_block_that_is_seen():
    """Three blocks of queries and keys, so that some are left out and some are full; float32, forward alone."""
    cfg = config(document_attention=True, context=512, window=100, width=64)
    model = randomised(cfg).float().requires_grad_(False)
    ids = torch.randint(1, cfg.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    ids[0, 170], ids[1, 40], ids[1, 290] = 0, 0, 0
    losses = []
    for execution in (Execution(attention="masked"), Execution(attention="flex", compile=True)):
        model.execution = execution
        losses.append(model.logits(last_hidden(model, ids)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def last_hidden(model: LRT, ids: Tensor) -> Tensor:
    passes = Schedule.parse("interleaved-2").passes(ids.shape[1])
    *_, (_, written, _) = run_passes(model, ids, passes, model.starts(ids))
    assert written.hidden is not None
    return written.hidden
