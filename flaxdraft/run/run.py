"""One run from a target's address to a report: target, data, train, evaluate, export, report."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from flaxdraft.config import RunConfig
from flaxdraft.devices import hosts
from flaxdraft.evaluate.differences import refuse_wrong_answers
from flaxdraft.evaluate.report import print_headline
from flaxdraft.progress import process_log
from flaxdraft.run.answers import answer_prompts
from flaxdraft.run.material import gather
from flaxdraft.run.results import chosen_checkpoint, evaluate_draft, export_draft, finished, report_run
from flaxdraft.run.setup import claim_data, claim_draft, claim_folders, lock, prepare
from flaxdraft.run.target import RunTarget
from flaxdraft.run.training import asks_the_target, train_draft
from flaxdraft.serving.contract import find_engine
from flaxdraft.train.chosen import Chosen


def run(config: RunConfig, allowed: Sequence[str] = ()) -> None:
    """All stages, then the headline. Of many processes all ask the target, train and evaluate, in step with each other;
    the first one alone writes, exports and reports.

    Args:
        allowed: fields of the configuration that may differ from what the output directory was made with.

    Raises:
        WrongAnswersError: see `refuse_wrong_answers`; all is written by then.
    """
    setup = prepare(config, allowed)
    claim_folders(setup)
    log = process_log(setup.draft_dir / "logs" / f"process-{jax.process_index()}.log", speaks=hosts.is_main())
    with log, lock(setup.draft_dir):
        with hosts.main_first("claim again"):
            claim_draft(setup)
        target = RunTarget(setup)
        unfinished = hosts.agree(hosts.is_main() and not finished(setup))
        if unfinished:
            _ = target.given  # what cannot be used is refused before the target is asked
        with lock(setup.data_dir):  # other drafts share the answers
            with hosts.main_first("claim answers"):
                claim_data(setup)
            answers = answer_prompts(setup, target)
        if not asks_the_target(setup):
            target.release()
        trained = None
        if unfinished:
            trained = train_draft(setup, gather(setup, target, answers))
        chosen = Chosen(*hosts.agree(chosen_checkpoint(setup) if hosts.is_main() else None))
        evaluation = evaluate_draft(setup, chosen, trained)
        with hosts.main_first("results"):
            if hosts.is_main():
                export_dir = export_draft(setup, chosen, trained)
                report_dir = report_run(setup, evaluation)
                engine = find_engine(setup.algorithm.serving(), config.engine)
                print_headline(evaluation, export_dir, report_dir, config.target.path, engine)
        refuse_wrong_answers([evaluation])
