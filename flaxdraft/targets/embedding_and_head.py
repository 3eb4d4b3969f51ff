"""What stands before and behind a target's layers: embedding, final norm, head. Where features are given, or are made
elsewhere, training needs nothing else of a target, so that its layers need not fit beside the draft."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxdraft.devices import host_reads
from flaxdraft.interfaces import EmbeddingAndHead
from flaxdraft.targets import OpenedTarget
from flaxdraft.targets.decoder import DecoderConfig, DecoderTarget


@dataclasses.dataclass(frozen=True)
class EmbeddingAndHeadWeights:
    """The part of `interfaces.Target` that is not computed. The arrays lie on the host until they are asked for."""

    config: DecoderConfig
    tensors: dict[str, np.ndarray]  # embedding [V, E], final_norm [E], and head [V, E] unless it is tied

    @classmethod
    def of_target(cls, opened: OpenedTarget, config: DecoderConfig) -> EmbeddingAndHeadWeights:
        """From a target's files, of which nothing else is read; float32."""
        names = {path: name for path, name, _ in opened.family.name_table(config)}
        wanted = {"embedding": "embed", "final_norm": "norm/scale", "head": "head"}

        def read(name: str) -> np.ndarray:
            whole = tuple(slice(0, size) for size in opened.source.shape(name))
            return np.asarray(opened.source.read(name, whole), np.float32)

        tensors = {key: read(names[path]) for key, path in wanted.items() if path in names}
        tensors["final_norm"] = tensors["final_norm"] + np.float32(config.norm_offset)
        return cls(config, tensors)

    @classmethod
    def of_loaded(cls, target: DecoderTarget) -> EmbeddingAndHead:
        """Of a target that is split over devices: put together on the host. All processes of its mesh must call it."""
        if target.mesh is None:
            return target
        tensors = {"embedding": target.embedding(), "final_norm": target.final_norm()}
        tensors |= {} if target.config.tie_word_embeddings else {"head": target.head()}
        return cls(target.config, host_reads.read(tensors))

    def embedding(self) -> Float[Array, "V E"]:
        return jnp.asarray(self.tensors["embedding"])

    def head(self) -> Float[Array, "V E"]:
        return jnp.asarray(self.tensors.get("head", self.tensors["embedding"]))

    def final_norm(self) -> Float[Array, " E"]:
        return jnp.asarray(self.tensors["final_norm"])
