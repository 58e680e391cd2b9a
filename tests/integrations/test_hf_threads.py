"""Two threads with one model: what one asks to be recorded, or puts in place of tokens, is no affair of the other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_hf_training import FULL, ids_of, wrapped

pytest.importorskip("transformers")


@pytest.mark.parametrize("mine", ["hidden states", "vectors"])
@pytest.mark.parametrize("theirs", ["tokens", "hidden states", "vectors"])
def test_a_call_in_the_midst_of_another_threads_changes_neither(mine: str, theirs: str):
    model = wrapped(FULL, schedule="parallel").eval()
    core, rows = model.model.core, {"mine": ids_of(2, 6), "theirs": ids_of(2, 6).flip(1)}

    @torch.no_grad()  # which is a thread's own
    def called(kind: str, name: str) -> list[torch.Tensor]:
        ids = rows[name]
        vectors = 1.5 * core.embedding.weight[ids] if kind == "vectors" else None
        given: dict[str, Any] = {"input_ids": ids} if vectors is None else {"inputs_embeds": vectors}
        out = model(**given, output_hidden_states=kind == "hidden states")
        return [out.logits, *(out.hidden_states or ())]

    alone = [called(mine, "mine"), called(theirs, "theirs")]
    beside: list[list[torch.Tensor]] = []

    def amid(*_: object) -> None:
        if not beside and threading.current_thread() is threading.main_thread():
            beside.append([])
            with torch.no_grad():
                other = threading.Thread(target=lambda: beside.append(called(theirs, "theirs")))
                other.start()
                other.join()

    core.embedding.register_forward_pre_hook(amid)
    together = [called(mine, "mine"), beside[1]]
    for one, two in zip(alone, together, strict=True):
        assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
