"""What both transformers classes share: weights, embeddings, recomputation, and what other libraries ask of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from lrt.config.run import to_dict
from lrt.integrations.hf.config import LRTConfig
from lrt.integrations.hf.embeds import value_embeddings
from lrt.model.blocks import Block, BlockContext
from lrt.model.lrt import LRT
from lrt.model.shapes import HeadsBKNE, StreamBND
from lrt.utils.checksums import SUMS, require_sums

MOVED = {r"(?<!counter\.)steps_done": "counter.steps_done"}
"""Tensors that have had another name, by expressions."""
AGAIN = partial(checkpoint, use_reentrant=False)


class RecomputedBlock(GradientCheckpointingLayer, Block):
    """A block that the library can have computed again for the backward pass."""

    def forward(self, x: StreamBND, context: BlockContext) -> tuple[StreamBND, HeadsBKNE, HeadsBKNE]:
        return Block.forward(self, x, context)


class TiedHead(nn.Module):
    """The head of a model whose head is its embedding, without weights of its own: what other libraries look for."""

    bias = None

    def __init__(self, core: LRT):
        super().__init__()
        self._core = (core,)  # no module of this one: its weights are the model's already

    @property
    def weight(self) -> Tensor:
        """[V, D], an adapter's part too."""
        return self._core[0].tied_head()

    def forward(self, hidden: StreamBND) -> Tensor:
        """Logits [.., V], not capped yet."""
        return F.linear(hidden, self.weight)


class LRTPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config: LRTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = LRTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecomputedBlock"]  # noqa: RUF012 - the library's own type
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"steps_done"]  # noqa: RUF012 - folders from before it was kept

    def __init__(self, config: LRTConfig):
        config.fit()
        super().__init__(config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library has it; of folders from before the count of steps moved, too.

        ValueError: weights or configuration of a folder are not what its checksums say.
        """
        folder = pretrained_model_name_or_path
        if folder is not None and Path(folder).is_dir():
            require_sums(Path(folder), lambda name: name == "config.json" or name.endswith(".safetensors"))
        mapping = MOVED | (key_mapping or {})
        loaded = super().from_pretrained(folder, *model_args, key_mapping=mapping, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        renamed = vars(model).get("_weight_conversions") or ()  # would be undone when the model is saved
        conversions = [one for one in renamed if not set(MOVED) & set(one.source_patterns)]
        vars(model)["_weight_conversions"] = conversions or None
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the library does; checksums of what lay there before are of that no more."""
        (Path(save_directory) / SUMS).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def inner(self) -> LRT:
        """The core's model."""
        (core,) = (module for module in self.modules() if isinstance(module, LRT))
        return core

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the weights that were not loaded, by the core's own table; on the meta device there are none yet."""
        for name, buffer in self.named_buffers():
            if name.endswith("steps_done") and not getattr(buffer, "_is_hf_initialized", False):
                buffer.zero_()
        for core in (module for module in self.modules() if isinstance(module, LRT) and module.device.type != "meta"):
            fresh = [(n, p) for n, p in core.named_parameters() if not _kept(core, n, p)]
            fresh_model = LRT(core.config, core.device, self.config.seed) if fresh else core
            for name, p in fresh:
                p.copy_(fresh_model.get_parameter(name))
                p._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] - the library's own mark

    # Recomputation.

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = AGAIN, every_n_layers: int = 1
    ) -> None:
        """As the library has it, of its kind of layer; blocks are given tensors in tuples, which no reentrant way sees.

        Values and gradients are those of the reentrant way.
        """
        checkpointing = gradient_checkpointing_func
        if isinstance(checkpointing, partial):
            checkpointing = partial(
                checkpointing.func, *checkpointing.args, **checkpointing.keywords | {"use_reentrant": False}
            )
        every = () if every_n_layers == 1 else (every_n_layers,)  # which older versions do not know
        super()._set_gradient_checkpointing(enable, checkpointing, *every)

    # Embeddings.

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.inner.embedding = value  # pyright: ignore[reportAttributeAccessIssue]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As the library does, value embeddings and the core's configuration too; they grow by their mean row."""
        resized = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        core, size = self.inner, len(resized.weight)
        if size != core.config.vocab_size:
            for table in value_embeddings(core):
                table.weight = nn.Parameter(_resized(table.weight.detach(), size), table.weight.requires_grad)
                table.num_embeddings = size
            bos = core.config.bos
            new_bos = None if bos is None or bos >= size else bos
            core.config = replace(core.config, vocab_size=size, bos=new_bos)
            self.config.lrt, self.config.vocab_size = to_dict(core.config), size
        return resized


def _kept(core: LRT, name: str, p: nn.Parameter) -> bool:
    """Whether the library has marked a parameter, or its module, as holding what it should."""
    module = core.get_submodule(name.rpartition(".")[0])
    return any(getattr(marked, "_is_hf_initialized", False) for marked in (p, module))


def _resized(weight: Tensor, size: int) -> Tensor:
    """The first `size` rows of `weight` [V, D], and its mean row beyond them."""
    rows = weight[:size]
    return torch.cat((rows, weight.mean(0, keepdim=True).expand(size - len(rows), -1).to(weight.dtype)))
