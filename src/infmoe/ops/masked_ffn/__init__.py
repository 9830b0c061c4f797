"""The mask of Eq. 6, folded over samples, and the product under it.

`naive` is the truth; `eager` runs everywhere; `fused` is the compiled form, dense or sparse.
"""
