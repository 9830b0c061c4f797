"""Feed-forward layers behind one interface. Adding a variant is one file and one line here."""

from infmoe.errors import unknown_name
from infmoe.layers.base import ConditionalFFN as ConditionalFFN
from infmoe.layers.base import FFNCost as FFNCost
from infmoe.layers.base import FFNOutput as FFNOutput
from infmoe.layers.base import Init as Init
from infmoe.layers.dense import DenseFFN as DenseFFN
from infmoe.layers.infinity import InfinityFFN as InfinityFFN
from infmoe.layers.metrics import RoutingStats as RoutingStats
from infmoe.layers.moe import MoEFFN as MoEFFN
from infmoe.layers.router import GaussianRouter as GaussianRouter
from infmoe.layers.router import Router as Router
from infmoe.layers.routing import NoiseKey as NoiseKey
from infmoe.layers.routing import PerLayer as PerLayer
from infmoe.layers.routing import Routing as Routing
from infmoe.layers.switch import SwitchFFN as SwitchFFN

FFN_CLASSES: dict[str, type[ConditionalFFN]] = {
    "dense": DenseFFN,
    "switch": SwitchFFN,
    "moe": MoEFFN,
    "infinity": InfinityFFN,
}


def ffn_class(name: str) -> type[ConditionalFFN]:
    """The class of this variant.

    Raises:
        InfMoEError: an unknown name, with the nearest known one.
    """
    if name not in FFN_CLASSES:
        raise unknown_name("ffn", name, FFN_CLASSES)
    return FFN_CLASSES[name]
