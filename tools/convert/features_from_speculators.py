"""Hidden states that vLLM kept for speculators, as a feature store to train on.

    python tools/convert/features_from_speculators.py DIR STORE --target /models/Qwen3-8B

DIR is what speculators' prepare_data.py wrote, with vLLM's hidden_states/hs_*.safetensors inside. The last state there
is from before the target's final norm, which is applied here. `draft.vocab_map=DIR/d2t.npy` trains with the draft
vocabulary that lies beside them.
"""

from __future__ import annotations

import sys

import ingest_command

from flaxdraft.data.speculators_folder import SpeculatorsFolder


def main(argv: list[str] | None = None) -> int:
    """See `ingest_command.main`."""
    return ingest_command.main(__doc__, SpeculatorsFolder, argv)


if __name__ == "__main__":
    sys.exit(main())
