"""python -m flaxdraft.evaluate DRAFT --target ADDRESS --prompts FILE --out DIR: what a draft is worth by decoding.

The same command on every host, where there are several: all decode, in step with each other, and the first one writes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxdraft.data.prompts import SPLITS, read_prompts
from flaxdraft.errors import InputError
from flaxdraft.run.chat_options import add_template_options, template_inputs, template_of
from flaxdraft.run.commands import ADDRESS, Command, call
from flaxdraft.run.target_options import add_target_options, dtype_or_default, on_all_hosts, target_mesh

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flaxdraft.data.chat_template import ChatTemplate
    from flaxdraft.data.prompts import Prompt
    from flaxdraft.nn.precision import Precision
    from flaxdraft.serving.trained_draft import TrainedDraft
    from flaxdraft.targets import OpenedTarget


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the report is written; 1 where answers that should be the target's own are not; 2 with one message for
    wrong input."""
    return call(Command(__doc__ or "", _arguments, _work), argv, "python -m flaxdraft.evaluate")


def _work(arguments: argparse.Namespace) -> int:
    _check(arguments)

    def work() -> None:
        with _draft_files(arguments.draft, arguments.step) as directory:
            evaluate(arguments, directory)

    return on_all_hosts(work)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("draft", type=Path, help="an exported draft, or a run's draft folder")
    parser.add_argument("--target", required=True, help=ADDRESS)
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSONL: prompts, or MT-bench's questions with turns"
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results; the same one goes on")
    parser.add_argument("--step", help="of a run's checkpoints, instead of its export: a number, latest or best")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="held_out", help="of a prompts file")
    parser.add_argument("--limit", type=int, help="prompts from the beginning of the file")
    parser.add_argument(
        "--chain", type=int, nargs="+", default=[3], help="draft tokens a target pass; several are compared"
    )
    parser.add_argument(
        "--tree", type=int, nargs="+", action="append", default=[], metavar="WIDTH",
        help="children of a node by depth, a tree of draft tokens beside the chains (greedy only); may be given again",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of sampling; each decodes everything once")
    add_template_options(parser)
    parser.add_argument("--rows", type=int, default=8, help="conversations decoded together")
    add_target_options(parser)


def _check(arguments: argparse.Namespace) -> None:
    a = arguments
    for name, value, least in (
        ("--limit", a.limit, 1), ("--chain", min(a.chain), 1), ("--max-new-tokens", a.max_new_tokens, 2),
        ("--rows", a.rows, 1), ("--seeds", min(a.seeds), 0),
    ):  # fmt: skip
        if value is not None and value < least:
            raise InputError(f"{name}: found {value}, expected at least {least}")
    trees = [" ".join(map(str, tree)) for tree in a.tree]
    for name, values in (("--chain", a.chain), ("--seeds", a.seeds), ("--tree", trees)):
        if len(set(values)) < len(values):
            raise InputError(f"{name}: found {' '.join(map(str, values))}, expected each once")
    if a.temperature == 0 and len(a.seeds) > 1:
        raise InputError("--seeds: several make sense only with --temperature above 0; greedy decoding has no seed")


@contextmanager
def _draft_files(path: Path, step: str | None) -> Iterator[Path]:
    """A serving directory: the path itself, the export of a run's draft folder, or one made of its checkpoint.

    Raises:
        InputError: none of them is there.
    """
    for directory in (path, path / "export") if step is None else ():
        if (directory / "config.json").exists():
            yield directory
            return
    if not (path / "checkpoints").is_dir():
        raise InputError(
            f"draft {path}: found neither config.json nor {'export/ nor ' * (step is None)}checkpoints/; expected an "
            "exported draft, what tools/convert writes, or a run's draft folder"
        )
    from flaxdraft.run.draft_source import open_draft
    from flaxdraft.serving.export import export_again

    with tempfile.TemporaryDirectory() as scratch:
        source = open_draft(path, step=step or "latest")
        export_again(Path(scratch) / "draft", source.draft, source.target, engine="hf", dtype="float32")
        yield Path(scratch) / "draft"


def evaluate(a: argparse.Namespace, directory: Path) -> None:
    """
    Args:
        a: the command's arguments.
        directory: of the draft's files.

    Raises:
        WrongAnswersError: see `refuse_wrong_answers`; all is written by then.
    """
    import jax

    from flaxdraft.algorithms.loading import from_pretrained, serving_files
    from flaxdraft.decode.decoding import Settings
    from flaxdraft.devices import hosts
    from flaxdraft.evaluate.differences import refuse_wrong_answers
    from flaxdraft.evaluate.measure import Guess, Session, measure
    from flaxdraft.evaluate.report import print_evaluation, write_report
    from flaxdraft.evaluate.results import guess_results
    from flaxdraft.files.fetch import content_of, sha256_of
    from flaxdraft.files.json_files import write_json
    from flaxdraft.nn.precision import of_both
    from flaxdraft.progress import CONSOLE
    from flaxdraft.stages.claims import claim_together
    from flaxdraft.targets import open_target

    guesses = [*(Guess(chain_length=chain) for chain in a.chain), *(Guess(tree=tuple(tree)) for tree in a.tree)]
    draft = from_pretrained(directory)
    for guess in guesses:  # refuses wrong numbers, and what this draft cannot propose, before the target is loaded
        settings = Settings(a.max_new_tokens, guess.chain_length, (), a.temperature, a.top_p, guess.tree)
        settings.program(draft.algorithm.drafter())
    prompts = read_prompts(a.prompts, () if a.split == "all" else (a.split,), "--prompts")
    prompts = [prompt for prompt in prompts if a.split in ("all", prompt.split)][: a.limit]
    dtype, mesh = dtype_or_default(a.dtype), target_mesh(a.mesh)
    shape = {} if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1}
    opened = open_target(a.target)
    template, of_template = _template(a, opened, prompts)
    inputs = {
        "draft": {path.name: sha256_of(path) for path in serving_files(directory)},
        "target": {"address": a.target, "content": content_of(a.target, None)}, "prompts": sha256_of(a.prompts),
        "split": a.split, "limit": a.limit, "max_new_tokens": a.max_new_tokens, "temperature": a.temperature,
        "top_p": a.top_p, "rows": a.rows, "dtype": dtype, **of_template,
        # Speed depends on the devices. `data` alone is what older evaluations recorded.
        "data": shape.get("data", 1), "target_mesh": {name: size for name, size in shape.items() if name != "data"},
    }  # fmt: skip
    claim_together(a.out, inputs, "Give another --out, or remove it to start anew.")
    loaded, paired = _load(opened, directory, draft, of_both(dtype), mesh)
    CONSOLE.print(
        f"{len(prompts)} prompts, {sum(len(prompt.turns) for prompt in prompts)} turns, up to {a.max_new_tokens} "
        f"tokens each; {', '.join(map(str, guesses))}; temperature {a.temperature:g}"
    )
    settings = Settings(a.max_new_tokens, 0, tuple(loaded.stop_tokens), a.temperature, a.top_p)
    session = Session(loaded.model, paired, loaded.tokenizer, settings, "--max-new-tokens", a.rows, template)
    runs = measure(session, prompts, guesses, a.seeds, a.out / "batches", inputs)
    results = guess_results(session, prompts, guesses, runs)
    axes = f" ({', '.join(f'{name} {size}' for name, size in shape.items())})" if shape else ""
    facts = {
        "draft": f"{a.draft}, step {a.step}" if a.step else str(a.draft), "target": a.target,
        "prompts": f"{a.prompts}, {len(prompts)} of them",
        "decoding": f"temperature {a.temperature:g}, top-p {a.top_p:g}, up to {a.max_new_tokens} tokens, {a.rows} "
                    f"conversations together, {dtype}",
        "devices": f"{1 if mesh is None else mesh.size} x {jax.devices()[0].device_kind}{axes}, jax {jax.__version__}",
    }  # fmt: skip
    if hosts.is_main():
        write_json(a.out / "results.json", {"facts": facts, "inputs": inputs, "chains": results})
        write_report(a.out, facts, results)
        print_evaluation(results, a.out)
    refuse_wrong_answers(results)


def _template(
    a: argparse.Namespace, opened: OpenedTarget, prompts: Sequence[Prompt]
) -> tuple[ChatTemplate, dict[str, Any]]:  # fmt: skip
    """What the chat template is given, and what the results record of it. Nothing is loaded for it.

    Raises:
        InputError: the target cannot be asked these prompts, or the draft was trained with other arguments.
    """
    from flaxdraft.data.prompts import check_context, render_messages
    from flaxdraft.serving.card import recorded_template
    from flaxdraft.stages.claims import RECORD

    trained = recorded_template(a.draft)
    tokenizer = opened.needed_tokenizer(with_template=True)
    opened.needed_stop_tokens()
    if trained and not a.template:
        a.template = [*trained.items()]
    if trained is not None and dict(a.template) != trained:
        raise InputError(
            f"--template: found {dict(a.template)}, the draft was trained with {trained}; leave it out, which takes "
            "those"
        )
    template = template_of(a, tokenizer, a.out / RECORD)
    for prompt in prompts:
        tokens = render_messages(tokenizer, prompt.first, f"prompt {prompt.id!r}", template=template)
        what = f"turn 1 of prompt {prompt.id!r}"
        check_context(len(tokens), what, a.max_new_tokens, "--max-new-tokens", opened.config().context)
    return template, template_inputs(template, tokenizer)


def _load(opened: OpenedTarget, directory: Path, draft: TrainedDraft, precision: Precision, mesh: Mesh | None):
    """The target with the layers that the draft taps, and the draft beside it.

    Raises:
        InputError: the two do not belong together.
    """
    from flaxdraft import targets
    from flaxdraft.algorithms.loading import tapped_layers
    from flaxdraft.evaluate.loading import pair

    named = tapped_layers(directory, opened.source.config)
    taps = draft.algorithm.tap_layers(opened.config().num_hidden_layers, None if named is None else tuple(named))
    loaded = targets.load_target(opened, tap_layers=taps, precision=precision, mesh=mesh)
    return loaded, pair(directory, draft, loaded, precision)


if __name__ == "__main__":
    sys.exit(main())
