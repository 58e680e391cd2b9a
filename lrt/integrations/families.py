"""Other families' checkpoints: which of their settings are which options of ours, and which weight is which.

Rotary embeddings turn the other way there; exchanging the halves of each head's channels in queries and keys (rows of
their matrices, biases, weights of their norms) makes the two conventions equal, so the model needs no option for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from lrt.config.model import MEMORY_OFF, BackboneConfig, Biases, ModelConfig, RopeScaling
from lrt.config.run import to_dict
from lrt.utils.files import require_fields, require_kind
from lrt.utils.require import require

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What checkpoints of one `model_type` are like."""

    architecture: str
    learned_qk: bool = False
    """RMSNorm with weights of queries and keys, before RoPE."""
    biases: Literal["flags", "flag", "qkv"] = "flag"
    """Biases by `attention_bias` and `mlp_bias`, by `attention_bias` alone, or of query, key and value always."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", biases="flags"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biases="qkv"),
    "qwen3": Family("Qwen3ForCausalLM", learned_qk=True),
}

_BLOCK = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp.glu": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_TURNED = ("attention.query", "attention.key", "attention.query_norm", "attention.key_norm")


def model_config(facts: Facts, bos: int | None = None) -> ModelConfig:
    """The `ModelConfig`, without memory, of a checkpoint whose config.json holds `facts`.

    ValueError: an unknown family, or a setting that this backbone does not have; the message names it.
    """
    kind = facts.get("model_type")
    supported = isinstance(kind, str) and kind in FAMILIES
    require(supported, f"model_type {kind!r} is not among the families that can be imported: {', '.join(FAMILIES)}")
    _refuse(facts)
    family, heads, letter = FAMILIES[str(kind)], _number(facts, "num_attention_heads"), "S" if _windowed(facts) else "L"
    theta, rope = _rope(facts)
    qwen = 128 if family.learned_qk else None  # the width that family's configuration implies where it names none
    backbone = BackboneConfig(
        head_width=_value(facts, "head_dim", int, qwen),
        mlp="swiglu",
        mlp_width=_number(facts, "intermediate_size"),
        tied=_value(facts, "tie_word_embeddings", bool, False),
        biases=_biases(family, facts),
        norm_weights=True,
        norm_eps=_value(facts, "rms_norm_eps", float, 1e-6),
        embedding_norm=False,
        qk_norm="before" if family.learned_qk else "none",
        rope=rope,
    )
    return ModelConfig(
        depth=_number(facts, "num_hidden_layers"), width=_number(facts, "hidden_size"), heads=heads,
        kv_heads=_value(facts, "num_key_value_heads", int, heads), bos=bos, vocab_size=_number(facts, "vocab_size"),
        context=_value(facts, "max_position_embeddings", int, 2048), residual_scalars=False, softcap=None,
        window_pattern=letter, last_layer=letter, window=facts["sliding_window"] if letter == "S" else None,
        rope_theta=theta, memory=MEMORY_OFF, backbone=backbone,
    )  # fmt: skip


def _value(facts: Facts, name: str, kind: type, default: Any) -> Any:
    """A setting of the `kind`; the default where it is absent or null. ValueError: it is of another kind."""
    return default if facts.get(name) is None else require_kind(facts[name], kind, f"config.json: {name}")


def _number(facts: Facts, name: str) -> int:
    """A whole number that must be there."""
    require_fields(facts, {name: int}, "config.json")
    return facts[name]


def family_config(kind: str, config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config` as a checkpoint of the family `kind`.

    ValueError: the model has something that the family has not; the message names the fields.
    """
    require(kind in FAMILIES, f"family {kind!r} is unknown; choose one of {', '.join(FAMILIES)}")
    back, family, rope = config.backbone, FAMILIES[kind], config.backbone.rope
    scaling: dict[str, Any] = {"rope_type": "default" if rope.kind == "none" else rope.kind}
    if rope.kind != "none":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low,
            "high_freq_factor": rope.high,
            "original_max_position_embeddings": rope.original,
        }
    facts = {
        "architectures": [family.architecture], "model_type": kind, "hidden_act": "silu", "dtype": "float32",
        "num_hidden_layers": config.depth, "hidden_size": config.d, "num_attention_heads": config.h,
        "num_key_value_heads": config.k, "head_dim": config.e, "max_position_embeddings": config.context,
        "vocab_size": config.vocab_size, "intermediate_size": config.mlp_width, "rms_norm_eps": back.norm_eps,
        "tie_word_embeddings": back.tied, "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "bos_token_id": config.bos, "eos_token_id": config.bos,
        "sliding_window": config.windows()[-1] if kind == "mistral" else None,
    }  # fmt: skip
    if family.biases != "qkv":
        facts["attention_bias"] = back.biases in ("attention", "all")
    if family.biases == "flags":
        facts["mlp_bias"] = back.biases == "all"
    differing = _differing(_spelt_out(config), _spelt_out(model_config(facts, config.bos)))
    require(not differing, f"a {kind} checkpoint cannot hold this model's {', '.join(differing)}; use --to hf")
    return facts


def imported(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights from a family's, by name. ValueError: one is missing or has no place here."""
    names = _names(config)
    expected, ignored = set(names.values()), {"lm_head.weight"} if config.backbone.tied else set()
    for name in sorted((expected ^ weights.keys()) - ignored):
        verb = "lacks" if name in expected else "also holds"
        require(name.endswith("inv_freq"), f"the checkpoint {verb} the weight {name}, unlike its config.json says")
    for ours, theirs in names.items():
        rows, turned = weights[theirs].shape[:1], ours.rpartition(".")[0].endswith(_TURNED)
        fits = bool(rows) and (not turned or rows[0] % config.e == 0)
        require(
            fits, f"the checkpoint's {theirs} has the shape {[*weights[theirs].shape]}, unlike its config.json says"
        )
    return {ours: _turned(ours, weights[theirs], config) for ours, theirs in names.items()}


def exported(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A family's weights from ours, by name; memory parameters have no counterpart and must not be there."""
    return {theirs: _turned(ours, weights[ours], config) for ours, theirs in _names(config).items()}


def _names(config: ModelConfig) -> dict[str, str]:
    """Our weight names to the family's."""
    back = config.backbone
    parts = [name for name in _BLOCK if back.qk_norm == "before" or name not in _TURNED[2:]]
    biased = {
        "none": (),
        "qkv": ("attention.query", "attention.key", "attention.value"),
        "attention": [name for name in parts if name.startswith("attention.") and not name.endswith("norm")],
        "all": [name for name in parts if not name.endswith("norm")],
    }[back.biases]
    names = {f"{k}.weight": f"{v}.weight" for k, v in _OUTER.items() if k != "head" or not back.tied}
    for i in range(config.depth):
        for part in parts:
            for kind in ("weight", "bias") if part in biased else ("weight",):
                names[f"blocks.{i}.{part}.{kind}"] = f"model.layers.{i}.{_BLOCK[part]}.{kind}"
    return names


def _turned(name: str, x: Tensor, config: ModelConfig) -> Tensor:
    """Exchange the halves of each head's channels where the weight meets RoPE; twice is the identity."""
    if not name.rpartition(".")[0].endswith(_TURNED):
        return x
    return x.unflatten(0, (-1, 2, config.e // 2)).flip(1).flatten(0, 2).contiguous()


def _biases(family: Family, facts: Facts) -> Biases:
    if family.biases == "qkv":
        return "qkv"
    attention, mlp = (_value(facts, name, bool, False) for name in ("attention_bias", "mlp_bias"))
    mlp = mlp and family.biases == "flags"
    require(attention or not mlp, "mlp_bias without attention_bias has no counterpart here")
    return "all" if mlp else "attention" if attention else "none"


def _rope(facts: Facts) -> tuple[float, RopeScaling]:
    """Base and scaling of RoPE, from either form in which config.json holds them."""
    scaling = _value(facts, "rope_parameters", dict, {}) or _value(facts, "rope_scaling", dict, {})
    theta = _value(scaling, "rope_theta", float, None) or _value(facts, "rope_theta", float, 10_000.0)
    kind = _value(scaling, "rope_type", str, None) or _value(scaling, "type", str, "default")
    require(kind in ("default", "linear", "llama3"), f"rope_type {kind!r} is not supported: only linear and llama3")
    if kind == "default":
        return theta, RopeScaling()
    names = ("factor",) if kind == "linear" else ("factor", *_LLAMA3)
    require_fields(scaling, dict.fromkeys(names, float), "config.json: rope_parameters")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=scaling["factor"])
    low, high, original = (scaling[name] for name in _LLAMA3)
    return theta, RopeScaling(kind="llama3", factor=scaling["factor"], low=low, high=high, original=int(original))


_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _refuse(facts: Facts) -> None:
    """Raise ValueError for settings whose function this backbone does not compute."""
    for name, fine in (
        ("hidden_act", facts.get("hidden_act", "silu") in ("silu", "swish")),
        ("quantization_config", facts.get("quantization_config") is None),
        ("sliding_window", not _windowed(facts) or facts["model_type"] == "mistral"),
        ("partial_rotary_factor", facts.get("partial_rotary_factor", 1) == 1),
    ):
        require(fine, f"{name} {facts.get(name)!r} of this checkpoint is not supported; its function would change")


def _windowed(facts: Facts) -> bool:
    """Whether layers see less than the context: all of them in mistral, some in others."""
    windows = _value(facts, "use_sliding_window", bool, facts.get("model_type") == "mistral")
    context = _value(facts, "max_position_embeddings", int, 0)
    return windows and 0 < _value(facts, "sliding_window", int, 0) < context


def _spelt_out(config: ModelConfig) -> ModelConfig:
    """The same model with the numbers that other fields imply written out."""
    back = replace(config.backbone, head_width=config.e, mlp_width=config.mlp_width)
    windows = config.windows()
    letters = "".join("L" if window is None else "S" for window in windows)
    return replace(
        config, width=config.d, heads=config.h, kv_heads=config.k, window_pattern=letters,
        window=next(filter(None, windows), None), backbone=back,
    )  # fmt: skip


def _differing(a: ModelConfig, b: ModelConfig) -> list[str]:
    left, right = to_dict(a), to_dict(b)
    return [name for name in left if left[name] != right[name]]
