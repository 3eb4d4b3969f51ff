"""What a run would take, from its configuration and the target's config.json: nothing is loaded, trained or written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from flaxdraft.config import RunConfig
from flaxdraft.data.answers import MULTIPLE, PREFILL_CHUNK
from flaxdraft.data.store import Source
from flaxdraft.data.store_writer import StorePlan
from flaxdraft.devices.mesh import make_mesh
from flaxdraft.errors import InputError
from flaxdraft.files import streaming
from flaxdraft.nn.precision import DTYPES
from flaxdraft.ops.padding import round_up
from flaxdraft.progress import CONSOLE
from flaxdraft.run.answers import answer_limit
from flaxdraft.run.draft import check_draft, draft_config
from flaxdraft.run.estimate import Estimate, estimate
from flaxdraft.run.planned_devices import PlannedDevices, planned_devices
from flaxdraft.run.planned_target import PlannedTarget, TargetFigures, pass_work, target_figures
from flaxdraft.run.setup import Setup, parts
from flaxdraft.run.training import asks_the_target
from flaxdraft.train.resident import HELP

_ASSUMED = 0.4  # of the peak in bfloat16, where no rate is given
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(tokens/s|TFLOP/s)")


class Plan(NamedTuple):
    """Figures of a run; bytes are those of one device where nothing else is said."""

    config: RunConfig
    mesh: Mapping[str, int]
    devices: PlannedDevices
    step: Estimate
    training: dict[str, int]  # bytes by part
    answering: dict[str, int]
    host: dict[str, int]
    target_flops: float  # of a step's pass, on all devices
    store: int  # bytes of a token's features
    answers: int  # tokens at most whose features the run stores itself

    @property
    def flops(self) -> float:
        """Of a step, on all devices."""
        return self.step.flops + self.target_flops

    def hours(self, rate: str | None) -> str:
        """
        Args:
            rate: "18800 tokens/s", of all devices, or "400 TFLOP/s", of each; None assumes a share of the peak.

        Raises:
            InputError: the rate is none.
        """
        steps, size = self.config.train.num_steps, math.prod(self.mesh.values())
        if rate is None:
            if self.devices.peak is None:
                return "unknown: the peak of these devices is; give --rate '20000 tokens/s' or --rate '300 TFLOP/s'"
            each, why = self.devices.peak * _ASSUMED, f"assumed: {_ASSUMED:.0%} of the peak in bfloat16"
            return f"{steps * self.flops / each / size / 3600:.2f} hours at {each / 1e12:.0f} TFLOP/s a device ({why})"
        match = _RATE.fullmatch(rate.strip())
        if match is None or not float(match[1]):
            raise InputError(f"--rate: found {rate!r}, expected '20000 tokens/s' or, for each device, '300 TFLOP/s'")
        if match[2] == "tokens/s":
            hours = steps * self.step.rows * self.step.length / float(match[1]) / 3600
            return f"{hours:.2f} hours at {match[1]} tokens/s (given)"
        return f"{steps * self.flops / float(match[1]) / 1e12 / size / 3600:.2f} hours at {rate} a device (given)"

    def lines(self, rate: str | None) -> list[str]:
        step, steps = self.step, self.config.train.num_steps
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        reads = f", of which {self.target_flops:.3g} are the target's" if self.target_flops else ""
        stored = f"; at most {_size(self.store * self.answers)} of answers under data/" if self.answers else ""
        return [
            f"mesh       {axes} ({math.prod(self.mesh.values())} of {self.devices.name})",
            f"draft      {step.trained / 1e6:.1f} M trained parameters",
            f"batch      {step.rows} rows of up to {step.length} tokens, {step.rows * step.length} tokens a step",
            f"training   {_listed(self.training)} a device (work {self.devices.work_label})",
            f"answering  {_listed(self.answering)} a device, {self.config.data.rows} rows at a time",
            f"host       {_listed(self.host)}",
            f"compute    {self.flops:.3g} FLOP a step{reads}, {self.flops * steps:.3g} in all (products with weights, "
            "every row supervised)",
            f"steps      {steps}",
            f"time       {self.hours(rate)}, evaluation and answers apart",
            f"store      {_size(self.store)} a token, {_size(self.store * 10**6)} a million tokens of captured "
            f"features{stored}",
        ]  # fmt: skip

    def doubt(self) -> str | None:
        """What to say where it depends on the work whether training fits, and the size of the work is an estimate.

        Raises:
            InputError: the devices have too little memory; says how much, and what helps.
        """
        limit, doubt = self.devices.memory, None
        for name, held in (("training", self.training), ("answering", self.answering)):
            total = sum(held.values())
            if limit is None or total <= limit:
                continue
            largest = max(held, key=lambda part: held[part])
            said = (
                f"{_listed(held)} a device, and {self.devices.name} have {_size(limit)} each. First, {HELP[largest]}. "
                "What helps besides: mesh.fsdp (weights and moments over more devices), train.accumulate and "
                "algorithm.remat=full (work), train.pack_length and train.batch_size (batch, features and work), "
                "data.rows (caches)"
            )
            if total - held.get("work", 0) > limit or not self.devices.stand_in:
                raise InputError(f"--plan: {name} does not fit: {said}")
            doubt = f"{name} may not fit, by an estimate of the work: {said}"
        return doubt


def _listed(sizes: Mapping[str, int]) -> str:
    return f"{_size(sum(sizes.values()))}: " + ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())


def _size(num_bytes: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit / 10:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes / 1e3:.1f} kB"


def plan(config: RunConfig, devices: str | None = None, rate: str | None = None) -> None:
    """Says what the configuration would take, and does nothing else.

    Args:
        devices: see `planned_devices`.
        rate: see `Plan.hours`.

    Raises:
        InputError: see `parts`, `check_draft`, `planned_devices`, `Plan.hours` and `Plan.doubt`.
    """
    own = config.target.mesh.model_dump(exclude_none=True)
    num = max(math.prod(shape.values()) for shape in (config.mesh.model_dump(), own))
    found = made_plan(config, planned_devices(devices, num))
    for line in found.lines(rate):
        CONSOLE.print(line)
    if (doubt := found.doubt()) is not None:
        CONSOLE.print(f"doubtful   {doubt}")


def made_plan(config: RunConfig, devices: PlannedDevices) -> Plan:
    """
    Raises:
        InputError: see `parts` and `check_draft`.
    """
    dtype = config.target.dtype or ("float32" if devices.are_cpus else "bfloat16")
    config = config.model_copy(update={"target": config.target.model_copy(update={"dtype": dtype})})
    setup = parts(config, devices.devices)
    target = PlannedTarget(setup)
    check_draft(setup, target)
    longest = config.data.max_prompt_tokens + _longest_answer(setup)
    mesh = setup.target_mesh or make_mesh(devices=devices.devices)
    figures = target_figures(target, mesh, DTYPES[setup.target_dtype], config.data.rows, longest)
    step = estimate(setup, draft_config(setup, target), len(target.config.tap_layers))
    online = config.data.conversations is not None
    read = figures.flops * step.rows * step.length if online else 0.0
    answering = {
        "target": figures.weight_bytes, "caches": figures.cache_bytes, "answers' features": _told(setup, target),
    }  # fmt: skip
    return Plan(
        config, dict(setup.mesh.shape), devices, step, _training(setup, step, figures), answering,
        _host(setup, step), read, _bytes_a_token(setup, target), _answered_tokens(setup),
    )  # fmt: skip


def _told(setup: Setup, target: PlannedTarget) -> int:
    """Bytes of the features of all answers at a time and of a chunk of their prompts, whole on every device."""
    data, c = setup.config.data, target.config
    chunk = min(PREFILL_CHUNK, round_up(data.max_prompt_tokens, MULTIPLE))
    width = (len(c.tap_layers) + 1) * c.hidden_size * jnp.dtype(DTYPES[setup.target_dtype]).itemsize
    return data.rows * (_longest_answer(setup) + chunk) * width


def _longest_answer(setup: Setup) -> int:
    """Tokens, of the splits that the run asks."""
    return max(answer_limit(setup, split)[1] for split in setup.splits)


def _training(setup: Setup, step: Estimate, figures: TargetFigures) -> dict[str, int]:
    """While the draft trains: one batch is trained on and the next one is there."""
    config, held = setup.config, dict(step.held)
    work = step.work
    if config.data.conversations is not None:
        work = max(work, pass_work(figures.abstract, step.batch))
    kept = {"target": figures.weight_bytes} if asks_the_target(setup) else {}
    return kept | held | {"batch": 2 * held["batch"], "features": 2 * held["features"], "work": work}


def _host(setup: Setup, step: Estimate) -> dict[str, int]:
    """Of all devices together: pieces of weights on their way, batches that are read ahead, and the state while it is
    saved."""
    size, read = setup.mesh.size, ("batch",) if setup.config.data.conversations is not None else ("batch", "features")
    return {
        "loading": streaming.READERS * streaming.PIECE * jnp.dtype(jnp.float32).itemsize,
        "batches read ahead": setup.config.data.prefetch * size * sum(step.held[name] for name in read),
        "a checkpoint on its way": size * (step.held["draft"] + step.held["moments"]),
    }


def _bytes_a_token(setup: Setup, target: PlannedTarget) -> int:
    c, dtype = target.config, setup.config.data.feature_dtype
    source = Source("", "", "", setup.config.train.compute_dtype, c.tap_layers, c.hidden_size, 0, dtype, dtype)
    return StorePlan(source, (0, 1), 1, True).num_bytes


def _answered_tokens(setup: Setup) -> int:
    """Of the prompts that the run asks, with their longest answers."""
    data = setup.config.data
    counts = {split: sum(prompt.split == split for prompt in setup.prompts) for split in setup.splits}
    if "train" in counts:
        counts["train"] = min(counts["train"], data.num_prompts or counts["train"])
    return sum(count * (data.max_prompt_tokens + answer_limit(setup, split)[1]) for split, count in counts.items())
