"""README.md and docs/: every command, option and link in them leads to something.

python -m pytest tests/test_readme.py
"""

import contextlib
import functools
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import surroundings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# python, the script, and its arguments: to the end of the line, or of the code in it
COMMAND = re.compile(r"python ([\w/]+\.py)((?:\\\n|[^`\n|&#])*)")


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(script, its options) of every command in a text."""
    found = COMMAND.findall(path.read_text(encoding="utf-8"))
    return [(script, re.findall(r"(?<!\S)--[a-z][a-z-]*", line)) for script, line in found]


@functools.cache
def options_of(script: str) -> set[str]:
    """What a script's --help knows."""
    path, said = ROOT / script, io.StringIO()
    argv, folders = sys.argv, sys.path
    sys.argv, sys.path = [str(path), "--help"], [str(path.parent), *sys.path]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, folders
    return set(re.findall(r"--[a-z][a-z-]*", said.getvalue()))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_name_scripts_and_options_that_exist(path):
    for script, options in commands(path):
        assert (ROOT / script).is_file(), script
        assert set(options) <= options_of(script) | {"--help"}, script


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_the_readme_is_short_and_has_the_commands_of_a_newcomer():
    lines = README.splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 110
    start = "    pip install -r requirements.txt && "
    found = [line for line in lines if line.startswith(start)]
    assert found == [start + "python exp_emotion.py", start + "python -m pytest"]


def test_the_readme_names_every_script():
    assert len(commands(ROOT / "README.md")) >= 5
    for path in ROOT.glob("exp_*.py"):
        assert path.name in README


@pytest.mark.slow
def test_the_code_of_the_readme_runs(tmp_path):
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    environment = surroundings(tmp_path) | {"PYTHONIOENCODING": "utf-8"}
    argv = [sys.executable, "-c", code]
    ran = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
