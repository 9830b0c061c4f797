"""A profile of a model, as if `infmoe frontier` had measured it."""

import json

from infmoe.hf.budget import profile_name, profile_values
from infmoe.layers.point import Point

# dials, loss, increase (at most `MORE` more, but for the model's own), median ms, ms of 95 %
POINTS = [
    (Point(2, 0.25), 3.00, 0.00, 4.0, 5.0),
    (Point(1, 0.25), 3.02, 0.02, 3.0, 4.0),
    (Point(1, (0.25, 0.125)), 3.05, 0.05, 2.0, 2.5),
    (Point(None, 0.0625, mode="mu"), 3.20, 0.20, 1.5, 1.8),
    (Point(8, 0.25), 2.99, -0.01, 6.0, 9.0),
    (Point(4, 0.5), 3.01, 0.01, 7.0, 8.0),  # on nobody's frontier
]

MORE = 0.0033


def rows():
    return [
        {
            **{name: getattr(p, name) for name in ("num_samples", "keep_ratio", "num_experts_per_tok", "mode")},
            "loss": loss,
            "increase": increase,
            "increase_at_most": increase + MORE if increase else 0.0,
            "token_ms": ms,
            "token_ms_p95": p95,
        }
        for p, loss, increase, ms, p95 in POINTS
    ]


def written(folder, model, num_rows=1):
    values = profile_values(model, rows(), num_rows=num_rows, source="runs/mine") | {"cached_tokens": [8, 24]}
    (folder / profile_name(num_rows)).write_text(json.dumps(values))
    return folder
