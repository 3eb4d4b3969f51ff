"""A target writes: prompts of any length, any chunk of prefill, each row by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

import flaxdraft.decode.generation
from flaxdraft import targets
from flaxdraft.decode.generation import Writing, _Rows, generate, generate_each
from flaxdraft.errors import InputError
from flaxdraft.interfaces import Batch
from flaxdraft.targets.__main__ import main

PROMPTS = [[5, 9, 30, 7], [8] * 11, [40, 41, 6, 50, 51, 52, 53]]


@pytest.fixture(scope="module")
def target(tiny_gguf):
    return targets.from_pretrained(str(tiny_gguf), tap_layers=(1, 3, 4)).model


def greedy(target, prompt, num, stop=()):
    """One forward over everything for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + num and (len(text) == len(prompt) or text[-1] not in stop):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(text)] = text
        ones = jnp.ones((1, 32), jnp.int32)
        batch = Batch(jnp.asarray(tokens), ones > 0, ones, jnp.arange(32)[None])
        text.append(int(target.features(batch).argmax_BT[0, len(text) - 1]))
    return text[len(prompt) :]


@pytest.mark.parametrize("chunk", [4, 16])
def test_greedy_is_what_the_uncached_forward_says(target, chunk):
    got = generate(target, PROMPTS, max_new_tokens=6, stop_tokens=(), prefill_chunk=chunk)
    assert got == [greedy(target, prompt, 6) for prompt in PROMPTS]


def test_rows_end_by_themselves(target):
    whole = [greedy(target, prompt, 6) for prompt in PROMPTS]
    stop = whole[1][2]
    counted = []
    got = generate(target, PROMPTS, max_new_tokens=6, stop_tokens=[stop], on_tokens=counted.append)
    cut = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in whole]
    assert got == cut
    assert sum(counted) == sum(map(len, cut))


def each(target, prompts, *, num_rows=None, on_tokens=lambda num: None, seeds=None, **writing):
    """(number, tokens) of every answer, as they are done."""
    how = Writing(**writing)
    written = generate_each(target, prompts, how, seeds=seeds, num_rows=num_rows, on_tokens=on_tokens)
    return [(one.number, one.tokens) for one in written]


def test_rows_that_are_free_take_the_next_prompt(target):
    """Eleven prompts in four rows, most of whose answers end early, at places of their own."""
    prompts = [[5 + i, 9, 30 + i] * (1 + i % 3) for i in range(11)]
    whole = [greedy(target, prompt, 9) for prompt in prompts]
    stops = [whole[0][3], whole[4][6], whole[7][1]]
    want = [greedy(target, prompt, 9, stops) for prompt in prompts]
    assert len({*map(len, want)}) >= 3
    counted, shared = [], {"max_new_tokens": 9, "stop_tokens": stops, "prefill_chunk": 4}
    got = each(target, prompts, num_rows=4, on_tokens=counted.append, **shared)
    assert dict(got) == dict(enumerate(want))
    assert len(got) == len(prompts)
    assert sum(counted) == sum(map(len, want))
    sampled = shared | {"temperature": 20.0, "seeds": [*range(50, 61)]}
    assert generate(target, prompts, num_rows=4, **sampled) == generate(target, prompts, **sampled)


@pytest.mark.parametrize("num_rows", [1, 5, 8])
def test_shares_that_do_not_divide_the_rows(target, num_rows):
    """Nine prompts of three lengths in one row; in five, read one by one; in eight, where two are read at a time, three
    rows may be free at once, and the last prompt is read beside a row of padding. Samples tell seeds apart."""
    prompts = [[5 + i, 9, 30 + i] * (1 + i % 3) for i in range(9)]
    shared = {"max_new_tokens": 7, "prefill_chunk": 4, "temperature": 20.0, "seeds": [*range(70, 79)]}
    whole = generate(target, prompts, stop_tokens=(), **shared)
    stops = [whole[0][2], whole[1][4], whole[2][2], whole[6][1]]
    want = generate(target, prompts, stop_tokens=stops, **shared)
    assert len({*map(len, want)}) >= 3
    counted = []
    got = each(target, prompts, num_rows=num_rows, stop_tokens=stops, on_tokens=counted.append, **shared)
    assert dict(got) == dict(enumerate(want))
    assert len(got) == len(prompts)
    assert sum(counted) == sum(map(len, want))


def test_only_whole_shares_are_read_while_prompts_wait(target, monkeypatch):
    """Two rows at a time of nine, whose answers end together; all of them at once where no prompt has to wait."""
    sizes, with_group = [], _Rows._with_group
    monkeypatch.setattr(_Rows, "_with_group", lambda *args: sizes.append(len(args[2])) or with_group(*args))
    prompts = [[5 + i, 9, 30 + i] for i in range(13)]
    generate(target, prompts, max_new_tokens=3, stop_tokens=(), num_rows=9)
    assert sizes == [2, 2, 2, 2, 2, 2, 1]  # of nine free rows eight, one is left; then two, two, and the last
    sizes.clear()
    generate(target, prompts, max_new_tokens=3, stop_tokens=())
    assert sizes == [13]


def test_answers_are_handed_out_as_they_end(target, monkeypatch):
    """Also where no prompt waits any more."""
    monkeypatch.setattr(flaxdraft.decode.generation, "TOKENS_AT_A_TIME", 2)
    prompts = [[5 + i, 9, 30 + i] * (1 + i % 3) for i in range(11)]
    whole = [greedy(target, prompt, 10) for prompt in prompts]
    stops = [whole[0][3], whole[4][6], whole[7][1]]
    got = each(target, prompts, max_new_tokens=10, stop_tokens=stops)
    looks = [len(answer) // 2 for _, answer in got]  # the first token comes with the prompt
    assert looks == sorted(looks)
    assert [i for i, _ in got] != [*range(11)]


def test_features_are_those_of_the_uncached_forward(target):
    """Of prompts that are read in chunks, by rows that are free: tokens and features go together."""
    prompts = [[5 + i, 9, 30 + i] * (1 + i % 3) for i in range(7)]
    stop = greedy(target, prompts[1], 9)[3]
    how = Writing(9, (stop,), prefill_chunk=4, keep_features=True)
    written = [*generate_each(target, prompts, how, num_rows=4)]
    assert sorted(one.number for one in written) == [*range(7)]
    assert len({len(one.tokens) for one in written}) > 1
    for number, tokens, features in written:
        text = np.array([[*prompts[number], *tokens]], np.int32)
        ones = np.ones_like(text)
        want = target.features(Batch(text, ones > 0, ones, np.arange(text.shape[1], dtype=np.int32)[None]))
        assert_close(features.taps_BTKE[:-1], want.taps_BTKE[0, :-1], ulp=100)
        assert_close(features.last_BTE[:-1], want.last_BTE[0, :-1], ulp=100)
        np.testing.assert_array_equal(features.argmax_BT[-len(tokens) - 1 : -1], tokens)
        assert_close(features.logsumexp_BT[-len(tokens) - 1 : -1], want.logsumexp_BT[0, -len(tokens) - 1 : -1], ulp=100)
        assert not any(x[-1].any() for x in jax.tree.leaves(features))


def test_a_row_depends_on_its_prompt_and_seed_alone(target):
    sampled = {"max_new_tokens": 8, "stop_tokens": (), "temperature": 20.0, "top_p": 0.9, "prefill_chunk": 16}
    together = generate(target, PROMPTS, seeds=[3, 4, 5], **sampled)
    assert generate(target, PROMPTS[::-1], seeds=[5, 4, 3], **sampled) == together[::-1]
    assert generate(target, PROMPTS, seeds=[3, 4, 5], **sampled) == together
    other = generate(target, [PROMPTS[0]] * 3, seeds=[3, 6, 3], **sampled)
    assert other[0] == together[0] == other[2]
    assert other[1] != together[0]


def test_wrong_arguments(target):
    with pytest.raises(InputError, match="prompts: found an empty one"):
        generate(target, [[1], []], max_new_tokens=2, stop_tokens=())
    with pytest.raises(InputError, match=r"temperature -1 and top_p 1.0"):
        generate(target, [[1]], max_new_tokens=2, stop_tokens=(), temperature=-1)


def test_the_card(tiny_gguf, capsys):
    assert main([str(tiny_gguf), "--new-tokens", "4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "family llama, LlamaForCausalLM", "parameters 0.", "layers 8 layers",
        "with a chat template", "float32 weights a device (one device)", "prompt What is the capital",
    ):  # fmt: skip
        assert part in text
    assert "answer" in text


def test_the_card_of_a_mesh_that_is_not_there(tiny_gguf, capsys):
    """Memory for a mesh needs no devices; a sample does."""
    assert main([str(tiny_gguf), "--new-tokens", "0", "--mesh", "fsdp=16,tensor=2"]) == 0
    assert "(fsdp 16 x tensor 2)" in " ".join(capsys.readouterr().out.split())
    assert main([str(tiny_gguf), "--new-tokens", "0", "--mesh", "fsdp=64"]) == 2
    assert "mesh.fsdp: 64 devices do not divide" in capsys.readouterr().err
    assert main([str(tiny_gguf), "--mesh", "fsdp=16"]) == 2
    assert "--mesh: fsdp=16 takes 16 devices, 8 are visible" in capsys.readouterr().err


def test_the_card_of_nothing(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "no file or directory" in capsys.readouterr().err
