"""The Latent Recurrent Transformer: train it in parallel passes, decode it exactly with memory.

The public names are imported when they are first used, so that `import lrt` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrt.config.model import MemoryConfig, ModelConfig
    from lrt.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
    from lrt.model.loss import ScheduledLoss
    from lrt.model.lrt import LRT
    from lrt.passes import Pass, exact_prefix
    from lrt.schedule import Schedule
    from lrt.text_model import TextModel, load, train

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
    "TextModel",
    "TrainConfig",
    "exact_prefix",
    "load",
    "train",
]
_MODULES = {
    "lrt.config.model": ("MemoryConfig", "ModelConfig"),
    "lrt.config.run": ("DataConfig", "OptimConfig", "RunConfig", "TrainConfig"),
    "lrt.model.loss": ("ScheduledLoss",),
    "lrt.model.lrt": ("LRT",),
    "lrt.passes": ("Pass", "exact_prefix"),
    "lrt.schedule": ("Schedule",),
    "lrt.text_model": ("TextModel", "load", "train"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
