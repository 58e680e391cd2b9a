"""`/api/inspect`: both modes scored as the library scores them, strengths as the injections have them."""

from __future__ import annotations

import pytest
import torch
from helpers import lossy_tokenizer
from serving import Server, make_run, opened, post

from lrt.data.tokenizer import load_tokenizer
from lrt.inference.generate import score

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's libraries


def test_inspect_scores_both_modes_and_measures_the_memory(server):
    text = "def area(self): return width * height"
    found = post(server, "/api/inspect", {"text": text, "top": 3}).json()
    row = torch.tensor([opened(server, text)])
    for name, mode in (("decoded", "exact"), ("zero", "zero_memory")):
        expected = -score(server.loaded.model, row[:, :-1], row[:, 1:], mode=mode).nats[0]
        listed = torch.tensor([t[name]["logprob"] for t in found["tokens"]])
        torch.testing.assert_close(listed, expected, atol=1e-4, rtol=0)
        total = float(-listed.sum()) / (0.6931471805599453 * len(text))
        assert found["bpb"][name] == pytest.approx(total, abs=1e-4)
    assert "".join(t["text"] for t in found["tokens"]) == text
    for kind in ("residual", "key", "value"):
        rows = torch.tensor(found["strength"][kind])
        assert rows.shape == (2, row.shape[1] - 1)
        assert (rows[:, 0] == 0).all()  # nothing to read at the first token
        assert (rows[:, 1:] > 0).all()
    assert found["model"]["trained_without_memory"] is False and found["normalised"] is False
    assert all(part._forward_pre_hooks == {} for block in server.loaded.model.blocks for part in block.modules())


def test_strengths_are_the_norms_of_the_injections(server):
    """The residual part by hand: |gamma m| / |alpha x + beta x0| in block 1, where x is x0."""
    model = server.loaded.model
    ids = opened(server, "fox jumps over")
    found = post(server, "/api/inspect", {"text": "fox jumps over"}).json()["strength"]["residual"][0]
    from lrt.inference.prefill import prefill
    from lrt.model.ops import rms_norm

    block = model.blocks[0].injection
    with torch.no_grad():
        for t in range(1, len(ids) - 1):
            memory = prefill(model, torch.tensor([ids[:t]]), mode="exact").cache.memory[0]
            x0 = rms_norm(model.embedding.weight[ids[t]])
            expected = (block.gamma * memory).norm() / ((block.alpha + block.beta) * x0).norm()
            assert found[t] == pytest.approx(float(expected), rel=1e-3)


def test_bits_of_a_text_that_the_tokens_lose_say_so(tmp_path):
    words = load_tokenizer(lossy_tokenizer(tmp_path / "words", "Lowercase", ["the euros"]))
    with Server(make_run(tmp_path / "run", tokenizer=words)) as running:
        for text, lost in (("the euros", False), ("The euros", True)):
            assert post(running, "/api/inspect", {"text": text}).json()["normalised"] is lost
