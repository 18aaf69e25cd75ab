"""benchmarks/benchmark.py on a tiny model: tokens are counted, and a wrong result is found."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import common
import harness

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "benchmark.py"
spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
benchmark = sys.modules["benchmark"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

TINY = "--shape toy --device cpu --dtype float32 --limit 2 --repeats 1".split()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(options, items, plain model, our model)."""
    folder = str(tmp_path_factory.mktemp("model"))
    args = benchmark.options(TINY)
    items, corpus = benchmark.load_items(args)
    benchmark.make_model(folder, args, corpus)
    plain = benchmark.load_plain(folder, args)
    ours = common.load_model(folder, device="cpu")
    return args, items, plain, ours


@pytest.fixture
def run(bench, monkeypatch):
    """run(task) -> ({way: row}, lengths of its texts)."""
    args, items, plain, ours = bench
    monkeypatch.setitem(harness.CACHE, "folder", None)  # run_task sets it, this puts it back

    def call(task: str):
        texts = ["".join(item) for item in items[task]]
        ids = plain.tokenizer(texts).input_ids
        rows = {}
        for row in benchmark.run_task(task, args, items[task], plain, ours):
            assert benchmark.agrees(row, args)
            rows[row["way"]] = row
        return rows, [len(each) for each in ids]

    return call


def test_tokens_of_hidden_states(run):
    rows, lengths = run("states")
    padded = len(lengths) * max(lengths)  # one batch
    assert rows["released"]["tokens"] == sum(lengths)
    assert rows["released"]["logits"] == sum(lengths)
    assert rows["plain"]["tokens"] == padded
    assert rows["plain"]["logits"] == len(lengths)
    assert rows["stopped"]["tokens"] == padded * 7 / 8  # blocks 0 to 6 of 8
    assert rows["stopped"]["logits"] == 0
    assert 0 < rows["ours"]["tokens"] <= padded * 7 / 8
    assert rows["ours"]["logits"] == 0


def test_tokens_of_the_sweep_and_of_mc1(run):
    rows, lengths = run("emotion")
    assert rows["released"]["tokens"] == 8 * sum(lengths)
    assert max(lengths) < rows["ours"]["tokens"] < rows["plain"]["tokens"] / 6
    rows, lengths = run("mc1")
    assert rows["released"]["tokens"] == sum(lengths)
    assert rows["ours"]["tokens"] < rows["released"]["tokens"] / 2


def test_tokens_of_generation(run):
    rows, lengths = run("generate")
    new = benchmark.NEW_TOKENS
    assert rows["released"]["tokens"] == sum(lengths) + 2 * (new - 1)  # the last token is not read
    assert rows["plain"]["tokens"] == 2 * (max(lengths) + new - 1)
    assert rows["ours"]["logits"] == rows["plain"]["logits"] == 2 * new


def test_a_share_has_the_lengths_of_all_items():
    items = ["x" * n for n in range(100, 0, -1)]
    picked = [len(items[i]) for i in benchmark.share_of(items, 4)]
    assert sum(picked) / 4 == pytest.approx(50.5, abs=1)
    assert benchmark.share_of(items, None) == list(range(100))


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
    assert not benchmark.agrees(row, benchmark.options(TINY))
