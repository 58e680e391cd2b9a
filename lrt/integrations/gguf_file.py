"""GGUF: a plain model, and its tokenizer, as one file for llama.cpp and what is built on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt.config.model import RopeScaling
from lrt.data.tokenizer import Tokenizer
from lrt.inference.loaded import Loaded
from lrt.integrations.convert import family_checkpoint
from lrt.model.attention import slowed
from lrt.utils.require import require

FILE = "model.gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Families whose forward GGUF's readers have under the same name, the first that fits is taken."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NUMBERS_IN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The expression of two families, which differ in how many digits make a piece."""
EXPRESSIONS = {
    GPT2: "gpt-2",
    NUMBERS_IN.format(r"\p{N}{1,3}"): "llama-bpe",
    NUMBERS_IN.format(r"\p{N}"): "qwen2",
}
"""How a text is cut before merges, and the name that GGUF's readers know it by."""
WHOLE_WORDS = "llama-bpe"
"""There a piece that is a token stays whole, whatever merges say."""
UNKNOWN_CUT = (
    "GGUF names how a tokenizer cuts text, and has no name known here for {}; use --to {} and llama.cpp's own converter"
)


def save_gguf(loaded: Loaded, folder: Path) -> None:
    """Write a run's plain model as `folder`/model.gguf, in float32.

    ValueError: memory that acts, a shape or tokenizer that the format has no name for, or no package gguf.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ValueError("GGUF needs its package: pip install 'latent-recurrent-transformer[gguf]'") from None
    kind, facts, weights = _checkpoint(loaded)
    words = _words(loaded.tokenizer, facts, kind)
    folder.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(folder / FILE, kind)
    _write_shape(writer, facts)
    _write_words(writer, words, loaded.tokenizer, facts)
    for name, tensor in _tensors(weights, facts, kind, loaded.model.config.backbone.rope):
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _checkpoint(loaded: Loaded) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The first architecture that can hold the model, and the model as its checkpoint. ValueError: a Llama's reason."""
    back, reasons = loaded.model.config.backbone, []
    for kind in ARCHITECTURES:
        try:
            facts, weights = family_checkpoint(loaded, kind)
        except ValueError as error:
            reasons.append(error)
            continue
        lacking = {
            "rope scaling llama3": kind != "llama" and back.rope.kind == "llama3",
            "biases of attention": kind == "qwen3" and back.biases != "none",
        }
        named = [name for name, there in lacking.items() if there]
        require(not named, f"GGUF has no {' and no '.join(named)} for a {kind}; use --to {kind}")
        return kind, facts, weights
    raise reasons[0]


# The shape and the weights.


def _write_shape(writer: Any, facts: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    rope = facts["rope_parameters"]
    writer.add_file_type(0)  # all of it in float32
    writer.add_block_count(facts["num_hidden_layers"])
    writer.add_context_length(facts["max_position_embeddings"])
    writer.add_embedding_length(facts["hidden_size"])
    writer.add_feed_forward_length(facts["intermediate_size"])
    writer.add_head_count(facts["num_attention_heads"])
    writer.add_head_count_kv(facts["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(facts["head_dim"])
    writer.add_layer_norm_rms_eps(facts["rms_norm_eps"])
    writer.add_vocab_size(facts["vocab_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _tensors(
    weights: Mapping[str, Tensor], facts: Mapping[str, Any], kind: str, rope: RopeScaling
) -> list[tuple[str, Tensor]]:
    """The format's names, and weights as its readers turn them: pairs of neighbours in a Llama, halves in others."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], facts["num_hidden_layers"])
    tensors = []
    for name, weight in weights.items():
        turned = kind == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj"))
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None
        tensors.append((known, _paired(weight, facts["head_dim"]) if turned else weight))
    if rope.kind == "llama3":
        channels = torch.arange(0, facts["head_dim"], 2) / facts["head_dim"]
        speeds = facts["rope_parameters"]["rope_theta"] ** -channels
        tensors.append(("rope_freqs.weight", speeds / slowed(speeds, rope)))
    return tensors


def _paired(x: Tensor, width: int) -> Tensor:
    """Rows of each head, whose halves turn together, so that neighbours do."""
    return x.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2).contiguous()


# The tokenizer.


def _words(tokenizer: Tokenizer, facts: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """tokenizer.json, with the name of how it cuts text as `cut`. ValueError: there is none."""
    content = json.loads(tokenizer.fast().to_str())
    model = content["model"]
    expression = _expression(content)
    cut = EXPRESSIONS.get(expression or "")
    if model["type"] == "BPE" and not model["merges"] and expression is not None:
        cut = "gpt-2"  # where nothing is merged, cuts change nothing
    fits = model["type"] == "BPE" and cut is not None and not model.get("byte_fallback")
    fits = fits and bool(model.get("ignore_merges")) == (cut == WHOLE_WORDS)
    cutter = f"this {model['type']} tokenizer" if expression is None else f"the expression {expression[:60]!r}"
    require(fits, UNKNOWN_CUT.format(cutter, kind))
    return content | {"cut": cut}


def _expression(content: Mapping[str, Any]) -> str | None:
    """By which a byte-level tokenizer cuts text, empty where it does not; None: it is another kind of tokenizer."""
    first, normalizer = content["pre_tokenizer"] or {}, content["normalizer"]
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    last = steps[-1]
    plain = last.get("type") == "ByteLevel" and not last["add_prefix_space"]
    plain = plain and (normalizer is None or normalizer["type"] == "NFC")
    if not plain or len(steps) > 2:
        return None
    if len(steps) == 1:
        return GPT2 if last["use_regex"] else ""
    split = steps[0]
    isolates = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return split["pattern"].get("Regex") if isolates and not last["use_regex"] else None


def _write_words(writer: Any, content: Mapping[str, Any], tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
    from gguf import TokenType

    size, config = facts["vocab_size"], tokenizer.config
    texts = [f"[PAD{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    for text, i in content["model"]["vocab"].items():
        texts[i], kinds[i] = text, TokenType.NORMAL
    for added in content["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    bos = texts[tokenizer.bos]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(content["cut"])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [f"{bos} {bos}"])  # readers want some; BOS is never made of pieces
    ends = facts["eos_token_id"]
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    if isinstance(ends, list):
        writer.add_eot_token_id(ends[1])
    writer.add_add_bos_token(True)
    if config.chat_template is not None:
        writer.add_chat_template(config.chat_template)
