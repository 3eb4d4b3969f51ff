"""Names of the weights that a DFlash draft does not have. Codebooks have no `.weight`, as in all published drafts."""

from __future__ import annotations

from flaxdraft.algorithms.dflash.sizes import BlockSizes

SELECTOR = "candidate_selector"
CODEBOOKS = (f"{SELECTOR}.predecessor_codebook", f"{SELECTOR}.successor_codebook")
CONVOLUTIONS = ("attention_conv", "mlp_conv")


def own_names(config: BlockSizes) -> tuple[tuple[str, str, str], ...]:
    """(JAX path, PyTorch key, transform)."""
    rows = [
        ("selector/embed_tokens", CODEBOOKS[0], "copy"), ("selector/lm_head", CODEBOOKS[1], "copy"),
        ("selector/projection/kernel", f"{SELECTOR}.hidden_projection.weight", "transpose"),
    ]  # fmt: skip
    for i in range(config.num_hidden_layers):
        for name in CONVOLUTIONS:
            ours, theirs = f"layer_{i}/{name}", f"layers.{i}.{name}"
            rows.append((f"{ours}/base_kernel", f"{theirs}.base_kernel", "copy"))
            rows.append((f"{ours}/kernel_projection/kernel", f"{theirs}.kernel_projection.weight", "transpose"))
    return tuple(rows)
