"""harness.py: options, files, runs, records, and vectors on disk."""

import csv
import errno
import math
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import harness
import report
from common import Transplant, next_token_logits
from harness import (
    Run,
    export_concept,
    fail,
    load_concept,
    model_options,
    option_parser,
    parse_options,
    read_json,
    read_table,
    read_text,
    read_texts,
    run_script,
    save_concept,
)
from report import (
    draw_grid,
    draw_strength,
    fluent,
    holm,
    markdown,
    mcnemar,
    new_figure,
    paired_gain,
    paired_p,
    pivot,
    pool,
    rank_p,
    record,
    select,
    spread,
    summary,
    verdict,
)

import gguf
import numpy as np
import pytest
import torch
from conftest import close, json_rows, vectors
from safetensors.torch import save_file
from scipy.stats import fisher_exact

# ================================================================ 1  Options

FAMILIES = {
    "toy": {
        "src": "toy/a",
        "src_base": "toy/a-base",
        "tgt": ["toy/b"],
        "tgt_chat": ["toy/b-chat"],
        "layer": "0.75",
        "alpha": [1.0, 2.0],
        "limit": 50,
        "sentences": 100,
    },
    "custom": {"layer": "0.5", "alpha": [1.0], "limit": -1, "sentences": 2000},
}


def parse(folder, words="", *more):
    parser = option_parser("A script.", FAMILIES)
    return parse_options(parser, FAMILIES, [*words.split(), "--data", str(folder), *more])


def test_fail_is_one_line(one_line):
    assert one_line(lambda: fail("two\n  lines")) == "error: two lines\n"


def test_a_script_ends_with_one_line(one_line, capsys):
    def interrupted():
        raise KeyboardInterrupt

    def overflow():
        raise FloatingPointError("NaN in x")

    one_line(lambda: run_script(overflow), "NaN in x")
    with pytest.raises(SystemExit) as stopped:
        run_script(interrupted)
    assert stopped.value.code == 130
    assert "continue" in capsys.readouterr().err


BAD_OPTIONS = """
--src a
--tgt a
--src a --tgt b --tgt-chat c d
--src a --tgt x/b y/b
--tgt-chat none none
--family no-such
--family custom
--no-such-option
--src
stray
--alpha x
--alpha nan
--alpha 1 inf
--alpha 1 0
--alpha
--refine median
--sentences 9
--sentences many
--random 0
--limit 0
--limit -2
--limit 1.5
--batch-tokens 0
--ridge -1
--ridge nan
--ridge inf
--layer x
--layer 1,2,3
--layer -1
--layer 1,
--layer 1.2.3
--layer .
--layer auto,3
--dtype int3
--seed x
--seed -1
--seed 4294967296
--remote someone
--data no/such/folder
"""


@pytest.mark.parametrize("line", BAD_OPTIONS.strip().splitlines())
def test_bad_options_end_in_one_line(line, tmp_path, one_line):
    argv = ["--data", str(tmp_path), *line.split()]
    parser = option_parser("A script.", FAMILIES)
    one_line(lambda: parse_options(parser, FAMILIES, argv))


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("", "toy/a toy/a-base ['toy/b'] ['toy/b-chat'] 0.75"),
        ("--src a --tgt b c", "a a ['b', 'c'] [None, None] 0.5"),
        ("--src a --tgt b c --tgt-chat none d", "a a ['b', 'c'] [None, 'd'] 0.5"),
        ("--family toy --src a", "a a ['toy/b'] ['toy/b-chat'] 0.75"),
        ("--family toy --src a --src-base c", "a c ['toy/b'] ['toy/b-chat'] 0.75"),
        ("--src-base c", "toy/a c ['toy/b'] ['toy/b-chat'] 0.75"),
        ("--family toy --tgt b", "toy/a toy/a-base ['b'] [None] 0.75"),
        ("--tgt-chat d --layer 2,3", "toy/a toy/a-base ['toy/b'] ['d'] 2,3"),
    ],
)
def test_own_models_do_not_take_partners_from_the_family(words, wanted, tmp_path):
    args = parse(tmp_path, words)
    assert f"{args.src} {args.src_base} {args.tgt} {args.tgt_chat} {args.layer}" == wanted


def test_an_option_goes_before_the_family(tmp_path):
    args = parse(tmp_path, "--alpha 0.5 -3 0.5 --limit -1 --sentences 17")
    assert args.alpha == [0.5, -3.0]
    assert (args.limit, args.sentences, args.family) == (-1, 17, "toy")
    assert parse(tmp_path).alpha == [1.0, 2.0]
    options = model_options(parse(tmp_path, "--batch-tokens 9 --allow-pickle --dtype float16"))
    assert options["remote"] == []
    assert (options["batch_tokens"], options["dtype"]) == (9, "float16")
    assert options["allow_pickle"]
    assert not options["trust_remote_code"]


@pytest.mark.parametrize(
    "line",
    """--ridge 0
--ridge 0.01
--sentences 10
--random 1
--limit 1
--batch-tokens 1
--seed 0
--seed 4294967295""".splitlines(),
)
def test_options_at_their_bounds_are_taken(line, tmp_path):
    option, value = line.removeprefix("--").split()
    assert getattr(parse(tmp_path, line), option.replace("-", "_")) == float(value)


def test_without_bitsandbytes_one_line_says_so(monkeypatch, one_line, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    one_line(lambda: parse(tmp_path, "--dtype nf4"), "pip install bitsandbytes")


def test_no_cache_is_an_option(tmp_path, cache_folder):
    parse(tmp_path)
    assert harness.CACHE["folder"] == str(cache_folder)
    parse(tmp_path, "--no-cache")
    assert harness.CACHE["folder"] is None
    parse(tmp_path)
    assert harness.CACHE["folder"] == str(cache_folder)


def test_permuted_labels_are_a_null_of_mean_differences_only(tmp_path, capsys):
    assert parse(tmp_path, "--permutations 9").permutations == 9
    assert parse(tmp_path, "--permutations 9 --refine probe").permutations == 0
    assert "no vectors of permuted labels with --refine probe" in capsys.readouterr().out


def test_few_sentences_for_a_map_are_remarked(tmp_path, capsys):
    parse(tmp_path, "--sentences 99")
    assert "note: 80 sentences fit each affine map" in capsys.readouterr().out
    parse(tmp_path, "--sentences 100")
    assert "note: " not in capsys.readouterr().out


def test_the_harness_sets_how_long_threads_spin_before_torch_is_imported():
    code = "import harness, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {name: os.environ[name] for name in os.environ if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(
        command, cwd=harness.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "5000 False\n"


# ================================================================ 2  Files


BAD_FILES = [
    (read_text, None, "no file"),
    (read_text, b"a\nb\n\xff", "line 3: not UTF-8"),
    (read_json, b'{"a": 1,\n "b" 2}', "line 2: not JSON"),
    (read_json, b'["\\ud800"]', "unusable"),
    (read_json, b"[" * 100_000, "unusable"),
    (read_texts, b'{"a": 1}', "list of texts"),
    (read_texts, b"[]", "not empty"),
    (read_texts, b'["a", " "]', "text 1"),
    (read_texts, b'["a", "b", 3]', "text 2"),
    (read_table, b'a,b\n1,"2', "line 2: not CSV"),
    (read_table, b"a,c\n1,2\n", "line 1: must have the columns a, b"),
    (read_table, b"", "line 1"),
    (read_table, b"a,b\n1,2\n3\n", "row 2"),
    (read_table, b"a,b\n1,2,3\n", "row 1"),
]


@pytest.mark.parametrize("read, content, word", BAD_FILES)
def test_a_reader_names_the_file_and_the_line(read, content, word, tmp_path, one_line):
    path = tmp_path / "a-file"
    if content is not None:
        path.write_bytes(content)
    columns = ["a", "b"] if read is read_table else []
    one_line(lambda: read(path, *columns), "a-file", word)


def test_readers_take_a_byte_order_mark_and_any_line_ends(tmp_path):
    path = tmp_path / "a-file"
    path.write_bytes(b'\xef\xbb\xbf["a ",\r\n "b", "a"]')
    assert read_texts(path) == ["a", "b"]
    path.write_bytes(b'\xef\xbb\xbfa,b,note\r\n1,"x\r\ny",\r\n')
    assert read_table(path, "a", "b") == [{"a": "1", "b": "x\r\ny", "note": ""}]


class Figure:
    """What Run.figure saves: writes half of itself, then fails if it has an error."""

    def __init__(self, error=None):
        self.error = error

    def savefig(self, file, **_):
        file.write(b"half")
        if self.error:
            raise self.error
        file.write(b" whole")


def test_a_file_appears_whole_or_not_at_all(start, one_line, monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: None)
    run = start()
    before = sorted(run.folder.iterdir())
    for number in (errno.ENOSPC, errno.EFBIG):
        error = OSError(number, "the disk is full")
        one_line(lambda: run.figure(Figure(error), "figure_1"), "no space left", "figure_1.png")
    one_line(lambda: run.figure(Figure(OSError(errno.EROFS, "read-only")), "f"), "read-only")
    assert sorted(run.folder.iterdir()) == before
    run.figure(Figure(), "figure_1")
    with pytest.raises(KeyboardInterrupt):
        run.figure(Figure(KeyboardInterrupt()), "figure_1")
    new = sorted(set(run.folder.iterdir()) - set(before))
    assert [path.name for path in new] == ["figure_1.pdf", "figure_1.png"]
    assert new[0].read_text() == new[1].read_text() == "half whole"


def test_a_real_limit_on_file_sizes_is_one_line(tmp_path, one_line):
    """The kernel says so in the middle of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        one_line(lambda: save_concept(tmp_path / "v", torch.ones(999), **ABOUT), "no space left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


# ================================================================ 4  Runs


@pytest.fixture
def start(tmp_path):
    """start(words, inputs) -> the Run of a script in tmp_path with these options and inputs."""
    script = tmp_path / "exp_test.py"
    script.write_text("# a script")

    def begin(words="", inputs=("m", 1), **options):
        args = parse(tmp_path, words, "--out", str(tmp_path / "out"))
        return Run(script, args, MODELS, inputs, **options)

    return begin


MODELS = SimpleNamespace(fingerprint=lambda name: f"sha256:{name}")
VALUE = {"α": [1.5, None, True], "text": "ü\n", "n": 3}


def test_a_step_is_computed_once_and_read_back_by_the_same_command(start):
    calls = []

    def compute(*args, **options):
        calls.append((args, options))
        return VALUE

    for _ in range(2):
        run = start()
        for _ in range(2):
            assert run.step("steer α 2 / x", compute, 1, more=2) == VALUE
    assert calls == [((1,), {"more": 2})]
    assert (len(run.reused), len(run.computed)) == (1, 0)
    assert run.step("pair", lambda: (1, {2: 3})) == [1, {"2": 3}]  # as it will be read back


def test_steps_of_like_or_long_names_are_kept_apart(start):
    names = ["a b", "a-b", "α", "β", "x" * 499 + "a", "x" * 499 + "b"]
    for run in (start(), start()):
        assert [run.step(name, str, name) for name in names] == names
    assert len(list(run.steps.iterdir())) == len(names)


def test_a_step_that_fails_leaves_nothing(start):
    def interrupted():
        raise KeyboardInterrupt

    run = start()
    with pytest.raises(KeyboardInterrupt):
        run.step("a", interrupted)
    with pytest.raises(TypeError):
        run.step("a", object)
    assert not list(run.steps.iterdir())
    assert start().step("a", int, 2) == 2


def test_what_changes_results_starts_another_folder(start, tmp_path):
    folder = start().folder
    assert folder.parent.name == "exp_test"
    assert folder.name.startswith("a--b--")
    for words in ("--family toy", "--no-cache", "--batch-tokens 9", "--fresh"):
        assert start(words).folder == folder
    for words in ("--alpha 3", "--seed 1", "--intercept", "--src c --tgt b"):
        assert start(words).folder != folder
    assert start(inputs=("m", 2)).folder != folder
    (tmp_path / "exp_test.py").write_text("# another script")
    assert start().folder != folder


def test_fresh_starts_over(start):
    start().step("a", int, 1)
    assert start("--fresh").step("a", int, 2) == 2
    assert start().step("a", int, 3) == 2


@pytest.mark.parametrize("content", ["", '{"a": '])
def test_a_damaged_step_is_named_and_not_computed_again(content, start, one_line):
    run = start()
    run.step("one", int, 1)
    [path] = run.steps.iterdir()
    path.write_text(content)
    one_line(lambda: run.step("one", int, 2), path.name, "damaged")


def test_the_folder_says_what_was_run(start, monkeypatch):
    run = start("--alpha 2 4")
    about = read_json(run.folder / "args.json")
    assert about["inputs"]["models"]["toy/a"] == "sha256:toy/a"
    assert about["args"]["alpha"] == [2.0, 4.0]
    assert about["command"][1:4] == ["--alpha", "2", "4"]
    environment = read_json(run.folder / "environment.json")
    assert environment["torch"] == torch.__version__
    monkeypatch.setenv("PATH", "")  # no git
    run = start("--fresh")
    assert '"commit": "unknown"' in (run.folder / "environment.json").read_text()


def test_saved_records_read_back(start, capsys):
    run = start("--seed 3")
    records = [
        record(item="Table 1", alpha=2.0, value=1 / 3, n=10, concept='joy, "big"\nline'),
        record(metric="token_acc", value=math.pi),
    ]
    examples = [{"prompt": "a\nb — ü", "said": None}]
    image = run.figure(new_figure()[0], "one ä")
    run.save(records, examples, ["- **b** α", image], ["| a |\n|---|\n| α |"])
    assert json_rows(run.folder, "examples.jsonl") == examples
    rows = json_rows(run.folder, "records.jsonl")
    for row, each in zip(rows, records, strict=True):
        assert row | each == row
        assert (row["run"], row["seed"], row["refine"]) == (run.id, 3, "mean")
        assert {"map", "protocol"} <= set(row)
    with open(run.folder / "records.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for cells, row in zip(table, rows, strict=True):
        assert cells == {name: "" if value is None else str(value) for name, value in row.items()}
    report = (run.folder / "report.md").read_text()
    assert "- **b** α\n\n![one-ä](one-ä.png)\n\n| a |\n|---|\n| α |\n" in report
    assert '<img src="data:image/png;base64,' in (run.folder / "report.html").read_text()
    said = capsys.readouterr().out
    assert str(run.folder) in said and "- **b** α" in said and "![" not in said


def test_what_a_model_has_written_is_text_in_both_reports(start):
    said = "a|b <script>*c*\nd ![e](http://f.g/h.png) __i__ _j_ k_l 5 [6, 7]"
    prompt = "~~~\n# In 1955 [INST] <b>"
    run = start(first_prompts=[prompt])
    run.save([], [], [markdown(["|v|", ""], [[said, "last"]])])
    page = (run.folder / "report.html").read_text()
    shown = "a|b &lt;script&gt;*c* d ![e](http://f.g/h.png) __i__ _j_ k_l 5&nbsp;[6,&nbsp;7]"
    assert "<th>|v|</th>" in page and f"<td>{shown}</td>\n<td>last</td>" in page
    assert "<pre><code>~~~\n# In 1955 [INST] &lt;b&gt;\n</code></pre>" in page


def test_steps_are_told_line_by_line_and_not_at_all_under_quiet(start, capsys):
    run = start(steps=3)
    for name in ("one", "two", "one"):
        run.step(name, int, 1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("] ")[1] for line in lines] == ["1/3 one", "2/3 two"]
    again = start("--quiet --seed 1", steps=3)
    again.step("one", int, 1)
    assert not capsys.readouterr().err
    assert start("--quiet").folder == run.folder


def runs_command(capsys, *argv):
    capsys.readouterr()
    harness.main([str(each) for each in argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("group", [None, "1e6 tokens"])  # all records of checkpoints have one
def test_runs_are_listed_and_compared(group, start, tmp_path, capsys, one_line):
    one, other, third = start(), start("--seed 1"), start("--seed 2")
    for run, hits, alpha in ((one, 10, 1), (other, 15, 2)):
        hits = [1] * hits + [0] * (20 - hits)
        about = {"target": "toy/b", "metric": "mc1", "part": "test", "group": group}
        records = [record(hits, method="base", alpha=0, **about)]
        for variant in (None, report.FLUENT, "random 1"):
            what = {"method": "contrans", "variant": variant, "source": "toy/a", "alpha": alpha}
            records.append(record(hits, **what, **about))
        run.save(records, [], ["- **b**, 1.0 % without a vector: nothing."])
    third.step("a", int, 1)
    said = runs_command(capsys, "runs", tmp_path)
    assert said.count("complete") == 2 and said.count("b, 1.0 % without a vector: nothing.") == 2
    assert f"{third.folder}" in said and "interrupted after 1 steps" in said
    said = runs_command(capsys, "compare", one.folder, other.folder)
    assert "| seed" in said and "random 1" not in said
    # Newcombe 1998, method 10
    change = "| 50.0 [30, 70] | 75.0 [53, 89] | 25.0 [-5, 49] |"
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert f"| | a | b | ConTrans | 1, 2 | mc1 {change}" in rows  # each with the alpha it chose
    assert f"| | | b | Base Model | 0 | mc1 {change}" in rows
    assert sum(report.FLUENT in row for row in rows) == 1
    one_line(lambda: harness.main(["compare", str(one.folder), str(third.folder)]), "finished")


def test_an_output_folder_that_cannot_be_made_ends_in_one_line(tmp_path, one_line):
    (tmp_path / "file").write_text("")
    args = parse(tmp_path, "", "--out", str(tmp_path / "file"))
    one_line(lambda: Run(__file__, args, MODELS, []), "cannot write")


def test_figures_show_every_strength_and_block():
    """Eight strengths, some of them without a rate, in the curves and in the grid."""
    hits = [1, 0, 0, 1]
    about = {"metric": "mc1", "source_block": 1, "block": 2}
    records, others = [record(hits, method="base", alpha=0, metric="mc1")], []
    alphas = [3, 1, 2, -1, 4, 5, 6, 7]
    for alpha in alphas:
        for variant in (None, "random 0", "random 1"):
            records.append(record(hits, method="contrans", variant=variant, alpha=alpha, **about))
        cost = about | {"metric": "perplexity_ratio", "alpha": alpha}
        others += [record(value=1234.5, **cost), record(value=1.5, **cost | {"block": 3})]
    curves = draw_strength(records, {"contrans": (1, 2, 3.0)}, ylabel="MC1")
    [legend] = curves.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["ConTrans", "its highest random direction", "Base Model"]
    lengths = [len(line.get_xdata()) for line in curves.axes[0].lines]
    assert lengths[:2] == [9, 8]
    assert list(curves.axes[0].lines[0].get_xdata()) == sorted([0, *alphas])
    tried = select(records, variant=None, method="contrans")[:6]
    grid = draw_grid("MC1 [%]", tried, others, (1, 2, 3))
    texts = [text.get_text() for text in grid.axes[0].texts]
    assert texts.count("50 (×1234)") == 6 and texts.count("(×1.50)") == 8


# ================================================================ 5  Records


def effects(**rates):
    """Records of rates of 70 items, by what they are: base, contrans, or a control of it."""
    records = []
    for name, rate in rates.items():
        hits = np.arange(70) < 70 * rate
        method = name if name in ("base", "self-align") else "contrans"
        variant = None if name in ("base", "contrans", "self-align") else name.replace("_", " ")
        about = {"method": method, "variant": variant, "alpha": 2.0 * (name != "base")}
        records.append(record(hits, metric="logit_acc", part="test", **about))
    return records, {"contrans": 2.0}


VERDICTS = [
    ({"contrans": 0.92, "random_1": 0.48, "shuffled_map": 0.94}, "not above the controls", "94.3"),
    (
        {"contrans": 0.92, "random_1": 0.9, "shuffled_map": 0.48},
        "not above the controls",
        "and 0.5",
    ),
    ({"contrans": 0.92, "random_1": 0.55, "other_joy": 0.7}, "holds", "other joy"),
    ({"contrans": 0.52, "random_1": 0.1}, "does not move it", "52.9"),
    ({"contrans": 0.1, "random_1": 0.5}, "does not move it", "random 1"),
    ({"contrans": 0.75, "random_1": 0.98}, "not above the controls", "random 1"),
]


@pytest.mark.parametrize("rates, outcome, word", VERDICTS)
def test_the_verdict_is_about_the_strongest_control(rates, outcome, word):
    line, rule = verdict({"tok361": effects(base=0.5, **rates)}).split("\n\n")
    assert "permuted labels" not in rule
    assert line.startswith("- **tok361**, 50.0 % without a vector")
    assert f"**{outcome}**" in line or f"**is {outcome}**" in line
    assert word in line
    assert line.count("**") == 4


@pytest.mark.parametrize("count, above, holds", [(9, 1, 0), (19, 0, 1), (99, 1, 1)])
def test_among_few_vectors_of_permuted_labels_a_vector_must_be_above_all(count, above, holds):
    """Since no rank among 19 or fewer has p < 0.05."""
    nulls = {f"permuted_{k}": 0.93 if k < above else 0.5 for k in range(count)}
    found = effects(base=0.5, contrans=0.92, random_1=0.5, **nulls)
    line, rule = verdict({"t": found}).split("\n\n")
    assert ("**holds**" in line) == bool(holds) and "permuted labels" in rule


def test_over_other_items_a_rate_is_compared_by_fishers_test():
    records, alphas = effects(base=0.5, contrans=0.9, random_1=0.5)
    records[2]["hits"] = records[2]["hits"] * 2  # 140 items
    p = fisher_exact([[63, 7], [70, 70]]).pvalue
    assert f"and {p:.1g} (" in verdict({"t": (records, alphas)})


def test_the_verdict_of_what_should_fall():
    found = {"b": effects(base=0.9, contrans=0.1, random_1=0.8, random_2=0.5)}
    assert "**holds**: 10.0 %" in verdict(found, lower=True)
    assert "its strongest control, random 2: 50.0 %" in verdict(found, lower=True)
    assert "does not move it" in verdict(found)
    nulls = {f"permuted_{k}": 0.8 for k in range(30)}
    found = {"b": effects(base=0.9, contrans=0.1, random_1=0.5, **nulls)}
    line = verdict(found, lower=True)
    assert "**holds**: 10.0 %" in line and "permuted 0.032" in line  # 1 / 31


def test_of_several_sources_the_verdict_spells_out_those_that_hold():
    records, _ = effects(base=0.1, contrans=0.9, random_1=0.3)
    others = [effects(contrans=rate)[0][0] for rate in (0.3, 0.1)]
    records[1]["source"] = "big/a"
    for name, each in zip("bc", others):
        each["source"] = f"big/{name}"
    line, _ = verdict({"t": (records + others, {})}).split("\n\n")
    assert "ConTrans of a **holds**: 90.0 %" in line and line.count("holds") == 1
    assert "ConTrans of b 30.0 %, ConTrans of c 10.0 % **do not hold**" in line
    assert "(strongest control, random 1: 30.0 %)" in line
    own, _ = effects(random_2=0.2, random_3=0.6)  # of b alone
    own = [each | {"source": "big/b"} for each in own]
    line, _ = verdict({"t": (records + others + own, {})}).split("\n\n")
    assert "(strongest control, random 3: 60.0 %)" in line


def test_the_summary_carries_the_controls_of_the_verdict():
    maps = {"shuffled_map_0": 0.94, "shuffled_map_1": 0.5}
    found = {name: effects(base=0.5, contrans=0.92, **maps) for name in ("a", "b")}
    rows = summary("Title", found).splitlines()
    assert rows[0] == "Title" and "| a " in rows[2] and "| b " in rows[2]
    [row] = [row for row in rows if "shuffled" in row]
    assert row.count("72.1 [50, 94]") == 2


def test_a_rate_has_a_wilson_interval():
    found = record(hits=np.arange(263) < 81, metric="mc1")
    assert (found["value"], found["n"], found["metric"]) == (81 / 263, 263, "mc1")
    newcombe = (0.2553, 0.3662)  # 1998, Table I, method 3
    assert (found["low"], found["high"]) == pytest.approx(newcombe, abs=6e-5)


def test_a_mean_has_a_bootstrap_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = record(values=values)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert found["value"] == pytest.approx(values.mean())
    assert found["n"] == 400
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert record(values=values.tolist()) == found
    found = record(values=[0.25] * 7)
    assert found["low"] == found["value"] == found["high"] == 0.25


def test_the_interval_is_over_the_units_of_the_claim():
    hits = [1] * 50 + [0] * 50 + [1] * 50 + [0] * 50
    units = [name for name in "abcd" for _ in range(50)]
    found = record(hits=hits, units=units)
    assert (found["value"], found["n"], found["units"]) == (0.5, 200, 4)
    assert (found["low"], found["high"]) == (0.0, 1.0)  # four concepts, all or nothing
    assert (found["item_low"], found["item_high"]) == pytest.approx((0.4314, 0.5686), abs=1e-4)
    alike = record(hits=[1, 0] * 100, units=units)
    assert (alike["low"], alike["high"]) == (alike["item_low"], alike["item_high"])


def test_pooled_records_have_the_pooled_field_as_unit():
    one, other = record([1] * 10, concept="fear"), record([0] * 30, concept="anger")
    [found] = pool([one, other], "concept", "mean")
    assert (found["concept"], found["value"], found["n"], found["units"]) == ("mean", 0.25, 40, 2)
    assert (found["low"], found["high"]) == (0.0, 1.0)


def test_p_values_are_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # Holm 1979
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_a_rank_among_the_null_is_never_0():
    assert rank_p(0.5, [0.1] * 199) == pytest.approx(0.005)
    assert rank_p(0.1, [0.1] * 199) == 1.0
    assert rank_p(0.5, [0.6, 0.5, 0.4]) == 0.75


def test_a_paired_gain_is_over_the_same_items():
    ours, base = record(values=[1.0, 2.0, 3.0] * 20), record(values=[0.5, 1.5, 2.5] * 20)
    expected = {"value": 0.5, "low": 0.5, "high": 0.5, "n": 60}
    assert paired_gain(ours, base) == pytest.approx(expected)
    assert paired_gain(record([1, 1, 0, 0]), record([0, 1, 0, 0]))["value"] == 0.25


def costly_curve():
    """Effects over alpha, and perplexities of sentences that limit alpha and of others."""
    curve, costs = [record(method="base", alpha=0, value=0.05, metric="mc1")], []
    for part, base in (("limiting sentences", 10.0), ("plain sentences", 20.0)):
        costs.append(record(method="base", alpha=0, value=base, part=part))
        for alpha, cost in [(1, 1.05), (2, 1.09), (3, 1.2)]:
            about = {"method": "contrans", "alpha": alpha, "part": part}
            costs.append(record(value=cost * base, **about))
            costs.append(record(value=3 * base, variant="random 0", **about))
    for alpha in (1, 2, 3):
        curve.append(record(method="contrans", alpha=alpha, value=alpha / 10, metric="mc1"))
    return curve, costs


def test_the_fluent_record_is_at_the_strongest_alpha_within_a_tenth():
    curve, costs = costly_curve()
    mirrored = [each | {"alpha": -each["alpha"], "value": 0.9} for each in curve]
    more = [each | {"alpha": -each["alpha"]} for each in select(costs, method="contrans")]
    [found] = fluent(mirrored + curve, more + costs)  # of two as strong the positive one
    assert (found["alpha"], found["value"]) == (2, 0.2)
    assert found["variant"] == report.FLUENT
    [note] = report.fluency_notes([found], costs).values()
    assert note == "α = 2, perplexity of other sentences ×1.09"
    for each in select(costs, part="limiting sentences", method="contrans"):
        each["value"] = 12.0  # now every strength is too much
    [found] = fluent(curve, costs)
    assert (found["method"], found["alpha"], found["value"]) == ("contrans", 0, 0.05)
    assert list(report.fluency_notes([found], costs).values()) == ["every α costs more"]


def test_the_effect_is_drawn_against_its_cost():
    curve, costs = costly_curve()
    axis = report.draw_fluency(curve, costs, ylabel="MC1").axes[0]
    line, limit = axis.lines
    assert line.get_xdata() == pytest.approx([1, 1.05, 1.09, 1.2])
    assert line.get_ydata() == pytest.approx([0.05, 0.1, 0.2, 0.3])
    assert list(limit.get_xdata()) == [1.1, 1.1]


def test_p_is_about_the_units_of_the_claim():
    units = [name for name in "abcdef" for _ in range(50)]
    before = record([0] * 300, units=units)
    four = record([1] * 200 + [0] * 100, units=units)  # in four of six concepts
    one = record([1] * 50 + [0] * 250, units=units)
    assert mcnemar(before["hits"], one["hits"]) < 1e-10
    assert paired_p(before, one) > 0.5
    assert 0.0005 < paired_p(before, four) < 0.05
    assert paired_p(before, before) == 1.0
    few = record([1, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 30, units=units)  # a little in all
    assert paired_p(before, few) == pytest.approx(2 / 2001)
    few = record([1] * 4 + [0] * 26, units=list("ab") * 15)
    assert paired_p(record([0] * 30, units=list("ab") * 15), few) == mcnemar([0] * 30, few["hits"])


@pytest.mark.parametrize("lower, p", [(False, 0.75), (True, 0.5)])
def test_the_rank_of_an_effect_counts_what_is_as_good(lower, p):
    records, alphas = effects(base=1.0, contrans=0.2, random_1=0.1, random_2=0.5, random_3=0.9)
    notes = report.effect_notes(records, alphas, lower)
    [rank] = [note for name, note in notes.items() if "random" in name]
    assert rank.endswith(f"among these 3: {p:.2g}")
    assert notes["ConTrans"] == f"p = {mcnemar(records[0]['hits'], records[1]['hits']):.1g}"


def test_each_source_is_judged_by_its_own_permuted_labels():
    """And by random directions that all sources share."""
    records, _ = effects(base=0.0, contrans=0.9, random_1=0.1)
    base, ours, random = records
    random["source"] = base["source"] = None
    found = [base, random]
    for source, value in (("small", 0.2), ("tiny", 0.95)):
        found.append(ours | {"source": source})
        null = {"source": source, "variant": "own-α permuted 0", "value": value}
        found.append(ours | null | {"hits": (np.arange(70) < 70 * value).tolist()})
    line = verdict({"t": (found, {})})
    assert "ConTrans of small **holds**" in line
    assert "ConTrans of tiny 90.0 % **do not hold** (strongest control, own-α permuted 0" in line


MAP_WARNINGS = [
    ({"r2_where_read": -0.1}, "R² -0.10 where v is read"),
    ({"r2_where_read": 0.1}, None),
    ({"r2_along_v": -0.1}, "R² -0.10 along v̂"),
    ({"r2_along_v": 0.1}, None),
    ({"cosine_to_response": 0.29}, "cosine 0.29 to Cov(Y, X·v)"),
    ({"cosine_to_response": 0.3}, None),
    ({"separation": 0.69}, "v hardly tells pairs apart (AUC 0.69)"),
    ({"separation": 0.7}, None),
    ({"n_over_d": 0.6}, "0.60 sentences for each dimension"),
    ({"n_over_d": 0.5}, None),
    ({"n_over_d": 2.0}, None),
    ({"r2": -0.1}, None),
]


@pytest.mark.parametrize("measured, warning", MAP_WARNINGS, ids=str)
def test_the_table_of_maps_says_what_to_mistrust(measured, warning):
    [(metric, value)] = measured.items()
    about = {"source": "zoo/small", "target": "zoo/large", "method": "contrans"}
    records = [record(**about, metric=metric, value=value)]
    assert f"{value:.2f}" in report.map_table(records)
    found = report.map_warnings(records)
    assert len(found) == (1 if warning else 0)
    for line in found:
        assert line.startswith(f"Warning: ConTrans, small → large: {warning}")


def test_a_record_has_all_fields_and_no_others():
    assert list(record(value=0.5)) == report.RECORD
    with pytest.raises(ValueError, match="valeu"):
        record(valeu=0.5)


def test_mcnemar_counts_the_outcomes_that_are_no_likelier():
    before, after = [0, 1, 1, 1, 1, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 1]  # one gained, six lost
    for pair in ((before, after), (after, before)):
        assert mcnemar(*pair) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(before, before) == 1


def make_records():
    return [
        record(
            item="Figure 2a",
            source="our small",
            target="our large",
            concept=concept,
            method="contrans" if alpha else "base",
            alpha=alpha,
            metric="token_acc",
            hits=[1] * int(5 + alpha) + [0] * 5,
        )
        for concept in ("happiness", "joy")
        for alpha in (0.0, 1.0, 2.0)
    ]


def test_records_are_selected_and_spread():
    records = make_records()
    joy = select(records, concept="joy", method="contrans")
    assert joy == [records[4], records[5]]
    joy[0]["paper"] = 0.3
    mean = spread(joy, "random")
    values = [each["value"] for each in joy]
    assert (mean["low"], mean["high"], mean["n"]) == (min(values), max(values), 2)
    assert mean["value"] == pytest.approx(np.mean(values))
    assert (mean["variant"], mean["paper"], mean["concept"]) == ("random", None, "joy")


def test_a_table_shows_every_record_once_and_why_rows_are_missing():
    records = make_records()
    records[1]["paper"] = 0.412
    missing = {"fear": "too few scenarios", "anger": "no such label"}
    lines = pivot(records, "concept", "alpha", missing, {"joy": "a note"}).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert table[0] == ["", "0.0", "1.0", "2.0", ""]
    for name, row, some in zip(("happiness", "joy"), table[2:4], (records[:3], records[3:])):
        assert row[0] == name
        for each, cell in zip(some, row[1:4], strict=True):
            assert f"{100 * each['value']:.1f} [" in cell
    assert table[2][2] == "54.5 [28, 79] (41.2)"
    assert [row[-1] for row in table[2:]] == ["", "a note", "", ""]
    assert [row[:2] for row in table[4:]] == [[name, reason] for name, reason in missing.items()]
    assert "too few" in pivot([], "concept", "alpha", missing, {"joy": "a note"})
    other = pivot([record(metric="perplexity", value=12.345)], "metric", "item")
    assert "12.35" in other or "12.34" in other
    assert "too few" in pivot([], "concept", "alpha", {"joy": "too few"}, {"joy": "a note"})


def test_the_numbers_of_the_paper_are_joined_by_the_papers_names():
    records = make_records()
    harness.add_paper_numbers(records, {"our small": "LLaMA-7B", "our large": "LLaMA-13B"})
    papers = {(each["concept"], each["alpha"]): each["paper"] for each in records}
    assert papers["happiness", 1.0] == 0.41
    assert papers["happiness", 2.0] == 0.92
    assert papers["joy", 1.0] is None
    base = make_records()[:1]
    base[0]["source"] = None  # the paper's "-"
    harness.add_paper_numbers(base, {"our large": "LLaMA-13B"})
    assert base[0]["paper"] == 0.11
    harness.add_paper_numbers(others := make_records(), {})
    assert not any(each["paper"] for each in others)
    for other in ({"part": "validation"}, {"group": "women"}):
        others = [each | other for each in make_records()]
        harness.add_paper_numbers(others, {"our small": "LLaMA-7B", "our large": "LLaMA-13B"})
        assert not any(each["paper"] for each in others)


# ================================================================ 6  Vectors

[A] = vectors(1)
ABOUT = {
    "concept": "happiness",
    "source": "a",
    "target": "b",
    "fingerprint": "sha256:1",
    "layer": 3,
    "method": "mean",
    "pairs": 60,
    "first_prompt": "Tom felt\nvery — ünï",
}


def test_a_concept_vector_comes_back_with_what_it_is(tmp_path, llama, zoo):
    path = tmp_path / "new" / "happiness.safetensors"
    about = ABOUT | {"fingerprint": llama[0].fingerprint, "r2": 0.4}
    save_concept(path, A.double(), **about)
    vector, found = load_concept(path, llama[0])
    assert torch.equal(vector, A)
    assert found | about == found
    assert found["sign"] == "positive minus negative"
    with pytest.raises(ValueError, match="was made for b"):
        load_concept(path, zoo("gpt2")[0])


def test_a_vector_that_does_not_say_what_it_is_is_refused(tmp_path):
    path = tmp_path / "v"
    for missing in ABOUT:
        about = {name: value for name, value in ABOUT.items() if name != missing}
        with pytest.raises(ValueError, match=f"missing: {missing}"):
            save_concept(path, A, **about)
    assert not path.exists()
    save_file({"vector": A}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="does not say what it is"):
        load_concept(path)


def test_gguf_s_own_reader_and_a_plain_hook_give_our_steered_logits(any_pair, tmp_path):
    """llama.cpp adds direction.N to the output of block N, times --control-vector-scaled."""
    model, reference = any_pair
    path = tmp_path / "new" / "v.gguf"
    export_concept(path, model, A.double(), 1, -1.5)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == model.config.model_type
    [tensor] = reader.tensors
    assert tensor.name == "direction.1"
    shift = torch.tensor(tensor.data)
    assert torch.equal(shift, -1.5 * A)
    assert [file.name for file in path.parent.iterdir()] == ["v.gguf"]
    for scale in (1.0, 0.5):
        wanted = next_token_logits(model, ["Tom felt"], [Transplant.of(A, 1, -1.5 * scale)])
        close(reference.next_logits(["Tom felt"], {1: scale * shift}), wanted[0], 1e-4)


@pytest.mark.parametrize(
    "name, vector, layer, word",
    [
        ("v.gguf", A, 0, "after block 0"),
        ("v.pt", A, 4, "block 4 does not exist"),
        ("v.pt", A, -1, "block -1 does not exist"),
        ("v.pt", A, 2.0, "layer: block 2.0"),  # alpha and layer swapped
        ("v.pt", A[:-1], 1, r"vector must be \[32\]"),
        ("v.bin", A, 1, ".pt or .gguf"),
    ],
)
def test_what_cannot_be_exported_is_refused(name, vector, layer, word, llama, tmp_path):
    with pytest.raises(ValueError, match=word):
        export_concept(tmp_path / name, llama[0], vector, layer, 1.0)
    assert not list(tmp_path.iterdir())
