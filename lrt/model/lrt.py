"""The Latent Recurrent Transformer: tokens in, the logits of the decoded model out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.config.decoding import DEFAULT_MODE, PrefillOptions
from lrt.model.recurrence import check_tokens, states
from lrt.model.run_passes import run_passes
from lrt.model.shapes import StreamBND, TokensBN
from lrt.model.state import PassInput
from lrt.model.transformer import Transformer
from lrt.schedule import Schedule
from lrt.utils.compiling import outside_graphs
from lrt.utils.require import require


class LRT(Transformer):
    """A Latent Recurrent Transformer, initialised: `LRT(config)`, on torch's default device unless one is given.

    `model(tokens)` are the logits of the recurrence; `run_pass` is one pass of it, `run_passes` a schedule's,
    `ScheduledLoss` trains it, and `lrt.inference` continues texts.
    """

    def forward(self, tokens: TokensBN, mode: str | None = None, tolerance: float | None = None) -> Tensor:
        """Next-token logits [B, T, V] of the *decoded* model: what token-by-token decoding of `tokens` computes.

        Every row begins at position 0; the memory is reset at BOS, if the model knows one.

        Args:
            tokens: int64 [B, T].
            mode: how the recurrence is solved. `exact`: token by token, and the only one that gradients flow through.
                `interleaved-G` or `jacobi`: parallel sweeps until no memory is off by more than `tolerance`.
                `zero_memory`: one parallel pass that reads no recurrent memory, and so is not the decoded model.
                None: `exact` where a gradient is wanted, else `interleaved-8`.
            tolerance: estimated relative error of a position's memory at which sweeps stop; by default prefill's own.

        Raises:
            ValueError: a gradient is wanted of sweeps; a token out of range; an unknown mode.
        """
        graded = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        mode = mode or ("exact" if graded else DEFAULT_MODE)
        how = PrefillOptions.parse("exact" if mode == "zero_memory" else mode, tolerance)
        parallel = mode == "zero_memory" or not self.config.memory.recurrent
        require(
            not graded or parallel or mode == "exact",
            f"no gradient flows through prefill mode {mode}: call the model under torch.no_grad(), take mode='exact' "
            "(T passes with gradient), or train with ScheduledLoss",
        )
        return self.logits(self._parallel(tokens) if parallel else self._recurrent_states(tokens, how, graded))

    def _parallel(self, tokens: TokensBN) -> StreamBND:
        """The head's input at every position by one pass that reads no recurrent memory: one graph for any length."""
        check_tokens(self, tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        read = PassInput(places, previous=F.pad(tokens[:, :-1], (1, 0), value=-1))
        hidden = self.forward_pass(tokens, read, self.starts(tokens)).hidden
        assert hidden is not None
        return hidden

    @outside_graphs  # one would hold every step, and cannot say how many sweeps settle
    def _recurrent_states(self, tokens: TokensBN, how: PrefillOptions, graded: bool) -> StreamBND:
        """The head's input at every position by the recurrence; differentiable where `graded`."""
        if not graded:
            return torch.cat([hidden for _, hidden, _ in states(self, tokens, how)], dim=1)
        check_tokens(self, tokens)
        passes = Schedule.parse("sequential").passes(tokens.shape[1])
        hidden = [written.hidden for _, written, _ in run_passes(self, tokens, passes, self.starts(tokens))]
        return torch.cat([h for h in hidden if h is not None], dim=1)
