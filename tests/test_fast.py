"""What is shared, stopped early or split, counted in the models themselves; and that nothing changes by it.

That each number equals the plain way's is in test_common.py, on every architecture and with every transplant. Here: that the
fast ways are really taken, what they save, and what happens where a model or its memory does not allow them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_common import PREFIX, TEXTS, close, vectors

import common
from common import Transplant

V = vectors(1)[0]
SWEEP = [Transplant.of(V, 2, alpha) for alpha in (0.0, 0.5, 1.0, 2.0, 4.0)]


@contextmanager
def counted(model):
    """{block: [(rows, tokens), …], "unembed": [positions, …]} of every forward pass meanwhile."""
    seen = {"unembed": [], **{block: [] for block in range(len(model.layers))}}

    def count(name):
        def hook(module, args, kwargs, output):
            h = output if name == "unembed" else args[0] if args else kwargs["hidden_states"]
            seen[name].append(h.shape[:-1].numel() if name == "unembed" else tuple(h.shape[:2]))
        return hook
    parts = {**{block: model.layers[block]._module for block in range(len(model.layers))}, "unembed": model.unembed._module}
    handles = [part.register_forward_hook(count(name), with_kwargs=True) for name, part in parts.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def alone(model, score):
    """The same scores with nothing shared, whatever the model could do."""
    before, model.abilities = model.abilities, (False, False)
    try:
        return score()
    finally:
        model.abilities = before


# ================================================================ strengths share the lower blocks


def test_every_family_of_the_tests_can_share_blocks_and_beginnings(any_pair):
    model, _ = any_pair
    assert common._abilities(model) == (True, True)


def test_blocks_up_to_the_steered_one_run_once_for_all_strengths(any_pair):
    model, _ = any_pair
    common._abilities(model)
    with counted(model) as seen:
        got = common.next_token_logits(model, TEXTS, SWEEP)
    rows = {block: sum(rows for rows, _ in passes) for block, passes in seen.items() if block != "unembed"}
    assert rows == {0: 4, 1: 4, 2: 4, 3: 20} and sum(seen["unembed"]) == 20
    close(got, alone(model, lambda: common.next_token_logits(model, TEXTS, SWEEP)))
    close(got[0], common.next_token_logits(model, TEXTS)[0])


def test_a_single_transplant_parts_no_rows(llama):
    model, _ = llama
    common._abilities(model)
    with counted(model) as seen:
        common.next_token_logits(model, TEXTS, SWEEP[3:4])
    assert all(sum(rows for rows, _ in seen[block]) == 4 for block in range(4))


def test_a_sweep_behind_a_prefix_reads_it_once_below_and_once_a_strength_above(pair):
    model, _ = pair
    if model.config.model_type == "gpt_neo":
        pytest.skip("its window is shorter than a prefix that is worth keeping")
    prompts = [PREFIX + text for text in TEXTS]
    ids = common.encode(model, prompts)
    prefix = common._common_prefix(ids, 1)
    with counted(model) as seen:
        got = common.next_token_logits(model, prompts, SWEEP)
    assert prefix >= 32 and seen[0][0] == (1, prefix) and seen[3][0] == (5, prefix)
    assert all(tokens <= max(map(len, ids)) - prefix for _, tokens in seen[0][1:])
    close(got, alone(model, lambda: common.next_token_logits(model, prompts, SWEEP)), 2e-5)


@pytest.mark.parametrize("broken, said", [("_repeated", "strengths cannot share the lower blocks"),
                                          ("_cache", "prompts cannot share their beginning")])
def test_a_model_that_cannot_share_is_computed_in_full_and_it_is_said(llama, monkeypatch, capsys, broken, said):
    model, _ = llama
    pairs = [(PREFIX + text, word) for text in TEXTS for word in (" happy", " very sad dog")]
    wanted = common.choice_logprobs(model, pairs, SWEEP)[0]

    def fails(*_):
        raise RuntimeError("this architecture wants something else")
    monkeypatch.setattr(model, "abilities", None)
    monkeypatch.setattr(common, broken, fails)
    close(common.choice_logprobs(model, pairs, SWEEP)[0], wanted, 2e-5)
    common.next_token_logits(model, TEXTS)
    printed = capsys.readouterr().out
    assert printed.count(said) == 1 and printed.count("\n") == 1 and model.abilities.count(True) == 1


def test_a_way_that_gives_other_numbers_is_not_taken(llama, monkeypatch, capsys):
    model, _ = llama
    monkeypatch.setattr(model, "abilities", None)
    monkeypatch.setattr(common, "_repeated", lambda arguments, copies: {**arguments, "attention_mask": None}
                        if isinstance(arguments, dict) else arguments)          # padding would be looked at
    assert common._abilities(model) == (False, True)


# ================================================================ choices share their question


def test_a_question_is_read_once_for_all_its_choices(pair, monkeypatch):
    model, _ = pair
    monkeypatch.setattr(model, "pass_tokens", 10**5)        # all in one batch
    if model.config.model_type == "gpt_neo":
        pytest.skip("its window is shorter than the questions")
    questions = ["Lily lost her old cat in the park. Lily felt very", "The big dog sat on the red ball and it ran to the"]
    words = [" happy", " very sad", " sad dog", " x", " big old town"]
    pairs = [(question, word) for question in questions for word in words]
    with counted(model) as seen:
        got = common.choice_logprobs(model, pairs, SWEEP)
    starts = [len(ids) - 1 for ids in common.encode(model, questions)]
    tails = [len(whole) - start - 2 for (question, word), start in zip(pairs, [start for start in starts for _ in words])
             for whole in common.encode(model, [question + word])]
    first, second = seen[0]
    assert first == (2, max(starts)) and second == (10, 1 + max(tails))
    assert seen["unembed"][-1] == 5 * sum(tail + 1 for tail in tails)          # no position that nobody asks for
    plain = alone(model, lambda: common.choice_logprobs(model, pairs, SWEEP))
    close(got[0], plain[0], 2e-5)
    assert torch.equal(got[1], plain[1])


def test_a_prefix_and_a_question_are_two_beginnings_of_one_choice(llama, monkeypatch):
    model, _ = llama
    monkeypatch.setattr(model, "pass_tokens", 10**5)
    questions = ["Lily lost her old cat in the park. Lily felt", "Tom ran to the big house. Tom felt"]
    pairs = [(PREFIX + question, word) for question in questions for word in (" happy", " very sad", " sad dog", " x")]
    with counted(model) as seen:
        got = common.choice_logprobs(model, pairs, SWEEP)
    assert [rows for rows, _ in seen[0]] == [1, 2, 8] and [rows for rows, _ in seen[3]] == [5, 10, 40]
    close(got[0], alone(model, lambda: common.choice_logprobs(model, pairs, SWEEP))[0], 2e-5)


def test_contexts_that_differ_are_not_read_apart_from_their_ends(llama):
    model, _ = llama
    with counted(model) as seen:
        common.choice_logprobs(model, [(text, " happy") for text in TEXTS])
    assert sum(rows for rows, _ in seen[0]) == 4


# ================================================================ batches and memory


@pytest.mark.parametrize("scores", ["states", "logits", "choices", "text"])
def test_a_batch_too_large_for_memory_is_halved_and_so_are_those_that_follow(llama, monkeypatch, scores):
    model, _ = llama
    texts = TEXTS * 6
    pairs = [(text, word) for text in texts for word in (" happy", " very sad dog")]
    score = {"states": lambda: common.hidden_states(model, texts, transplant=SWEEP[3]),
             "logits": lambda: common.next_token_logits(model, texts, SWEEP),
             "choices": lambda: common.choice_logprobs(model, pairs, SWEEP)[0],
             "text": lambda: common.generate(model, texts, SWEEP[3], 4)}[scores]
    wanted, inner, failed = score(), common._padded, []

    def padded(model, rows, before=None):
        if len(rows) * max(map(len, rows)) > (24 if scores == "choices" else 45):
            failed.append(len(rows))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(model, rows, before)
    for name in ("batch_tokens", "pass_tokens"):
        monkeypatch.setattr(model, name, 400)
    common._abilities(model)
    monkeypatch.setattr(common, "_padded", padded)
    got = score()
    assert failed and model.batch_tokens < 400 and model.pass_tokens <= model.batch_tokens
    assert got == wanted if scores == "text" else close(got, wanted, 2e-5) is None
    score()
    before = len(failed)
    score()
    assert len(failed) == before                # remembered


def test_a_single_row_too_large_for_memory_is_an_error(llama, monkeypatch):
    def padded(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for name in ("batch_tokens", "pass_tokens"):
        monkeypatch.setattr(llama[0], name, getattr(llama[0], name))
    common._abilities(llama[0])
    monkeypatch.setattr(common, "_padded", padded)
    with pytest.raises(torch.OutOfMemoryError):
        common.next_token_logits(llama[0], TEXTS)


def test_a_pass_holds_no_more_tokens_than_it_may(llama, monkeypatch):
    model, _ = llama
    monkeypatch.setattr(model, "batch_tokens", 64)
    with counted(model) as seen:
        common.hidden_states(model, TEXTS * 8, transplant=SWEEP[1])
        common.next_token_logits(model, TEXTS * 8, SWEEP[:2])
        common.choice_logprobs(model, [(text, word) for text in TEXTS for word in (" happy", " very sad")], SWEEP[:2])
    assert len(seen[0]) > 8 and all(rows * tokens <= 64 for rows, tokens in seen[3])


def test_short_prompts_do_not_wait_for_long_ones(llama, monkeypatch):
    """Padding costs as much as tokens: once a batch is worth a pass, it ends before rows that are much shorter."""
    model, _ = llama
    monkeypatch.setattr(model, "pass_tokens", 128)
    lengths = [30] * 2 + [3] * 4
    assert list(common._batches(model, lengths)) == [[0, 1], [2, 3, 4, 5]]
    assert list(common._batches(model, lengths, costs=[0.0] * 6)) == [[0, 1, 2, 3, 4, 5]]      # a generation: few batches
    assert common._alike([3, 30, 3, 30, 29], 50) == [[1, 3, 4], [0, 2]] and common._alike([3, 30], 50) == [[1, 0]]


def test_long_choices_are_not_what_short_ones_are_padded_to(llama, monkeypatch):
    model, _ = llama
    monkeypatch.setattr(model, "pass_tokens", 400)          # a part is worth a pass of its own from 50 tokens
    pairs = [(text, word) for text in TEXTS[1:2] * 5 for word in [" happy", " very sad dog in the old town. " * 2]]
    with counted(model) as seen:
        got = common.choice_logprobs(model, pairs)
    widths = sorted({tokens for _, tokens in seen[0][-2:]})
    assert widths[0] == 1 and widths[1] > 10 and [rows for rows, _ in seen[0][-2:]] == [5, 5]
    close(got[0], alone(model, lambda: common.choice_logprobs(model, pairs))[0], 2e-5)


# ================================================================ the map


@pytest.mark.parametrize("n, d", [(60, 20), (20, 60)], ids=["many sentences", "few sentences"])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_fast_factors_are_those_of_the_singular_values(n, d, ridge, monkeypatch):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = common._pseudo_inverse(x, 0.0, ridge)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    close(left @ right, vt.T * (s / (s**2 + ridge * (s**2).mean())) @ u.T, 1e-9)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("the slow way was taken"))
    common._pseudo_inverse(x, 0.0, ridge)


def test_states_that_are_nearly_dependent_take_the_safe_way(monkeypatch):
    """The Gram matrix would square a condition number of 1e6; with singular values nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(60, 20, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))
    s = torch.logspace(0, -6, 20, dtype=torch.float64)
    taken, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: taken.append(1) or svd(*args, **options))
    left, right = common._pseudo_inverse(u * s @ v.T, 0.0, 0.0)
    assert taken
    close(left @ right, v / s @ u.T, 1e-7)


def test_maps_into_two_spaces_share_one_factorisation(monkeypatch):
    x, y, z = (vectors(50, width, seed) for seed, width in enumerate((8, 12, 5)))
    first = common.fit_affine(x, y)
    monkeypatch.setattr(common, "_pseudo_inverse", lambda *_: pytest.fail("x was factorised again"))
    second = common.fit_affine(x, z, inverse=first.inverse)
    wanted = torch.linalg.lstsq(x[:40].double(), z[:40].double()).solution
    close(second.vector(vectors(3, 8)), (vectors(3, 8).double() @ wanted).float())


def test_bridges_from_one_space_share_its_factors(monkeypatch):
    args, made = SimpleNamespace(sentences=40, intercept=False, rcond=0.0, ridge=0.0, norm="as-is"), []
    inner = common._pseudo_inverse
    monkeypatch.setattr(common, "_pseudo_inverse", lambda *given: made.append(1) or inner(*given))
    x, shared = vectors(50, 8)[:, None], {}
    over = [common.Bridge(x, vectors(50, width, width)[:, None], args, shared) for width in (12, 5)]
    alone = common.Bridge(x, vectors(50, 5, 5)[:, None], args)
    got = [bridge.carry(V[:8], 0, **which) for bridge in over for which in ({}, {"number": 1}, {"shuffled": True})]
    assert len(made) == 2                       # one a sample of the sentences
    close(alone.carry(V[:8], 0), got[3])
