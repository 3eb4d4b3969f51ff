"""A draft's loss and gradients on documents of a tiny real target, as the trainer takes them."""

import jax
import jax.numpy as jnp
from eagle3 import algorithm, target_of
from flax import nnx

from flaxdraft.algorithms.eagle3.drafts import llama
from flaxdraft.config import DataConfig, TrainConfig
from flaxdraft.data.draft_vocabulary import choose_vocab
from flaxdraft.data.pipeline import batches_from, make_pipeline
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.devices.weight_places import on_mesh, weight_on_mesh
from flaxdraft.nn.precision import Precision
from flaxdraft.targets import from_pretrained
from flaxdraft.train.batch_placement import SHARDING
from flaxdraft.train.loop import Trainer
from flaxdraft.train.state import split_draft

STEPS, WIDTH = 3, 64


class Teaching:
    """One target, one draft, one compiled program for each batch shape."""

    def __init__(self, path, token_counts):
        self.mesh, self.algorithm = make_mesh(1), algorithm(STEPS)
        taps = self.algorithm.tap_layers(8, None)
        self.target = from_pretrained(str(path), mesh=self.mesh, tap_layers=taps).model
        self.vocab = choose_vocab(token_counts, [0, 1, 2], WIDTH)
        config = llama.Config(**llama.Config.for_target(self.target.config, WIDTH))
        embedding, head = jax.device_get((self.target.embedding(), self.target.head()))
        draft = llama.make(
            config,
            self.vocab,
            target_of(jnp.asarray(embedding)),
            precision=Precision(),
            sharding=SHARDING,
            rngs=nnx.Rngs(0),
        )
        graphdef, *states = split_draft(draft)
        self.params, self.frozen = (on_mesh(state, self.mesh, SHARDING) for state in states)
        self.head_WE = weight_on_mesh("head", jnp.asarray(head[self.vocab.target_ids_W]), self.mesh, SHARDING.weight_ve)

        def loss(params, frozen, example):
            draft = nnx.merge(graphdef, params, frozen)
            sums = self.algorithm.sums(draft, example, self.algorithm.first_carry())
            numerator, count = sums.terms()
            return numerator / count, sums

        self._gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def pipeline(self, documents, **train):
        fields = {"num_steps": 1, "batch_size": 4, "length_buckets": 1} | train
        return make_pipeline(documents, self.algorithm, TrainConfig(**fields), DataConfig(prompts="none"), seed=5)

    def epoch(self, documents, **train):
        """((loss, sums), gradients) of every batch of the first epoch, on the host."""
        pipeline = self.pipeline(documents, **train)
        trainer = Trainer(None, None, self.algorithm, self.mesh, self.vocab, self.head_WE, None, 2, self.target)
        with jax.set_mesh(self.mesh):
            hosts = batches_from(pipeline, 0, pipeline.steps_per_epoch, 2)
            return [jax.device_get(self._gradients(self.params, self.frozen, trainer.example(host))) for host in hosts]
