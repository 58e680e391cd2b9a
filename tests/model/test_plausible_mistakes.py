"""What a stranger may hand the library by mistake: right, or one sentence that says what to give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import config, packed, randomised
from torch import Tensor

from lrt.config.decoding import SamplingParams
from lrt.inference.generate import generate, score
from lrt.inference.prefill import decode_step, prefill
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.passes import Pass
from lrt.schedule import Schedule

MODEL = randomised(config()).float().eval()
IDS = packed(MODEL.config, 2, 6)
LOSS = ScheduledLoss(MODEL, "settled-2")
WRONG = {
    "numpy": (IDS.numpy(), "of type ndarray: give token ids, a tensor"),
    "list": (IDS.tolist(), "of type list: give token ids, a tensor"),
    "none": (None, "of type NoneType"),
    "text": ("abc", "of type str"),
    "float": (IDS.float(), r"of type float32 and shape \(2, 6\): give token ids"),
    "bool": (IDS.bool(), "of type bool"),
    "uint8": (IDS.to(torch.uint8), "of type uint8"),
    "one row": (IDS[0], "give rows of tokens|give one target for each token"),
    "table of rows": (IDS[None], "give rows of tokens|give one target for each token"),
    "no rows": (IDS[:0], "at least 1 token|give one target for each token"),
    "no tokens": (IDS[:, :0], "at least 1 token|give one target for each token"),
}
CALLS: dict[str, Any] = {
    "model": MODEL,
    "pass": MODEL.run_pass,
    "loss": lambda ids: LOSS(ids, IDS),
    "targets": lambda ids: LOSS(IDS, ids),
    "score": lambda ids: score(MODEL, ids, IDS),
    "scored": lambda ids: score(MODEL, IDS, ids),
    "prefill": lambda ids: prefill(MODEL, ids),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_table_of_ids_is_refused(kind: str, call: str):
    ids, said = WRONG[kind]
    with pytest.raises(ValueError, match=said) as error, torch.no_grad():
        CALLS[call](ids)
    assert "\n" not in str(error.value) and len(str(error.value)) < 160


@pytest.mark.parametrize("call", ["model", "loss", "score", "prefill"])
@pytest.mark.parametrize("shift", [-30, 30])
def test_tokens_that_there_are_not_are_named(call: str, shift: int):
    with pytest.raises(ValueError, match=r"token -?\d+ is outside the vocabulary of 19"):
        CALLS[call](IDS + shift)


@torch.no_grad()
def test_ids_of_32_bits_are_ids():
    brief = IDS.int()
    assert torch.equal(MODEL(brief), MODEL(IDS))
    assert torch.equal(LOSS(brief, brief).loss, LOSS(IDS, IDS).loss)
    assert torch.equal(score(MODEL, brief, brief).nats, score(MODEL, IDS, IDS).nats)
    short, long = (prefill(MODEL, ids, capacity=9) for ids in (brief, IDS))
    assert torch.equal(short.logits, long.logits)
    after = [decode_step(MODEL, ids[:, 0], one.cache)[0] for ids, one in ((brief, short), (IDS, long))]
    assert torch.equal(*after)
    law = SamplingParams(max_new_tokens=2, temperature=0)
    texts = [
        [e.token for step in generate(MODEL, ids, law) for e in step.emissions] for ids in (brief, IDS, IDS.numpy())
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    "starts", [IDS, torch.zeros(2, 6), torch.zeros(2, 5, dtype=torch.bool), [[False] * 6] * 2], ids=str
)
def test_starts_are_truth_values_one_a_token(starts: Any):
    for call in (lambda: LOSS(IDS, IDS, starts), lambda: MODEL.run_pass(IDS, starts=starts)):
        with pytest.raises(ValueError, match="starts are of type .*: give True or False for each token"):
            call()


@pytest.mark.parametrize(
    ("tokens", "active", "said"),
    [
        (IDS[:, :1], None, r"shape \(2, 1\) for 2 rows"), (IDS[:1, 0], None, r"shape \(1,\) for 2 rows"),
        ([1, 2], None, "tokens of type list"), (IDS[:, 0].float(), None, "tokens of type float32"),
        (torch.tensor([1, 99]), None, "token 99 is outside"), (torch.tensor([1, -1]), None, "token -1 is outside"),
        (IDS[:, 0], torch.tensor([1, 0]), "active must be"), (IDS[:, 0], torch.tensor([True]), "active must be"),
    ],
)  # fmt: skip
def test_a_step_takes_one_token_a_row(tokens: Any, active: Tensor | None, said: str):
    cache = prefill(MODEL, IDS, capacity=9).cache
    with pytest.raises(ValueError, match=said):
        decode_step(MODEL, tokens, cache, active)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": 0}, "the capacity is 0"), ({"lengths": [1, 2]}, "lengths of type list"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths of type float32"),
        ({"lengths": torch.tensor([[1], [2]])}, r"lengths of shape \(2, 1\)"),
    ],
)  # fmt: skip
def test_a_prompts_room_and_lengths_are_whole_numbers(options: dict[str, Any], said: str):
    """A capacity of 0 was taken for none given."""
    with pytest.raises(ValueError, match=said):
        prefill(MODEL, IDS, **options)


OTHERS = {"depth": config(depth=4), "heads": config(kv_heads=1), "width": config(width=48, heads=6)}


@pytest.mark.parametrize("call", ["step", "prefill", "generate"])
@pytest.mark.parametrize("kind", [*OTHERS, "prefill's result", "list"])
def test_a_state_is_the_models_own(kind: str, call: str):
    """A state of other layers or heads failed in torch's own words, a result of prefill in Python's."""
    state: Any = prefill(MODEL, IDS, capacity=9) if kind == "prefill's result" else [0]
    state = prefill(LRT(OTHERS[kind]), IDS, capacity=9).cache if kind in OTHERS else state
    calls = {
        "step": lambda: decode_step(MODEL, IDS[:, 0], state), "prefill": lambda: prefill(MODEL, IDS, cache=state),
        "generate": lambda: next(generate(MODEL, IDS.tolist(), cache=state)),
    }  # fmt: skip
    said = r"another model's \(\d layers" if kind in OTHERS else "the state is of type (Prefill|list): give a KVCache"
    with pytest.raises(ValueError, match=said):
        calls[call]()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_weights_of_a_wrapped_model_are_named(prefix: str, strict: bool):
    """Where they need not all be there, nothing was loaded, in silence."""
    state = {prefix + name: x for name, x in MODEL.state_dict().items()}
    with pytest.raises(ValueError, match=f"every name begins with '{prefix}': .* take it off") as error:
        MODEL.load_state_dict(state, strict=strict)
    assert "\n" not in str(error.value)
    MODEL.load_state_dict({name.removeprefix(prefix): x for name, x in state.items()})


@pytest.mark.parametrize("prompts", [[1, 2, 3], IDS[0], "abc", [IDS], [None], ["abc"]], ids=str)
def test_one_prompt_is_a_list_within_a_list(prompts: Any):
    with pytest.raises(ValueError, match=r"\[\[1, 2, 3\]\] is one prompt"):
        next(generate(MODEL, prompts))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LRT({"depth": 2}), "config is a dict; give a ModelConfig"),  # pyright: ignore[reportArgumentType]
        (lambda: LRT(MODEL.config, device="tpu"), "device 'tpu' is not available here; use cpu"),
        (lambda: LRT(MODEL.config, device="cpux:0"), "device 'cpux:0' is not available here"),
        (lambda: LRT(MODEL.config, device=[]), "device '\\[\\]' is not"),  # pyright: ignore[reportArgumentType]
        (lambda: ScheduledLoss(MODEL, None), "schedule is a NoneType"),  # pyright: ignore[reportArgumentType]
        (lambda: ScheduledLoss(MODEL, "parallel", consistency=-1.0), "consistency is -1.0"),
        (lambda: ScheduledLoss(MODEL, "parallel", consistency=float("nan")), "consistency is nan"),
        (lambda: Schedule("setled"), "no schedule is of kind 'setled'"),
        (lambda: Schedule("settled"), "kind 'settled' and size None: use Schedule.parse"),
        (lambda: Pass([0, 1, 2]), r"a pass over \[0, 1, 2\]: give a range"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_a_model_is_made_of_is_looked_at(make: Any, said: str):
    """A schedule of a kind that there is not was run as one parallel pass."""
    with pytest.raises(ValueError, match=said):
        make()
