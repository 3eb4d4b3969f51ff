"""Names of the heads' weights."""

from __future__ import annotations

from flaxdraft.algorithms.dspark.sizes import DSparkSizes


def head_names(config: DSparkSizes) -> tuple[tuple[str, str, str], ...]:
    """(JAX path, PyTorch key, transform)."""
    rows = [
        ("markov/embed_tokens", "markov_head.markov_w1.weight", "copy"),
        ("markov/lm_head", "markov_head.markov_w2.weight", "copy"),
    ]
    projections = {"gated": "gate_proj", "rnn": "joint_proj"}
    linears = [("markov", "markov_head", name) for kind, name in projections.items() if config.markov_head_type == kind]
    if config.enable_confidence_head:
        linears.append(("confidence", "confidence_head", "proj"))
    for ours, theirs, name in linears:
        rows.append((f"{ours}/{name}/kernel", f"{theirs}.{name}.weight", "transpose"))
        rows.append((f"{ours}/{name}/bias", f"{theirs}.{name}.bias", "copy"))
    return tuple(rows)
