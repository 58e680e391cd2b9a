"""A peer to be measured beside: transformers' own nanochat model in the shape of ours without memory."""

from __future__ import annotations

from typing import Any

import torch

from lrt.config.model import ModelConfig
from lrt.utils.require import require

PEER = "transformers"


def nanochat(config: ModelConfig, device: torch.device) -> Any:
    """transformers' NanoChatForCausalLM of `config`'s sizes, with random weights.

    It has neither residual scalars nor value embeddings, so it does a little less than ours.

    Raises:
        ValueError: transformers is not installed, or the shape is one that it cannot have.
    """
    try:
        from transformers import NanoChatConfig, NanoChatForCausalLM
    except ImportError:
        raise ValueError("--peer needs transformers: pip install 'latent-recurrent-transformer[hf]'") from None
    require(config.d == config.h * config.e, "--peer: transformers' nanochat derives the head width from the width")
    shape = NanoChatConfig(
        vocab_size=config.vocab_size, hidden_size=config.d, intermediate_size=4 * config.d,
        num_hidden_layers=config.depth, num_attention_heads=config.h, num_key_value_heads=config.k,
        max_position_embeddings=config.context, final_logit_softcapping=config.softcap,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with device:
        return NanoChatForCausalLM(shape)
