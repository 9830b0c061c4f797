"""transformers' `ModelTesterMixin` and `ConfigTester` on every variant; run it with `run.py`.

The suite demands a deterministic forward pass, so `infinity` routes by the mean of its router.
"""

import unittest
from unittest import mock

from transformers.models.auto import modeling_auto
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

from infmoe.hf import InfMoEConfig, InfMoEForCausalLM, InfMoEModel, modeling_infmoe

# The suite tells base models and language models apart by transformers' own tables.
modeling_auto.MODEL_MAPPING_NAMES["infmoe"] = "InfMoEModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["infmoe"] = "InfMoEForCausalLM"


def set_config_for_less_flaky_test(config: InfMoEConfig) -> None:
    """The suite's own sets keys that our config does not have, and refuses when they are loaded again."""
    config.layer_norm_epsilon = 1.0


test_modeling_common.set_config_for_less_flaky_test = set_config_for_less_flaky_test

OPTIONS = {
    "dense": {},
    "switch": {"num_experts": 2},
    "moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "infinity": {"z_dim": 8, "routing_mode": "mu"},
}


class ModelTester:
    """What the mixin asks of a model's tester: a small config and inputs."""

    is_training = True
    batch_size = 7
    seq_length = 9
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99

    def __init__(self, parent, ffn: str):
        self.parent, self.ffn = parent, ffn

    def get_config(self) -> InfMoEConfig:
        return InfMoEConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=64,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            ffn=self.ffn,
            **OPTIONS[self.ffn],
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Suite(ModelTesterMixin):
    """The mixin on our classes; `ffn` is set below."""

    ffn: str
    all_model_classes = (InfMoEModel, InfMoEForCausalLM)
    all_generative_model_classes = (InfMoEForCausalLM,)
    pipeline_model_mapping = {}  # noqa: RUF012

    def setUp(self):
        self.model_tester = ModelTester(self, self.ffn)
        self.config_tester = ConfigTester(self, config_class=InfMoEConfig, hidden_size=32, num_attention_heads=4)

    def test_batching_equivalence(self):
        # Routing statistics are sums over the batch, so they alone differ from one row's.
        output = modeling_infmoe.InfMoEModelOutput
        with mock.patch.object(
            modeling_infmoe, "InfMoEModelOutput", lambda **fields: output(**(fields | {"routing_stats": None}))
        ):
            super().test_batching_equivalence()

    @unittest.skip("the distribution has no GenerationTesterMixin; tests/hf/test_hf_generate.py stands in for it")
    def test_generation_tester_mixin_inheritance(self):
        pass

    def test_config(self):
        self.config_tester.run_common_tests()


class DenseTest(Suite, unittest.TestCase):
    ffn = "dense"


class SwitchTest(Suite, unittest.TestCase):
    ffn = "switch"


class MoETest(Suite, unittest.TestCase):
    ffn = "moe"


class InfinityTest(Suite, unittest.TestCase):
    ffn = "infinity"
    test_all_params_have_gradient = False  # at the mean, sigma's map has none
