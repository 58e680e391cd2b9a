"""The Latent Recurrent Transformer: train it in parallel passes, decode it exactly with memory."""

from lrt.config.model import MemoryConfig, ModelConfig
from lrt.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
from lrt.model.loss import ScheduledLoss
from lrt.model.transformer import LRT
from lrt.schedule import Pass, Schedule, exact_prefix

__version__ = "0.1.0"
__all__ = [
    "LRT",
    "DataConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "Pass",
    "RunConfig",
    "Schedule",
    "ScheduledLoss",
    "TrainConfig",
    "exact_prefix",
]
