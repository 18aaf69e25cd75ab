"""benchmarks/benchmark.py: every way is run, counts what it computes, and is found out if it comes to something else.

    pytest tests/test_benchmark.py
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "benchmark.py"
spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

TINY = ["--shape", "toy", "--device", "cpu", "--limit", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(options, texts, plain model, our model) of the toy shape."""
    folder = tmp_path_factory.mktemp("bench")
    args = benchmark.options(TINY)
    texts = benchmark.load_texts(args.data, args.seed)
    benchmark.make_model(folder / "model", args, texts.corpus)
    return args, texts, benchmark.load_plain(folder / "model", args), common.load_model(str(folder / "model"), device="cpu")


@pytest.fixture
def rows_of(bench, tmp_path, monkeypatch):
    """rows_of(work, repeats) -> ({way: row}, what is wrong)"""
    monkeypatch.setattr(common, "CACHE", common.CACHE)      # the benchmark puts folders of its own there

    def run(work: str, repeats: int = 1):
        args, texts, plain, ours = bench
        monkeypatch.setattr(args, "repeats", repeats)
        monkeypatch.setattr(benchmark, "STRENGTHS", [1, 4])
        rows, wrong = benchmark.run_work(work, args, texts, plain, ours, tmp_path)
        return {row["way"]: row for row in rows}, wrong
    return run


def lengths(bench, texts: list[str]) -> list[int]:
    return [len(ids) for ids in bench[2].tokenizer(texts).input_ids]


# ================================================================ the whole script


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """What the script writes to --out; it ends with 0 only if all ways agree."""
    out = tmp_path_factory.mktemp("report") / "report.md"
    result = subprocess.run([sys.executable, SCRIPT, *TINY, "--out", out], capture_output=True, encoding="utf-8",
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert out.read_text(encoding="utf-8") == result.stdout
    return result.stdout


def test_the_table_has_every_work_and_every_way(report):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith("| ")]
    header, *rows = cells
    assert header[:2] == ["work", "way"]
    assert [row[0] for row in rows if row[0]] == [title for title, _, _ in benchmark.WORKS.values()]
    assert [row[1] for row in rows] == [way for _, _, ways in benchmark.WORKS.values() for way in ways]
    for row in rows:
        assert float(row[header.index("seconds")]) >= 0 and (row[1] != "ours" or row[header.index("× ours")] == "1.00")
        assert bool(row[-1]) == (row[1] != "ours")          # every other way says how far it is from ours


def test_the_report_says_what_it_was_measured_with(report):
    assert re.search(r"x86_64|aarch64|arm64", report) and "float32" in report and "1 threads" in report
    assert f"torch {torch.__version__}" in report and "128 × 8" in report and "texts of toy" in report


def test_the_readme_says_how_many_items_each_way_does_by_default():
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (\d+) \w+ \| (all|\d+)(?:, plain (\d+))? \| `", readme, re.MULTILINE)
    assert rows == [(str(count), str(ways["released"][1] or "all"), str(ways.get("plain", (0, 0))[1] or ""))
                    for _, count, ways in benchmark.WORKS.values()]


# ================================================================ what is counted


def test_tokens_of_the_states_are_counted_as_they_are_computed(bench, rows_of):
    ways, wrong = rows_of("states")
    assert wrong == []
    size = lengths(bench, bench[1].lines[:2])
    padded = 2 * max(size)                      # one batch
    assert (ways["released"]["tokens"], ways["released"]["logits"]) == (sum(size), sum(size))
    assert (ways["plain"]["tokens"], ways["plain"]["logits"]) == (padded, 2)
    assert (ways["stopped"]["tokens"], ways["stopped"]["logits"]) == (padded * 7 / 8, 0)        # blocks 0 to 6 of 8
    assert 0 < ways["ours"]["tokens"] <= padded * 7 / 8 and ways["ours"]["logits"] == 0


def test_tokens_of_the_sweep(bench, rows_of):
    ways, wrong = rows_of("emotion")            # two strengths
    assert wrong == []
    size = lengths(bench, bench[1].prompts[:2])
    assert ways["released"]["tokens"] == ways["released"]["logits"] == 2 * sum(size)
    assert ways["plain"]["tokens"] == 2 * 2 * max(size) and ways["plain"]["logits"] == 2 * 2
    assert 2 * 2 <= ways["ours"]["logits"] <= 2 * 3         # the shared prefix may cost one each
    assert max(size) < ways["ours"]["tokens"] < ways["plain"]["tokens"]


def test_tokens_of_generation(bench, rows_of):
    ways, wrong = rows_of("generate")
    assert wrong == []
    size = lengths(bench, [context for context, _ in bench[1].questions[:2]])
    new = benchmark.NEW_TOKENS
    assert ways["released"]["tokens"] == sum(size) + 2 * (new - 1)      # the last token is not read
    assert ways["plain"]["tokens"] == 2 * (max(size) + new - 1)
    assert ways["released"]["logits"] == ways["plain"]["logits"] == 2 * new


def test_a_linear_layer_counts_rows_times_weights_and_the_function_is_put_back():
    before = torch.nn.functional.linear
    block, unembed = torch.nn.Linear(3, 5), torch.nn.Linear(3, benchmark.VOCABULARY, bias=False)
    with benchmark.measured("cpu") as cost:
        unembed(torch.ones(2, 7, 3)), block(torch.ones(4, 3))
    assert (cost.blocks, cost.logits, cost.unembedding) == (4 * 15, 14, 14 * 3 * benchmark.VOCABULARY)
    assert torch.nn.functional.linear is before and cost.seconds > 0


def test_the_items_of_a_share_have_the_lengths_of_all():
    items = ["x" * n for n in range(100, 0, -1)]
    picked = benchmark.share(items, 4, full=False)
    assert picked == sorted(picked) and sum(len(items[i]) for i in picked) / 4 == pytest.approx(50.5, abs=1)
    assert benchmark.share(items, 4, full=True) == benchmark.share(items, None, full=False) == list(range(100))


# ================================================================ a wrong result is found out


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        benchmark.main([*TINY, *argv])
    assert end.value.code == 1
    return capsys.readouterr().out


def test_choices_scored_without_the_vector_end_with_1(monkeypatch, capsys):
    monkeypatch.setattr(common, "CACHE", common.CACHE)
    right = common.choice_logprobs
    monkeypatch.setattr(common, "choice_logprobs", lambda model, pairs, transplants: right(model, pairs))
    printed = refused(["--only", "mc1"], capsys)
    assert "WRONG: mc1, released: differs" in printed and "WRONG: mc1, plain: differs" in printed


@pytest.mark.parametrize("work, function, spoil", [
    ("states", "hidden_states", lambda states: states * 1.001),
    ("generate", "generate", lambda texts: [*texts[:-1], texts[-1] + "."]),
    ("emotion", "score_labels", lambda labels: (labels[0], (labels[1] + 1) % 6)),
    ("emotion", "next_token_logits", lambda logits: logits.flip(0)),                # the strengths in another order
    ("mc1", "choice_logprobs", lambda scores: (scores[0] * float("nan"), scores[1])),
])
def test_each_work_finds_a_result_that_is_a_little_off(rows_of, monkeypatch, work, function, spoil):
    right = getattr(common, function)
    monkeypatch.setattr(common, function, lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    rows, wrong = rows_of(work)
    assert len(wrong) == len(rows) - 1 and all("differs from ours" in fault for fault in wrong)


def test_the_map_finds_a_result_that_is_a_little_off(rows_of, monkeypatch):
    right = common.fit_affine
    monkeypatch.setattr(common, "fit_affine", lambda x, y: right(x, y * 1.001))
    assert rows_of("map")[1] and not monkeypatch.undo() and not rows_of("map")[1]


def test_states_that_are_kept_from_one_repeat_to_the_next_are_found_out(rows_of, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark.tempfile, "mkdtemp", lambda dir: str(tmp_path))
    _, wrong = rows_of("states", repeats=2)
    assert len(wrong) == 1 and "states, ours" in wrong[0] and "something was kept" in wrong[0]


@pytest.mark.parametrize("argv", [["--width", "100"], ["--layers", "4"], ["--limit", "1"], ["--repeats", "0"],
                                  ["--only", "nothing"], ["--data", "no/such/folder"]])
def test_impossible_options_end_with_2(argv):
    with pytest.raises(SystemExit) as end:
        benchmark.main([*TINY, *argv])
    assert end.value.code == 2
