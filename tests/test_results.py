"""The numbers of the README's two tables, from the records of the commands that print them.

pytest -m slow tests/test_results.py

CONTRANS_RESULTS names a folder of results. A finished run there of this very code is not run again.
The columns of real models need them (CONTRANS_MODELS) and data (CONTRANS_PAPER_DATA).
"""

import os
import re
import shlex
from pathlib import Path

import exp_emotion
import exp_truthfulqa
from report import select

import numpy as np
import pytest
from conftest import ROOT, json_rows, real_models

pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERDICTS = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
TARGETS = ["llama-m", "llama-l"]
EMOTION_ROWS = {  # method, and the beginning of its variant
    "base model (paper, 13B / 65B: 6 / 16)": ("base", None),
    "Self-Align, the target's own vector": ("self-align", None),
    "**ConTrans**, the paper's map (paper: 93 / 83)": ("contrans", None),
    "the same, 5 disjoint samples of text": ("contrans", "map "),
    "**ConTrans, local map**": ("contrans-local", None),
    "the same, largest α with perplexity ≤ ×1.1": ("contrans-local", "perplexity"),
    "local map, 5 disjoint samples of text": ("contrans-local", "map "),
    "199 vectors of permuted labels": ("contrans-local", "permuted"),
    "local map at the paper's n / d of 0.39": ("contrans-local", "few sentences"),
    "20 of them, α by the same rule": ("contrans-local", "own-α permuted"),
    "5 maps of shuffled texts": ("contrans-local", "shuffled"),
}
# as in docs/map.md
REAL_OPTIONS = (
    '--shots 0 --template "{scenario} I felt very" --alpha 1 2 3 5 8 --limit 50 --sentences 1000'
    " --labels happy sad angry scared disgusted surprised"
)
TRUTHFULQA_ROWS = {
    "Base Model": ("base", None),
    "Align-Training": ("align-training", None),
    "EFT/proxy-tuning": ("eft", None),
    "Self-Align": ("self-align", None),
    "ConTrans, the paper's map": ("contrans", None),
    "ConTrans, local map": ("contrans-local", None),
    "the same, largest α with perplexity ≤ ×1.1": ("contrans-local", "perplexity"),
    "local map, 5 disjoint samples": ("contrans-local", "map "),
    "its vectors of permuted labels": ("contrans-local", "permuted"),
    "its 20 random directions": ("contrans-local", "random"),
    "its 5 maps of shuffled texts": ("contrans-local", "shuffled"),
}


def run_of(main, folder, argv=()):
    """(records, folder) of a command."""
    folder = Path(os.environ.get("CONTRANS_RESULTS", folder))
    main([*argv, "--out", str(folder), "--quiet"])
    paths = folder.glob(f"{main.__module__}/*/records.jsonl")
    newest = max(paths, key=lambda path: path.stat().st_mtime)  # each run writes its records
    return json_rows(newest.parent, newest.name), newest.parent


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-\d+)?")


def alike(written, found, tolerance=2):
    """The same words, and numbers that differ by no more than rounding on another CPU may cause
    (docs/guarantees.md): one answer of 68, which moves a rate by 1.5 points and its interval by 2,
    or a factor of ten in a p-value."""
    if NUMBER.sub("#", written) != NUMBER.sub("#", found):
        return False
    for pair in zip(NUMBER.findall(written), NUMBER.findall(found)):
        small, large = sorted(map(float, pair))
        if large - small > tolerance or (large < 1 and 0 < small < large / 10):
            return False
    return True


def check_verdicts(folder):
    """docs/verdicts.md has what a report of seed 0 says of each target."""
    written = VERDICTS.split("\n## Seed 1")[0].splitlines()
    report = (folder / "report.md").read_text().replace("**", "")
    for target in TARGETS:
        [line] = re.findall(rf"^- {target}, .*", report, re.MULTILINE)
        assert any(alike(each.strip(), line) for each in written), line


def readme_row(name, after):
    """The cells of a row of the first table after a text."""
    _, _, rest = README.partition(after)
    assert rest, after
    [row] = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", rest.split("\n##")[0], re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def cell(records, method, variant):
    """A rate with its interval, or the mean of several with their range, in %."""
    own = select(records, method=method, variant=None)
    chosen = [e for e in select(records, method=method) if e["variant"] == "shuffled map 0"]
    if chosen:
        own = select(own, alpha=chosen[0]["alpha"])
    found = own if variant is None else []
    for each in select(records, method=method):
        if variant and (each["variant"] or "").startswith(variant):
            found.append(each)
    if variant in ("random", "permuted"):
        found = select(found, alpha=own[0]["alpha"])
    if variant == "map ":
        found += own
    values = [each["value"] for each in found]
    low, high = min(values), max(values)
    if len(found) == 1:
        low, high = found[0]["low"], found[0]["high"]
    return f"{100 * np.mean(values):.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def at_chosen_alpha(records, validation, best_point):
    """Without the records of Self-Align at other alphas than validation chose."""
    [*_, alpha] = best_point(select(validation, method="self-align"))
    others = [each for each in records if each["method"] != "self-align" or each["variant"]]
    return others + select(records, method="self-align", variant=None, alpha=alpha)


def check_emotions(records, target, column):
    records = [each for each in records if each["target"].endswith(target)]
    mean = select(records, concept="mean", metric="token_acc")
    mine = select(mean, part="test", item="Figure 2a")
    mine += select(mean, part="test", item="Figure 6")
    validation = select(mean, part="validation", variant=None)
    mine = at_chosen_alpha(mine, validation, exp_emotion.best_point)
    for name, (method, variant) in EMOTION_ROWS.items():
        written = readme_row(name, "## Two commands")[column]
        assert written == cell(mine, method, variant), name


def test_the_table_of_emotions(tmp_path):
    records, folder = run_of(exp_emotion.main, tmp_path)
    check_verdicts(folder)
    for column, target in enumerate(TARGETS, start=2):
        check_emotions(records, target, column)


@pytest.mark.parametrize("column", [0, 1])
def test_the_table_of_emotions_of_real_models(column, tmp_path):
    models, data = real_models()
    names = ["neo3M-chat", "stories3M"]
    source, target = names[column], names[1 - column]
    argv = f"--src {models / source} --tgt {models / target} --data {data} {REAL_OPTIONS}"
    records, _ = run_of(exp_emotion.main, tmp_path, shlex.split(argv))
    check_emotions(records, target, column)


def test_the_table_of_truthfulqa(tmp_path):
    records, folder = run_of(exp_truthfulqa.main, tmp_path)
    check_verdicts(folder)
    table = select(records, item="Table 1", metric="mc1", group=None)
    for column, target in zip((0, 2), TARGETS):
        mine = [each for each in table if each["target"].endswith(target)]
        validation = select(mine, part="validation")
        tested = select(mine, part="test")
        tested = at_chosen_alpha(tested, validation, exp_truthfulqa.best_point)
        for name, (method, variant) in TRUTHFULQA_ROWS.items():
            written = readme_row(name, "**TruthfulQA**")[column]
            # The range of five maps of shuffled texts was seen to move by 13 points.
            tolerance = 15 if "shuffled" in name else 2
            found = cell(tested, method, variant)
            assert alike(written, found, tolerance), (name, written, found)
    report = (folder / "report.md").read_text()
    judged = re.findall(r"local map \*\*holds\*\*: .*? and (\S+), permuted (\S+) \(", report)
    assert len(judged) == 2 and {rank for _, rank in judged} == {"0.005"}
    readme = " ".join(README.split())
    [written] = re.findall(r"strongest control (\(p = \S+ and \S+\))", readme)
    assert alike(written, "(p = {} and {})".format(*(p for p, _ in judged)))
    gains = re.findall(r"^\| ConTrans, local map +\| EFT/proxy-tuning +\| (.*?) +\|", report, re.M)
    assert len(gains) == 2
    [written] = re.findall(r"differ from EFT's by (.*? nats)", readme)
    assert alike(written, "{} and {} nats".format(*gains), tolerance=0.1)
