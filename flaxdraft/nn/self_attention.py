"""Self-attention as a layer has it: projections, the operation itself, which somebody else brings, and the way out.

Shape letters: B batch, T time, X input width, D output width, N query heads, K key/value heads, H query and key width,
C value width.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Float, Int


class Attend(Protocol):
    """What is done with queries, keys and values: whoever runs the layers knows which rows see which keys (documents,
    a cache, a tree) and on which devices they are."""

    def __call__(
        self, q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKC: Float[Array, "B T K C"],
        scale: float, *, window: int | Int[Array, ""] | None = None, sinks_N: Float[Array, " N"] | None = None,
    ) -> Float[Array, "B T N C"]:  # fmt: skip
        """
        Args:
            scale: of the scores.
            window: each row sees the keys of so many positions at most, its own the last of them. A layer that has
                none among layers that do gives a number beyond every length.
            sinks_N: a score of each head that takes its share of the softmax and gives nothing (gpt-oss).
        """
        ...


class Heads(Protocol):
    """Projections from a layer's input to heads and back: `GQA`, `MLA`."""

    @property
    def softmax_scale(self) -> float: ...
    def project(self, x_BTX: Float[Array, "B T X"], inputs: slice = slice(None)) -> Any:
        """
        Args:
            inputs: which of the projections' inputs x holds; what parts of an input give may be added up.
        """
        ...

    def query(self, projected: Any, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]: ...
    def key_value(
        self, projected: Any, positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K C"]]: ...
    def output(self, heads_BTNC: Float[Array, "B T N C"], /) -> Float[Array, "B T D"]: ...


def self_attention(
    heads: Heads, x_BTX: Float[Array, "B T X"], positions_BT: Int[Array, "B T"], attend: Attend
) -> Float[Array, "B T D"]:
    """Rows attend to each other, at their positions. For windows and sinks give `partial(attend, window=...)`."""
    projected = heads.project(x_BTX)
    q_BTNH = heads.query(projected, positions_BT)
    k_BTKH, v_BTKC = heads.key_value(projected, positions_BT)
    return heads.output(attend(q_BTNH, k_BTKH, v_BTKC, heads.softmax_scale))
