"""Drafts for SmolLM2-135M-Instruct on one GPU: prompts, the target's answers, training, accept lengths.

    python experiments/flagship/run.py STAGE --work DIR [--set section.field=value ...]

STAGE is `generate`, `train NAME`, `evaluate`, `report` or `compare`; NAME is one of contestants.py. Every stage goes on
where it was stopped and has time limits as options; all of it lies under DIR. Settings are in flagship.yaml, results in
results.md (`report`: the two EAGLE-3 drafts) and comparison.md (`compare`: whatever was trained).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, folder_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIZES = (4096, 8192, 12288, 16384, 24576, 32768, 49152)  # of the draft vocabulary
COVERAGE = 0.997
CHAINS = tuple(range(1, 8))
TRIAL_STEPS = 60


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def write_json(path: Path, value: Any) -> None:
    from flaxdraft.files import json_files

    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_json(path, value)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def configured(a: argparse.Namespace, *more: str):
    from flaxdraft.config import load_config

    os.chdir(ROOT)  # the prompts' path is the repository's
    return load_config(str(HERE / "flagship.yaml"), [*more, *a.overrides])


# generate


def generate(a: argparse.Namespace) -> None:
    """Prompts until there are enough or time is up, then answers until all are there or time is up."""
    from flaxdraft import targets
    from flaxdraft.nn.precision import of_both

    config, started = configured(a), time.monotonic()
    precision = of_both(a.dtype)
    loaded = targets.from_pretrained(config.target.path, sha256=config.target.sha256, precision=precision)
    say(f"target loaded, {time.monotonic() - started:.0f} s")
    prompts = write_prompts(a, config, loaded)
    answer(a, loaded, prompts)
    write_json(a.work / "data.json", statistics(a, loaded.tokenizer))
    say(f"generate: {time.monotonic() - started:.0f} s, {a.work / 'data.json'}")


def write_prompts(a: argparse.Namespace, config: Any, loaded: Any) -> list[dict[str, str]]:
    """The project's training prompts, and those that the target wrote, a wave a file."""
    import prompts as writing

    from flaxdraft.decode.generation import Writing, generate_each

    own = [row for row in writing.read_lines(ROOT / config.data.prompts)]
    training = [row for row in own if row["split"] == "train"]
    kept = writing.Kept(row["prompt"] for row in own if row["split"] == "held_out")
    found = [row for row in training if kept.add(row["prompt"])]
    start, wave, wave_size = time.monotonic(), 0, a.rows * 8
    while len(found) < a.prompts:
        path = a.work / "prompts" / f"{wave:04d}.json"
        if not path.exists():
            if time.monotonic() - start > a.prompt_seconds:
                break
            asked = writing.requests(training, wave_size, wave)
            begun = writing.beginnings(loaded.tokenizer, [opening for _, opening in asked])
            order = sorted(range(len(asked)), key=lambda i: len(begun[i]))
            made, rows, before = 0, [], time.monotonic()
            asked_tokens, seeds = [begun[i] for i in order], [wave * wave_size + i for i in order]
            how = Writing(writing.MOST_TOKENS, loaded.stop_tokens, a.temperature)
            for i, tokens, _ in generate_each(loaded.model, asked_tokens, how, seeds=seeds, num_rows=a.rows):
                made += len(tokens)
                category, opening = asked[order[i]]
                if tokens[-1] in loaded.stop_tokens:
                    text = opening + loaded.tokenizer.decode(tokens, skip_special_tokens=True)
                    rows.append({"id": f"written-{wave}-{order[i]}", "category": category, "prompt": text.strip()})
            took = time.monotonic() - before
            write_json(path, {"tokens": made, "seconds": took, "asked": len(asked), "rows": rows})
            say(f"prompts, wave {wave}: {len(rows)} of {len(asked)} done, {made / took:.0f} tokens/s")
        found += [row for row in read_json(path)["rows"] if kept.add(row["prompt"])]
        wave += 1
    say(f"{len(found)} different prompts, {len(training)} of them the project's")
    return found[: a.prompts]


def answer(a: argparse.Namespace, loaded: Any, prompts: list[dict[str, str]]) -> None:
    """Greedy answers: what is measured is greedy decoding, and a draft agrees most on what it was trained on."""
    from flaxdraft.data.conversations import Conversation
    from flaxdraft.data.regenerate import GROUP, regenerate
    from flaxdraft.data.talks import Answering

    conversations = [
        Conversation(f"prompt {row['id']}", row["id"], row["category"], "train",
                     ({"role": "user", "content": row["prompt"]},))
        for row in prompts
    ]  # fmt: skip
    options = Answering(max_prompt_tokens=a.prompt_tokens, max_new_tokens=a.answer_tokens)
    start, log = time.monotonic(), a.work / "answering.json"
    spent = read_json(log)["seconds"] if log.exists() else 0.0
    part = a.rows * GROUP
    for stop in range(part, len(prompts) + part, part):
        if time.monotonic() - start > a.answer_seconds:
            say("time for answers is up")
            break
        counts = regenerate(
            a.work, conversations[:stop], loaded.model, loaded.tokenizer, loaded.stop_tokens, options, a.rows
        )  # fmt: skip
        write_json(log, {"seconds": spent + time.monotonic() - start})
        say(f"{counts['answered']} of {len(prompts)} answered, {time.monotonic() - start:.0f} s")


def statistics(a: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Of the answers: tokens, how the vocabulary covers them, and the size that will do."""
    import numpy as np
    from prompts import read_lines

    from flaxdraft.data.draft_vocabulary import coverage_by_size
    from flaxdraft.data.talks import FILE

    counts, lengths, total, categories = np.zeros(len(tokenizer), np.int64), [], 0, {}
    for row in read_lines(a.work / FILE):
        ids, mask = np.asarray(row["input_ids"]), np.asarray(row["loss_mask"], bool)
        counts += np.bincount(ids[mask], minlength=len(counts))
        lengths.append(int(mask.sum()))
        total += len(ids)
        categories[row["category"]] = categories.get(row["category"], 0) + 1
    held = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    size = next((s for s in SIZES if s <= len(counts) and held[s - 1] >= COVERAGE), len(counts))
    waves = [read_json(path) for path in sorted((a.work / "prompts").glob("*.json"))]
    seconds = read_json(a.work / "answering.json")["seconds"]
    found = {
        "answers": len(lengths), "answer_tokens": int(sum(lengths)), "tokens": total, "seconds": seconds,
        "tokens_per_second": sum(lengths) / seconds, "median_answer": float(np.median(lengths)),
        "cut_at_limit": sum(length >= a.answer_tokens for length in lengths), "categories": categories,
        "prompt_seconds": sum(wave["seconds"] for wave in waves), "prompt_tokens": sum(w["tokens"] for w in waves),
        "prompts_asked": sum(wave["asked"] for wave in waves), "draft_vocab_size": size,
        "coverage": {str(k): v for k, v in coverage_by_size(counts, tokenizer.all_special_ids).items()},
    }  # fmt: skip
    say(json.dumps(found))
    return found


# train


def train(a: argparse.Namespace) -> None:
    """As many steps as the minutes allow, at the speed of a trial run on a part of the data."""
    from flaxdraft.data.talks import FILE
    from flaxdraft.run.setup import parts
    from flaxdraft.train.guards import PreemptedError

    if a.limit:
        # A stopped run saves its state, and the same command goes on there.
        timer = threading.Timer(a.limit, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    output = (a.work / folder_of(name_of(a))).parent
    shared = [*CONTESTANTS[a.draft], f"seed={a.seed}", f"output_dir={output}", f"name={name_of(a)}"]
    if not parts(configured(a, *shared)).algorithm.full_vocabulary:
        shared.append(f"draft.draft_vocab_size={read_json(a.work / 'data.json')['draft_vocab_size']}")
    answers, plan = a.work / FILE, a.work / f"plan-{a.draft}.json"
    try:
        if not plan.exists():
            write_json(plan, trial(a, shared, answers) if a.steps is None else {"num_steps": a.steps})
    except PreemptedError as error:
        say(str(error))
        sys.exit(75)
    steps = read_json(plan)["num_steps"]
    every = max(steps // 10, 1)
    config = configured(
        a, *shared, f"data.conversations={answers}", f"train.num_steps={steps}", f"train.eval_every={every}"
    )  # fmt: skip
    start = time.monotonic()
    try:
        fitted(config, export=True)
    except PreemptedError as error:
        say(str(error))
        sys.exit(75)
    say(f"train {name_of(a)}: {steps} steps, {time.monotonic() - start:.0f} s with compilation and evaluation")


def name_of(a: argparse.Namespace) -> str:
    """Of a training's folder."""
    return f"{a.draft}-seed-{a.seed}" if a.seed else a.draft


def fitted(config: Any, *, export: bool) -> None:
    """A run's training, and its export; the evaluation is a stage of its own here."""
    from flaxdraft.run.answers import answer_prompts
    from flaxdraft.run.material import gather
    from flaxdraft.run.results import chosen_checkpoint, export_draft
    from flaxdraft.run.setup import claim_folders, prepare
    from flaxdraft.run.target import RunTarget
    from flaxdraft.run.training import train_draft

    setup = prepare(config)
    claim_folders(setup)
    target = RunTarget(setup)
    trained = train_draft(setup, gather(setup, target, answer_prompts(setup, target)))
    if export:
        export_draft(setup, chosen_checkpoint(setup), trained)


def trial(a: argparse.Namespace, shared: list[str], answers: Path) -> dict[str, Any]:
    """Some steps on some answers. What is compiled for them is found in the cache by the run that follows."""
    directory, lines = a.work / f"trial-{a.draft}", []
    directory.mkdir(parents=True, exist_ok=True)
    with answers.open("rb") as file:
        for line in file:
            lines.append(line)
            if len(lines) == 4000:
                break
    (directory / "some.jsonl").write_bytes(b"".join(lines))
    start = time.monotonic()
    config = configured(
        a, *shared, f"name=trial-{name_of(a)}", f"data.conversations={directory / 'some.jsonl'}",
        f"train.num_steps={a.trial_steps}", "train.log_every=5",
    )  # fmt: skip
    fitted(config, export=False)
    rows = [row for row in metrics_of(config.draft_dir) if row["kind"] == "train"]
    per_step, speed = rows[-1]["tokens"] / rows[-1]["step"], sorted(row["tokens_per_second"] for row in rows[1:])
    rate = speed[len(speed) // 2]
    steps = max(int(60 * a.minutes * rate / per_step), 10)
    say(f"trial: {rate:.0f} tokens/s, {per_step:.0f} a step, {time.monotonic() - start:.0f} s; {steps} steps follow")
    return {"num_steps": steps, "trial_tokens_per_second": rate, "tokens_per_step": per_step, "minutes": a.minutes}


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    from flaxdraft.train.metrics_log import read_metrics

    return read_metrics(directory / "metrics.jsonl")


# evaluate, report


def evaluate(a: argparse.Namespace) -> None:
    """All drafts at once, each in a process of its own: most of the time is compilation, on the host. In float32, with
    products to match, so that an answer with a draft is the target's own to the last token: in bfloat16 a pass over a
    chain rounds otherwise than a pass over one token, and near ties between two tokens go either way."""
    config, running = configured(a), []
    environment = os.environ | {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.8 / len(drafts_of(a)):.2f}",
        # A chain length is decoded in seconds; choosing the best kernels for its products took more than a minute.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    for name in drafts_of(a):
        command = [
            sys.executable, "-m", "flaxdraft.evaluate", str(a.work / folder_of(name)), "--target", config.target.path,
            "--prompts", config.data.prompts, "--out", str(a.work / f"evaluation-{name}"), "--chain",
            *map(str, a.chains), "--max-new-tokens", str(config.evaluate.max_new_tokens), "--rows", str(a.rows),
            "--dtype", "float32", *(["--limit", str(a.prompts)] if a.prompts else []),
        ]  # fmt: skip
        say(" ".join(command))
        running.append((name, subprocess.Popen(command, env=environment)))
    start = time.monotonic()
    failed = [name for name, process in running if process.wait()]
    say(f"evaluate: {time.monotonic() - start:.0f} s" + (f", failed: {', '.join(failed)}" if failed else ""))
    if failed:
        sys.exit(1)


def drafts_of(a: argparse.Namespace) -> list[str]:
    """Those that have an export, in the order of contestants.py, the seeds of each together."""
    folders = [path.parent.name for path in a.work.glob("*/*/export")]
    return sorted(folders, key=lambda name: ([*CONTESTANTS].index(name.split("-seed-")[0]), name))


def found_of(a: argparse.Namespace, names: list[str]) -> list[Any]:
    from report import Draft

    found = []
    for name in names:
        results = a.work / f"evaluation-{name}" / "results.json"
        folder, plan = a.work / folder_of(name), a.work / f"plan-{name.split('-seed-')[0]}.json"
        found.append(Draft(
            name, read_json(results) if results.exists() else None, metrics_of(folder), read_json(plan),
            read_json(folder / "inputs.json"),
        ))  # fmt: skip
    return found


def report(a: argparse.Namespace) -> None:
    from report import write

    found = found_of(a, [name for name in ("llama", "mla") if name in drafts_of(a)])
    a.out.mkdir(parents=True, exist_ok=True)
    write(a.out, found, read_json(a.work / "data.json"), a.note)
    shutil.copy(a.work / "data.json", a.out)
    for draft in found:
        if draft.evaluation is not None:
            write_json(a.out / f"results-{draft.name}.json", draft.evaluation)
        shutil.copy(a.work / folder_of(draft.name) / "metrics.jsonl", a.out / f"metrics-{draft.name}.jsonl")
    say(f"report: {a.out}")


def compare(a: argparse.Namespace) -> None:
    """comparison.md, comparison.png and what they are made of, comparison.json."""
    from comparison import summary, write

    target, drafts = configured(a).target, found_of(a, drafts_of(a))
    if missing := [draft.name for draft in drafts if draft.evaluation is None]:
        sys.exit(f"not decoded yet: {', '.join(missing)}; run `run.py evaluate --work {a.work}` first")
    kept = [summary(draft, a.work / folder_of(draft.name) / "export", target.path) for draft in drafts]
    a.out.mkdir(parents=True, exist_ok=True)
    write_json(a.out / "comparison.json", {"note": a.note, "data": read_json(a.work / "data.json"), "drafts": kept})
    write(a.out, read_json(a.out / "comparison.json"))
    say(f"compare: {a.out}")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = whole.add_subparsers(required=True, metavar="generate | train | evaluate | report | compare")
    one = stages.add_parser("generate")
    one.set_defaults(stage=generate)
    one.add_argument("--prompts", type=int, default=100000, help="at most")
    one.add_argument("--prompt-seconds", type=float, default=75, help="after which no more prompts are asked for")
    one.add_argument("--answer-seconds", type=float, default=200, help="after which no more answers are")
    one.add_argument("--prompt-tokens", type=int, default=128, help="of the template, too; longer ones are left out")
    one.add_argument("--answer-tokens", type=int, default=128, help="at most")
    one.add_argument("--temperature", type=float, default=0.9, help="of prompts")
    one.add_argument("--rows", type=int, default=1024, help="decoded together")
    one.add_argument("--dtype", default="bfloat16", help="of weights and products")
    two = stages.add_parser("train")
    two.set_defaults(stage=train)
    two.add_argument("draft", choices=tuple(CONTESTANTS))
    two.add_argument("--seed", type=int, default=0, help="of the weights, the batches' order and all that is drawn")
    two.add_argument("--minutes", type=float, default=5.0, help="of steps; compilation and evaluation come on top")
    two.add_argument("--steps", type=int, help="so many, and no trial")
    two.add_argument("--trial-steps", type=int, default=TRIAL_STEPS)
    two.add_argument("--limit", type=float, help="seconds after which the run saves its state and ends")
    three = stages.add_parser("evaluate")
    three.set_defaults(stage=evaluate)
    three.add_argument("--chains", type=int, nargs="+", default=CHAINS)
    three.add_argument("--rows", type=int, default=64, help="decoded together")
    three.add_argument("--prompts", type=int, help="of the held-out ones; all by default")
    four = stages.add_parser("report")
    four.set_defaults(stage=report)
    four.add_argument("--out", type=Path, required=True)
    four.add_argument("--note", help="a paragraph for the results: machine, versions, what was special")
    five = stages.add_parser("compare")
    five.set_defaults(stage=compare)
    five.add_argument("--out", type=Path, required=True)
    five.add_argument("--note", help="a paragraph for the results: machine, versions, what was special")
    for each in (one, two, three, four, five):
        each.add_argument("--work", type=Path, required=True, help="a folder for everything; the same one goes on")
        each.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="section.field=value",
            help="a field of flagship.yaml; may be given several times",
        )  # fmt: skip
    return whole


def main(argv: list[str] | None = None) -> None:
    a = parser().parse_args(argv)
    a.work = a.work.resolve()
    a.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(a.work / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    sys.path[:0] = [str(HERE), str(ROOT)]
    a.stage(a)


if __name__ == "__main__":
    main()
