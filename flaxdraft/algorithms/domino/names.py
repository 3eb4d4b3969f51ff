"""Names of the head's weights."""

from __future__ import annotations


def head_names() -> tuple[tuple[str, str, str], ...]:
    """(JAX path, PyTorch key, transform)."""
    return (
        ("correction/prefix_gru/input_proj/kernel", "prefix_gru.weight_ih_l0", "transpose"),
        ("correction/prefix_gru/state_proj/kernel", "prefix_gru.weight_hh_l0", "transpose"),
        ("correction/projection/kernel", "embed_proj.0.weight", "transpose"),
        ("correction/lm_head", "embed_proj.2.weight", "copy"),
    )
