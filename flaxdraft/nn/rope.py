"""Rotary position embeddings: default, linear, dynamic NTK, llama3 and YaRN, angles always in float32.

Formulas follow transformers' modeling_rope_utils (the parameter names too), except that `rope_theta` is honoured
by every type. Shape letters: B batch, T time, N heads, H rotated width (of which H/2 angles).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flaxdraft.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_EXTRA_FIELDS = (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
)  # fmt: skip
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding. `None` means that the config does not set the field, so the formula's default holds."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None  # whether YaRN's ramp begins and ends at whole dimensions, as it does where None

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise InputError(f"rope_type: found {self.rope_type!r}, expected one of {', '.join(ROPE_TYPES)}")
        for name in _REQUIRED.get(self.rope_type, ()):
            if getattr(self, name) is None:
                raise InputError(f"rope parameters: rope_type {self.rope_type!r} needs {name!r}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> RopeConfig:
        """Reads both dialects: `rope_parameters`, or `rope_theta` + `rope_scaling` (with `type` or `rope_type`).

        Raises:
            InputError: an unknown type, a missing parameter, or one that would change the angles and is not supported.
        """
        new = config.get("rope_parameters") or {}
        old = config.get("rope_scaling") or {}
        merged = {**old, **new}
        part = merged.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if part not in (None, 1.0):
            raise InputError(
                f"rope parameters: partial_rotary_factor is {part!r}, which is not supported; expected it absent"
            )
        theta = merged.get("rope_theta", config.get("rope_theta"))
        return cls(
            rope_type=merged.get("rope_type", merged.get("type", "default")),
            rope_theta=10000.0 if theta is None else float(theta),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            **{name: merged[name] for name in _EXTRA_FIELDS if merged.get(name) is not None},
        )

    def to_hf(self) -> dict[str, Any]:
        """Both dialects at once, since servers disagree on which one they read; absent fields are left out."""
        extra = {name: getattr(self, name) for name in _EXTRA_FIELDS if getattr(self, name) is not None}
        out: dict[str, Any] = {
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": self.rope_type, "rope_theta": self.rope_theta, **extra},
        }
        if self.rope_type != "default":
            out["rope_scaling"] = {"rope_type": self.rope_type, **extra}
        return out

    def for_draft(self) -> RopeConfig:
        """Of a draft beside a target that turns so: without `truncate`, which SGLang does not read. A draft learns with
        angles that every engine gives it."""
        return dataclasses.replace(self, truncate=None)

    def softmax_mscale(self) -> float:
        """MLA's extra factor on the softmax scale: get_mscale(factor, mscale_all_dim)^2 iff mscale_all_dim is set."""
        if self.rope_type == "default" or not self.mscale_all_dim or self.factor is None:
            return 1.0
        return get_mscale(self.factor, self.mscale_all_dim) ** 2


def get_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's magnitude factor: 0.1 m ln(s) + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_factor(rope: RopeConfig) -> float:
    """The factor that multiplies cos and sin; 1 for every type but YaRN."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    assert rope.factor is not None
    if rope.mscale and rope.mscale_all_dim:
        return get_mscale(rope.factor, rope.mscale) / get_mscale(rope.factor, rope.mscale_all_dim)
    return get_mscale(rope.factor)


def _llama3(rope: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    old, factor = rope.original_max_position_embeddings, rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert old is not None
    assert factor is not None
    assert low is not None
    assert high is not None
    wavelength = 2 * math.pi / inv_freq
    smooth = (old / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > old / low, inv_freq / factor, blended)
    return np.where(wavelength < old / high, inv_freq, scaled)


def _yarn(rope: RopeConfig, inv_freq: np.ndarray, width: int) -> np.ndarray:
    old = rope.original_max_position_embeddings or rope.max_position_embeddings
    fast = 32.0 if rope.beta_fast is None else rope.beta_fast
    slow = 1.0 if rope.beta_slow is None else rope.beta_slow

    def dim_of(rotations):
        return width * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dim_of(fast), dim_of(slow)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)


def inverse_frequencies(
    rope: RopeConfig, width: int, positions_BT: Int[Array | np.ndarray, "B T"]
) -> Float[Array, " half"] | np.ndarray:
    """Angle per position of each of the width/2 pairs. Only dynamic NTK looks at the positions: the farthest one of all
    rows stretches the angles of all, as in transformers (`dynamic_rope_update`), so none may be padding's beyond the
    real ones (see `turning_positions`)."""
    exponent = np.arange(0, width, 2, dtype=np.float64) / width
    if rope.rope_type == "dynamic":
        assert rope.factor is not None
        # Readers of this type know no original_max_position_embeddings: the window is the config's.
        limit = rope.max_position_embeddings
        length = jnp.maximum(jnp.max(positions_BT) + 1, limit).astype(jnp.float32)
        stretch = rope.factor * length / limit - (rope.factor - 1)
        return 1.0 / (rope.rope_theta * stretch ** (width / (width - 2))) ** jnp.asarray(exponent, jnp.float32)
    inv_freq = 1.0 / rope.rope_theta**exponent
    if rope.rope_type == "linear":
        assert rope.factor is not None
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif rope.rope_type == "yarn":
        inv_freq = _yarn(rope, inv_freq, width)
    return inv_freq.astype(np.float32)


def turning_positions(positions_BT: Int[Array, "B T"], num_slots: int) -> Int[Array, "B T"]:
    """The positions by which queries and keys turn, beside a cache of `num_slots` slots. Positions from there on mark
    padding, which nobody reads: it turns like the first token, so that no real one's angles depend on it."""
    return jnp.where(positions_BT < num_slots, positions_BT, 0)


def cos_sin(
    rope: RopeConfig, width: int, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of position x frequency, times the attention factor; any position ids, packed or offset."""
    inv_freq = jnp.asarray(inverse_frequencies(rope, width, positions_BT))
    angle = positions_BT.astype(jnp.float32)[..., None] * inv_freq[None, None, :]
    scale = attention_factor(rope)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate_half(
    x_BTNH: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Llama's layout: pair i is (x_i, x_{i+H/2})."""
    a, b = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def rotate_interleaved(
    x_BTNH: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """DeepSeek's layout: pair i is (x_{2i}, x_{2i+1}). The result is kept de-interleaved, [first | second] of all
    pairs, for queries and keys alike: their products do not change and no element is moved back."""
    pairs = x_BTNH.astype(cos.dtype).reshape(*x_BTNH.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
