"""What the library's own common tests ask about a model; `test_transformers_suite.py` runs this file inside theirs."""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

from lrt.integrations.hf import LRTConfig, LRTForCausalLM, LRTModel

modeling_auto.MODEL_MAPPING_NAMES["lrt"] = "LRTModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["lrt"] = "LRTForCausalLM"
TINY = {"depth": 2, "width": 32, "heads": 4, "kv_heads": 2, "vocab_size": 99, "bos": 0, "context": 64}


class LRTModelTester:
    causal_lm_class = LRTForCausalLM
    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return LRTConfig(lrt=TINY, pad_token_id=98, bos_token_id=0, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class LRTModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (LRTModel, LRTForCausalLM)
    training_overfit_steps = 330  # a tester may choose; after 300, the default, the gradient had fallen by 89.6 %

    def setUp(self):
        self.model_tester = LRTModelTester(self)
        self.config_tester = ConfigTester(self, config_class=LRTConfig, lrt=self.model_tester.get_config().lrt)

    def test_config(self):
        self.config_tester.run_common_tests()
