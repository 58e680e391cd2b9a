"""GGUF files: read back, and run by llama.cpp where its Python package is at hand; what has no GGUF is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_families import CASES, logits_of, saved
from tokenizers import Regex, pre_tokenizers

from lrt.cli.main import main
from lrt.config.decoding import SamplingParams
from lrt.config.model import RopeScaling
from lrt.config.run import RunConfig, TrainConfig
from lrt.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, train_bpe
from lrt.inference.generate import generate
from lrt.integrations.convert import convert
from lrt.integrations.gguf_file import EXPRESSIONS, FILE, GPT2
from lrt.model.lrt import LRT
from lrt.training import checkpoint
from lrt.training.checkpoint import load_model

gguf = pytest.importorskip("gguf")
TEXTS = [
    "the quick brown fox, it's  12 x and we'll\n\n  see ٣٤ é漢字 🙂!?", "\t a  ", "I'M 'd", " \u3000x\u00a0y",
    "_a-b_12345c", "a\r\n\r\n  b\n", "", "\x00\x01 \x7f <|bos|> fox",
]  # fmt: skip


def cut_by(expression: str) -> BPETokenizer:
    """A small BPE that cuts text as another family does."""
    core = train_bpe(["the quick brown fox jumps 12345 over\n\nthe lazy dog"] * 20, 290).fast()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.model.ignore_merges = EXPRESSIONS[expression] == "llama-bpe"
    return BPETokenizer(core)


WORDS = {"bytes": ByteTokenizer, "bpe": lambda: train_bpe(["the quick brown fox"] * 20, 280)}
WORDS |= {name: lambda expression=expression: cut_by(expression) for expression, name in EXPRESSIONS.items()}
SHAPES = [(case, "bpe") for case in CASES if case not in ("mistral-windows", "qwen3, tied, biases")] + [
    ("llama", words) for words in WORDS
]


def run_of(case: str, words: Tokenizer, folder: Path) -> Path:
    """A run with the weights of a small random model of another family."""
    convert(saved(case, folder / "theirs", words), folder / "run")
    return folder / "run"


def exported(run: Path, out: Path):
    assert main(["export", str(run), str(out), "--to", "gguf"]) == 0
    return gguf.GGUFReader(out / FILE)


def test_the_file_holds_the_model_and_its_tokenizer(tmp_path: Path, capsys):
    run = run_of("llama 3, tied", train_bpe(["the quick brown fox"] * 20, 280), tmp_path)
    reader, loaded = exported(run, tmp_path / "out"), load_model(run)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    state = loaded.model.state_dict()
    assert torch.equal(tensors["token_embd.weight"], state["embedding.weight"]) and "output.weight" not in tensors
    assert torch.equal(tensors["blk.2.ffn_down.weight"], state["blocks.2.mlp.down.weight"])
    turned = tensors["blk.1.attn_q.weight"].unflatten(0, (4, 4, 2)).transpose(1, 2)  # 4 heads of 4 pairs
    assert torch.equal(turned.flip(1).flatten(0, 2), state["blocks.1.attention.query.weight"])
    assert tensors["rope_freqs.weight"].min() == 1 and tensors["rope_freqs.weight"].max() == 8
    read = {name: field.contents() for name, field in reader.fields.items()}
    words = loaded.tokenizer
    assert (read["general.architecture"], read["tokenizer.ggml.pre"]) == ("llama", "gpt-2")
    assert (
        read["tokenizer.ggml.tokens"][words.encode("the")[0]] == "the"
        and read["tokenizer.ggml.tokens"][299] == "[PAD299]"
    )
    assert read["tokenizer.ggml.token_type"][words.bos] == gguf.TokenType.CONTROL
    assert read["tokenizer.ggml.bos_token_id"] == words.bos and read["tokenizer.chat_template"] == "{{ messages }}"


def test_what_has_no_gguf_is_refused(tmp_path: Path, capsys):
    words = train_bpe(["the quick brown fox"] * 20, 280)
    run = run_of("qwen3", words, tmp_path)
    loaded = load_model(run)
    scaled = replace(
        loaded.model.config.backbone, rope=RopeScaling(kind="llama3", factor=8.0, low=1.0, high=4.0, original=32)
    )
    biased = replace(loaded.model.config.backbone, biases="attention")
    odd = cut_by(GPT2).fast()
    odd.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    cases = {
        "no rope scaling llama3 for a qwen3": (replace(loaded.model.config, backbone=scaled), words),
        "no biases of attention for a qwen3": (replace(loaded.model.config, backbone=biased), words),
        "cannot hold this model's .*softcap": (replace(loaded.model.config, softcap=15.0), words),
        "name known here for this BPE tokenizer": (loaded.model.config, BPETokenizer(odd)),
    }
    for i, (reason, (config, tokenizer)) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        tokenizer.save(folder / "tokenizer")
        checkpoint.save(
            folder, 0, RunConfig(model=config, train=TrainConfig(length=32)), LRT(config), {}, extra={}, keep=1
        )
        assert main(["export", str(folder), str(tmp_path / "no"), "--to", "gguf"]) == 2
        assert re.search(reason, capsys.readouterr().err)
        assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "words"), SHAPES)
def test_llama_cpp_computes_the_same(case: str, words: str, tmp_path: Path, capsys):
    """Tokens of texts, logits, and 30 greedy tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    run = run_of(case, WORDS[words](), tmp_path)
    exported(run, tmp_path / "out")
    loaded = load_model(run)
    model, tokenizer = loaded.model, loaded.tokenizer
    theirs = llama_cpp.Llama(
        str(tmp_path / "out" / FILE), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == [
            tokenizer.bos,
            *tokenizer.encode(text),
        ], text
    ids = [tokenizer.bos, *tokenizer.encode(TEXTS[0])][:30]
    theirs.eval(ids)
    expected = logits_of(model, torch.tensor([ids]))[0]
    assert (torch.from_numpy(theirs.scores[: len(ids)].copy()) - expected).abs().max() < 1e-4 * expected.std()
    theirs.reset()
    greedy = theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    answer = [token for token, _ in zip(greedy, range(30), strict=False)]
    steps = generate(model, [ids], SamplingParams(max_new_tokens=30, temperature=0, stop_tokens=()))
    assert answer == [emission.token for step in steps for emission in step.emissions]
    theirs.close()
