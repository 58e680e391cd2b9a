"""Other families: logits against transformers' own implementation, decoding against its generate, and the way back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrt.cli.main import main
from lrt.config.conversion import Conversion
from lrt.config.decoding import SamplingParams
from lrt.config.model import MEMORY_OFF, MemoryConfig
from lrt.config.recipes import LRT_SCHEDULE
from lrt.data.tokenizer import train_bpe
from lrt.inference.generate import generate, score
from lrt.inference.prefill import prefill
from lrt.integrations import families
from lrt.integrations.convert import _weights, add_memory, convert, save_family
from lrt.model.lrt import LRT
from lrt.training.checkpoint import load_model

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "llama": ("llama", {"rms_norm_eps": 1e-3}),
    "llama 3, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear rope, wide heads": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}, "head_dim": 16},
    ),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral-windows": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3, tied, biases": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
}
every = pytest.mark.parametrize("case", CASES)


def theirs(case: str, dtype: torch.dtype = torch.float32):
    """A small random model of the library's own, every parameter drawn."""
    kind, options = CASES[case]
    settings = transformers.AutoConfig.for_model(kind, **SMALL | options, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(settings).to(dtype).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = 0.6 if p.ndim == 1 or "embed" in name else 1.2 / p.shape[1] ** 0.5
            p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64) * wide + 0.4 * (p.ndim == 1))
    return model


def ours(model, memory: MemoryConfig = MEMORY_OFF) -> LRT:
    cfg = replace(families.model_config(model.config.to_dict(), bos=0), memory=memory)
    made = LRT(cfg).to(model.dtype).eval()
    state = {k: v for k, v in model.state_dict().items() if not (cfg.backbone.tied and k == "lm_head.weight")}
    add_memory(made, families.imported(state, cfg), "zero", 0.0, 0)
    return made


def text(rows: int = 3, length: int = 40) -> Tensor:
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(2))


def logits_of(model: LRT, ids: Tensor) -> Tensor:
    from lrt.model.run_passes import run_passes
    from lrt.passes import Pass

    with torch.no_grad():
        return model.logits(next(run_passes(model, ids, [Pass(range(ids.shape[1]))], model.starts(ids)))[1].hidden)


@every
def test_logits_are_those_of_transformers(case: str):
    model, ids = theirs(case), text()
    expected = model(ids).logits.detach()
    assert expected.std() > 0.3
    assert (logits_of(ours(model), ids) - expected).abs().max() < 1e-5


@every
def test_in_float64_they_agree_to_rounding(case: str):
    """Rotary angles are float32 in transformers whatever the model's type, and so is the softmax of some families."""
    model, ids = theirs(case, torch.float64), text()
    assert (logits_of(ours(model), ids) - model(ids).logits.detach()).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["llama 3, tied", "qwen3", "qwen2"])
@pytest.mark.parametrize("memory", [MEMORY_OFF, MemoryConfig(), MemoryConfig(projection="shared", source=2)])
def test_greedy_decoding_is_transformers_generate(case: str, memory: MemoryConfig):
    """With memory added at zero too: exact prefill, cached steps."""
    model, ids = theirs(case), text(2, 9)
    mine = ours(model, memory)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
    laws = SamplingParams(max_new_tokens=20, temperature=0, stop_tokens=())
    for mode in ("exact", "interleaved-4"):
        steps = list(generate(mine, ids.tolist(), laws, mode=mode))
        assert torch.tensor([[e.token for e in s.emissions] for s in steps]).T.equal(expected)


@every
def test_memory_at_zero_changes_no_bit(case: str):
    model, ids = theirs(case), text()
    plain, zero = ours(model), ours(model, MemoryConfig())
    expected = score(plain, ids[:, :-1], ids[:, 1:], mode="exact").nats
    assert (score(zero, ids[:, :-1], ids[:, 1:], mode="exact").nats - expected).abs().max() < 1e-6
    assert prefill(zero, ids).effort.sweeps >= 1
    for name, p in zero.named_parameters():  # and yet all that reads memory can learn
        p.requires_grad_(name.endswith(("gamma", "projection.key.weight")))
    from lrt.model.loss import ScheduledLoss
    from lrt.schedule import Schedule

    ScheduledLoss(zero, Schedule.parse("settled-1"))(ids[:, :-1], ids[:, 1:]).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in zero.parameters() if p.requires_grad)


@pytest.mark.parametrize("start", ["small", "copy"])
@pytest.mark.parametrize("projection", ["shared", "layerwise"])
def test_other_starts_are_near(start, projection):
    model, ids = theirs("llama"), text()
    memory = MemoryConfig(projection=projection)
    far, near = (ours(model, memory) for _ in range(2))
    cfg = far.config
    weights = families.imported(model.state_dict(), cfg)
    for made, scale in ((far, 0.3), (near, 1e-4)):
        add_memory(made, weights, start, scale, 0)
    plain = score(ours(model), ids[:, :-1], ids[:, 1:], mode="exact").nats
    moved = [(score(m, ids[:, :-1], ids[:, 1:], mode="exact").nats - plain).abs().max() for m in (far, near)]
    assert moved[0] > 0.1
    assert 0 < moved[1] < 0.05
    assert all(p.abs().max() > 0 for name, p in far.named_parameters() if "projection." in name or "gamma" in name)


# Folders.


@pytest.fixture(scope="module")
def words():
    return train_bpe(["the quick brown fox jumps over the lazy dog"] * 20, 280)


def saved(case: str, folder: Path, words) -> Path:
    theirs(case).save_pretrained(folder)
    words.save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize("case", ["llama 3, tied", "qwen2", "qwen3"])
def test_a_folder_becomes_a_run_and_a_folder_again(case: str, tmp_path: Path, words, capsys):
    source, run, back = (tmp_path / name for name in ("source", "run", "back"))
    saved(case, source, words)
    assert main(["convert", str(source), "--out", str(run)]) == 0
    loaded = load_model(run)
    ids = text() % 280
    ids[:, 0] = loaded.tokenizer.bos
    expected = theirs(case)(ids).logits
    assert (logits_of(loaded.model, ids) - expected).abs().max() < 1e-5
    assert loaded.model.config.bos == words.bos
    assert (run / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
    save_family(load_model(run), back, CASES[case][0])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert (again(ids).logits - expected).abs().max() < 1e-6


def test_training_goes_on_from_it(tmp_path: Path, words, capsys):
    source, run, more = (tmp_path / name for name in ("source", "run", "more"))
    saved("llama 3, tied", source, words)
    convert(source, run, Conversion(memory="shared"))
    book = tmp_path / "book.txt"
    book.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    few = ["--train.batch", "2", "--train.length", "16", "--train.eval-rows", "2", "--train.device", "cpu"]
    data = ["--data.source", str(book), "--data.folder", str(tmp_path / "data"), "--data.validation", "0.2"]
    goal = ["--train.horizon", "steps=3", "--train.schedule", "interleaved-2"]
    assert main(["train", "--init-from", str(run), "--out", str(more), *few, *data, *goal]) == 0
    before, after = load_model(run).model, load_model(more)
    assert after.model.config == before.config
    assert after.model.config.vocab_size == after.tokenizer.vocab_size == 300 > words.vocab_size
    assert after.config.train.init_from == str(run)
    assert json.loads((more / "config.json").read_text())["model"]["memory"]["projection"] == "shared"
    moved = [(p - dict(before.named_parameters())[n]).abs().max() for n, p in after.model.named_parameters()]
    assert 0 < max(moved) < 1
    assert main(["train", "--resume", str(more)]) == 0
    with pytest.raises(ValueError, match="uses its memory"):
        save_family(load_model(more), tmp_path / "no", "llama")
    again = ["train", "--init-from", str(more), "--out", str(tmp_path / "again"), *few, *data]
    assert main([*again, "--train.horizon", "steps=1"]) == 0
    assert load_model(tmp_path / "again").config.train.schedule == LRT_SCHEDULE.rpartition(",")[2]


def test_a_model_of_ours_gains_memory(tmp_path: Path, words):
    source, plain, late = (tmp_path / name for name in ("source", "plain", "late"))
    saved("llama", source, words)
    convert(source, plain)
    convert(plain, late, Conversion(memory="layerwise", memory_source=2, start="copy"))
    cfg = load_model(late).model.config
    assert (cfg.memory.projection, cfg.source) == ("layerwise", 2)
    for options, words_ in (
        ({"memory": "shared"}, "already has memory"), ({}, "exists; remove it"), ({"context": 0}, "at least 1 token")
    ):  # fmt: skip
        out = late if "exists" in words_ else tmp_path / "other"
        with pytest.raises(ValueError, match=words_):
            convert(late, out, Conversion(**options))


# Refusals.


@pytest.mark.parametrize(
    ("change", "words_"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"mlp_bias": True}, "mlp_bias"), ({"quantization_config": {}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window 8"),
    ],
)  # fmt: skip
def test_what_would_compute_something_else_is_refused(change: dict, words_: str):
    facts = transformers.AutoConfig.for_model("llama", **SMALL).to_dict()
    with pytest.raises(ValueError, match=words_):
        families.model_config(facts | change)


def test_weights_that_do_not_match_the_config_are_named():
    model = theirs("llama")
    cfg = families.model_config(model.config.to_dict())
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"lacks the weight model.norm.weight"):
        families.imported({k: v for k, v in state.items() if k != "model.norm.weight"}, cfg)
    with pytest.raises(ValueError, match=r"also holds the weight model.layers.0.self_attn.q_proj.bias"):
        families.imported(state | {"model.layers.0.self_attn.q_proj.bias": state["model.norm.weight"]}, cfg)


def test_a_window_that_the_context_implies_is_written_out():
    cfg = families.model_config(theirs("mistral-windows").config.to_dict())
    facts = families.family_config("mistral", replace(cfg, window=None, window_pattern="SS"))
    assert facts["sliding_window"] == cfg.context // 2
    with pytest.raises(ValueError, match=r"a llama checkpoint cannot hold this model's .*last_layer"):
        families.family_config("llama", cfg)


def test_a_family_refuses_what_it_has_not():
    from helpers import config

    with pytest.raises(ValueError, match=r"a llama checkpoint cannot hold this model's .*softcap.*backbone"):
        families.family_config("llama", replace(config(), memory=MEMORY_OFF))
    cfg = families.model_config(theirs("qwen3").config.to_dict())
    with pytest.raises(ValueError, match=r"a llama checkpoint cannot hold this model's backbone"):
        families.family_config("llama", cfg)


@pytest.mark.parametrize("names", [{"a": 1, "b": "x.safetensors"}, ["x"], None, {"a": None}, {"a": ["x"]}])
def test_an_index_of_other_kinds_is_one_line(names, tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: .* it must be"):
        _weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_codes_are_no_weights(dtype: torch.dtype, tmp_path: Path, words):
    """A quantised matrix means something with its scales alone; taken as numbers it would be another model."""
    folder = saved("llama", tmp_path / "theirs", words)
    weights, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: (weights[name] * 3).to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        convert(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_weight_in_two_files_is_refused(tmp_path: Path, words):
    folder = saved("llama", tmp_path / "theirs", words)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(ValueError, match="as another file does; keep one of them"):
        convert(folder, tmp_path / "run")


OPTIONAL = [
    "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "SHA256SUMS",
    "model.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_link_that_leads_nowhere_is_not_taken_for_a_file_that_is_missing(name: str, tmp_path: Path, words):
    """As a download that was broken off leaves them: what they say would be lost in silence."""
    folder = saved("llama", tmp_path / "theirs", words)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{name} does not exist; restore the file"):
        convert(folder, tmp_path / "run")
