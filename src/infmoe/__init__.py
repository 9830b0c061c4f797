"""∞-MoE: language models whose feed-forward layers hold a continuum of experts (arXiv 2601.17680).

`infmoe.layers` has the layers, `infmoe.hf` the Hugging Face model. The names below are imported on first use,
so that `import infmoe` stays as fast as a command line needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infmoe.hf import InfMoEConfig as InfMoEConfig
    from infmoe.hf import InfMoEForCausalLM as InfMoEForCausalLM
    from infmoe.layers import DenseFFN as DenseFFN
    from infmoe.layers import InfinityFFN as InfinityFFN
    from infmoe.layers import MoEFFN as MoEFFN
    from infmoe.layers import NoiseKey as NoiseKey
    from infmoe.layers import PerLayer as PerLayer
    from infmoe.layers import Routing as Routing
    from infmoe.layers import SwitchFFN as SwitchFFN

__version__ = "0.1.0"

_HOMES = {
    "infmoe.hf": ("InfMoEConfig", "InfMoEForCausalLM"),
    "infmoe.layers": ("DenseFFN", "InfinityFFN", "MoEFFN", "NoiseKey", "PerLayer", "Routing", "SwitchFFN"),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'infmoe' has no attribute {name!r}")
