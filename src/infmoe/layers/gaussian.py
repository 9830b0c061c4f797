"""Closed forms about the top-N of Gaussian scores: what the initial scale and `mask_scale` rest on."""

import math
from statistics import NormalDist

_NORMAL = NormalDist()


def kept_second_moment(keep_ratio: float) -> float:
    """E[m^2 1(m among the top `keep_ratio`)] for a standard normal m: 0.464 at 0.25, 1 at 1."""
    if keep_ratio >= 1.0:
        return 1.0
    cut = _NORMAL.inv_cdf(1.0 - keep_ratio)
    return keep_ratio + cut * _NORMAL.pdf(cut)


def mean_mask_second_moment(keep_ratio: float, num_samples: int, correlation: float) -> float:
    """E[(mean of K kept scores)^2] for standard normal scores of which any two correlate by `correlation`.

    K equal terms E[m^2 kept] and K(K-1) cross terms. Given the part u that the samples share, two kept
    scores are independent, so a cross term is E_u[ E[m kept | u]^2 ], integrated here by the midpoint rule.
    """
    own = kept_second_moment(keep_ratio)
    if num_samples == 1 or correlation >= 1.0:
        return own
    shared, rest = math.sqrt(correlation), math.sqrt(1.0 - correlation)
    cut = -math.inf if keep_ratio >= 1.0 else _NORMAL.inv_cdf(1.0 - keep_ratio)
    cross, num_points, reach = 0.0, 400, 8.0
    for i in range(num_points):
        u = -reach + (i + 0.5) * 2 * reach / num_points
        mean = shared * u
        kept_mean = mean * (1.0 - _NORMAL.cdf((cut - mean) / rest)) + rest * _NORMAL.pdf((cut - mean) / rest)
        cross += kept_mean**2 * _NORMAL.pdf(u) * 2 * reach / num_points
    return (own + (num_samples - 1) * cross) / num_samples
