"""One run from a target's address to a report: target, data, train, evaluate, export, report."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from flaxdraft.config import RunConfig
from flaxdraft.devices import hosts
from flaxdraft.evaluate.report import print_headline
from flaxdraft.progress import CONSOLE, process_log
from flaxdraft.run.answers import answer_prompts
from flaxdraft.run.draft import check_draft, draft_config
from flaxdraft.run.estimate import estimate
from flaxdraft.run.material import gather
from flaxdraft.run.results import evaluate_draft, export_draft, finished, report_run
from flaxdraft.run.setup import claim_data, claim_draft, claim_folders, lock, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.run.training import train_draft
from flaxdraft.serving.contract import find_engine


def run(config: RunConfig, allowed: Sequence[str] = ()) -> None:
    """All stages, then the headline. Of many processes all train; the first one alone asks the target, evaluates,
    exports and reports, while the others wait.

    Args:
        allowed: fields of the configuration that may differ from what the output directory was made with.
    """
    setup = prepare(config, allowed)
    claim_folders(setup)
    log = process_log(setup.draft_dir / "logs" / f"process-{jax.process_index()}.log", speaks=hosts.is_main())
    with log, lock(setup.draft_dir):
        with hosts.main_first("claim again"):
            claim_draft(setup)
        target = RunTarget(setup)
        if hosts.agree(hosts.is_main() and not finished(setup)):
            _ = target.given  # what cannot be used is refused before the target is asked
        with hosts.main_first("data"), lock(setup.data_dir):  # other drafts share the answers
            claim_data(setup)
            answers = answer_prompts(setup, target)
        trained = None
        if hosts.agree(hosts.is_main() and not finished(setup)):
            trained = train_draft(setup, gather(setup, target, answers))
        with hosts.main_first("results"):
            if hosts.is_main():
                evaluation = evaluate_draft(setup, trained)
                export_dir = export_draft(setup, trained)
                report_dir = report_run(setup, evaluation)
                engine = find_engine(setup.algorithm.serving(), config.engine)
                print_headline(evaluation, export_dir, report_dir, config.target.path, engine)


def plan(config: RunConfig) -> None:
    """Says what the configuration would take, and does nothing else."""
    setup = prepare(config)
    target = RunTarget(setup)
    check_draft(setup, target)
    for line in estimate(setup, draft_config(setup, target), len(target.config.tap_layers)).lines():
        CONSOLE.print(line)
