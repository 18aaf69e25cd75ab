"""benchmarks/: tokens are counted, a wrong result is found, maps are those of the experiment."""

import re

import benchmark
import common
import harness
import maps
from models import load_model
from report import select

import pytest
import torch
from test_scripts import Finished, command

TINY = ["--shape", "toy", "--device", "cpu", "--dtype", "float32", "--limit", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(options, items, plain model, our model)."""
    folder = str(tmp_path_factory.mktemp("model"))
    args = benchmark.options(TINY)
    items, corpus = benchmark.load_items(args)
    benchmark.make_model(folder, args, corpus)
    plain = benchmark.load_plain(folder, args)
    ours = load_model(folder, device="cpu")
    return args, items, plain, ours


@pytest.fixture
def run(bench, monkeypatch):
    """run(task) -> tokens and logits of each way, lengths of the texts."""
    args, items, plain, ours = bench
    monkeypatch.setitem(harness.CACHE, "folder", None)  # run_task sets it, this puts it back

    def call(task):
        tokens, logits = {}, {}
        for row in benchmark.run_task(task, args, items[task], plain, ours):
            assert benchmark.agrees(row, args)
            tokens[row["way"]] = row["tokens"]
            logits[row["way"]] = row["logits"]
        texts = ["".join(item) for item in items[task]]
        ids = plain.tokenizer(texts).input_ids
        return tokens, logits, [len(each) for each in ids]

    return call


def test_tokens_of_hidden_states(run):
    tokens, logits, lengths = run("states")
    padded = 2 * max(lengths)  # one batch
    assert 0 < tokens.pop("ours") <= padded * 7 / 8
    assert tokens == {
        "released": sum(lengths),
        "plain": padded,
        "stopped": padded * 7 / 8,  # blocks 0 to 6 of 8
    }
    assert logits == {"released": sum(lengths), "plain": 2, "stopped": 0, "ours": 0}


@pytest.mark.slow
def test_tokens_of_the_sweep(run):
    tokens, _, lengths = run("emotion")
    assert tokens["released"] == 8 * sum(lengths)
    assert tokens["ours"] > max(lengths)
    assert tokens["ours"] < tokens["plain"] / 6


def test_tokens_of_mc1(run):
    tokens, _, lengths = run("mc1")
    assert tokens["released"] == sum(lengths)
    assert tokens["ours"] < tokens["released"] / 2


@pytest.mark.slow
def test_tokens_of_generation(run, bench):
    *_, ours = bench
    attention, mlp = 4 * ours.config.hidden_size, 3 * ours.config.intermediate_size
    keys = 3 / 4 * attention / (attention + mlp)  # share of a block that makes them, and queries
    tokens, logits, lengths = run("generate")
    new = benchmark.NEW_TOKENS - 1  # the last token is not read
    assert tokens["released"] == 4 * (sum(lengths) + 2 * new)
    assert tokens["plain"] == 4 * 2 * (max(lengths) + new)
    # Blocks 0 to 6 of 8 read each prompt once. Block 7 makes its keys once for each of four
    # strengths, and then reads the last token.
    read = 2 * max(lengths) * (7 + 4 * keys) / 8 + 4 * 2 / 8
    assert tokens["ours"] == pytest.approx(read + 4 * 2 * new)
    assert logits["plain"] == logits["ours"] == 4 * 2 * (new + 1)


def test_a_share_has_the_lengths_of_all_items():
    items = ["x" * n for n in range(100, 0, -1)]
    picked = [len(items[i]) for i in benchmark.share_of(items, 4)]
    assert sum(picked) / 4 == pytest.approx(50.5, abs=1)
    assert benchmark.share_of(items, None) == list(range(100))


@pytest.mark.slow
def test_a_wrong_result_ends_with_1(monkeypatch, capsys):
    monkeypatch.setitem(harness.CACHE, "folder", None)
    right = common.choice_logprobs
    monkeypatch.setattr(common, "choice_logprobs", lambda model, pairs, _: right(model, pairs))
    with pytest.raises(SystemExit) as end:
        benchmark.main([*TINY, "--only", "mc1"])
    assert end.value.code == 1
    assert "WRONG: mc1 released, mc1 plain" in capsys.readouterr().out


def test_difference_sees_nan():
    theirs = {"x": torch.ones(2)}
    ours = {"x": torch.tensor([1.0, float("nan")])}
    numbers, _ = benchmark.difference(theirs, ours, [0, 1], True)
    row = {"numbers": numbers, "choices": 0.0}
    args = benchmark.options(TINY)
    assert not benchmark.agrees(row, args)


@pytest.mark.slow
def test_maps_have_the_effects_that_the_experiment_has(data, tmp_path, capsys):
    argv = [*command("exp_emotion", "--maps", "1", "--data", data), "--alpha", "1", "4"]
    maps.main(argv)
    said = capsys.readouterr().out
    run = Finished("exp_emotion", argv, tmp_path / "out")
    rates = []
    for method in ("base", "self-align", "contrans", "contrans-local"):
        mine = run.find(concept="mean", metric="token_acc", method=method, variant=None)
        grid = select(mine, part="validation") or mine
        best = max(grid, key=lambda each: (each["value"], -each["alpha"]))
        [tested] = select(mine, part="test", alpha=best["alpha"], item="Figure 2a")
        rates.append(100 * tested["value"])
    base, own, paper, local = rates
    assert f"{base:.1f} / {own:.1f} " in said
    assert re.search(rf"^\| paper +\| {paper:.1f} \(", said, re.MULTILINE)
    assert re.search(rf"^\| local +\| {local:.1f} \(", said, re.MULTILINE)
