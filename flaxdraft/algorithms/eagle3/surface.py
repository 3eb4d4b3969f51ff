"""The surface of an EAGLE-3 draft: what the unroll and the drafter call, whatever the attention is.

Shape letters: B batch, T time, K tapped layers or key/value heads, D draft width, E target width, W draft vocabulary,
N query heads, H head width, C value width.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Float, Int


class Draft(Protocol):
    """One layer and a head; nothing outside its file knows which attention it has."""

    config: Any
    precision: Any
    sharding: Any
    target_ids: Any
    draft_ids: Any

    @property
    def softmax_scale(self) -> float: ...
    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]: ...
    def project(self, taps_BTKE: Float[Array, "B T K E"]) -> Float[Array, "B T D"]: ...
    def token_projections(self, embeds_BTD: Float[Array, "B T D"]) -> Any:
        """A token's share of the attention's projections: arrays [B, T, ...], the same at every step of the unroll."""
        ...

    def projections(self, token_projections: Any, hidden_BTD: Float[Array, "B T D"]) -> Any: ...
    def query(self, projections: Any, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T N H"]: ...
    def key_value(
        self, projections: Any, positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K C"]]: ...
    def finish(
        self, hidden_BTD: Float[Array, "B T D"], heads_BTNC: Float[Array, "B T N C"]
    ) -> Float[Array, "B T D"]: ...
    def head_input(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]: ...
    def head(self) -> Float[Array, "D W"]: ...
    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T W"]: ...
