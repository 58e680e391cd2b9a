"""LRT in transformers: importing this registers the Auto classes, so that exported folders load without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lrt.integrations.hf.config import LRTConfig
from lrt.integrations.hf.model import LRTForCausalLM, LRTForSequenceClassification, LRTModel

AutoConfig.register("lrt", LRTConfig, exist_ok=True)
AutoModel.register(LRTConfig, LRTModel, exist_ok=True)
AutoModelForCausalLM.register(LRTConfig, LRTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LRTConfig, LRTForSequenceClassification, exist_ok=True)

__all__ = ["LRTConfig", "LRTForCausalLM", "LRTForSequenceClassification", "LRTModel"]
