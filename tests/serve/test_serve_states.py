"""Kept states continue as if nothing had happened, from every mark; and conversations become the right tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import config, fixed, tokens
from serving import WORDS

from lrt.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from lrt.data.tokenizer_config import read_tokenizer_config
from lrt.inference.prefill import decode_step, prefill
from lrt.model.kv_cache import KVCache
from lrt.serve.states import StateStore
from lrt.serve.text import Listing, Vocabulary

MINE = b"mine"
FULL = config(window_pattern="L")
WINDOWED, NARROW = config(), config(window_pattern="S", last_layer="S")
DOCUMENTS = config(document_attention=True, window_pattern="L")
SHIFT, BOTH = (config(window_pattern="L", **memory) for memory in ({"source": 0}, {"shift": True}))


def taken_in(model, ids: list[int], marks: list[int]) -> tuple[KVCache, dict[int, torch.Tensor]]:
    """Row 1 of a state of two that has taken in `ids`, and the memory at the marks."""
    cache, found = KVCache.empty(model, 2, 40), {}
    for n, token in enumerate(ids, 1):
        _, cache = decode_step(model, torch.tensor([0, token]), cache)
        if n in marks:
            found[n] = cache.memory[1].clone()
    return cache, found


@pytest.mark.parametrize(
    "cfg",
    [FULL, WINDOWED, NARROW, SHIFT, BOTH, DOCUMENTS],
    ids=["full", "windowed", "narrow", "shift", "both", "documents"],
)
def test_a_state_goes_on_from_its_marks_in_a_used_row(cfg):
    """With windows that have wrapped only the end is left; without, the earlier mark too."""
    model, ids = fixed(cfg), tokens(cfg, 1, 20)[0].tolist()
    cache, marks = taken_in(model, ids[:12], [5, 12])
    store = StateStore(10**6)
    store.add(MINE, ids[:12], cache, 1, marks)
    if cfg in (WINDOWED, NARROW):
        assert store.find(MINE, ids[:8]) == (None, 0)
    for prompt in (ids[:9], ids[:14]):
        kept, mark = store.find(MINE, prompt)
        if kept is None:
            continue
        assert mark == (12 if len(prompt) == 14 else 5)
        used, _ = taken_in(model, [3] * 17, [])  # a row that others have written into
        state = kept.into(used, 0, mark, cfg.bos)
        found = prefill(model, torch.tensor([prompt[mark:]]), cache=state.take(torch.tensor([0])), mode="exact")
        expected = prefill(model, torch.tensor([prompt]), mode="exact", capacity=40)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-10, rtol=1e-10)


def test_other_tokens_and_whole_prompts_find_nothing():
    model, ids = fixed(FULL), tokens(FULL, 1, 20)[0].tolist()
    cache, marks = taken_in(model, ids[:12], [12])
    store = StateStore(10**6)
    store.add(MINE, ids[:12], cache, 1, marks)
    assert store.find(MINE, ids[:12]) == (None, 0)  # its last token must still be taken in, for its logits
    assert store.find(MINE, [*ids[:11], (ids[11] + 1) % 19, 3]) == (None, 0)
    assert store.find(MINE, ids[:13])[1] == 12


def test_longer_states_replace_their_beginnings_and_the_oldest_leave():
    model, ids = fixed(FULL), tokens(FULL, 1, 20)[0].tolist()
    cache, marks = taken_in(model, ids[:6], [6])
    store = StateStore(10**6)
    store.add(MINE, ids[:6], cache, 1, marks)
    cache, marks = taken_in(model, ids[:12], [12])
    store.add(MINE, ids[:12], cache, 1, marks)
    assert len(store) == 1
    assert store.find(MINE, ids[:8])[1] == 6
    size = store.size
    small = StateStore(int(1.5 * size))
    for first in (1, 2):
        other = [first, *ids[1:12]]
        cache, marks = taken_in(model, other, [12])
        small.add(MINE, other, cache, 1, marks)
    assert len(small) == 1
    assert small.size <= small.limit
    assert small.find(MINE, [2, *ids[1:12], 4])[1] == 12
    nothing = StateStore(0)
    nothing.add(MINE, ids[:12], cache, 1, marks)
    assert len(nothing) == 0


def with_settings_of(tokenizer: Tokenizer, folder: Path) -> Vocabulary:
    """A vocabulary with the chat template that a folder holds."""
    tokenizer.config = read_tokenizer_config(folder, tokenizer.vocabulary(), tokenizer.specials)
    return Vocabulary(tokenizer)


def test_contents_never_spell_special_tokens_and_templates_do(tmp_path):
    tokenizer = train_bpe([WORDS * 20], 300)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[answer]"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    words = with_settings_of(tokenizer, tmp_path)
    ids, stop = words.conversation([{"role": "user", "content": "the <|bos|> fox"}])
    assert stop == ()
    assert ids.count(tokenizer.bos) == 1 and ids[0] == tokenizer.bos
    assert tokenizer.decode(ids) == "[user]the <|bos|> fox\n[answer]"
    refusing = "{{ raise_exception('no system messages') }}"
    (tmp_path / "chat_template.jinja").write_text(refusing, encoding="utf-8")
    with pytest.raises(ValueError, match="no system messages"):
        with_settings_of(tokenizer, tmp_path).conversation([{"role": "system", "content": "x"}])


def test_bytes_that_are_no_text_are_spelled_and_offsets_count_characters():
    words = Vocabulary(ByteTokenizer())
    listed = Listing(words).completion([(i, -1.0, ((i, -1.0),)) for i in [97, *"é".encode(), 98]])
    assert listed["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert listed["text_offset"] == [0, 1, 1, 2]
    assert listed["top_logprobs"][1] == {"bytes:\\xc3": -1.0}
    assert words.spell(256) == "<|bos|>"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert bytes(words.conversation(talk)[0][1:]) == b"USER: a\nBOT: b\nUSER: c\nBOT:"


def test_a_scope_finds_its_own_states_alone():
    model, ids = fixed(FULL), tokens(FULL, 1, 20)[0].tolist()
    cache, marks = taken_in(model, ids[:12], [12])
    store = StateStore(10**6)
    store.add(b"one", ids[:12], cache, 1, marks)
    assert store.find(b"one", ids[:13])[1] == 12
    assert store.find(b"two", ids[:13]) == (None, 0)
    store.add(b"two", ids[:12], cache, 1, marks)
    assert len(store) == 2  # what another scope holds is not replaced


def test_branches_share_a_beginning_and_it_outlives_one_of_them():
    model, ids = fixed(FULL), tokens(FULL, 1, 20)[0].tolist()
    store, branches = StateStore(10**6), [[*ids[:8], 1, 2, 3], [*ids[:8], 4, 5, 6]]
    for branch in branches:
        cache, marks = taken_in(model, branch, [8, 11])
        store.add(MINE, branch, cache, 1, marks)
    assert len(store) == 2 and store.find(MINE, [*ids[:8], 7])[1] == 8
    store._drop(next(reversed(store._kept)))
    assert store.find(MINE, [*ids[:8], 7])[1] == 8
    store._drop(next(iter(store._kept)))
    assert store.find(MINE, [*ids[:8], 7]) == (None, 0)
    assert (store.size, store._holders, store._digests, store._sorted) == (0, {}, {}, [])


@pytest.mark.slow
def test_the_bytes_counted_are_the_bytes_held_and_finding_one_among_many_is_quick():
    """Among 148,000 small states; in a process of its own, so that no other memory is reused."""
    code = """
import gc, time, psutil, torch
from helpers import config, fixed
from lrt.model.kv_cache import KVCache
from lrt.serve.states import StateStore
model = fixed(config(window_pattern="L"))
cache, store, n = KVCache.empty(model, 1, 40), StateStore(2**34), 148_000
memory = cache.memory[0].clone()
def rss():
    gc.collect()
    return psutil.Process().memory_info().rss
store.add(b"", [1, 2], cache, 0, {2: memory})
before, counted = rss(), store.size
for i in range(n):
    store.add(b"", [i % 19, i // 19 % 19, i // 361 % 19, i // 6859 % 19, i // 130321, 7, 8, 9], cache, 0, {8: memory})
held, counted = rss() - before, store.size - counted
begin = time.perf_counter()
for i in range(100):
    assert store.find(b"", [i % 19, i // 19 % 19, 0, 0, 0, 7, 8, 9, 3])[1] == 8
print(held, counted, (time.perf_counter() - begin) / 100)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600,
                           cwd=Path(__file__).parent.parent)  # fmt: skip
    held, counted, seconds = map(float, found.stdout.split())
    print(
        f"{held / 148_000:.0f} bytes a state held, {counted / 148_000:.0f} counted, {1e3 * seconds:.3f} ms to find one"
    )
    assert 0.75 < held / counted < 1.25
    assert seconds < 0.005
