"""What the backward pass computes anew instead of keeping it."""

from __future__ import annotations

from typing import Literal

import jax

ATTENTION_OUTPUT = "attention_output"  # by which kernels name what they give (`jax.ad_checkpoint.checkpoint_name`)
Remat = Literal["none", "projections", "full"]
# projections: all but what products with weights and attention gave. full: everything.
POLICIES = {
    "projections": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
