"""The rows of a draft's name table stand for the same weight on both sides.

Reading back what was written cannot see that two names are exchanged: a server would then run another model.
"""

import pytest
from test_contracts import DRAFTS, make_draft

# Engines number the norms of the tapped states.
NUMBERED = {"fc_norm_low": "fc_norm.0", "fc_norm_mid": "fc_norm.1", "fc_norm_high": "fc_norm.2"}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("switch", ["fc_norm", "norm_before_fc"])
def test_both_names_of_a_row_say_the_same(name, switch):
    for path, key, _ in DRAFTS[name].name_table(make_draft(DRAFTS[name], **{switch: True}).config):
        weight = path.removesuffix("/kernel").removesuffix("/scale").replace("/", ".")
        assert key.removeprefix("midlayer.").removesuffix(".weight") == NUMBERED.get(weight, weight)
