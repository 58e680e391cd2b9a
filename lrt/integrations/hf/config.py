"""The configuration that transformers sees: our `ModelConfig` in full, the usual names beside it, and the modes."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from lrt.config.decoding import DEFAULT_MODE, PrefillOptions
from lrt.config.model import ModelConfig
from lrt.config.run import from_dict, to_dict
from lrt.schedule import Curriculum
from lrt.utils.require import require

MEMORY_LAYER = "lrt_full_attention"
"""Type of the cache layer that holds the memory beside keys and values: the last one."""
PEFT_TARGETS = {
    f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING": ["query", "value"]
    for method in (
        "LORA", "ADALORA", "BOFT", "C3A", "DELORA", "DEFT", "GLORA", "HRA", "LOHA", "LOKR", "MISS", "OFT", "POLY",
        "RANDLORA", "ROAD", "SHIRA", "VBLORA", "VERA", "WAVEFT", "FOURIERFT", "BONE",
    )
} | {
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": ["key", "value", "down"],
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": ["down"],
}  # fmt: skip
"""What PEFT's methods adapt where they are not told: the memory's own value projections too, which have that name."""
PREFILLS = ("sweeps", "exact", "zero_memory")


@strict
class LRTConfig(PreTrainedConfig):
    """Configuration of `LRTForCausalLM`. `lrt` holds the model; everything else says how it is run."""

    model_type = "lrt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - a list, which the Trainer adds to
    auto_map = {}  # noqa: RUF012 - a plain dictionary, as the library has it
    """What code a folder brings; none unless an export says it. TRL asks every model that is not the library's own."""

    lrt: dict | None = None
    """`ModelConfig` as plain data; none means its defaults."""
    prefill: str = "sweeps"
    """How a forward over several tokens computes the recurrence: `sweeps`, `exact`, or `zero_memory`, which reads no
    memory anywhere, in later steps neither."""
    prefill_mode: str = DEFAULT_MODE
    """Which sweeps: jacobi or interleaved-G."""
    prefill_tolerance: float | None = None
    """Estimated relative error of the memory at which sweeps stop; none means prefill's own."""
    schedule: str = "settled-1..3"
    """Schedule of the loss in train mode; of several stages, the last."""
    seed: int = 0
    """Of the schedule's draws and of fresh weights."""
    training: dict | None = None
    """The run's training configuration, for the way back."""
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    final_logit_softcapping: float | None = None
    """What caps logits, by the name that others read who compute them from the head's input, as TRL does."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.fit(complete=False)
        self.max_position_embeddings = self.model_config().context
        super().__post_init__(**kwargs)

    def fit(self, complete: bool = True) -> None:
        """Have `lrt` follow the size of the vocabulary and a tied head where they were set here; no other number.

        ValueError: another number is not the model's. Unless all are `complete`, 0 and none are not told.
        """
        model = self.model_config()
        if self.vocab_size not in (0, model.vocab_size):
            bos = None if model.bos is None or model.bos >= self.vocab_size else model.bos
            model = replace(model, vocab_size=self.vocab_size, bos=bos)
        if self.tie_word_embeddings:
            model = replace(model, backbone=replace(model.backbone, tied=True))
        self.lrt = to_dict(model)
        for name, own in self._sizes(model).items():
            value = getattr(self, name)
            other = f"{name} is {value}, but the model's is {own}, by the field lrt: leave {name} out"
            require(value == own or (not complete and value in (0, None)), other)
            setattr(self, name, own)

    @staticmethod
    def _sizes(model: ModelConfig) -> dict[str, Any]:
        """What stands here a second time, by the names that others read."""
        return {
            "vocab_size": model.vocab_size, "hidden_size": model.d, "num_hidden_layers": model.layers,
            "num_attention_heads": model.h, "num_key_value_heads": model.k, "head_dim": model.e,
            "final_logit_softcapping": model.softcap,
        }  # fmt: skip

    def __setattr__(self, name: str, value: Any) -> None:
        """As the library has it. ValueError: no such mode or schedule; `from_pretrained` sets its options this way."""
        if name == "prefill":
            require(value in PREFILLS, f"prefill is {value!r}; choose one of {', '.join(PREFILLS)}")
        elif name == "prefill_mode":
            PrefillOptions.parse(str(value))
        elif name == "prefill_tolerance":
            PrefillOptions.parse(DEFAULT_MODE, value)
        elif name == "schedule":
            Curriculum.parse(str(value))
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """As the library has it. PEFT asks for this before it looks its default targets up: it is told ours then."""
        _tell_peft()
        return super().to_dict()

    def model_config(self) -> ModelConfig:
        """The model."""
        return from_dict(ModelConfig, self.lrt or {}, "lrt")

    @property
    def layer_types(self) -> list[str]:
        """Which cache layers to build. Not kept in config.json: readers without our code would refuse the last one."""
        return ["full_attention"] * (self.num_hidden_layers - 1) + [MEMORY_LAYER]

    def validate_layer_type(self) -> None:
        """Ours is not among the library's own types."""


def _tell_peft() -> None:
    """Enter the projections that adapters go to by default in PEFT's tables, where it has been imported."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants else ():
        if name in PEFT_TARGETS:
            table.setdefault("lrt", PEFT_TARGETS[name])
