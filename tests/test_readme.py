"""README.md: what it tells a newcomer to type is what works, and what it says is so.

    pytest tests/test_readme.py
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA_README = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
PACKAGES = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub", "websocket": "websocket-client"}    # module: package
FOREIGN = {"--model", "--control-vector", "--control-vector-scaled"}         # options of lm_eval and of llama.cpp
HOSTS = {"github.com", "raw.githubusercontent.com", "huggingface.co", "arxiv.org", "ndif.us", "login.ndif.us", "api.ndif.us",
         "nnsight.net", "download.pytorch.org", "127.0.0.1"}


def tracked() -> list[Path]:
    """Files of the repository, those that are not committed yet too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def texts() -> dict[Path, str]:
    """What is to be read in the repository: no weights, no figures, no tokenizer tables."""
    read = {}
    for path in tracked():
        try:
            read[path] = path.read_bytes().decode("utf-8") if path.name != "tokenizer.json" else ""
        except UnicodeDecodeError:
            pass
    return read


# ================================================================ the method in 25 lines


@pytest.fixture(scope="module")
def block() -> str:
    code, = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return code


@pytest.fixture(scope="module")
def printed(block, tmp_path_factory) -> list[str]:
    """What the block prints as a script, run from the root of the repository."""
    folder = tmp_path_factory.mktemp("block")
    (folder / "block.py").write_text(block, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1",
                   "CONTRANS_CACHE": str(folder / "cache")}
    result = subprocess.run([sys.executable, folder / "block.py"], cwd=ROOT, env=environment, capture_output=True,
                            encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_block_is_as_short_as_it_says(block):
    lines = [line for line in block.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) <= 25 and "The method in 25 lines" in README
    assert max(map(len, block.splitlines())) <= 120


def test_the_block_prints_the_fit_and_three_lines(printed):
    assert len(printed) == 4
    assert re.fullmatch(r"held-out R² 0\.\d\d, cosine 0\.\d\d, \|v\| \d+\.\d, \|v̂\| \d+\.\d", printed[0])
    assert [line.split()[0] for line in printed[1:]] == ["base", "v̂", "random"]


def test_the_block_shows_an_effect_that_a_random_direction_has_not(printed):
    counts = [re.search(r"(\d+) of (\d+) answers", line).groups() for line in printed[1:]]
    (base, n), (ours, _), (chance, _) = [map(int, pair) for pair in counts]
    assert n == 80 and base <= 0.05 * n and ours >= 0.25 * n
    assert ours - base > 2 * (chance - base)


# ================================================================ commands


def test_the_two_commands_are_those_that_the_check_of_the_repository_runs():
    extract = re.search(r"sed -n '(.*?)' README\.md", (ROOT / ".ci" / "run").read_text()).group(1)
    found = subprocess.run(["sed", "-n", extract, "README.md"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout
    assert found.splitlines() == ["pip install -r requirements.txt && python exp_emotion.py",
                                  "pip install -r requirements.txt && python -m pytest"]


def test_every_option_in_the_texts_exists():
    scripts = [*sorted(path.name for path in ROOT.glob("exp_*.py")), "common.py", "data/prepare.py", "data/toy/train.py"]
    helps = "".join(subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
                    for script in scripts)
    known = set(re.findall(r"--[a-z][a-z-]*", helps))
    assert set(re.findall(r"(?<![\w|-])--[a-z][a-z-]*", README + DATA_README)) <= known | FOREIGN


def test_every_script_is_in_the_table_and_the_table_has_no_other():
    listed = re.findall(r"^\| `(exp_\w+\.py)` \|", README, re.MULTILINE)
    assert listed == sorted(path.name for path in ROOT.glob("exp_*.py"))


def test_every_command_of_a_script_names_a_script_that_is_there():
    for text in (README, DATA_README):
        for script in re.findall(r"python ([\w/]+\.py)", text):
            assert (ROOT / script).is_file(), script


# ================================================================ what it says


@pytest.mark.parametrize("path", ["README.md", "data/README.md"])
def test_links_lead_to_files_that_are_in_the_repository(path):
    here, files = (ROOT / path).parent, set(tracked())
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / path).read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and (here / link).resolve() not in files]
    assert missing == []


def test_no_number_is_left_to_be_filled_in():
    for path, text in texts().items():
        if path.suffix == ".md":
            assert not re.search(r"@[A-Z]+@|\bTODO\b|\bTBD\b", text), path


def test_the_table_of_the_zoo_says_what_training_json_says():
    """A row is of a base model, with its chat model if it has one; of checkpoints, the last one counts."""
    rows = re.findall(r"^\| (`[\w-]+`(?:, `[\w-]+-chat`)?) \|(.*)\|$", DATA_README, re.MULTILINE)
    models = ROOT / "data" / "toy" / "models"
    listed = [re.findall(r"`([\w-]+)`", names) for names, _ in rows]
    assert sorted(sum(listed, [])) == sorted(path.name for path in models.iterdir())
    for names, (_, rest) in zip(listed, rows):
        _, shape, parameters, steps, minutes = [cell.strip() for cell in rest.split("|")]
        folders = [max([models / name, *(models / name).glob("step_*")]) for name in names]
        records = [json.loads((folder / "training.json").read_text()) for folder in folders]
        config = json.loads((folders[0] / "config.json").read_text())
        assert shape == f"{config['hidden_size']} × {config['num_hidden_layers']}"
        assert parameters == f"{records[0]['parameters'] / 1e6:.2f} M"
        assert steps == " + ".join(f"{record['steps']:,}" for record in records)
        assert [int(part) for part in minutes.split("+")] == [round(record["minutes"]) for record in records]


def test_requirements_name_every_package_that_is_imported():
    ours = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("tests/*.py")]}
    imported = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/toy/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            imported |= {name.split(".")[0] for name in names}
    required = {name for path in ROOT.glob("requirements*.txt") for name in re.findall(r"^[\w-]+", path.read_text(), re.MULTILINE)}
    imported -= ours | set(sys.stdlib_module_names)
    assert {PACKAGES.get(name, name) for name in imported} <= required


def test_requirements_are_pinned_and_installed_as_pinned():
    from importlib.metadata import version
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if pin := re.match(r"([\w-]+)==([\w.]+)", line):
            assert version(pin[1]).split("+")[0] == pin[2], line


# ================================================================ nothing of one machine


def test_no_text_holds_a_path_of_one_machine():
    private = re.compile("|".join([r"/wor" r"k/", r"/ho" r"me/\w", r"/Us" r"ers/\w", r"/ro" r"ot/"]))
    temporary = re.compile(r"/t" r"mp\b")
    for path, text in texts().items():
        assert not private.search(text), path
        assert path.parent == ROOT / "tests" or not temporary.search(text), path


def test_addresses_lead_to_public_hosts_that_are_known():
    for path, text in texts().items():
        hosts = set(re.findall(r"https?://([\w.-]+)", text))
        assert hosts <= HOSTS, (path, hosts - HOSTS)
        assert not re.search(r"(?i)fa" r"rm(?!er)", text), path
