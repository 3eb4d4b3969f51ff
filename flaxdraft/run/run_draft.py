"""The stages of a run up to its trained draft: target, data, training.

Every stage keeps its result under the output directory and is skipped while its inputs stay the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.text import Text

from flaxdraft import algorithms
from flaxdraft.config import RunConfig, nearest
from flaxdraft.data.answers import capture, is_captured, load_split, write_texts
from flaxdraft.data.documents import AnsweredPrompts, Documents
from flaxdraft.data.draft_vocabulary import choose_vocab, coverage, describe_sizes, read_map, source_of
from flaxdraft.data.online import open_conversations
from flaxdraft.data.pipeline import make_pipeline
from flaxdraft.data.prompts import SPLITS, Prompt, read_prompts, render
from flaxdraft.data.store import MANIFEST, FeatureStore
from flaxdraft.data.templates import tokenizer_digest
from flaxdraft.decode.decoding import Settings
from flaxdraft.decode.greedy import Row
from flaxdraft.devices import host_reads, hosts
from flaxdraft.devices.mesh import Sharding, make_mesh
from flaxdraft.devices.weight_places import check_heads, on_mesh, weight_on_mesh
from flaxdraft.errors import InputError
from flaxdraft.evaluate.during_training import UntrainedDraft, make_decoded_accept_length
from flaxdraft.files.fetch import content_of, digest_of, sha256_of
from flaxdraft.interfaces import Target, VocabMap
from flaxdraft.nn.precision import DTYPES, Precision
from flaxdraft.plugins import find_by_name
from flaxdraft.progress import CONSOLE
from flaxdraft.run.init_from import check_target, load_start, start_files
from flaxdraft.run.run_target import RunTarget
from flaxdraft.serving.contract import find_engine
from flaxdraft.serving.export import check_servable
from flaxdraft.serving.record import DraftRecord
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.stages.claims import Stage, check_claimed, claim
from flaxdraft.stages.same_inputs import flatten
from flaxdraft.targets.decoder import DecoderConfig
from flaxdraft.targets.embedding_and_head import OuterWeights
from flaxdraft.train.batch_placement import SHARDING, check_batch
from flaxdraft.train.loop import Trainer
from flaxdraft.train.metrics_log import check_wandb
from flaxdraft.train.resume import Resume, check_request
from flaxdraft.train.state import split_draft

STAGES = ("target", "data", "train", "evaluate", "export", "report")


def say(stage: str, text: str) -> None:
    CONSOLE.print(Text.assemble((f"{STAGES.index(stage) + 1}/{len(STAGES)} {stage}", "bold"), f"  {text}"))


class Run:
    """One configuration: what it is made of, and its stages up to the trained draft."""

    def __init__(self, config: RunConfig, allowed: Sequence[str] = ()):
        """
        Args:
            allowed: fields of the configuration that may differ from what the output directory was made with.

        Raises:
            InputError: the configuration names something that does not exist, or its parts do not go together.
        """
        self.config = config
        folder = find_by_name(algorithms.PACKAGE, config.algorithm.name, "algorithm.name").__name__
        self.draft_module = find_by_name(f"{folder}.drafts", config.draft.architecture, "draft.architecture")
        self.algorithm = algorithms.make(config.algorithm, packed=config.train.pack_length is not None)
        find_engine(self.algorithm.serving(), config.export.engine, "export.engine")
        self.evaluation = self.algorithm.drafting(config.evaluate.chain_length)
        # Training rows come from prompts that the target answers, from a store, or from conversations.
        given = [name for name in ("store", "conversations") if getattr(config.data, name) is not None]
        if len(given) == 2:
            raise InputError("data.store, data.conversations: both are given; training reads one of them")
        if given == ["conversations"] and config.mesh.sequence > 1:
            raise InputError(
                "mesh.sequence: features that the target makes while the draft trains (data.conversations) are not "
                "split along rows; capture a store (python -m flaxdraft.data capture) and give data.store, or leave "
                "mesh.sequence at 1"
            )
        self.splits = ("held_out",) if given else SPLITS
        self.prompts = read_prompts(config.data.prompts, self.splits)
        check_batch(config)
        self.mesh = make_mesh(**config.mesh.model_dump())
        self.data_dir = Path(config.output_dir) / "data"
        self.draft_dir = config.draft_dir
        data = config.data.model_dump(exclude={"prefetch"}) | {"prompts": sha256_of(Path(config.data.prompts))}
        if config.data.conversations is not None:
            data["conversations"] = digest_of(config.data.conversations, "data.conversations")
        if config.data.store is not None:
            data["store"] = sha256_of(FeatureStore(config.data.store).directory / MANIFEST)
        self.data_inputs = {
            "target": config.target.model_dump() | {"content": content_of(config.target.path, config.target.sha256)},
            "data": data, "evaluate": {"max_new_tokens": config.evaluate.max_new_tokens},
        }  # fmt: skip
        draft = config.draft.model_dump()
        if config.draft.vocab_map is not None:
            draft["vocab_map"] = digest_of(config.draft.vocab_map, "draft.vocab_map")
        self.start = None  # the draft that training begins from, if not from nothing
        if config.draft.init_from is not None:
            self.start = load_start(config.draft, self.draft_module)
            draft["init_from"] = {path.name: sha256_of(path) for path in start_files(config.draft.init_from)}
        self.draft_inputs = self.data_inputs | {
            "seed": config.seed, "draft": draft, "algorithm": config.algorithm.model_dump(),
            "train": config.train.model_dump(),
        }  # fmt: skip
        self.target = RunTarget(
            config.target, self.algorithm, lambda: say("target", config.target.path), self._check_target
        )
        self.allowed = allowed
        known = [*flatten(self.draft_inputs)]
        for field in allowed:
            if field not in known:
                raise InputError(f"--allow-change: no field {field!r}; {nearest(field, known)}")
        check_wandb(config.train.wandb)
        check_request(config.train.resume, self.draft_dir / "checkpoints")
        if jax.process_count() > 1 and self.mesh.size != jax.device_count():
            raise InputError(
                f"mesh: {self.mesh.size} devices of {jax.device_count()}; a run of {jax.process_count()} processes "
                "uses all of them"
            )

    def claim_folders(self) -> None:
        """
        Raises:
            InputError: see `claim` and `check_claimed`.
        """
        with hosts.main_first("claim"):
            own = claim if hosts.is_main() else check_claimed
            own(self.data_dir, self.data_inputs, "Give another output_dir, or remove it to start anew.")
            own(
                self.draft_dir, self.draft_inputs, "Give another name= or output_dir=, or remove it to start anew.",
                self.allowed,
            )  # fmt: skip

    def _check_target(self, target: DecoderConfig) -> None:
        if self.start is not None:
            check_target(self.start, self.config.draft.init_from, target, self.target.opened.source.config)

    @functools.cached_property
    def outer(self) -> Target | OuterWeights:
        """The target's embedding, head and final norm; its layers are not loaded where their features are given."""
        if self.config.data.store is not None:
            return OuterWeights(self.target.config, self.documents.target())
        if self.config.data.conversations is not None:
            return OuterWeights.of_target(self.target.opened, self.target.config)
        return self.target.loaded.model

    def _split(self, split: str) -> list[Prompt]:
        prompts = [prompt for prompt in self.prompts if prompt.split == split]
        count = self.config.data.num_prompts
        if split == "held_out" or count is None:
            return prompts
        if count > len(prompts):
            raise InputError(f"data.num_prompts: found {count}, {self.config.data.prompts} has {len(prompts)}")
        # A fixed mixture of categories, whatever the order of the file.
        order = np.random.default_rng(0).permutation(len(prompts))[:count]
        return [prompts[i] for i in sorted(order)]

    @functools.cache  # noqa: B019 (one run a process)
    def data(self) -> dict[str, Any]:
        """Answers and features of both splits, on disk; returns their order and the tokenizer's special ids."""
        stage = Stage(self.data_dir / "data.json", self.data_inputs)
        result = stage.load()
        data = self.config.data
        if result is None or not all(
            is_captured(self.data_dir, split, len(order), data.rows) for split, order in result["order"].items()
        ):
            self.check_draft()
            target = self.target.loaded
            say("data", "the target answers the prompts")
            self._check_context()
            special = sorted({*target.tokenizer.all_special_ids, *target.stop_tokens})
            result = {"order": {}, "eos": target.tokenizer.eos_token_id, "special": special}
            for split in self.splits:
                dtype = data.feature_dtype if split == "train" else "float32"
                _, limit = self._answer_limit(split)
                prompts = self._split(split)
                result["order"][split] = order = capture(
                    self.data_dir, split, target.model, target.tokenizer, prompts,
                    max_prompt_tokens=data.max_prompt_tokens, max_new_tokens=limit, num_rows=data.rows, dtype=dtype,
                )  # fmt: skip
                rows = load_split(self.data_dir, split, len(order), data.rows)
                write_texts(self.data_dir / f"{split}.json", target.tokenizer, prompts, order, rows)
            stage.store(result)
        else:
            say("data", f"done before: {self.data_dir}")
        return result

    def _answer_limit(self, split: str) -> tuple[str, int]:
        """The field and its value."""
        if split == "train":
            return "data.max_answer_tokens", self.config.data.max_answer_tokens
        return "evaluate.max_new_tokens", self.config.evaluate.max_new_tokens

    def _check_context(self) -> None:
        """
        Raises:
            InputError: a prompt with its longest answer would leave the target's context.
        """
        data, context = self.config.data, self.target.config.max_position_embeddings
        for split in self.splits:
            field, limit = self._answer_limit(split)
            rendered = [render(self.target.tokenizer, p, data.max_prompt_tokens) for p in self._split(split)]
            longest = max(map(len, rendered))
            if longest + limit > context:
                raise InputError(
                    f"{field}: found {limit}; after the longest prompt ({longest} tokens) that leaves the target's "
                    f"context of {context}; expected at most {context - longest}"
                )

    def draft_config(self):
        """The architecture's Config: the target's sizes, with draft.fields on top; or that of draft.init_from."""
        if self.start is not None:
            return self.start.config
        defaults = self.draft_module.Config.for_target(self.target.config, self.config.draft.draft_vocab_size)
        fields = self.config.draft.fields
        for name in fields:
            if name not in defaults or name == "rope":
                known = sorted(set(defaults) - {"rope"})
                raise InputError(
                    f"draft.fields: {self.config.draft.architecture} has no {name!r}; {nearest(name, known)}"
                )
        return self.draft_module.Config(**defaults | fields)

    def make_draft(self, sharding: Sharding, compute: str, float8: bool = False) -> nnx.Module:
        """A draft as it is before training."""
        config = self.draft_config()
        draft = self.draft_module.make(
            config, self.vocab, self.outer, precision=Precision(compute=DTYPES[compute], float8=float8),
            sharding=sharding, rngs=nnx.Rngs(self.config.seed),
        )  # fmt: skip
        if self.start is not None:
            nnx.update(draft, self.start.params)
        elif self.config.draft.warm_start:
            self.algorithm.warm_start(draft, self.outer, self.vocab)
        return draft

    @functools.cached_property
    def data_rows(self) -> dict[str, list[Row]]:
        """The answered splits in memory, loaded once and only where a stage needs them."""
        order, num_rows = self.data()["order"], self.config.data.rows
        return {split: load_split(self.data_dir, split, len(ids), num_rows) for split, ids in order.items()}

    @functools.cached_property
    def documents(self) -> Documents:
        """What is trained on.

        Raises:
            InputError: the store is of another target or tokenizer; conversations cannot be read or rendered.
        """
        vocab_size = self.target.config.vocab_size
        if self.config.data.conversations is not None:
            return open_conversations(self.config.data, self.target.tokenizer, vocab_size)
        if self.config.data.store is None:
            return AnsweredPrompts(self.data_rows["train"], vocab_size)
        expected = {
            "target": content_of(str(self.target.opened.path), self.config.target.sha256),
            "tokenizer": tokenizer_digest(self.target.tokenizer), "tap_layers": [*self.target.config.tap_layers],
        }  # fmt: skip
        return FeatureStore(self.config.data.store, expected)

    @functools.cached_property
    def vocab(self) -> VocabMap:
        """The draft vocabulary: that of draft.init_from or draft.vocab_map, or chosen from the training answers."""
        counts = self.documents.token_counts
        if self.start is not None:
            vocab = self.start.vocab
        elif self.config.draft.vocab_map is not None:
            vocab = read_map(self.config.draft.vocab_map, len(counts), self.config.draft.draft_vocab_size)
        else:
            source = source_of(tokenizer_digest(self.target.tokenizer), self.documents.digest)
            vocab = choose_vocab(counts, self.data()["special"], self.config.draft.draft_vocab_size, source)
        CONSOLE.print(
            f"  {len(self.documents.lengths)} answers, {counts.sum()} tokens, {np.count_nonzero(counts)} distinct; the "
            f"draft vocabulary of {vocab.draft_vocab_size} holds {coverage(counts, vocab):.1%} of them"
        )
        CONSOLE.print(f"  {describe_sizes(counts, self.data()['special'])}")
        return vocab

    @functools.cached_property
    def params(self) -> nnx.State:
        """The trained parameters, on one device; where training is done they come from its last checkpoint."""
        config = self.config.train
        self.check_draft()
        self.record()
        rows = jax.NamedSharding(self.mesh, SHARDING.act_b)
        part = hosts.local_part(rows, config.batch_size)
        pipeline = make_pipeline(self.documents, self.algorithm, config, self.config.data, self.config.seed, part)
        CONSOLE.print(f"  {pipeline.layout.describe()}")
        # Loaded before the mesh is set: target and vocabulary stay on one device, where decoding uses them.
        _, teacher = self.vocab, self.teacher(config.compute_dtype)
        say("train", f"{config.num_steps} steps of {config.batch_size} answers to {self.target.opened.path.name}")
        decoded = self.decoded_in_training()
        graphdef, params, frozen = split_draft(self.make_draft(SHARDING, config.compute_dtype, config.float8))
        check_heads(self.draft_config(), SHARDING, self.mesh.shape)
        with jax.set_mesh(self.mesh):
            params, frozen = (on_mesh(state, self.mesh, SHARDING) for state in (params, frozen))
            CONSOLE.print(
                f"  {sum(math.prod(p.shape) for p in jax.tree.leaves(params)) / 1e6:.1f} M trained parameters"
            )
            resume = Resume(config.resume, self.draft_inputs, self.vocab, self.allowed)
            trainer = Trainer(
                self.draft_dir, config, self.algorithm, self.evaluation, self.mesh, self.vocab,
                jax.tree.map(lambda x: weight_on_mesh("teacher", x, self.mesh, SHARDING.weight_ve), teacher), resume,
                self.config.data.prefetch, self.reader, decoded,
            )  # fmt: skip
            params = trainer.train(graphdef, params, frozen, pipeline, self.data_rows["held_out"])
        return jax.device_put(host_reads.read(params), jax.local_devices()[0])

    def decoded_in_training(self) -> Callable[[nnx.State], float] | None:
        """The accept length of `evaluate.decode_prompts` held-out prompts, by decoding in float32."""
        config = self.config.evaluate
        if not config.decode_prompts:
            return None
        graphdef, _, frozen = split_draft(self.make_draft(Sharding.none(), "float32"))
        return make_decoded_accept_length(
            self.target.loaded.model, UntrainedDraft(graphdef, frozen, self.algorithm.drafter()),
            self.data_rows["held_out"], config.decode_prompts,
            Settings(config.max_new_tokens, config.chain_length, (self.data()["eos"],)),
        )  # fmt: skip

    @property
    def reader(self) -> Target | None:
        """The target on the training mesh, where it reads conversations while the draft trains."""
        if self.config.data.conversations is None:
            return None
        return self.target.on(self.mesh, DTYPES[self.config.train.compute_dtype])

    def check_draft(self) -> None:
        """Before any time is spent on it.

        Raises:
            InputError: there is no such draft or vocabulary map next to this target, or no server loads it.
        """
        if self.start is None and self.config.draft.vocab_map is not None:
            read_map(self.config.draft.vocab_map, self.target.config.vocab_size, self.config.draft.draft_vocab_size)
        about = AboutTarget(self.target.opened.source.config, self.target.config.tap_layers)
        check_servable(self.algorithm, self.draft_config(), about, self.config.export.engine)

    def record(self) -> None:
        """Keeps what a later export asks for."""
        taps, target = self.target.config.tap_layers, self.target.opened.source.config
        if hosts.is_main():
            DraftRecord(self.draft_config().to_hf(), taps, target, self.config.target.path).write(self.draft_dir)

    def teacher(self, dtype: str) -> Any:
        """See `Algorithm.teacher`."""
        return self.algorithm.teacher(self.outer, self.vocab, DTYPES[dtype])
