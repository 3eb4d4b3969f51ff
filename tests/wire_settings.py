"""The fields of each algorithm's section, for test_wire.py."""

from wire_rows import As, Begins, Differs, Says

DFLASH = ("algorithm.name=dflash", "draft.fields={num_hidden_layers: 1}")
DPACE = (*DFLASH, "algorithm.objective=dpace")
DOMINO = ("algorithm.name=domino", "draft.fields={num_hidden_layers: 1}")
DFLASH2 = ("algorithm.name=dflash2", "draft.fields={num_hidden_layers: 1}")
SMALL = ("draft.draft_vocab_size=64", "draft.fields={num_hidden_layers: 1}")
PEAGLE = ("algorithm.name=peagle", *SMALL, "algorithm.num_depths=2")
DSPARK = ("algorithm.name=dspark", "draft.fields={num_hidden_layers: 1}")
# The fields of each algorithm's section. (Rows of one that is not in `run.yaml` give `algorithm.name`.)
SETTINGS: dict[str, dict[str, list]] = {
    "eagle3": {
        "name": [Says("none", "algorithm.name: no 'none' .* found dflash, .*eagle3")],
        "ttt_length": [Differs("step", 2)],
        "step_decay": [Differs("step", 0.5, ("algorithm.ttt_length=2",))],
        "objective": [Differs("step", "lk_lambda")],
        # The same figures, laid out in another way: tests/test_suffix_attention.py, tests/test_distillation.py.
        "attention": [Differs("step", "chunked")],
        "attention_chunk": [Differs("step", 16, ("algorithm.attention=chunked",))],
        "remat": [Differs("step", "full")],
        "loss_chunk": [Differs("step", 16)],
    },
    "dflash": {
        "name": [Begins("dflash", lambda first, _: "layer_1/self_attn/q_norm/scale" in first.weights)],
        "block_size": [Differs("step", 8, DFLASH)],
        "sample_from_anchor": [Differs("step", True, (*DFLASH, "export.engine=hf"))],
        "num_anchors": [Differs("batches", 2, DFLASH)],
        "decay_gamma": [Differs("step", None, DFLASH)],
        "objective": [Differs("step", "dpace", DFLASH), Differs("step", "dpace_continuation", DPACE)],
        "dpace_alpha": [Differs("step", 0.3, DPACE)],
        "stop_at_hole": [Differs("step", True, DFLASH)],
        "denominator": [Differs("step", "rows", DFLASH)],
        # The same figures, laid out in another way: tests/test_block_attention.py, tests/test_cross_entropy.py.
        "attention": [Differs("step", "chunked", DFLASH)],
        "attention_chunk": [Differs("step", 16, (*DFLASH, "algorithm.attention=chunked"))],
        "remat": [Differs("step", "full", DFLASH)],
        "loss_chunk": [Differs("step", 16, DFLASH)],
    },
    "dflash2": {
        "name": [Begins("dflash2", lambda first, _: "layer_0/mlp_conv/base_kernel" in first.weights)],
        "block_size": [Differs("step", 4, DFLASH2)],
        "stop_at_hole": [Differs("step", True, DFLASH2)],
        "decay_gamma": [Differs("step", None, DFLASH2)],
        "selector_alpha": [Differs("step", 0.5, DFLASH2)],
        "selector_warmup_ratio": [Differs("step", 0.5, DFLASH2)],
        "selector_ramp_ratio": [Differs("step", 0.5, DFLASH2)],
        "selector_warmup_steps": [Differs("step", 3, DFLASH2)],
        "selector_ramp_steps": [Differs("step", 3, DFLASH2)],
        "selector_missing_label": [Differs("step", "last_candidate", DFLASH2)],
        "selector_stop_gradient": [Differs("step", True, DFLASH2)],
        "loss_chunk": [Differs("step", 16, DFLASH2)],  # the same figures: tests/test_candidate_head.py
        **{name: [As("dflash")] for name in ("num_anchors", "attention", "attention_chunk", "remat")},
    },
    "domino": {
        "name": [Begins("domino", lambda first, _: "correction/prefix_gru/state_proj/kernel" in first.weights)],
        "block_size": [Differs("step", 4, DOMINO)],
        "shift_label": [Differs("step", False, DOMINO)],
        "pure_draft_prefix_len": [Differs("step", 2, (*DOMINO, "export.engine=hf"))],
        "base_start": [Differs("step", 0.5, DOMINO)],
        "base_ratio": [Differs("step", 0.5, DOMINO)],
        "base_steps": [Differs("step", 3, DOMINO)],
        "decay_gamma": [Differs("step", None, DOMINO)],
        "stop_at_hole": [Differs("step", True, DOMINO)],
        "loss_chunk": [Differs("step", 16, DOMINO)],  # the same figures: tests/test_corrected_head.py
        **{name: [As("dflash")] for name in ("num_anchors", "attention", "attention_chunk", "remat")},
    },
    "dspark": {
        "name": [Begins("dspark", lambda first, _: "confidence/proj/kernel" in first.weights)],
        "block_size": [Differs("step", 4, DSPARK)],
        "ce_alpha": [Differs("step", 0.3, DSPARK)],
        "l1_alpha": [Differs("step", 0.3, DSPARK)],
        "confidence_alpha": [Differs("step", 0.3, DSPARK)],
        "confidence_threshold": [Differs("drafter", 0.5, DSPARK)],  # what it cuts: tests/test_dspark.py
        "decay_gamma": [Differs("step", None, DSPARK)],
        "loss_chunk": [Differs("step", 16, DSPARK)],  # the same figures: tests/test_corrected_head.py
        **{name: [As("dflash")] for name in ("num_anchors", "attention", "attention_chunk", "remat")},
    },
    "peagle": {
        "name": [Differs("weights", "peagle", SMALL[:1])],
        "num_depths": [Differs("batches", 3, PEAGLE)],
        "down_sample_ratio": [Differs("batches", 0.5, PEAGLE)],
        "down_sample_ratio_min": [Differs("batches", 0.9, PEAGLE)],
        "objective": [Differs("step", "lk_alpha", PEAGLE)],
        # The same figures, laid out in another way: tests/test_suffix_attention.py, tests/test_distillation.py.
        "attention": [Differs("step", "chunked", PEAGLE)],
        "attention_chunk": [Differs("step", 16, (*PEAGLE, "algorithm.attention=chunked"))],
        "remat": [Differs("step", "full", PEAGLE)],
        "loss_chunk": [Differs("step", 16, PEAGLE)],
    },
}
