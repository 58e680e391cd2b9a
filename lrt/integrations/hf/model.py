"""LRT in transformers: its classes around the core's one forward; solving, stepping and the loss are the core's too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple
from transformers.utils.logging import get_logger

from lrt.integrations.hf.cache import require_goes_on
from lrt.integrations.hf.config import LRTConfig
from lrt.integrations.hf.documents import require_open_end
from lrt.integrations.hf.embeds import as_tokens
from lrt.integrations.hf.fold import Wanted
from lrt.integrations.hf.forward import Inputs, Outcome, by_schedule, decoded, free_to_look, is_step
from lrt.integrations.hf.objective import objective
from lrt.integrations.hf.pretrained import LRTPreTrainedModel, RecomputedBlock, TiedHead
from lrt.model.lrt import LRT
from lrt.model.recurrence import check_tokens
from lrt.model.shapes import StreamBND, TokensBN
from lrt.utils.compiling import being_exported, outside_graphs
from lrt.utils.require import require

OUTSIDE = ("labels", "shift_labels", "output_hidden_states", "output_attentions", "inputs_embeds")
"""Arguments of a forward that no graph takes in."""
UNTRACED = (
    "a whole sequence takes as many sweeps or passes as its values ask for, which no exported program can: "
    "export one step on a cache (exported_step in lrt.integrations.exported_step)"
)
ONE_OF_SEVERAL = (
    "this forward gives each position's last pass, so a loss made of it lacks the schedule's other passes "
    "(%s): train with labels (Trainer), or with a schedule of one loss, as settled-1..3"
)
EARLY = (
    "assistant_early_exit: early blocks of an LRT write no memory to draft with; give an assistant_model, or "
    "prompt_lookup_num_tokens"
)
RENAMED = "from transformers 5.24 on a cache has another name, which LRT does not read: take transformers<5.24"
PACKED_BY = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
"""What other models are told documents in one row by."""

logger = get_logger(__name__)


def steps_in_graphs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a compiler trace steps on a cache alone; any other forward runs outside of its graphs, as a whole.

    A graph cannot say how many sweeps settle, nor how many passes are drawn; states and losses look at values.
    """
    outside = outside_graphs(forward)

    @wraps(forward)
    def run(self: LRTPreTrainedModel, input_ids: TokensBN | None = None, *args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values")
        graphed = not args and all(kwargs.get(name) is None for name in OUTSIDE)
        if graphed and cache is not None and input_ids is not None and is_step(self.config, input_ids, cache):
            return forward(self, input_ids, **kwargs)
        require(not being_exported(), UNTRACED)
        return outside(self, input_ids, *args, **kwargs)

    return run


@dataclass
class LRTModelOutput(BaseModelOutputWithPast):
    """What the library expects, and what a loss counts where that was asked for."""

    scored: Any = None
    """`Outcome.scored`."""


class StepCounter(nn.Module):
    """A count kept with the weights; a module, since maps of devices place modules and parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))


class LRTModel(LRTPreTrainedModel):
    """The backbone: tokens to the head's input, with memory."""

    def __init__(self, config: LRTConfig):
        super().__init__(config)
        self.core = LRT(config.model_config(), block=RecomputedBlock)
        self.gradient_checkpointing = False
        self.counter = StepCounter()
        self.register_load_state_dict_pre_hook(_read_where_it_was)
        self.post_init()

    @property
    def steps(self) -> int:
        """Forwards in train mode with gradient so far; ranges are drawn from it. Kept with the weights."""
        return int(self.counter.get_buffer("steps_done"))

    @steps.setter
    def steps(self, count: int) -> None:
        self.counter.get_buffer("steps_done").fill_(count)

    @steps_in_graphs
    @can_return_tuple
    def forward(
        self,
        input_ids: TokensBN | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: StreamBND | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_scored: bool = False,
        **kwargs: Any,
    ) -> LRTModelOutput:
        """The states of the last block, normalised; where gradients are enabled they carry one.

        In train mode they are those of the configured schedule, each position's by the last pass over it; in eval mode,
        and in generation, those of the configured prefill, or of a step.

        Args:
            input_ids: int64 [B, N].
            attention_mask: [B, M] of the tokens so far and these, 0 where there is padding, on either side; None: none.
            position_ids: [B, N] or [1, N]; a document begins where they begin again at 0. Otherwise the mask implies
                them.
            past_key_values: a cache built from this configuration.
            inputs_embeds: float [B, N, D], in place of input_ids: see `as_tokens`.
            use_cache: whether to return a cache; by default as the configuration says, and never in train mode.
            return_scored: whether to return what a loss counts.

        Raises:
            ValueError: what this model does not compute.
        """
        require(kwargs.get("cache") is None, RENAMED)
        axes = None if attention_mask is None else attention_mask.dim()
        require(axes in (None, 2), f"LRT takes a padding mask of 2 axes, not {axes}")
        wanted = self._wanted(output_hidden_states, output_attentions)
        cached = past_key_values is not None or bool(use_cache)
        scheduled = self.training and not (cached and not torch.is_grad_enabled())
        without = "in train mode a forward runs the schedule's passes: leave past_key_values and use_cache out"
        require(not (scheduled and cached), without)
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not scheduled
        require((input_ids is None) != (inputs_embeds is None), "give input_ids or inputs_embeds, one of them")
        packed_by = [name for name in PACKED_BY if kwargs.get(name) is not None]
        remedy = "which LRT reads from position_ids: have the collator return them too"
        require(position_ids is not None or not packed_by, f"{packed_by} say where documents begin, {remedy}")
        others = (attention_mask, position_ids, past_key_values, use_cache, wanted)
        if input_ids is not None:
            out = self._run(Inputs(self._of_vocabulary(input_ids), *others), scheduled)
        else:
            assert inputs_embeds is not None
            with as_tokens(self.core, inputs_embeds) as tokens:
                out = self._run(Inputs(tokens, *others), scheduled)
        if scheduled and not return_scored:
            self._say_what_lacks(out)
        return LRTModelOutput(
            last_hidden_state=out.hidden,  # pyright: ignore[reportArgumentType]
            past_key_values=out.cache if use_cache else None,
            hidden_states=out.states.streams if wanted.streams else None,  # pyright: ignore[reportArgumentType]
            attentions=out.states.attentions if wanted.attentions else None,  # pyright: ignore[reportArgumentType]
            scored=out.scored if return_scored else None,
        )

    def _of_vocabulary(self, tokens: TokensBN) -> TokensBN:
        listed = isinstance(tokens, (list, tuple))
        require(not listed, "input_ids are a list; give a tensor of rows, torch.tensor([[1, 2, 3]])")
        if free_to_look(tokens):
            check_tokens(self.core, tokens)
        return tokens.long()

    def _say_what_lacks(self, out: Outcome) -> None:
        """One line, once, where a loss that is made of the result is not the schedule's."""
        _, passes = out.scored[0]
        twice = sum(len(p.positions) for p in passes) > max(p.positions[-1] for p in passes) + 1
        if twice and torch.is_grad_enabled():
            logger.warning_once(ONE_OF_SEVERAL % self.config.schedule)

    def _run(self, inputs: Inputs, scheduled: bool) -> Outcome:
        if scheduled:
            return by_schedule(self.core, self.config, inputs, self._count())
        return decoded(self.core, self.config, inputs)

    def _wanted(self, streams: bool | None, attentions: bool | None) -> Wanted:
        config = self.config
        streams = config.output_hidden_states if streams is None else streams
        return Wanted(bool(streams), bool(config.output_attentions if attentions is None else attentions))

    def _count(self) -> int:
        """This forward's number; those without gradient do not count, so that what is compared with one is like it."""
        step = self.steps
        if torch.is_grad_enabled():
            self.steps = step + 1
        return step


def _read_where_it_was(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """The count of steps, of weights from before it moved."""
    if f"{prefix}steps_done" in tensors:
        tensors[f"{prefix}counter.steps_done"] = tensors.pop(f"{prefix}steps_done")


class LRTForCausalLM(LRTPreTrainedModel, GenerationMixin):
    """The language model."""

    def __init__(self, config: LRTConfig):
        super().__init__(config)
        self.model = LRTModel(config)
        self.tied_head = TiedHead(self.model.core) if self.model.core.head is None else None
        self.post_init()

    @property
    def steps(self) -> int:
        """Forwards in train mode with gradient so far."""
        return self.model.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self.model.steps = count

    def get_output_embeddings(self) -> nn.Module:
        head = self.tied_head if self.model.core.head is None else self.model.core.head
        assert head is not None
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if new_embeddings is not self.tied_head:
            self.model.core.head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As the library has it; ValueError: rows padded on the right, a cache of other tokens, a draft of its own."""
        require(generation_config.assistant_early_exit is None, EARLY)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if mask is not None and mask.dim() == 2:
            require_open_end(mask)
            if cache is not None and int(cache.get_seq_length()):
                require_goes_on(cache, self.config.num_hidden_layers, mask, 1)
        return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, *args, **kwargs
        )

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

    @steps_in_graphs
    @can_return_tuple
    def forward(
        self,
        input_ids: TokensBN | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: StreamBND | None = None,
        labels: TokensBN | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, N, V] and, where there are labels, a loss in nats a target; see `LRTModel.forward`.

        In train mode the loss is the schedule's, over all its passes, and the logits are those of the last pass over
        each position; in eval mode the loss is that of the logits.

        Args:
            labels: int64 [B, N], -100 where nothing is to be predicted: tokens at their own places.
            logits_to_keep: only the last so many positions, or those at these indices; 0 keeps all.
            num_items_in_batch: targets of the whole step, which the loss is a mean over; None: of this batch.
            kwargs: `shift_labels`, targets where they are to be predicted, in place of labels; no parameter of its own,
                since the Trainer takes every parameter with such a name for something that each batch has.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        targets = labels if shift_labels is None else shift_labels
        out = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, return_scored=targets is not None, **kwargs,
        )  # fmt: skip
        hidden, core = out.last_hidden_state, self.model.core
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = core.logits(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if targets is not None:
            loss = objective(core, out.scored, targets, shift_labels is not None, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


class LRTForSequenceClassification(GenericForSequenceClassification, LRTPreTrainedModel):
    """Scores of whole rows, for rewards and classes, from the state of each row's last token that is no padding."""

    def __init__(self, config: LRTConfig):
        LRTPreTrainedModel.__init__(self, config)  # not by the library's Auto class, which folders of code lack
        self.num_labels = config.num_labels or 1
        self.model = LRTModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        if self.inner.config.document_attention:
            self.register_forward_pre_hook(_without_closing, with_kwargs=True)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        weight = self.score.weight
        if weight.device.type != "meta" and not getattr(weight, "_is_hf_initialized", False):
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


def _without_closing(
    model: LRTForSequenceClassification, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook: rows [B, N] without a BOS at their end, which begins another document and sees nothing of theirs."""
    kwargs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
    tokens, bos, pad = kwargs.get("input_ids"), model.inner.config.bos, model.config.pad_token_id
    if tokens is not None and pad is not None:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(tokens != pad, place, 0).amax(1, keepdim=True)
        others = ((tokens != pad) & (tokens != bos)).any(1, keepdim=True)
        closing = (place == last) & (tokens == bos) & others
        mask = kwargs.get("attention_mask")
        kwargs["input_ids"] = tokens.masked_fill(closing, pad)
        kwargs["attention_mask"] = (torch.ones_like(tokens) if mask is None else mask).masked_fill(closing, 0)
    return args[2:], kwargs


# By this table the Trainer tells language models, whose labels it shifts itself where it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("lrt", LRTForCausalLM.__name__)
