"""The list of `breaks.py`: what is broken, and who should notice."""

from typing import NamedTuple


class Break(NamedTuple):
    what: str
    old: str  # stands once in the package; white space may differ
    new: str
    tests: tuple[str, ...]  # arguments of pytest
    why: str = ""  # it may go unnoticed


def wire(*fields: str) -> tuple[str, ...]:
    """Rows of test_wire.py."""
    return ("tests/test_wire.py", "-k", " or ".join(f"[{field}]" for field in fields))


def of(file: str, name: str = "") -> tuple[str, ...]:
    return (f"tests/{file}.py", *(("-k", name) if name else ()))


OPTIMIZER = (
    Break("betas are ignored", "*config.betas,", "", wire("train.betas")),
    Break("the betas are exchanged", "*config.betas,", "*config.betas[::-1],", of("test_one_update")),
    Break("eps is ignored", "eps=config.eps,", "", wire("train.eps")),
    Break("gradients are not clipped", "optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)", "adamw",
          wire("train.clip_norm")),
    Break("updates are clipped in place of gradients",
          "optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)",
          "optax.chain(adamw, optax.clip_by_global_norm(config.clip_norm))", of("test_one_update")),
    Break("weight decay is ignored", "eps=config.eps, weight_decay=config.weight_decay,", "eps=config.eps,",
          wire("train.weight_decay")),
    Break("norm scales decay too", "lambda p: p.ndim > 1 and not", "lambda p: p.ndim > 0 and not",
          of("test_train_step", "norms_do_not_decay")),
    Break("a head that is kept decays", "p.ndim > 1 and not isinstance(variable, Kept)", "p.ndim > 1",
          of("test_train_step", "kept")),
    Break("muon takes the head as well", '"lm_head" in name or "embed_tokens" in name', '"embed_tokens" in name',
          of("test_train_step", "muon")),
    Break("the micro-batches' gradients are averaged, and divided again", "lambda g: g / count, gradients",
          "lambda g: g / count / num_microbatches, gradients", of("test_one_update")),
    Break("the running mean moves the wrong way", "decay * m + (1 - decay) * p",
          "(1 - decay) * m + decay * p", of("test_train_step", "running_mean")),
    Break("the running mean is not handed to the step", "compute, config.accumulate, config.ema_decay)",
          "compute, config.accumulate)", wire("train.ema_decay")),
    Break("the weights are exported in place of their running mean",
          "return state.params if state.ema is None else state.ema", "return state.params",
          of("test_wire", "trained_weights")),
    Break("a step that is not finite is taken", "jnp.where(finite, n, o), new, old", "n, new, old",
          of("test_train_step", "not_finite")),
    Break("accepted shares are not carried to the next step", "return jnp.where(sums.row_count_J > 0, mean_J,",
          "return jnp.where(sums.row_count_J < 0, mean_J,", of("test_train_step", "acceptance")),
)  # fmt: skip

SCHEDULE = (
    Break("the warmup is ignored", "max(round(config.warmup_ratio * config.num_steps), 1)", "1",
          wire("train.warmup_ratio")),
    Break("cosine ends at 0", "warmup, last, peak * config.final_lr_ratio)", "warmup, last, 0.0)",
          wire("train.final_lr_ratio")),
    Break("wsd goes down too early", "ends.append(last - decay)", "ends.append(warmup)",
          of("test_train_step", "schedules")),
    Break("wsd goes down over half of the steps", "max(round(config.decay_ratio * config.num_steps), 1)",
          "max(round(0.5 * config.num_steps), 1)", wire("train.decay_ratio")),
    Break("constant is cosine", 'if config.schedule == "cosine":', 'if config.schedule != "wsd":',
          wire("train.schedule")),
)  # fmt: skip

BEGINNING = (
    Break("the seed of the weights is fixed", "rngs=nnx.Rngs(setup.config.seed)", "rngs=nnx.Rngs(0)", wire("seed")),
    Break("the seed of the batches is fixed", "config, data, seed, part)", "config, data, 0, part)",
          wire("seed")),
    Break("every step of the unroll weighs the same", "self.settings.step_decay**j", "1.0",
          ("tests/test_wire.py", "-k", "eagle3 and step_decay")),
    Break("warm_start is ignored", "elif setup.config.draft.warm_start:", "else:",
          wire("draft.warm_start")),
    Break("float8 is ignored", "Precision(compute=compute, float8=config.float8)", "Precision(compute=compute)",
          wire("train.float8")),
    Break("init_from gives sizes and map, but no weights", "nnx.update(draft, setup.start.params)", "pass",
          wire("draft.init_from")),
    Break("the teacher's head is not narrowed", "[vocab.target_ids_W].astype(dtype)",
          "[vocab.target_ids_W]", wire("train.compute_dtype")),
)  # fmt: skip

SHARDING = (
    Break("an axis of the mesh is ignored", "make_mesh(**config.mesh.model_dump(), devices",
          'make_mesh(**config.mesh.model_dump(exclude={"tensor"}), devices', wire("mesh.tensor")),
    Break("every micro-batch reduces its gradients", "unreduced = trained and", "unreduced = False and",
          of("multidevice/test_meshes", "reduced_once")),
    Break("rows that another device owns are trained too", "supervised_JBR & chosen.shared.owned_BR[None]",
          "supervised_JBR", of("multidevice/test_meshes", "curve and sequence and llama")),
    Break("weights are whole along fsdp", "weight_df=P(FSDP_AXIS, TENSOR_AXIS), weight_fd",
          "weight_df=P(None, TENSOR_AXIS), weight_fd", wire("mesh.fsdp")),
    Break("every device of the tensor axis holds all heads", "act_btnh=P(batch, None, TENSOR_AXIS, None)",
          "act_btnh=P(batch, None, None, None)", of("multidevice/test_meshes", "curve and tensor and llama"),
          why="the same figures, with more memory and work on each device, which no default test measures"),
    Break("each device's sums are its own", "sums = jax.tree.map(lambda x: added_up(x, jax.P(), rows_axes), sums)",
          "", of("multidevice/test_meshes", "curve and data and llama")),
)  # fmt: skip

RESUME = (
    Break("the data begin anew", 'begun.arrays, begun.record["step"]', "begun.arrays, 0", wire("train.resume")),
    Break("batches are those of the first steps", "grain.MapDataset.range(start, stop)",
          "grain.MapDataset.range(stop - start)", of("test_pipeline", "reading_ahead")),
    Break("the vocabulary map of a checkpoint is not compared",
          "if not np.array_equal(target_ids, vocab.target_ids_W) or record", "if record",
          of("test_resume", "vocabulary")),
    Break("a run may go on with another seed", '"target.path", "target.sha256",',
          '"target.path", "target.sha256", "seed",',
          of("test_resume", "may_not_change")),
    Break("damaged weights are taken", 'if int(marks[f"{name}{label}"]) != int(value):', "if False:",
          of("test_checkpoint", "damaged_files")),
    Break("the best checkpoint is not kept", "return stay if winner is None else stay | {winner}", "return stay",
          of("test_checkpoint", "rotation")),
    Break("metrics of steps that are done again stay", 'if line["step"] <= step] if step else []',
          "] if step else []", of("test_metrics_on_resume")),
    Break("step N is the newest", "else found.get(int(step[1]))", "else latest",
          of("test_resume", "asked_for")),
)  # fmt: skip

MASKS = (
    Break("a step is supervised behind one that is not", "mask = mask & usable(j + 2)", "mask = usable(j + 2)",
          of("test_eagle3", "supervision")),
    Break("supervision goes on into the next document", "& (ahead(segments_BT, k) == segments_BT)", "",
          of("test_eagle3", "supervision")),
    Break("packed documents see each other", "take_rows(document_ranges(segments_BT).first_BR, rows_BR)",
          "jnp.zeros_like(rows_BR)", of("test_eagle3", "packed")),
    Break("the teacher is a row early", "(take_rows(x, rows + 1) for x in",
          "(take_rows(x, rows) for x in", of("test_eagle3", "loop")),
    Break("later steps sit at the first step's position", "draft.projections(tokens, hidden), positions_BR + j",
          "draft.projections(tokens, hidden), positions_BR", of("test_speculative", "mla-3")),
    Break("last_turn_only is ignored", "data.max_length, data.last_turn_only,", "data.max_length, False,",
          wire("data.last_turn_only")),
    Break("mask_reasoning is ignored", ", data.mask_reasoning,", ", False,", wire("data.mask_reasoning")),
    Break("offsets are those that a tokenizer may trim", "inner.post_processor = None", "pass",
          of("test_turns", "white_space")),
    Break("white space behind an end of turn is supervised", "return begin + len(kept) if any(", "return end if any(",
          of("test_turns", "would_write")),
    Break("marks alone say what was generated",
          "touched = [(begin, end) for begin, end in found if max(begin, mark[0]) < min(end, mark[1])]",
          "touched = [mark]", of("test_turns", "would_write")),
    Break("a header is supervised where no prompt is written", "if touched and not habits_of(chat).prompt:",
          "if False:", of("test_turns", "leave_out_what")),
    Break("an end of text hides the generation prompt", "plain = _without(footer, plain)", "pass",
          of("test_built_templates")),
    Break("a prompt that is written unasked is supervised", "begin += len(prompt)", "pass",
          of("test_turns", "without_being_told")),
    Break("an earlier turn's prompt is taken for a later one's", "if not prompt or (marker and marker in lead):",
          "if not prompt:", of("test_turns", "header_of_its_own")),
    Break("tool calls keep their JSON text", "arguments = json.loads(arguments) if arguments.strip() else None",
          "return arguments", of("test_tool_calls", "arguments")),
    Break("the date is today's", "datetime.fromisoformat(self.date)", "datetime.now()",
          of("test_chat_inputs", "date")),
    Break("the target's context is not looked at", "min(self.max_length, self.context)", "self.max_length",
          of("test_target_files", "context")),
    Break("last_batch is ignored", '"last_batch": data.last_batch', '"last_batch": "fill"', wire("data.last_batch")),
    Break("prefetch is ignored", "teacher, resume, data.prefetch,", "teacher, resume, 4,", wire("data.prefetch")),
    Break("the answer begins a token early", "np.arange(len(row.tokens)) >= row.num_prompt",
          "np.arange(len(row.tokens)) >= row.num_prompt - 1", of("test_pipeline")),
)  # fmt: skip

SEAMS = (
    Break("the loss leaves out the scale and the cap of the logits", "How(self._loss_chunk(anchor_BA), draft.made_of)",
          "How(self._loss_chunk(anchor_BA))", of("test_dflash", "scaled_and_capped")),
    Break("values of a block draft are not scaled", "if self.value_scale != 1:", "if False:",
          of("test_dflash", "scaled_and_capped")),
    Break("sliding layers see their whole block", "slides if self.is_causal is None else self.is_causal",
          "bool(self.is_causal)", of("test_dflash", "each_layer_sees")),
    Break("rows that fill a batch up are divided by", "jnp.any(asked_BAS, axis=(1, 2)).astype",
          "jnp.ones(len(asked_BAS)).astype", of("test_dflash", "empty_rows")),
    Break("an evaluation goes on on another mesh", '"target_mesh": {name: size for name, size in shape',
          '"mesh": {name: size for name, size in shape', of("test_evaluate_command", "keeps_its_mesh")),
)  # fmt: skip

EXPORT = (
    Break("d2t holds ids",
          "return self.target_ids_W.astype(np.int64) - np.arange(self.draft_vocab_size, dtype=np.int64)",
          "return self.target_ids_W.astype(np.int64)", of("test_export", "vocabulary_tables")),
    Break("the dtype of the export is fixed", "dtype=config.export.dtype", 'dtype="float32"',
          wire("export.dtype")),
    Break("the engine of the export is fixed", "engine=config.engine, origin", 'engine="sglang", origin',
          wire("export.engine")),
    Break("the tapped layers of the export are the defaults",
          "AboutTarget(self.opened.hf_config, self.config.tap_layers)",
          "AboutTarget(self.opened.hf_config, [1, 3, 4])", wire("target.tap_layers")),
    Break("tapped layers are counted by output everywhere", "inputs = [layer + 1 for layer in outputs]",
          "inputs = list(outputs)", of("test_export", "layer_ids")),
    Break("gate and up are exchanged", '("mlp/gate_proj/kernel", "midlayer.mlp.gate_proj.weight", "transpose"), '
          '("mlp/up_proj/kernel", "midlayer.mlp.up_proj.weight", "transpose"),',
          '("mlp/gate_proj/kernel", "midlayer.mlp.up_proj.weight", "transpose"), '
          '("mlp/up_proj/kernel", "midlayer.mlp.gate_proj.weight", "transpose"),', of("test_exported_names")),
    Break("weights that are not finite are exported",
          'if not np.isfinite(array.astype(np.float32)).all(): raise InputError(f"export:',
          'if False: raise InputError(f"export:', of("test_export", "not_finite")),
)  # fmt: skip

EVALUATION = (
    Break("the walk goes on a row at a time", "row, left = row + gained, left - gained",
          "row, left = row + 1, left - gained", of("test_acceptance", "walk")),
    Break("the walk begins behind the answer's first token", "row, left, yields = num_prompt - 1,",
          "row, left, yields = num_prompt,", of("test_acceptance", "walk")),
    Break("a chain is as long as the unroll", "algorithm.drafting(config.evaluate.chain_length)",
          "algorithm.drafting(config.algorithm.ttt_length)", wire("evaluate.chain_length")),
    Break("hits behind a miss count", "jnp.cumprod(hit_BRJ, axis=-1, dtype=jnp.int32)", "hit_BRJ",
          of("test_speculative", "mla-3")),
    Break("what training is evaluated by are its own answers",
          'DTYPES[config.compute_dtype], material.answers.rows("held_out")',
          'DTYPES[config.compute_dtype], material.answers.rows("train")',
          wire("evaluate.max_new_tokens")),
    Break("decode_prompts is one", "draft(setup, material), rows, config.decode_prompts,",
          "draft(setup, material), rows, 1,", wire("evaluate.decode_prompts")),
    Break("the target stays beside training", "target.release()", "pass",
          of("multidevice/test_target_of_a_run", "gone and answers")),
    Break("target.dtype is ignored", "dtype = dtype_or_default(config.target.dtype)", "dtype = dtype_or_default(None)",
          wire("target.dtype")),
    Break("target.mesh is ignored", "shape = given or", "shape =", wire("target.mesh.fsdp")),
    Break("where the target lies binds its answers", 'model_dump(exclude={"mesh"})', "model_dump()",
          of("test_stored_answers", "where_the_target_lies")),
    Break("every answer is called identical",
          "one.prompt == two.prompt and one.answer.tokens == two.answer.tokens for one, two", "True for one, two",
          of("test_results")),
    Break("the final evaluation is not of the chosen weights",
          "untrained.trained(chosen_params(setup, trained, chosen))",
          "jax.tree.map(lambda x: x * 0, untrained.trained(chosen_params(setup, trained, chosen)))",
          ("tests/test_wire.py", "-k", "trained_weights")),
    Break("every pass counts twice", "num_pass_B=carry.num_pass_B + running_B",
          "num_pass_B=carry.num_pass_B + 2 * running_B", of("test_speculative", "mla-3")),
)  # fmt: skip

HOSTS = (
    Break("the heartbeat is fixed", "heartbeat_timeout_seconds=config.heartbeat_seconds",
          "heartbeat_timeout_seconds=30", wire("hosts.heartbeat_seconds")),
    Break("the hosts' section is not handed on", "supervised(config.hosts, work)",
          "supervised(type(config.hosts)(), work)", wire("hosts.coordinator")),
)  # fmt: skip

GOLDEN = ("tests/parity/test_dflash_golden.py",)
BLOCKS = (
    Break("a block sees its anchor among the text", "anchor_BA[:, :, None] - 1, begin_BAS.shape",
          "anchor_BA[:, :, None], begin_BAS.shape", of("test_block_attention")),
    Break("a window is counted from the anchor",
          "anchor_BA[:, :, None] + jnp.arange(self.size)[None, None] - (self.window - 1)",
          "anchor_BA[:, :, None] - self.window", of("test_block_attention")),
    Break("every block is causal", "near & ((ahead <= 0) | (not self.causal))", "near & (ahead <= 0)",
          of("test_block_attention")),
    Break("the context passes the layer's input norm", "self.self_attn.project(context_BTD)",
          "self.self_attn.project(self.input_layernorm(context_BTD))", GOLDEN),
    Break("labels are shifted by one", "Layout(block_size, shift=0, first=1)", "Layout(block_size, shift=1, first=1)",
          of("test_dflash", "predicts")),
    Break("blocks see other documents", "first_BA = take_rows(document_ranges(batch.segments_BT).first_BR, anchor_BA)",
          "first_BA = anchor_BA * 0", of("test_dflash", "packed")),
    Break("blocks predict other documents", "assistant & (segment == of_anchor_BA1) & (of_anchor_BA1 > 0)",
          "assistant & (of_anchor_BA1 > 0)", of("test_dflash", "predicts")),
    Break("weights by confidence have a gradient", "jnp.exp(-jax.lax.stop_gradient(loss_BAS))", "jnp.exp(-loss_BAS)",
          GOLDEN),
    Break("the decay begins at the anchor", "jnp.maximum(jnp.arange(layout.block_size) - layout.first, 0)",
          "jnp.arange(layout.block_size)", of("test_dflash", "weighs_one")),
    Break("the highest numbers are drawn", "np.where(possible_BT[:, :-1], uniform_BT, np.inf)",
          "np.where(possible_BT[:, :-1], -uniform_BT, np.inf)", GOLDEN),
    Break("every step draws the same anchors", "np.random.default_rng((draw.seed, draw.step, draw.first_row + i))",
          "np.random.default_rng((draw.seed, 0, draw.first_row + i))", of("test_dflash", "every_step")),
    Break("the anchor's slot proposes", "hidden_BSD[:, first : first + num_tokens]", "hidden_BSD[:, :num_tokens]",
          ("tests/parity/test_dflash_decoding.py",)),
)  # fmt: skip

HEAD_GOLDEN = ("tests/parity/test_domino_golden.py",)
HEADS = (
    Break("the gates of the head are exchanged", "(r, z, n), (of_r, of_z, of_n) =", "(z, r, n), (of_z, of_r, of_n) =",
          HEAD_GOLDEN),
    Break("a slot reads the token that it predicts", "if first: # slot k predicts", "if False: # slot k predicts",
          of("test_domino", "no_slot_reads")),
    Break("the base loss never fades", "jnp.minimum(step / settings.base_steps, 1)", "jnp.minimum(step, 0)",
          of("test_domino", "fades")),
    Break("the schedule stands still", "sums: Any, step: Int[Array, \"\"]) -> Int[Array, \"\"]: return step + 1",
          "sums: Any, step: Int[Array, \"\"]) -> Int[Array, \"\"]: return carry", of("test_domino", "fades")),
    Break("slots for which there is no token break a run", "jnp.cumprod(hit_BAQ | ~asked_BAQ,", "jnp.cumprod(hit_BAQ,",
          HEAD_GOLDEN),
    Break("the head reads the newest token alone", "chosen.append(choose(logits_BV, j)) token_B = chosen[-1][0]",
          "chosen.append(choose(logits_BV, j))",
          ("tests/parity/test_domino_decoding.py",)),
    Break("the head is served with any prefix", "prefix=1, plain_logits=True", "plain_logits=True",
          of("test_domino_check")),
    Break("the base loss counts in full", "of_final_C, of_base_C = weight_C * (1 - base_share), weight_C * base_share",
          "of_final_C, of_base_C = weight_C, weight_C * base_share", of("test_corrected_head")),
)  # fmt: skip

DFLASH2 = ("tests/parity/test_dflash2_golden.py",)
CANDIDATES = (
    Break("convolutions read what comes behind", "jnp.pad(x_BASD, ((0, 0), (0, 0), (j, 0), (0, 0)))[:, :, :size]",
          "jnp.pad(x_BASD, ((0, 0), (0, 0), (0, j), (0, 0)))[:, :, j:]", of("test_dflash2", "stay_in_their_block")),
    Break("convolutions go on from the block before", "size = c.block_size", "size = 2 * c.block_size",
          of("test_dflash2", "stay_in_their_block")),
    Break("the way out has the kernel of the way in", "return self._along(1, part(read), added)",
          "return self._along(0, part(read), added)", DFLASH2),
    Break("the kernels of the way out are made of what the part gives", "return self._along(1, part(read), added)",
          "return self._along(1, out := part(read), self.kernel_projection(out))", DFLASH2),
    Break("channels of a group lie apart", "jnp.repeat(added[:, :, :, j], width // added.shape[-1], axis=-1)",
          "jnp.tile(added[:, :, :, j], width // added.shape[-1])", DFLASH2),
    Break("the feed-forward passes no convolution",
          "self.mlp_conv(self.post_attention_layernorm(hidden_BRD), self.mlp)",
          "self.mlp(self.post_attention_layernorm(hidden_BRD))", DFLASH2),
    Break("the selector reads the token that it chooses", "jnp.maximum(jnp.arange(settings.block_size) - 1, 0)",
          "jnp.arange(settings.block_size)", DFLASH2),
    Break("the selector reads the newest token alone", "score_BK) chosen.append(choose(score_BV, j)) "
          "token_B = chosen[-1][0]", "score_BK)\n            chosen.append(choose(score_BV, j))", DFLASH2),
    Break("tokens that are no candidates are proposed", "jnp.full_like(logits_BQV[:, j], -jnp.inf).at[rows_B1, id_BK]",
          "logits_BQV[:, j].at[rows_B1, id_BK]", of("test_dflash2", "candidates_alone")),
    Break("labels that are no candidates count", "jnp.where(covered_C, loss_C, 0)", "loss_C",
          of("test_candidate_head")),
    Break("their gradient counts", "jnp.where(covered_C[:, None], jax.nn.softmax(score_CK, axis=1) - right_CK, 0)",
          "jax.nn.softmax(score_CK, axis=1) - right_CK", of("test_candidate_head")),
    Break("the selector's loss never reaches the logits", "if self.coupled:", "if False:", DFLASH2),
    Break("it reaches the states though it is stopped",
          "jax.lax.stop_gradient(states_BRD) if settings.selector_stop_gradient else states_BRD", "states_BRD",
          of("test_dflash2", "stopped_gradient")),
    Break("it reaches the logits though it is stopped", "not settings.selector_stop_gradient), self.how(",
          "True), self.how(", of("test_dflash2", "stopped_gradient")),
    Break("candidates are those of one device", "value_CK, at_CK = lax.top_k(values, count)",
          "value_CK, at_CK = lax.top_k(values[:, : logits_CW.shape[-1]], count)",
          of("test_candidate_head", "may_be_split")),
    Break("ids are counted on each device", "id_CK = id_CK + lax.axis_index(axis) * logits_CW.shape[-1]", "",
          of("test_candidate_head", "may_be_split")),
    Break("the selector's loss counts from the first step", "jnp.clip((step - warmup + 1) / max(ramp, 1), 0, 1)",
          "jnp.clip((step + 1) / max(ramp, 1), 0, 1)", of("test_dflash2", "comes_with_the_step or specforges")),
    Break("the selector's schedule stands still",
          "sums: Any, step: Int[Array, \"\"]) -> Int[Array, \"\"]: return step + 1",
          "sums: Any, step: Int[Array, \"\"]) -> Int[Array, \"\"]: return carry",
          of("test_dflash2", "comes_with_the_step")),
    Break("codebooks are written as they are called in memory", "f\"{SELECTOR}.successor_codebook\")",
          "f\"{SELECTOR}.successor_codebook.weight\")", of("test_dflash2_check")),
    Break("vLLM is said to pass the scale of logits over", "scales_logits=True, reduced_vocabulary=False, mixed",
          "reduced_vocabulary=False, mixed", of("test_dflash2_check")),
)  # fmt: skip

PEAGLE = ("tests/parity/test_peagle_golden.py",)
DEPTHS = (
    Break("places that drew the highest numbers are kept", "np.argsort(uniform_T[candidates]",
          "np.argsort(-uniform_T[candidates]", of("test_peagle", "elements_are_drawn")),
    Break("chains begin in another document",
          "candidates = candidates[segments_T[candidates - depth] == segments_T[candidates]]", "",
          of("test_peagle", "elements_are_drawn")),
    Break("every step draws the same elements", "np.random.default_rng([draw.seed, draw.step, draw.first_row + i])",
          "np.random.default_rng([draw.seed, 0, draw.first_row + i])", of("test_peagle", "every_step")),
    Break("masked places stand where their anchor does", "take_rows(batch.positions_BT, at_BR) + depth",
          "take_rows(batch.positions_BT, at_BR)", PEAGLE),
    Break("masked places count rows of other documents", "take_rows(batch.positions_BT, at_BR) + depth",
          "at_BR + depth", of("test_peagle", "each_element_sees")),
    Break("a parallel draft's head begins at random",
          "draft: ParallelDraft, target: EmbeddingAndHead, vocab: VocabMap) -> None: "
          "\"\"\"See `from_target.warm_start`.\"\"\" from_target.warm_start(draft, target, vocab)",
          "draft: ParallelDraft, target: EmbeddingAndHead, vocab: VocabMap) -> None: pass",
          of("test_peagle", "begins_with")),
    Break("an element sees the first chain of the depth before", "np.where(there, at, widths[depth - 1])",
          "np.where(there, 0 * at, widths[depth - 1])", PEAGLE),
    Break("the teacher is that of the place before", "take_rows(x, place_BM + 1) for x in",
          "take_rows(x, place_BM) for x in", PEAGLE),
    Break("the drafter's masked places stand one further", "newest_B[:, None] + jnp.arange(num)[None]",
          "newest_B[:, None] + 1 + jnp.arange(num)[None]", of("test_peagle", "greedy_decoding")),
    Break("hits behind a miss count at later depths", "prefix.append(hit[depth] & take_rows(prefix[-1], parent_BR))",
          "prefix.append(hit[depth])", of("test_peagle", "greedy_decoding")),
    Break("two mask tokens are not compared", "if len(set(found.values())) > 1:", "if False:",
          of("test_peagle_check", "two")),
    Break("engines that serve no parallel drafts are not refused", "if engine.why_not is not None: return [Finding(",
          "if engine.why_not == 0: return [Finding(", of("test_peagle_check", "nothing")),
)  # fmt: skip

TRUST = (
    Break("the teacher is of another row", "take_rows(features.last_BTE, rows_BR)",
          "take_rows(features.last_BTE, rows_BR + 1)", ("tests/parity/test_dspark_golden.py",)),
    Break("the recurrent head forgets", "keep * state + (1 - keep) * jnp.tanh(new), jnp.tanh(out)",
          "(1 - keep) * jnp.tanh(new), jnp.tanh(out)", ("tests/parity/test_dspark_golden.py",)),
    Break("the distance has half of its derivative", "p_CV * (jnp.sign(gap_CV) - leaning_C[:, None])",
          "p_CV * jnp.sign(gap_CV)", ("tests/parity/test_dspark_golden.py",)),
    Break("what is not trusted is proposed", "agree_BQ = agree_BQ * (jnp.arange",
          "agree_BQ = agree_BQ + 0 * (jnp.arange",
          of("test_dspark", "walk")),
    Break("what was not drafted is subtracted", "jnp.where(there_BQ[..., None], q_BQW, 0)", "q_BQW",
          of("test_dspark", "neither")),
    Break("the confidence is fitted on all slots", "counts_BAQ = (reached_BAQ * asked_BAQ)",
          "counts_BAQ = (1 + 0 * reached_BAQ * asked_BAQ)", of("test_dspark", "temperatures")),
    Break("the newest token's slot is left out", "layout_of(self.settings.block_size, sample_from_anchor=True)",
          "layout_of(self.settings.block_size, sample_from_anchor=False)", of("test_dspark", "walk")),
)  # fmt: skip

FAMILIES = (
    Break("the upper four bits come first", "numbers[byte & 15], numbers[byte >> 4]",
          "numbers[byte >> 4], numbers[byte & 15]", of("test_mxfp4")),
    Break("every device adds the experts' bias", "lax.axis_index(TENSOR_AXIS) == 0 if split else True", "True",
          of("multidevice/test_target_sharding", "agree")),
    Break("a norm is stored less one, and taken so", "return stored.astype(jnp.float32) + self.config.norm_offset if",
          "return stored if", of("test_families", "norms")),
)  # fmt: skip

BREAKS = (
    *OPTIMIZER, *SCHEDULE, *BEGINNING, *SHARDING, *RESUME, *MASKS, *EXPORT, *EVALUATION, *HOSTS, *BLOCKS, *SEAMS,
    *HEADS, *TRUST, *CANDIDATES, *DEPTHS, *FAMILIES,
)  # fmt: skip
