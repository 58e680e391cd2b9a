"""A callback for transformers' Trainer: draws of ranges go on where adapters are resumed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from lrt.integrations.hf.model import LRTModel


class DrawsGoOn(TrainerCallback, ExportableState):
    """Keeps the count of training forwards in trainer_state.json, and sets it where a training is resumed.

    PEFT saves adapters alone, and the count is none: give it to the Trainer, `callbacks=[DrawsGoOn()]`, so that
    schedules such as settled-1..3 are drawn as if nothing had been interrupted.
    """

    def __init__(self, steps: int = 0):
        self.steps = steps

    def state(self) -> dict[str, Any]:
        """What the Trainer saves."""
        return {"args": {"steps": self.steps}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the count that a checkpoint has, if this training goes on from one."""
        callbacks: Any = state.stateful_callbacks or {}
        kept = callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(kept, dict):
            for model in _cores(kwargs["model"]):
                model.steps = int(kept["args"]["steps"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the count."""
        self.steps = max((model.steps for model in _cores(kwargs["model"])), default=0)


def _cores(model: nn.Module) -> list[LRTModel]:
    """The LRTs that a model, or what wraps it, holds."""
    return [module for module in model.modules() if isinstance(module, LRTModel)]
