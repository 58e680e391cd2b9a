"""The model's modules and its one forward: any pass, over any positions, against any state.

A decoder-only transformer, nanochat-style unless `ModelConfig.backbone` says otherwise, whose blocks take in the memory
(docs/method.md#injection). Turn the memory off and it is exactly the plain transformer. `lrt.py` adds the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrt.config.model import Execution, ModelConfig
from lrt.model.attention import BLOCK, Mask, attention_mask, query_blocks, rope_at
from lrt.model.blocks import Block, BlockContext, Memories, projected, projections, stream_norm
from lrt.model.flex import block_mask
from lrt.model.ops import rms_norm
from lrt.model.parameters import MEMORY, initialise, role
from lrt.model.shapes import HeadsBKNE, PositionsN, StreamBND, TokensBN, check_rows, check_starts
from lrt.model.state import Buffer, LayerKV, PassInput, PassOutput, Segments, State
from lrt.utils.compiling import graph_of
from lrt.utils.dtensor import is_sharded
from lrt.utils.hardware import torch_device
from lrt.utils.require import require

BlockOutput = tuple[StreamBND, HeadsBKNE, HeadsBKNE]


class Transformer(nn.Module):
    """Embedding, blocks and head of an LRT, initialised; `run_pass` runs one pass."""

    def __init__(
        self,
        config: ModelConfig,
        device: str | torch.device | None = None,
        seed: int = 0,
        block: type[Block] = Block,
    ):
        """Build the model on `device` (by default torch's default device) and initialise it from `seed`.

        On the meta device nothing is allocated or initialised: `to_empty` and `initialise` do that later. `block` is
        the class of the blocks, where a library wants one of its own.
        """
        super().__init__()
        kind = type(config).__name__  # the name: of an exported folder transformers loads each class more than once
        require(kind == ModelConfig.__name__, f"the model's config is a {kind}; give a ModelConfig")
        self.config, self.execution = config, Execution()
        device = torch.get_default_device() if device is None else torch_device(device)
        with torch.device("meta"):  # so that nothing is allocated or drawn twice
            self.embedding = nn.Embedding(config.vocab_size, config.d)
            self.blocks = nn.ModuleList(block(config, i) for i in range(config.depth))
            self.norm = stream_norm(config)
            self.head = None if config.backbone.tied else nn.Linear(config.d, config.vocab_size, bias=False)
            self.projection, self.shift_projection = projections(config, config.memory.projection == "shared")
        if device.type != "meta":
            self.to_empty(device=device)
            initialise(self, config, seed)

    def run_pass(
        self,
        tokens: TokensBN,
        positions: range | None = None,
        state: State | None = None,
        starts: Tensor | None = None,
        *,
        top: bool = True,
    ) -> tuple[PassOutput, State]:
        """Run one pass over N positions against a state; what it computed, and the state after it.

        Args:
            tokens: the tokens there, int64 [B, N].
            positions: the slice of positions, 0..N-1 by default. A `KVCache` knows where its rows stand: give none.
            state: what earlier passes have left, a `Buffer` or a `KVCache` (then N = 1); by default nothing.
            starts: boolean [B, N], True at the first token of a document, where the memory is reset; none by default.
            top: whether the blocks above the source block run; without them there is no `hidden`.

        Raises:
            ValueError: tokens that are not whole numbers [B, N], starts that do not fit them.
        """
        check_rows(tokens)
        check_starts(tokens, starts)
        read, rest = (Buffer() if state is None else state).open(positions, tokens, self.config.blocks_run(top=top))
        written = self.forward_pass(tokens, read, starts, top=top)
        return written, rest.write(positions, written)

    def forward_pass(
        self, tokens: TokensBN, read: PassInput, starts: Tensor | None = None, *, top: bool = True
    ) -> PassOutput:
        """Run one pass over what a state has opened: `run_pass` without the state, tensors in and tensors out.

        Args:
            tokens: int64 [B, N].
            read: where the pass stands and what it reads.
            starts: boolean [B, N], True at the first token of a document; none by default.
            top: whether the blocks above the source block run.
        """
        eps, embedded = self.config.backbone.norm_eps, self.embedding(tokens)
        x0 = (rms_norm(embedded, eps) if self.config.backbone.embedding_norm else embedded).to(self.stream_dtype)
        memories = Memories(self._recurrent(read.memory, starts), self._shift(read.previous, starts))
        shared = projected(memories, (self.projection, self.shift_projection))
        rope = rope_at(read.positions, self.config.e, self.config.rope_theta, x0.dtype, self.config.backbone.rope)
        context = BlockContext(x0, tokens, read.positions, memories, shared, rope, None, None)
        confined = self.config.document_attention
        windows, masks = self.config.windows(), self._masks(read, document_start(read, starts) if confined else None)
        run, kv = self._runner(read)
        x = x0.clone() if self.execution.compile else x0  # one tensor given twice would be a graph of its own
        of_embedding = self.config.source == 0 and not self.config.backbone.embedding_norm
        memory, keys, values, below = rms_norm(x0, eps) if of_embedding else x0, [], [], None
        if read.below is not None:
            x, keys, values = read.below.stream, list(read.below.keys), list(read.below.values)
        for i in self.config.blocks_run(top=top)[len(keys) :]:
            below = x.detach() if i > 0 and i == self.config.blocks_below else below
            own = context._replace(attention_mask=masks[windows[i]], kv=None if kv is None else kv[i])
            x, k, v = run(self.blocks[i % self.config.depth], x, own)
            keys.append(k)
            values.append(v)
            memory = rms_norm(x, eps) if i + 1 == self.config.source else memory
        last = memory if self.config.source == self.config.layers else x
        hidden = (self.norm.scale(last) if last is memory else self.norm(last)) if top else None
        return PassOutput(tokens, hidden, memory, tuple(keys), tuple(values), starts if confined else None, below)

    def logits(self, hidden: StreamBND) -> Tensor:
        """Next-token logits [.., V], soft-capped, in float32 at least."""
        z = F.linear(hidden, self.tied_head()) if self.head is None else self.head(hidden)
        z = z.float() if z.dtype != torch.float64 else z
        cap = self.config.softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    def tied_head(self) -> Tensor:
        """The embedding as a head, [V, D]: what the embedding module says of every token, an adapter's part too."""
        if plain(self.embedding, nn.Embedding):
            return self.embedding.weight
        return self.embedding(torch.arange(self.config.vocab_size, device=self.device))

    def head_matrix(self) -> Tensor | None:
        """The matrix [V, D] that is all the head does; None where it does more: an adapter, a hook, a bias, packing."""
        if self.head is None:
            return self.tied_head()
        if not plain(self.head, nn.Linear) or self.head.bias is not None:
            return None
        weight = self.head.weight
        return weight if type(weight) in (Tensor, nn.Parameter) or is_sharded(weight) else None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. ValueError: the names are those of a model within another, as DDP and torch.compile save it."""
        name = next(iter(state_dict), "")
        prefix = next((name[: -len(own)] for own in self.state_dict() if name.endswith(f".{own}")), "")
        require(
            not prefix or not all(name.startswith(prefix) for name in state_dict),
            f"every name begins with {prefix!r}: the weights are those of a model within another; take it off: "
            f"{{name.removeprefix({prefix!r}): x for name, x in state.items()}}",
        )
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Type of the residual stream: autocast's where it is on, else the parameters'."""
        device, dtype = self.device.type, next(self.parameters()).dtype
        cast = device != "meta" and torch.is_autocast_enabled(device)  # on meta while offloaded
        return torch.get_autocast_dtype(device) if cast else dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def starts(self, tokens: TokensBN) -> Tensor | None:
        """Where documents start: at every BOS token; boolean like `tokens`, or None if the model knows no BOS."""
        return None if self.config.bos is None else tokens == self.config.bos

    def memory_parameters(self) -> list[nn.Parameter]:
        """Parameters that take part only where memory is read: W_K, W_V and gamma, a token shift's too."""
        return [p for name, p in self.named_parameters() if role(name) in MEMORY]

    def _masks(self, read: PassInput, start: PositionsN | None) -> dict[int | None, Mask]:
        """What queries see, by window: layers of one window hold the same positions. `start` is of their documents."""
        queries, n, masks = read.positions, read.positions.shape[-1], {}
        kv, backend = [None] * self.config.layers if read.kv is None else read.kv, self.execution.backend
        blockwise = backend == "auto" and queries.device.type == "cpu" and queries.dim() == 1
        for window, layer in zip(self.config.windows(), kv, strict=False):
            if window not in masks:
                keys = queries if layer is None else layer.positions
                inside = layer is None and start is None and (window is None or window >= n)
                if inside:
                    masks[window] = None
                elif backend == "flex" and n > 1:
                    masks[window] = block_mask(queries, keys, window, start)
                elif blockwise and keys.dim() == 1 and n > BLOCK:
                    masks[window] = query_blocks(queries, keys, window, start, BLOCK)
                else:
                    masks[window] = attention_mask(queries, keys, window, start)
        return masks

    def _runner(self, read: PassInput) -> tuple[Callable[..., BlockOutput], Sequence[LayerKV] | None]:
        """How blocks are called, and the keys and values of other positions in the form that suits that."""
        run, kv = _called, read.kv
        if self.execution.compile and read.positions.dim() == 1:  # a pass over a slice; decoding compiles its own step
            kv = None if kv is None else [layer.joined() for layer in kv if isinstance(layer, Segments)]
            run = _compiled()
        if self.execution.recompute and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        return run, kv

    def _recurrent(self, memory: StreamBND | None, starts: Tensor | None) -> StreamBND | None:
        """The memory that is read, reset where documents start."""
        if memory is None or not self.config.memory.recurrent:
            return None
        memory = memory if starts is None else memory.masked_fill(starts[..., None], 0)
        return memory.to(self.stream_dtype)

    def _shift(self, previous: TokensBN | None, starts: Tensor | None) -> StreamBND | None:
        """The memory of source block 0: what the previous token's embedding says, in every pass alike."""
        if not self.config.memory.shifted:
            return None
        assert previous is not None, "a model with a token shift needs the previous tokens"
        absent = previous < 0 if starts is None else (previous < 0) | starts
        embedded = rms_norm(self.embedding(previous.clamp(min=0)), self.config.backbone.norm_eps)
        return embedded.to(self.stream_dtype).masked_fill(absent[..., None], 0)


def document_start(read: PassInput, starts: Tensor | None) -> PositionsN | None:
    """Where the document of each position starts, [B, N], by the state and by `starts`; None: no document is known."""
    if starts is None:
        return None if read.document_start is None else read.document_start.expand(-1, read.positions.shape[-1])
    newest = torch.where(starts, read.positions, 0).cummax(dim=1).values
    return newest if read.document_start is None else torch.maximum(newest, read.document_start)


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what its class `kind` does and nothing else, with weights that are in place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    changed = any(hooks) or "forward" in vars(module)  # a library may put its own forward before the class's
    return type(module) is kind and not changed and not next(module.parameters()).is_meta


def _called(block: nn.Module, x: StreamBND, context: BlockContext) -> BlockOutput:
    return block(x, context)


@cache
def _compiled() -> Callable[..., BlockOutput]:
    return graph_of(_called, fullgraph=True)
