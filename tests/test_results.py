"""The numbers of the README's two tables, from the records of the default commands.

pytest -m slow tests/test_results.py

CONTRANS_RESULTS names a folder of results. A finished run there of this very code is not run again.
"""

import json
import os
import re
from pathlib import Path

import exp_emotion
import exp_truthfulqa
from report import mcnemar, select

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERDICTS = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
TARGETS = ["llama-m", "llama-l"]
EMOTION_ROWS = {  # method, and the beginning of its variant
    "base model": ("base", None),
    "Self-Align, the target's own vector": ("self-align", None),
    "**ConTrans**, the paper's map": ("contrans", None),
    "**ConTrans, local map**": ("contrans-local", None),
    "the same at the largest α with perplexity ≤ ×1.1": ("contrans-local", "perplexity"),
    "local map, 5 disjoint samples of text": ("contrans-local", "map "),
    "199 vectors of permuted labels": ("contrans-local", "permuted"),
    "local map at the paper's n / d of 0.39": ("contrans-local", "few sentences"),
    "20 of them, α by the same rule": ("contrans-local", "own-α permuted"),
    "map of shuffled texts": ("contrans-local", "shuffled"),
}
TRUTHFULQA_ROWS = {
    "Base Model": ("base", None),
    "Align-Training": ("align-training", None),
    "EFT/proxy-tuning": ("eft", None),
    "Self-Align": ("self-align", None),
    "ConTrans, the paper's map": ("contrans", None),
    "ConTrans, local map": ("contrans-local", None),
    "the same at the largest α with perplexity ≤ ×1.1": ("contrans-local", "perplexity"),
    "local map, 5 disjoint samples": ("contrans-local", "map "),
    "its vectors of permuted labels": ("contrans-local", "permuted"),
    "its random directions, its shuffled map": ("contrans-local", "random"),
}


def run_of(main, folder: Path) -> tuple[list[dict], Path]:
    """(records, folder) of a default command."""
    folder = Path(os.environ.get("CONTRANS_RESULTS", folder))
    main(["--out", str(folder), "--quiet"])
    paths = folder.glob(f"{main.__module__}/*/records.jsonl")
    newest = max(paths, key=lambda path: path.stat().st_mtime)  # each run writes its records
    records = [json.loads(line) for line in newest.read_text().splitlines()]
    report = newest.with_name("report.md").read_text().replace("**", "")
    for target in TARGETS:
        [line] = re.findall(rf"^- {target}, .*", report, re.MULTILINE)
        assert line in VERDICTS.split("\n## Seed 1")[0]
    return records, newest.parent


def readme_row(name: str, after: str) -> list[str]:
    """The cells of a row of the first table after a text."""
    _, _, rest = README.partition(after)
    assert rest, after
    [row] = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", rest.split("\n##")[0], re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def cell(records: list[dict], method: str, variant: str | None) -> str:
    """A rate with its interval, or the mean of several with their range, in %."""
    own = select(records, method=method, variant=None)
    chosen = [e for e in select(records, method=method) if e["variant"] == "shuffled map"]
    if chosen:
        own = select(own, alpha=chosen[0]["alpha"])
    if method == "self-align":
        own = [max(own, key=lambda each: each["value"])]
    found = own if variant is None else []
    for each in select(records, method=method):
        if variant and (each["variant"] or "").startswith(variant):
            found.append(each)
    if variant in ("random", "permuted", "other"):
        found = select(found, alpha=own[0]["alpha"])
    if variant == "map ":
        found += own
    values = [each["value"] for each in found]
    low, high = min(values), max(values)
    if len(found) == 1:
        low, high = found[0]["low"], found[0]["high"]
    return f"{100 * np.mean(values):.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def test_the_table_of_emotions(tmp_path):
    records, _ = run_of(exp_emotion.main, tmp_path)
    mean = select(records, concept="mean", metric="token_acc", part="test", item="Figure 2a")
    mean += select(records, concept="mean", metric="token_acc", part="test", item="Figure 6")
    for name, (method, variant) in EMOTION_ROWS.items():
        cells = []
        for target in TARGETS:
            mine = [each for each in mean if each["target"].endswith(target)]
            cells.append(cell(mine, method, variant))
        assert readme_row(name, "## Two commands")[:2] == cells, name


def test_the_table_of_truthfulqa(tmp_path):
    records, folder = run_of(exp_truthfulqa.main, tmp_path)
    tested = select(records, item="Table 1", metric="mc1", part="test", group=None)
    for name, (method, variant) in TRUTHFULQA_ROWS.items():
        for column, target in zip((0, 2), TARGETS):
            mine = [each for each in tested if each["target"].endswith(target)]
            written = readme_row(name, "**TruthfulQA**")[column]
            assert written.startswith(cell(mine, method, variant)), name
    report = (folder / "report.md").read_text()
    judged = re.findall(r"local map \*\*holds\*\*: .*? and (\S+), permuted (\S+) \(", report)
    assert len(judged) == 2 and {rank for _, rank in judged} == {"0.005"}
    assert "(p = {} and {})".format(*(p for p, _ in judged)) in README
    lines = (folder / "examples.jsonl").read_text().splitlines()
    examples = [each for each in map(json.loads, lines) if each.get("item") == "Table 1"]
    differences = []
    for target in TARGETS:
        mine = [each for each in examples if each["target"].endswith(target)]
        eft, ours = [
            [each["right"] for each in select(mine, method=method, variant=None)]
            for method in ("eft", "contrans-local")
        ]
        differences.append(f"{mcnemar(eft, ours):.1g}")
    assert "(difference: p = {} and {})".format(*differences) in README
