"""The Latent Recurrent Transformer: train it in parallel passes, decode it exactly with memory."""

from lrt.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from lrt.loss import ScheduledLoss
from lrt.model import LRT
from lrt.model_config import MemoryConfig, ModelConfig
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
