"""A store with everything in it."""

import pytest
from fake_results import fill

from infmoe.reproduce.plan import (
    ELASTIC_EXPERTS,
    ELASTIC_K,
    ELASTIC_KEEP,
    ELASTIC_MORE,
    ELASTIC_TUNED,
    ELASTIC_UNSCALED,
    LONG_RATES,
    OTHER_RATES,
    PASSES,
    START_RATES,
    STARTS,
    TIER1,
    TIER2,
    Scale,
    further_tokens,
    groups,
)
from infmoe.reproduce.store import Store


@pytest.fixture
def filled(store: Store, mini: Scale) -> Store:
    """Everything, as if it had been trained."""
    losses = {name: 3.5 + 0.01 * i for i, name in enumerate(dict.fromkeys((*TIER1, *TIER2)))}
    elastic = (*ELASTIC_KEEP, *ELASTIC_EXPERTS, *ELASTIC_UNSCALED, *ELASTIC_K, *ELASTIC_MORE, *PASSES)
    trained_for = dict.fromkeys((*elastic, *OTHER_RATES, *STARTS, *START_RATES, "moe16-fine-k16-scaled"), 3.45)
    losses = trained_for | losses | {"infinity-elastic": 3.44, "infinity-keep4": 3.45, "infinity-keep16": 3.43}
    losses |= {f"infinity-z{z}": 3.6 - 0.001 * z for z in mini.z_dims[:-1]}
    fill(store, losses | {"infinity": 3.4, "moe": 3.6, "dense-swiglu": 3.3}, mini.tokens)
    planned = {(arm, group.tokens) for group in groups("elastic", mini) for arm in group.trained}
    for arm, passes in PASSES.items():
        if (arm, tokens := int(mini.tokens / passes)) in planned:
            fill(store, {arm: 3.6}, tokens)
    fill(store, dict.fromkeys(ELASTIC_TUNED, 3.4), further_tokens(mini))
    fill(store, dict.fromkeys(LONG_RATES, 3.15), mini.long_tokens)
    fill(store, dict.fromkeys(TIER1, 3.2) | {"infinity": 3.1}, mini.long_tokens)
    for tokens in set(mini.data_sizes) - {mini.tokens, mini.long_tokens}:
        fill(store, {"infinity": 3.5, "moe": 3.7}, tokens)
    return store
