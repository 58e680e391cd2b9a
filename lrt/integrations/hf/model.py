"""LRT in transformers: its classes around the core's one forward; solving, stepping and the loss are the core's too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from lrt.config.decoding import PrefillOptions
from lrt.config.model import require
from lrt.inference.prefill import solve
from lrt.integrations.hf.cache import Layer, memory_layer, order, pick, places, state_of, take_back
from lrt.integrations.hf.config import LRTConfig
from lrt.model.loss import IGNORE, ScheduledLoss
from lrt.model.shapes import StreamBND, TokensBN
from lrt.model.state import Past
from lrt.model.transformer import LRT
from lrt.schedule import Curriculum

"""Positions that a prefill solves at a time, and the sweeps it may take before it goes on token by token."""


class LRTPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config: LRTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = LRTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _is_stateful = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["LRT"]  # noqa: RUF012 - the library's own type
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the weights that were not loaded, by the core's own table; on the meta device there are none yet."""
        for core in (module for module in self.modules() if isinstance(module, LRT) and module.device.type != "meta"):
            fresh = [(n, p) for n, p in core.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
            drawn = LRT.build(core.config, core.device, self.config.seed) if fresh else core
            for name, p in fresh:
                p.copy_(drawn.get_parameter(name))
                p._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] - the library's own mark

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Keep only the inputs of blocks for the backward pass: the core's own recomputation."""
        self._recompute(True)

    def gradient_checkpointing_disable(self) -> None:
        self._recompute(False)

    def _recompute(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, LRT):
                module.execution = replace(module.execution, recompute=on)


class LRTModel(LRTPreTrainedModel):
    """The backbone: tokens to the head's input, with memory."""

    def __init__(self, config: LRTConfig):
        super().__init__(config)
        self.core = LRT(config.model_config())
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.core.embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: TokensBN | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The states of the last block, normalised.

        Args:
            input_ids: int64 [B, N].
            attention_mask: [B, M] of the tokens so far and these, 0 where there is padding; None: no padding.
            position_ids: checked, not needed: the mask implies them.
            past_key_values: a cache built from this configuration.

        Raises:
            ValueError: what this model does not compute, such as embeddings as input, or packed documents.
        """
        input_ids = _accepted(input_ids, attention_mask, kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = DynamicCache(config=self.config) if use_cache and past_key_values is None else past_key_values
        layer = None if cache is None else memory_layer(cache, self.core.config.layers)
        if cache is not None and layer is not None and layer.m is not None and input_ids.shape[1] == 1:
            hidden = self._step(input_ids, attention_mask, cache)
        else:
            hidden = self._prefill(input_ids, attention_mask, position_ids, cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache if use_cache else None)  # pyright: ignore[reportArgumentType]

    def _step(self, tokens: TokensBN, mask: Tensor | None, cache: Cache) -> StreamBND:
        """One token per row on top of the cache: tensors in and out, so that it can be compiled."""
        layer = memory_layer(cache, self.core.config.layers)
        seen = cache.get_seq_length()
        if mask is None:
            slots = cache.get_max_length() if cache.is_compileable else seen + 1
            keys = torch.arange(slots, device=tokens.device)
            queries = torch.zeros(1, dtype=torch.int64, device=tokens.device) + seen
        else:
            keys = places(mask)
            queries = mask.long().sum(1, keepdim=True) - 1
        past = Past(queries, False, [Layer(one, keys) for one in cache.layers])
        assert layer.m is not None and layer.last_token is not None
        memory = None if self.config.prefill == "zero_memory" else layer.m[:, None]
        written = self.core(tokens, past, memory, self.core.starts(tokens), layer.last_token[:, None])
        layer.keep(written.source[:, 0], tokens[:, 0])
        assert written.hidden is not None
        return written.hidden

    def _prefill(
        self, tokens: TokensBN, mask: Tensor | None, positions: Tensor | None, cache: Cache | None
    ) -> StreamBND:
        """Several tokens per row, by the configured mode; rows may be padded on either side."""
        used = 0 if cache is None else int(cache.get_seq_length())
        rows, n = tokens.shape
        mask = torch.ones(rows, used + n, device=tokens.device) if mask is None else mask
        wide = f"the attention_mask has {mask.shape[1]} columns for {used + n} tokens so far; give one a token"
        require(mask.shape[1] >= used + n, wide)
        before, new = mask[:, :used].bool(), mask[:, used : used + n].bool()
        _check_positions(positions, mask[:, : used + n], n)
        state = state_of(cache, self.core.config, before, n, self.core.embedding.weight)
        index, length = order(new), state.length
        right = tokens.gather(1, index)  # padded on the right, as the core has it
        if self.config.prefill == "zero_memory":
            hidden, state = self._without_memory(right, new.sum(1), state)
        else:
            hidden, state = self._solved(right, new.sum(1), state)
        if cache is not None:
            take_back(cache, state, length, new)
        return pick(hidden, index.argsort(dim=1), 1)

    @torch.no_grad()
    def _solved(self, tokens: TokensBN, count: Tensor, state: Any) -> tuple[StreamBND, Any]:
        mode = "exact" if self.config.prefill == "exact" else self.config.prefill_mode
        plan, hidden = PrefillOptions.parse(mode, self.config.prefill_tolerance), []
        for _, solved in solve(self.core, tokens, count, state, plan):
            hidden, state = [*hidden, solved.hidden], solved.cache
        return torch.cat(hidden, dim=1), state

    def _without_memory(self, tokens: TokensBN, count: Tensor, state: Any) -> tuple[StreamBND, Any]:
        """One parallel pass of the plain transformer; the only forward of a whole sequence that carries a gradient."""
        full, buffer = range(tokens.shape[1]), state.buffer()
        past = buffer.past(full, self.core.config.layers, tokens.device)
        previous = buffer.previous_tokens(tokens)
        written = self.core(tokens, past, None, self.core.starts(tokens), previous)
        rows = torch.arange(len(tokens), device=tokens.device)
        with torch.no_grad():
            state = state.commit(buffer.write(full, written).detach(), tokens, rows, count)
        return written.hidden, state


class LRTForCausalLM(LRTPreTrainedModel, GenerationMixin):
    """The language model. In train mode, labels give the loss of the configured schedule."""

    def __init__(self, config: LRTConfig):
        super().__init__(config)
        self.model = LRTModel(config)
        self.steps = 0
        """Forwards in train mode so far: what the schedule's ranges are drawn from."""
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.core.embedding

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.model.core.head

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache, **kwargs: Any
    ) -> Tensor | None:
        """The padding mask itself, as wide as a static cache: every step then has the same shapes."""
        if attention_mask is None:
            return None
        return torch.nn.functional.pad(attention_mask, (0, past_key_values.get_max_length() - attention_mask.shape[1]))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: its paged cache has no place for the memory of rows that come and go."""
        raise ValueError("LRT has no continuous batching in transformers: use generate, or the server of this package")

    @can_return_tuple
    def forward(
        self,
        input_ids: TokensBN | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: TokensBN | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, N, V] by the configured prefill mode, and a loss where there are labels.

        In eval mode the loss is that of the logits. In train mode it is the schedule's, over rows padded on the right,
        and there are no logits: several passes make several.
        """
        if self.training and labels is not None:
            require(past_key_values is None, "a training forward takes no past_key_values; leave them out")
            ids = _accepted(input_ids, attention_mask, kwargs)
            loss = self._scheduled(ids, attention_mask, position_ids, labels, kwargs.get("num_items_in_batch"))
            return CausalLMOutputWithPast(loss=loss)  # pyright: ignore[reportArgumentType]
        if self.training and torch.is_grad_enabled() and self.config.prefill != "zero_memory":
            raise ValueError("in train mode give labels (the schedule's loss), or set config.prefill to zero_memory")
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = out.last_hidden_state
        logits = self.model.core.logits(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)  # pyright: ignore[reportArgumentType]

    def _scheduled(
        self, ids: TokensBN, mask: Tensor | None, positions: Tensor | None, labels: TokensBN, items: Any
    ) -> Tensor:
        if mask is not None:
            require(bool((mask[:, 1:] <= mask[:, :-1]).all()), "training rows must be padded on the right")
            labels = labels.masked_fill(mask == 0, IGNORE)
        _check_positions(positions, torch.ones_like(ids) if mask is None else mask, ids.shape[1])
        loss = ScheduledLoss(self.model.core, Curriculum.parse(self.config.schedule).stages[-1][0], self.config.seed)
        targets, step = labels[:, 1:].contiguous(), self.steps
        self.steps += 1
        found = loss(ids[:, :-1], targets, None, step).loss
        return found if items is None else found * (targets != IGNORE).sum() / items


def _accepted(ids: TokensBN | None, mask: Tensor | None, options: dict[str, Any]) -> TokensBN:
    """The tokens. ValueError: inputs or outputs that this model does not have."""
    wanted = [name for name in ("output_hidden_states", "output_attentions") if options.get(name)]
    given = options.get("inputs_embeds")
    require(given is None and ids is not None, "LRT takes input_ids, not inputs_embeds: blocks look tokens up")
    require(not wanted, f"LRT does not return {', '.join(wanted)}: a forward may run every block many times")
    shape = None if mask is None else mask.dim()
    require(shape in (None, 2), f"LRT takes a padding mask of 2 axes, not {shape}")
    assert ids is not None
    return ids


def _check_positions(positions: Tensor | None, mask: Tensor, n: int) -> None:
    """ValueError: positions other than those the mask implies, such as packed documents."""
    if positions is not None:
        implied = places(mask)[:, -n:]
        real = mask[:, -n:].bool()
        same = (positions.expand_as(implied) == implied) | ~real
        packed = "position_ids must count each row's tokens from 0: several documents in a row are told by their BOS"
        require(bool(same.all()), packed)
