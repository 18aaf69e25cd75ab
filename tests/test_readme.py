"""README.md and docs/: every command, option and link in them leads to something.

python -m pytest tests/test_readme.py
"""

import ast
import contextlib
import functools
import io
import re
import runpy
import subprocess
import sys
from importlib.metadata import requires

import pytest
from conftest import ROOT, surroundings

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = ["README.md", "data/README.md"]
TEXTS += [f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))]
FINDINGS = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
VERDICTS = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
TARGETS = ["llama-m", "llama-l"]
PAPER, LOCAL = "ConTrans", "ConTrans, local map"
CLAIMS = {  # row in the table of two seeds: script, and (target, vector) of both rates
    "emotions, the paper's map": ("exp_emotion", [(name, PAPER) for name in TARGETS]),
    "emotions, the local map": ("exp_emotion", [(name, LOCAL) for name in TARGETS]),
    "MC1, the paper's map": ("exp_truthfulqa", [(name, PAPER) for name in TARGETS]),
    "MC1, the local map": ("exp_truthfulqa", [(name, LOCAL) for name in TARGETS]),
    "checkpoints, last two, local map": (
        "exp_pretraining",
        [("step_1600", LOCAL), ("step_3000", LOCAL)],
    ),
    "the two largest sizes into each other, local map": (
        "exp_pythia",
        [("pythia-5", f"{LOCAL} of pythia-4"), ("pythia-4", f"{LOCAL} of pythia-5")],
    ),
}
# python, the script, and its arguments: to the end of the line, or of the code in it
COMMAND = re.compile(r"python ([\w/]+\.py)((?:\\\n|[^`\n|&#])*)")
OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]*")
PACKAGES = {  # whose module has another name
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "websocket": "websocket-client",
    "markdown_it": "markdown-it-py",
}


def commands(name):
    """(script, its options) of every command in a text."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = []
    for script, arguments in COMMAND.findall(text):
        found.append((script, OPTION.findall(arguments)))
    return found


@functools.cache
def options_of(script):
    """What a script's --help knows."""
    path = ROOT / script
    said = io.StringIO()
    argv, folders = sys.argv, sys.path
    sys.argv = [str(path), "--help"]
    sys.path = [str(path.parent), *folders]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, folders
    return set(re.findall(r"--[a-z][a-z-]*", said.getvalue()))


def python_files():
    found = []
    for pattern in ("*.py", "data/**/*.py", "benchmarks/*.py", "tests/*.py"):
        found += ROOT.glob(pattern)
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_commands_name_scripts_and_options_that_exist(name):
    for script, options in commands(name):
        assert (ROOT / script).is_file(), script
        assert set(options) <= options_of(script), script


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (folder / link).exists(), link


def test_the_readme_is_short_and_has_the_commands_of_a_newcomer():
    lines = README.splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 110
    start = "    pip install -r requirements.txt && "
    found = [line for line in lines if line.startswith(start)]
    assert found == [start + "python exp_emotion.py", start + "python -m pytest"]


def test_the_readme_names_every_script():
    assert len(commands("README.md")) >= 5
    for path in ROOT.glob("exp_*.py"):
        assert path.name in README


def test_readme_and_docs_name_every_family_and_count_the_architectures():
    models = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = (ROOT / "data" / "models.csv").read_text(encoding="utf-8").splitlines()[1:]
    for family in {row.partition(",")[0] for row in rows} - {"table 3"}:
        assert f"`{family}`" in models
        assert family == "toy" or re.search(rf"(--family|or) {family}\b", README), family
    working = models.split("## What works")[1].split("## What is refused")[0]
    assert f"{working.count('| `')} architectures" in README


def reports(seed):
    """What docs/verdicts.md has of the reports on one zoo."""
    return VERDICTS.split("\n## Seed ")[1 + seed]


def verdict_on(seed, script, target, vector):
    """(rate in %, whether it holds, p against its strongest control) of a vector."""
    [run] = [each for each in reports(seed).split(" results/") if each.startswith(f"{script}/")]
    [line] = re.findall(rf"^ *- {target}, (.*)", run, re.MULTILINE)
    outcomes = "holds|does not move it|is not above the controls"
    pattern = rf"; {vector} ({outcomes}): ([\d.]+) %, p = \S+ and ([\w.-]+)"
    [(outcome, rate, p)] = re.findall(pattern, line)
    return rate, outcome == "holds", p


def seed_rows():
    """{claim: cells} of the table of two seeds."""
    table = FINDINGS.split("## Two seeds")[1]
    rows = re.findall(r"^\| (.*) \|$", table, re.MULTILINE)[2:]
    return {name: cells for name, *cells in (row.split(" | ") for row in rows)}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_table_of_two_seeds_has_the_verdicts_of_the_reports(claim):
    *cells, where = seed_rows()[claim]
    script, vectors = CLAIMS[claim]
    between = " / " if vectors[0][0] in TARGETS else " and "
    both = 0
    for seed, cell in enumerate(cells):
        rates, holds, p = zip(*(verdict_on(seed, script, *each) for each in vectors))
        word = "yes" if all(holds) else "no"
        if any(holds) and not all(holds):
            word = f"in `{TARGETS[holds.index(True)]}` only"
        assert cell == f"{between.join(rates)}: {word} (p = {p[0]} and {p[1]})"
        both += all(holds)
    assert where.strip("*") == ("none", "one", "both")[both]


def test_every_rate_of_the_two_seeds_is_in_a_report():
    rows = seed_rows()
    assert len(rows) > 8
    for claim, cells in rows.items():
        for seed, cell in enumerate(cells[:2]):
            rates = re.sub(r"\(.*?\)", "", cell)  # without p
            for number in re.findall(r"\d+\.\d+", rates):
                assert number in reports(seed), (claim, number)
    second = README.split("**A second zoo**")[1].split("\n\n")[0]
    numbers = re.findall(r"\d+\.\d+", second)
    assert len(numbers) > 3
    assert all(number in reports(1) for number in numbers)


@pytest.mark.slow
def test_the_code_of_the_readme_runs(tmp_path):
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    environment = surroundings(tmp_path) | {"PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_requirements_bring_every_package_that_is_imported():
    known = ""
    for path in ROOT.glob("requirements*.txt"):
        known += path.read_text(encoding="utf-8")
    for package in re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        known += " ".join(requires(package) or [])
    ours = {path.stem for path in python_files()}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                package = name.partition(".")[0]
                if package not in ours and package not in sys.stdlib_module_names:
                    assert PACKAGES.get(package, package) in known, f"{path.name}: {package}"


def test_no_file_knows_a_folder_outside_the_repository():
    outside = re.compile(r"\.\./sha[r]ed|/wo[r]k/|/ho[m]e/\w")
    for path in [*python_files(), *(ROOT / name for name in TEXTS)]:
        assert not outside.search(path.read_text(encoding="utf-8")), path
