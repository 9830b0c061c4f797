"""The mask of Eq. 6, folded over samples: `naive` is the truth, `eager` what runs."""

from infmoe.ops.masked_ffn.eager import mean_top_mask as mean_top_mask
