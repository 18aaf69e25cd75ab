"""exp_pythia.py: options, choices, records, whole runs on small models of the zoo and of a hub on loopback.

    pytest tests/test_exp_pythia.py                     properties and tiny runs, also killed and continued
    pytest tests/test_exp_pythia.py -m slow             the newcomer's command: which sizes give and take

What this script shares with exp_pretraining.py is tested in tests/test_exp_pretraining.py.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Loads, Reference, json_rows, surroundings
from hub import Hub

import common
import exp_emotion
import exp_pythia
from exp_pythia import EMOTIONS, ZOO

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "data" / "toy"
ONE, TWO, THREE = MODELS = [f"{ZOO}/pythia-{k}" for k in (1, 2, 3)]
BLOCKS = dict(zip(MODELS, (1, 2, 3)))  # 0.75 of two, three and four
SMALL = [
    "--data",
    str(TOY),
    "--limit",
    "5",
    "--random",
    "2",
    "--sentences",
    "100",
    "--shots",
    "0",
    "--pairs",
    "10",
    "--alpha",
    "2",
]
TINY = ["--models", *MODELS, *SMALL]
FILES = ["records.csv", "records.jsonl", "examples.jsonl", "tables.md"]
FIGURES = {
    f"{name}.{kind}": start
    for name in ("figure_4", "figure_8")
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"))
}


def options(*argv) -> argparse.Namespace:
    return exp_pythia.options(list(map(str, argv)))


# ================================================================ options


def test_every_model_is_a_target_and_five_of_the_zoo_are_the_default():
    args = options()
    assert (
        args.family == "toy"
        and args.tgt == [f"{ZOO}/pythia-{k}" for k in range(1, 6)]
        and args.limit == 50
    )
    args = options("--models", "some/model-small@main", TWO)
    assert (args.family, args.tgt, args.limit) == ("custom", ["some/model-small@main", TWO], 200)
    assert options("--family", "pythia").tgt == [
        f"EleutherAI/pythia-{n}" for n in ("14m", "70m", "410m", "1.4b", "6.9b")
    ]
    assert options("--family", "toy", "--models", ONE, TWO).limit == 50


def test_alpha_zero_is_the_baseline_alone_and_a_strength_counts_once():
    assert options("--alpha", 0, 2, 2, 1).alpha == [2, 1]
    assert options("--alpha", "auto").alpha == [1, 2, 3, 5]


WRONG = {
    "a source": (["--src", ONE], "--models"),
    "source and target": (["--src", ONE, "--tgt", TWO], "--models"),
    "a target beside models": (["--models", ONE, TWO, "--tgt", TWO], "--models"),
    "one model": (["--models", ONE], "two models or more"),
    "a model twice": (["--models", ONE, ONE], "a name of its own"),
    "two models of one name": (["--models", "some/model", "other/model"], "a name of its own"),
    "custom without models": (["--family", "custom"], "has no models"),
    "an aligned model": (["--models", ONE, TWO, "--tgt-chat", ONE, TWO], "--tgt-chat"),
    "another base model": (["--models", ONE, TWO, "--src-base", TWO], "--src-base"),
    "layer auto": (["--layer", "auto"], "--layer"),
    "two layers": (["--layer", "1,2"], "--layer"),
    "block that the smallest has not": (
        ["--models", ONE, TWO, "--layer", "2"],
        "block 2 does not exist",
    ),
    "block that the others have not": (
        ["--models", TWO, ONE, "--layer", "2"],
        "block 2 does not exist",
    ),
    "alpha not a number": (["--alpha", "nan"], "--alpha"),
    "alpha 0 alone": (["--alpha", "0"], "--alpha"),
    "no pairs": (["--pairs", "0"], "--pairs"),
    "no control": (["--random", "0"], "--random"),
    "shots below 0": (["--shots", "-1"], "--shots"),
    "prompt longer than the context": (
        ["--models", ONE, TWO, "--shots", "30", "--pairs", "1", "--limit", "1"],
        "do not fit",
    ),
    "no such model folder": (["--models", "no/such/model", ONE], "no model folder"),
    "folder without a model": (["--models", str(TOY), ONE], "config.json"),
    "no data folder": (["--data", "nowhere"], "no data folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_before_any_weights_are_loaded(
    case, tmp_path, monkeypatch, capsys
):
    argv, says = WRONG[case]
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stopped:
        exp_pythia.main([*argv, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and says in printed.err
    assert not (tmp_path / "out").exists()


# ================================================================ choices and controls


def test_each_pair_has_its_own_alpha_and_the_control_is_as_strong_as_the_strongest(monkeypatch):
    generator, tested = torch.Generator().manual_seed(0), {}
    hits = {ONE: {1: 4, -2: 9, 3: 9}, TWO: {1: 7, -2: 0, 3: 0}}  # of ten validation scenarios
    states = {
        name: {
            "v": scale * torch.randn(6, 8, generator=generator),
            "plain": torch.randn(40, 8, generator=generator),
        }
        for name, scale in ((ONE, 5), (TWO, 1))
    }

    def answers(model, data, part, emotion, moves):
        if part == "test":
            tested[emotion] = moves
            return torch.full((len(moves), 5), -1)
        said = torch.full((len(moves), 10), -1)
        for row, move in enumerate(moves):
            said[row, : hits[MODELS[row // 3]][move.parts[0][1]]] = EMOTIONS.index(emotion)
        return said

    monkeypatch.setattr(exp_pythia, "answers", answers)
    args = options(
        "--models",
        ONE,
        TWO,
        "--alpha",
        1,
        3,
        -2,
        "--random",
        25,
        "--norm",
        "match",
        "--sentences",
        40,
    )
    result = exp_pythia.measure(SimpleNamespace(name=TWO), states, {}, args)
    assert result["alpha"] == {ONE: -2, TWO: 1} and set(result["with"]) == {ONE, TWO}
    assert len(result["base"]) == 30 and all(len(direction) == 30 for direction in result["random"])
    assert len(result["random"]) == 25 and list(tested) == EMOTIONS
    for e, (base, given, own, *directions) in enumerate(tested.values()):
        assert base == common.BASE and len(directions) == 25
        assert own.parts[0][:2] == (2, 1) and torch.equal(
            own.parts[0][2], states[TWO]["v"][e]
        )  # not mapped onto itself
        assert given.parts[0][:2] == (2, -2)
        for move in directions:  # |v^| is larger under --norm match, and so is |alpha|
            ((layer, alpha, vector),) = move.parts
            assert (layer, alpha) == (2, -2) and torch.isclose(
                vector.norm(), given.parts[0][2].norm()
            )
        assert len({tuple(move.parts[0][2].tolist()) for move in directions}) == 25


# ================================================================ records, tables, figures


def hits(count: int) -> list[int]:
    return [1] * count + [0] * (24 - count)


def made_up(base: int, given: dict[str, int], directions=(0, 2)) -> dict:
    """Results of a target that names the emotion so often: alone, with each source's vector, with random directions."""
    fits = {name: {"r2": 0.8, "cosine": 0.9, "fitted on": 160} for name in given}
    return {
        "base": hits(base),
        "with": {name: hits(count) for name, count in given.items()},
        "random": [hits(count) for count in directions],
        "alpha": dict.fromkeys(given, 2.0),
        "fits": fits,
        "block": 1,
    }


RESULTS = {ONE: made_up(0, {ONE: 3, TWO: 0}), TWO: made_up(4, {ONE: 2, TWO: 18})}
NOTHING = {ONE: made_up(0, {ONE: 3, TWO: 0}), TWO: made_up(0, {ONE: 0, TWO: 0})}


def made_up_args() -> argparse.Namespace:
    return options("--models", ONE, TWO, "--random", 2, "--alpha", 2, "--layer", "1")


def find(rows: list[dict], **match) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in match.items())]


def test_records_hold_every_pair_with_n_and_interval():
    rows = exp_pythia.make_records(made_up_args(), RESULTS)
    assert all(list(row) == common.RECORD and row["experiment"] == "pythia" for row in rows)
    for target, result in RESULTS.items():
        (base,) = find(rows, target=target, method="base")
        count = sum(result["base"])
        assert (base["alpha"], base["value"], base["n"], base["low"], base["high"]) == (
            0,
            count / 24,
            24,
            *common.wilson(count, 24),
        )
        assert [row["value"] for row in find(rows, target=target, method="random")] == [0, 2 / 24]
        for source, found in result["with"].items():
            method = "self-align" if source == target else "contrans"
            about = {"target": target, "source": source, "method": method, "layer": "1 -> 1"}
            (row,) = find(rows, **about, metric="token_acc")
            assert (row["value"], row["alpha"], row["low"], row["high"]) == (
                sum(found) / 24,
                2,
                *common.wilson(sum(found), 24),
            )
            (row,) = find(rows, **about, metric="absolute improvement")
            assert row["value"] == (sum(found) - count) / 24
            assert [row["value"] for row in find(rows, **about, concept="map")] == [0.8, 0.9]


def test_over_a_baseline_of_zero_there_is_no_ratio_and_the_counts_are_shown():
    pairs = {(3, 0): "3 / 0", (0, 0): "0 / 0", (2, 4): "0.5", (18, 4): "4.5"}
    assert {
        (given, base): exp_pythia.ratio(hits(given), hits(base)) for given, base in pairs
    } == pairs
    rows = find(exp_pythia.make_records(made_up_args(), RESULTS), metric="improvement ratio")
    assert {(row["target"], row["source"]): row["value"] for row in rows} == {
        (TWO, ONE): 0.5,
        (TWO, TWO): 4.5,
    }
    assert not find(exp_pythia.make_records(made_up_args(), NOTHING), metric="improvement ratio")
    lines = exp_pythia.tables(made_up_args(), RESULTS).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[-2:]] == [
        ["pythia-1", "3 / 0", "0 / 0"],
        ["pythia-2", "0.5", "4.5"],
    ]


def test_the_table_has_intervals_a_paired_test_and_the_control():
    lines = exp_pythia.tables(made_up_args(), RESULTS).splitlines()
    small, large = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[7:9])
    low, high = common.wilson(18, 24)
    assert small[:3] == [
        "pythia-1",
        f"0.0 [0, {100 * common.wilson(0, 24)[1]:.0f}]",
        "4.2 (to 8.3)",
    ]
    assert large[4] == f"75 [{100 * low:.0f}, {100 * high:.0f}]* (100)"
    assert large[3].startswith("8 [") and large[3].endswith(
        "] (75)"
    )  # as good as the better of two directions
    assert (
        common.mcnemar(hits(4), hits(18)) < 0.001 < common.mcnemar(hits(4), hits(2))
        and "n = 24" in lines[2]
    )


@pytest.mark.parametrize(
    "results", [RESULTS, NOTHING], ids=["one zero baseline", "nothing but zero baselines"]
)
@pytest.mark.filterwarnings("error")
def test_the_heat_maps_have_numbers_in_their_cells_and_leave_a_zero_baseline_grey(results):
    figure = exp_pythia.draw_heat(made_up_args(), results)
    ratios, absolute = figure.axes
    counts = [
        [(sum(results[t]["with"][s]), sum(results[t]["base"])) for s in (ONE, TWO)]
        for t in (ONE, TWO)
    ]
    where = {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text()
        for text in ratios.texts
    }
    assert where == {
        (y, x): exp_pythia.ratio(*map(hits, counts[y][x])) for y in (0, 1) for x in (0, 1)
    }
    shown = ratios.images[0].get_array()
    assert [
        [bool(np.ma.getmaskarray(shown)[y, x] or np.isnan(shown[y, x])) for x in (0, 1)]
        for y in (0, 1)
    ] == [[base == 0 for _, base in row] for row in counts]
    where = {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text()
        for text in absolute.texts
    }
    assert where == {
        (y, x): f"{100 * (counts[y][x][0] - counts[y][x][1]) / 24:+.0f}"
        for y in (0, 1)
        for x in (0, 1)
    }
    for axis in figure.axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["pythia-1", "pythia-2"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["pythia-1", "pythia-2"]
    figure.canvas.draw()


def test_t_sne_has_a_panel_a_size_and_a_colour_an_emotion():
    figure = exp_pythia.draw_scatter({name: np.random.rand(30, 2).tolist() for name in MODELS})
    assert [axis.get_title() for axis in figure.axes] == ["pythia-1", "pythia-2", "pythia-3"]
    assert (
        all(len(axis.collections) == 6 for axis in figure.axes)
        and "5 scenarios of each" in figure.get_suptitle()
    )


@pytest.mark.parametrize("count", [6, 24, 120])
def test_t_sne_takes_any_number_of_states(count):
    states = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(exp_pythia.scatter(states, 0)).all() and np.shape(
        exp_pythia.scatter(states, 0)
    ) == (count, 2)


# ================================================================ a whole run


SCRIPT = [sys.executable, str(ROOT / "exp_pythia.py")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run: its folder, what was loaded, and every transplant that was tested, by target, emotion and part."""
    out, loads, moves = tmp_path_factory.mktemp("finished"), Loads(), {}
    score_labels = exp_pythia.score_labels

    def listen(model, prompts, labels, transplants, label):
        moves[model.name, label] = transplants
        return score_labels(model, prompts, labels, transplants, label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_model", loads)
        patch.setattr(exp_pythia, "score_labels", listen)
        exp_pythia.main([*TINY, "--out", str(out)])
    (folder,) = (out / "exp_pythia").iterdir()
    return SimpleNamespace(folder=folder, out=out, loads=loads, moves=moves)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_run_folder_holds_records_tables_heat_maps_and_t_sne(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        "args.json",
        "environment.json",
        "steps",
        *FILES,
        *FIGURES,
    }
    assert all(
        (finished.folder / name).read_bytes().startswith(start) for name, start in FIGURES.items()
    )
    with open(finished.folder / "records.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in json_rows(finished.folder, "records.jsonl")
        ]
    about = json.loads((finished.folder / "args.json").read_text())
    assert about["inputs"][TWO] == common.fingerprint(TWO) and about["args"]["tgt"] == MODELS


def test_three_models_are_loaded_three_times(finished):
    assert finished.loads.names == MODELS


def test_with_one_at_a_time_only_one_is_in_memory_and_the_numbers_are_the_same(
    finished, monkeypatch, tmp_path
):
    monkeypatch.setattr(common, "load_model", loads := Loads())
    monkeypatch.setattr(common.Run, "figure", lambda *_: None)
    exp_pythia.main([*TINY, "--one-at-a-time", "--out", str(tmp_path)])
    (folder,) = (tmp_path / "exp_pythia").iterdir()
    assert contents(folder) == contents(finished.folder)
    assert loads.names == [ONE, TWO, THREE, TWO, ONE] and loads.most == 1


def test_records_agree_with_the_examples(finished):
    examples = json_rows(finished.folder, "examples.jsonl")
    rows = find(json_rows(finished.folder, "records.jsonl"), split="test", metric="token_acc")
    assert len(rows) == 3 * (1 + 3) and len(examples) == 30 * len(rows)
    for row in rows:
        named = [
            example["named"]
            for example in find(examples, target=row["target"], source=row["source"] or "none")
        ]
        assert len(named) == row["n"] == 30 and row["value"] == sum(named) / 30
        assert (row["low"], row["high"]) == common.wilson(sum(named), 30)


@pytest.fixture(scope="module")
def again():
    """Eq. 1 and 2 computed anew from ONE and TWO into THREE, and plain transformers to add the vectors to."""
    args = options(*TINY)
    data = exp_emotion.split(exp_emotion.load_scenarios(TOY), exp_emotion.options(SMALL))
    sentences = common.plain_sentences(args, MODELS)
    states, vectors = {}, {}
    for name in MODELS:
        model = common.load_model(name, device="cpu")
        states[name] = common.hidden_states(model, sentences, [BLOCKS[name]])[:, 0].double()
        for emotion in EMOTIONS:
            prompts = [
                [
                    f"Scenario: {text}\nThe emotion of the above scenario is"
                    for text in data[emotion][side]
                ]
                for side in ("positive", "negative")
            ]
            positive, negative = (
                common.hidden_states(model, texts, [BLOCKS[name]])[:, 0].double()
                for texts in prompts
            )
            vectors[name, emotion] = positive.mean(0) - negative.mean(0)
    rows = random.Random(0).sample(range(len(sentences)), 100)[:80]
    for name in (ONE, TWO):
        f = torch.from_numpy(
            np.linalg.lstsq(states[name][rows].numpy(), states[THREE][rows].numpy(), rcond=None)[0]
        )
        vectors |= {(name, emotion): vectors[name, emotion] @ f for emotion in EMOTIONS}
    return SimpleNamespace(
        data=data,
        vectors=vectors,
        reference=Reference(Path(THREE), "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    )


def test_the_vectors_that_were_tested_are_those_of_eq_1_and_2(finished, again):
    for emotion in EMOTIONS:
        base, *given = finished.moves[THREE, f"{emotion}, test"]
        assert base == common.BASE and len(given) == 3 + 2
        for source, move in zip(MODELS, given):
            ((layer, alpha, vector),) = move.parts
            assert (layer, alpha) == (BLOCKS[THREE], 2)
            assert (vector - again.vectors[source, emotion]).norm() < 1e-3 * vector.norm()


@pytest.mark.parametrize("source", ["none", *MODELS])
def test_the_answers_are_those_of_plain_transformers_with_a_hook(finished, again, source):
    words = [
        again.reference.ids(f"is {emotion}")[0, again.reference.ids("is").shape[1]].item()
        for emotion in EMOTIONS
    ]
    assert len(set(words)) == 6
    examples = find(json_rows(finished.folder, "examples.jsonl"), target=THREE, source=source)
    assert len(examples) == 30
    for example in examples:
        emotion = example["emotion"]
        steer = (
            {} if source == "none" else {BLOCKS[THREE]: 2 * again.vectors[source, emotion].float()}
        )
        logits = again.reference.logits(
            f"Scenario: {example['scenario']}\nThe emotion of the above scenario is", steer
        )[-1]
        assert example["scenario"] in again.data[emotion]["test"]
        assert example["named"] == (logits.argmax().item() == words[EMOTIONS.index(emotion)])


def test_the_same_command_ends_at_once_without_a_model(finished, monkeypatch, capsys):
    before = contents(finished.folder)
    (finished.folder / "figure_8.png").unlink()
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    exp_pythia.main([*TINY, "--out", str(finished.out)])
    assert contents(finished.folder) == before and (finished.folder / "figure_8.png").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(finished.folder)


def test_a_run_that_is_stopped_after_every_step_ends_with_the_same_records(
    finished, monkeypatch, tmp_path
):
    class Killed(Exception):
        pass

    runs, write = [], common.write_whole

    def write_and_end(path, content):
        write(path, content)
        if path.parent.name == "steps":
            raise Killed

    monkeypatch.setattr(common, "write_whole", write_and_end)
    monkeypatch.setattr(
        common.Run, "figure", lambda *_: None
    )  # takes half a second, and is tested elsewhere
    done = False
    while not done and len(runs) < 50:
        monkeypatch.setattr(common, "load_model", loads := Loads())
        runs.append(loads.names)
        try:
            exp_pythia.main([*TINY, "--out", str(tmp_path)])
            done = True
        except Killed:
            pass
    assert runs == [
        [ONE],
        [TWO],
        [THREE],
        [THREE],
        [TWO],
        [ONE],
        [],
        [],
        [],
        [],
    ]  # states, targets, t-SNE, the end
    (folder,) = (tmp_path / "exp_pythia").iterdir()
    assert folder.name == finished.folder.name and contents(folder) == contents(finished.folder)


def test_a_killed_process_goes_on_where_it_stopped(finished, monkeypatch, tmp_path):
    process = subprocess.Popen(
        [*SCRIPT, *TINY, "--out", str(tmp_path)],
        env=surroundings(tmp_path / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wanted = random.choice([1, 2, 3, 4, 5, 6])  # of nine steps
    while len(list(tmp_path.glob("exp_pythia/*/steps/*[sn]"))) < wanted and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    assert process.wait() == -9
    (folder,) = (tmp_path / "exp_pythia").iterdir()
    steps = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("steps/*[sn]")
    }

    def exists(step, suffix):
        return common.Run._step_file(SimpleNamespace(steps=folder / "steps"), step, suffix).exists()

    done = [
        name
        for name in MODELS
        if exists(f"states {name}", "safetensors") and exists(f"target {name}", "json")
    ]
    assert (
        len(steps) >= wanted
        and bool(done) == (len(steps) > 3)
        and not any((folder / name).exists() for name in FILES)
    )
    monkeypatch.setattr(common, "load_model", loads := Loads())
    exp_pythia.main([*TINY, "--out", str(tmp_path)])
    assert sorted(loads.names) == sorted(set(MODELS) - set(done))
    assert all(
        (path.read_bytes(), path.stat().st_mtime_ns) == before for path, before in steps.items()
    )
    assert contents(folder) == contents(finished.folder)


def test_a_process_says_one_line_on_stderr_and_ends_with_2(tmp_path):
    result = subprocess.run(
        [*SCRIPT, "--models", ONE, "--out", str(tmp_path / "out")],
        env=surroundings(tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_models_and_revisions_of_a_hub_give_the_numbers_of_the_same_folders(finished, tmp_path):
    names = {"some/one": ONE, "other/two@late": TWO}
    with Hub({"some/one": {"main": ONE}, "other/two": {"early": THREE, "late": TWO}}) as hub:
        result = subprocess.run(
            [*SCRIPT, "--models", *names, *SMALL, "--out", str(tmp_path / "out")],
            env=hub.surroundings(tmp_path),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    assert [revision for _, revision, _ in hub.loaded] == ["main", "late"]
    (folder,) = (tmp_path / "out" / "exp_pythia").iterdir()
    rows, every = json_rows(folder, "records.jsonl"), json_rows(finished.folder, "records.jsonl")
    ours = [
        row | {side: names.get(row[side]) for side in ("source", "target")}
        for row in rows
        if row["method"] != "random"
    ]
    assert ours == [
        row
        for row in every
        if row["method"] != "random" and {row["source"] or ONE, row["target"]} <= {ONE, TWO}
    ]


# ================================================================ who can give, and who can take


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The newcomer's command: Token Acc of each (source, target), of (0, target) without a vector, and the best of the random
    directions in each target. Sizes are 1 to 5."""
    out = tmp_path_factory.mktemp("measured")
    result = subprocess.run(
        [*SCRIPT, "--out", str(out)],
        env=surroundings(out / "cache"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (out / "exp_pythia").iterdir()
    rows = find(json_rows(folder, "records.jsonl"), metric="token_acc")
    size = {name: int(name[-1]) for name in exp_pythia.FAMILIES["toy"]["tgt"]}
    values = {
        (size.get(row["source"], 0), size[row["target"]]): row["value"]
        for row in rows
        if row["method"] != "random"
    }
    return values, {
        k: max(row["value"] for row in find(rows, target=name, method="random"))
        for name, k in size.items()
    }


@pytest.mark.slow
def test_the_smallest_size_neither_gives_nor_takes_and_no_size_takes_a_smaller_one_s_better_than_its_own(
    measured,
):
    values, _ = measured
    assert len(values) == 5 + 25
    assert all(values[source, 1] - values[0, 1] <= 0.1 for source in range(1, 6))
    assert all(values[1, target] - values[0, target] <= 0.1 for target in range(1, 6))
    assert all(
        values[target, target] >= values[source, target]
        for source in range(1, 6)
        for target in range(2, 6)
    )


@pytest.mark.slow
def test_the_largest_two_sizes_give_to_each_other_more_than_any_random_direction_does(measured):
    values, random_directions = measured
    assert values[5, 4] - values[0, 4] >= 0.3 and values[4, 5] - values[0, 5] >= 0.15
    assert values[5, 4] > random_directions[4] and values[4, 5] > random_directions[5]


@pytest.mark.slow
def test_the_own_vector_works_in_every_size_but_the_smallest_and_best_in_the_largest(measured):
    values, _ = measured
    own = [values[k, k] - values[0, k] for k in range(1, 6)]
    assert own[0] <= 0.1 and min(own[1:]) >= 0.3 and min(own[3:]) >= 0.8
