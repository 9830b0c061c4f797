"""The Hugging Face model; importing this module registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from infmoe.hf.accounting import ModelCost as ModelCost
from infmoe.hf.accounting import model_cost as model_cost
from infmoe.hf.configuration_infmoe import InfMoEConfig as InfMoEConfig
from infmoe.hf.modeling_infmoe import InfMoEForCausalLM as InfMoEForCausalLM
from infmoe.hf.modeling_infmoe import InfMoEModel as InfMoEModel

AutoConfig.register("infmoe", InfMoEConfig, exist_ok=True)
AutoModel.register(InfMoEConfig, InfMoEModel, exist_ok=True)
AutoModelForCausalLM.register(InfMoEConfig, InfMoEForCausalLM, exist_ok=True)
