"""Types of config.json's fields, so that what reads them later can take them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Size = Annotated[int, Field(gt=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class RopeFields(BaseModel):
    """Either dialect's object, with whatever else stands there."""

    model_config = ConfigDict(strict=True)

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Positive | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None


class Expected:
    """What a field may hold: a type, and what people call it."""

    def __init__(self, phrase: str, kind: Any):
        self.phrase, self._adapter = phrase, TypeAdapter(kind)

    def fits(self, value: Any) -> bool:
        try:
            self._adapter.validate_python(value, strict=True)
        except ValidationError:
            return False
        return True


SIZE = Expected("a positive integer", Size)
POSITIVE = Expected("a positive number", Positive)
TEXT = Expected("a text", str)
FLAG = Expected("true or false", bool)
NAMES = Expected("a list of names", list[str])
ROPE = Expected("an object of RoPE parameters", RopeFields)


def wrong(config: Mapping[str, Any], fields: Mapping[str, Expected]) -> list[str]:
    """Fields that do not hold what they must; absent and null ones are among them."""
    return [
        f"{name} is {config.get(name)!r}, expected {expected.phrase}"
        for name, expected in fields.items()
        if not expected.fits(config.get(name))
    ]


def malformed(config: Mapping[str, Any], fields: Mapping[str, Expected]) -> list[str]:
    """Fields that hold what no such field can; absent and null ones are somebody else's question."""
    return wrong(config, {name: expected for name, expected in fields.items() if config.get(name) is not None})
