"""exp_pretraining.py: options, data, choices, records, whole runs on checkpoints of the zoo and of a hub on loopback.

pytest tests/test_exp_pretraining.py                properties and tiny runs, also killed and continued
pytest tests/test_exp_pretraining.py -m slow        the newcomer's command: when the concept forms
"""

import argparse
import csv
import inspect
import json
import random
import shutil
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
from safetensors.torch import load_file

import common
import exp_emotion
import exp_pretraining
import exp_pythia
from exp_pretraining import EMOTIONS, ZOO

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "data" / "toy"
EARLY, MIDDLE, LAST = CHECKPOINTS = [
    str(ZOO / name) for name in ("step_0400", "step_1200", "step_3000")
]
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
]
TINY = ["--tgt", *CHECKPOINTS, *SMALL, "--alpha", "2", "3"]
BLOCK = 4  # 0.75 of the six that these checkpoints have
FILES = ["records.csv", "records.jsonl", "examples.jsonl", "tables.md"]


def options(*argv) -> argparse.Namespace:
    return exp_pretraining.options(list(map(str, argv)))


def refused(capsys, *argv) -> str:
    """The one line that the options end in."""
    with pytest.raises(SystemExit) as stopped:
        options(*argv)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1 and printed.startswith("error: ")
    return printed


# ================================================================ which checkpoints, and how much they have read


def test_revisions_of_one_repo_are_the_checkpoints_and_the_last_is_the_source():
    args = options("--model", "some/model", "--revisions", "a", "b", "c", "--tokens", 1, "2e9", 3e9)
    assert (
        args.tgt == ["some/model@a", "some/model@b", "some/model@c"] and args.src == "some/model@c"
    )
    assert args.tokens == [1, 2e9, 3e9] and (args.family, args.limit) == ("custom", 200)


def test_folders_are_checkpoints_too_and_another_source_can_be_named():
    assert options("--tgt", EARLY, LAST).src == LAST
    args = options("--src", MIDDLE, "--tgt", EARLY, LAST)
    assert (args.src, args.tgt) == (MIDDLE, [EARLY, LAST])


def test_by_default_all_checkpoints_of_the_zoo_are_compared():
    args = options()
    steps = [int(name.split("_")[-1]) for name in args.tgt]
    assert (
        args.family == "toy"
        and len(args.tgt) == 7
        and steps == sorted(steps)
        and args.src == args.tgt[-1]
    )
    assert args.tokens == [
        json.loads((Path(name) / "training.json").read_text())["tokens"] for name in args.tgt
    ]


def test_tokens_of_amber_are_known():
    args = options("--family", "amber")
    assert args.src == "LLM360/Amber@ckpt_358" and len(args.tgt) == len(args.tokens) == 9
    assert args.tokens[0] == pytest.approx(1259.13e9 / 360) and args.tokens[-1] == pytest.approx(
        1259.13e9 / 360 * 359
    )
    assert (
        options("--model", "LLM360/Amber", "--revisions", "ckpt_000", "ckpt_358").tokens
        == args.tokens[::8]
    )


def test_tokens_that_are_named_come_before_those_that_are_known():
    assert options("--tgt", EARLY, LAST, "--tokens", 5, 7).tokens == [5, 7]
    assert options("--family", "amber", "--tokens", *range(1, 10)).tokens == [*range(1, 10)]


@pytest.mark.parametrize("note", [None, "[]", "{", '{"tokens": "many"}', '{"steps": 3}'])
def test_tokens_of_a_folder_that_does_not_say_them_are_asked_for(note, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(EARLY, tmp_path / name)
        (tmp_path / name / "training.json").unlink()
        if note:
            (tmp_path / name / "training.json").write_text(note)
    assert "--tokens" in refused(capsys, "--tgt", tmp_path / "a", tmp_path / "b")
    assert options("--tgt", tmp_path / "a", tmp_path / "b", "--tokens", 1, 2).tokens == [1, 2]


def test_a_checkpoint_is_called_by_its_revision_or_its_folder(tmp_path):
    (tmp_path / "runs@home" / "step_1").mkdir(parents=True)
    names = ["some/model@a", "some/model", str(tmp_path / "runs@home" / "step_1"), EARLY]
    assert [exp_pretraining.short(name) for name in names] == ["a", "model", "step_1", "step_0400"]


def test_alpha_zero_is_the_baseline_alone_and_a_strength_counts_once():
    assert options("--alpha", 0, 2, 2, 1).alpha == [2, 1]
    assert options("--alpha", "auto").alpha == [1, 2, 3, 5]


@pytest.mark.parametrize(
    "layer, source, other", [("0.75", 4, 4), ("3", 3, 3), ("2,5", 2, 5), ("0.34,0.5", 2, 3)]
)
def test_the_source_is_read_at_the_first_number_of_layer_and_the_others_at_the_second(
    layer, source, other
):
    args = options("--tgt", EARLY, LAST, "--layer", layer)
    assert (exp_pretraining.block(args, LAST), exp_pretraining.block(args, EARLY)) == (
        source,
        other,
    )


WRONG = {
    "model without revisions": (["--model", "some/model"], "go together"),
    "revisions without a model": (["--revisions", "a", "b"], "go together"),
    "model and folders": (
        ["--model", "some/model", "--revisions", "a", "--tgt", EARLY],
        "not by both",
    ),
    "model and source": (
        ["--model", "some/model", "--revisions", "a", "--src", EARLY],
        "not by both",
    ),
    "revisions of a folder": (["--model", LAST, "--revisions", "a", "b"], "is a folder"),
    "custom without checkpoints": (["--family", "custom"], "has no checkpoints"),
    "unknown tokens": (
        ["--model", "some/model", "--revisions", "a", "b"],
        "has some/model@a seen?",
    ),
    "Amber without a number": (
        ["--model", "LLM360/Amber", "--revisions", "ckpt_000", "ckpt_last"],
        "ckpt_last seen?",
    ),
    "Amber without a revision": (["--tgt", "LLM360/Amber"], "LLM360/Amber seen?"),
    "fewer tokens than checkpoints": (
        ["--tgt", EARLY, LAST, "--tokens", "1"],
        "1 --tokens for 2 checkpoints",
    ),
    "more tokens than checkpoints": (
        ["--tgt", EARLY, LAST, "--tokens", "1", "2", "3"],
        "3 --tokens for 2",
    ),
    "tokens that shrink": (["--tgt", EARLY, LAST, "--tokens", "2", "1"], "grow"),
    "tokens that do not grow": (["--tgt", EARLY, LAST, "--tokens", "2", "2"], "grow"),
    "checkpoints in the wrong order": (["--tgt", LAST, EARLY], "grow"),
    "no tokens": (["--tgt", EARLY, LAST, "--tokens", "0", "1"], "positive"),
    "infinite tokens": (["--tgt", EARLY, LAST, "--tokens", "1", "inf"], "--tokens"),
    "tokens that are no number": (["--tgt", EARLY, LAST, "--tokens", "1", "nan"], "--tokens"),
    "tokens that are a word": (["--tgt", EARLY, LAST, "--tokens", "few", "many"], "--tokens"),
    "a checkpoint twice": (["--tgt", EARLY, LAST, EARLY], "twice"),
    "a revision twice": (
        ["--model", "some/model", "--revisions", "a", "a", "--tokens", "1", "2"],
        "twice",
    ),
    "an aligned model": (["--tgt", EARLY, LAST, "--tgt-chat", EARLY, LAST], "--tgt-chat"),
    "another base model": (["--tgt", EARLY, LAST, "--src-base", EARLY], "--src-base"),
    "layer auto": (["--layer", "auto"], "--layer auto"),
    "block out of range": (["--layer", "8"], "block 8 does not exist"),
    "block of the others out of range": (["--layer", "5,8"], "block 8 does not exist"),
    "alpha not a number": (["--alpha", "nan"], "--alpha"),
    "alpha 0 alone": (["--alpha", "0"], "--alpha"),
    "no pairs": (["--pairs", "0"], "--pairs"),
    "no control": (["--random", "0"], "--random"),
    "shots below 0": (["--shots", "-1"], "--shots"),
    "prompt longer than the context": (
        ["--shots", "30", "--pairs", "1", "--limit", "1"],
        "do not fit the context",
    ),
    "no such model folder": (
        ["--tgt", "no/such/model", LAST, "--tokens", "1", "2"],
        "no model folder",
    ),
    "folder without a model": (
        ["--tgt", str(TOY), LAST, "--tokens", "1", "2", "--shots", "0"],
        "config.json",
    ),
    "no data folder": (["--data", "nowhere"], "no data folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_before_any_weights_are_loaded(
    case, tmp_path, monkeypatch, capsys
):
    argv, says = WRONG[case]
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stopped:
        exp_pretraining.main([*argv, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and says in printed.err
    assert not (tmp_path / "out").exists()


# ================================================================ what is shared with the other emotion scripts


@pytest.mark.parametrize("name", ["load_scenarios", "split", "prompts", "check_prompts"])
def test_what_two_scripts_share_is_the_same_text(name):
    assert inspect.getsource(getattr(exp_pretraining, name)) == inspect.getsource(
        getattr(exp_pythia, name)
    )


def test_constants_and_scenarios_are_those_of_exp_emotion():
    assert inspect.getsource(exp_pretraining.load_scenarios) == inspect.getsource(
        exp_emotion.load_scenarios
    )
    for name in ("EMOTIONS", "TEMPLATE", "SHOT"):
        assert (
            getattr(exp_pretraining, name)
            == getattr(exp_pythia, name)
            == getattr(exp_emotion, name)
        )


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--shots", 0],
        ["--shots", 8, "--seed", 3],
        ["--pairs", 30, "--limit", 7],
        ["--limit", -1, "--seed", 1],
    ],
)
def test_parts_and_prompts_are_those_of_exp_emotion_s_clean_protocol(argv):
    scenarios = exp_emotion.load_scenarios(TOY)
    theirs, ours = exp_emotion.options(list(map(str, argv))), options(*argv)
    data = exp_emotion.split(scenarios, theirs)
    assert exp_pretraining.split(exp_pretraining.load_scenarios(TOY), ours) == data
    for shots in (False, True):
        assert exp_pretraining.prompts(
            data, ["You {win}.", "You lose."], shots
        ) == exp_emotion.prompts(data, ["You {win}.", "You lose."], theirs, shots)


def test_lists_that_are_too_short_say_how_many_are_needed(capsys):
    toy = exp_pretraining.load_scenarios(TOY)
    with pytest.raises(SystemExit):
        exp_pretraining.split({emotion: texts[:60] for emotion, texts in toy.items()}, options())
    assert "has 60 scenarios" in capsys.readouterr().err
    exp_pretraining.split({emotion: texts[:61] for emotion, texts in toy.items()}, options())


# ================================================================ choices and controls


def test_validation_takes_the_most_hits_and_every_control_has_the_norm_of_the_mapped_vector(
    monkeypatch,
):
    generator, tested = torch.Generator().manual_seed(0), []
    hits = {1: 3, 2: 8, 3: 8, -2: 8}  # of ten validation scenarios, by alpha

    def score_labels(model, prompts, labels, moves, label):
        emotion, part = label.split(", ")
        if part == "test":
            tested.append(moves)
        said = torch.full((len(moves), len(prompts)), -1)
        for row, move in enumerate(moves if part == "validation" else []):
            said[row, : hits[move.parts[0][1]]] = EMOTIONS.index(emotion)
        return said, said

    monkeypatch.setattr(exp_pretraining, "score_labels", score_labels)
    monkeypatch.setattr(
        exp_pretraining,
        "hidden_states",
        lambda model, texts, layers, label: torch.randn(len(texts), 1, 8, generator=generator),
    )
    monkeypatch.setattr(
        exp_pretraining, "concept_vector", lambda *_, label: torch.randn(1, 8, generator=generator)
    )
    args = options("--tgt", EARLY, LAST, "--alpha", 1, 3, -2, 2, "--random", 25, "--norm", "match")
    parts = dict.fromkeys(("positive", "negative", "validation", "test"), ["You win."] * 10)
    data = dict.fromkeys(EMOTIONS, parts)
    source = {
        "v": torch.randn(6, 8, generator=generator),
        "plain": torch.randn(40, 8, generator=generator),
    }
    result = exp_pretraining.measure(
        SimpleNamespace(name=EARLY), source, data | {"shots": []}, ["word"] * 40, args
    )
    assert (
        result["alpha"] in (2, -2)
        and len(tested) == 6
        and len(result["arms"]) == 6 * (1 + 4 + 1 + 25)
    )
    for e, moves in enumerate(tested):
        base, *mapped, own = moves[:6]
        assert base == common.BASE and {move.parts[0][1] for move in mapped} == {1, 3, -2, 2}
        v = mapped[0].parts[0][2]
        assert all(torch.equal(move.parts[0][2], v) for move in mapped)
        assert own.parts[0][1] == result["alpha"] and not torch.allclose(own.parts[0][2], v)
        assert all(
            layer == BLOCK
            and alpha == result["alpha"]
            and torch.isclose(direction.norm(), v.norm())
            for move in moves[6:]
            for layer, alpha, direction in move.parts
        )
        assert len({tuple(move.parts[0][2].tolist()) for move in moves[6:]}) == 25


# ================================================================ records, table, figure


def arm(
    emotion: str, method: str, alpha: float, said: list[int], preferred: list[int] | None = None
) -> dict:
    return {
        "emotion": emotion,
        "method": method,
        "alpha": alpha,
        "said": said,
        "preferred": preferred or said,
    }


def made_up(right: int) -> dict:
    """Results of a checkpoint in which v^ at alpha 2 gets so many of four scenarios right."""
    arms = []
    for e, emotion in enumerate(EMOTIONS):
        other = (e + 1) % 6
        arms += [
            arm(emotion, "base", 0, [other, -1, other, e], [other, e, other, e]),
            arm(emotion, "contrans", 2.0, [e] * right + [-1] * (4 - right), [e] * 4),
            arm(emotion, "contrans", 3.0, [-1] * 4),
            arm(emotion, "self-align", 2.0, [e] * 4),
            arm(emotion, "random", 2.0, [-1, -1, -1, e]),
            arm(emotion, "random", 2.0, [-1] * 4),
        ]
    return {
        "alpha": 2.0,
        "arms": arms,
        "block": 5,
        "r2": 0.8,
        "cosine": 0.9,
        "fitted on": 160,
        "cosine to own": 0.5,
    }


RESULTS = [made_up(1), made_up(3)]


def find(rows: list[dict], **match) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in match.items())]


def made_up_args() -> argparse.Namespace:
    return options(
        "--tgt",
        EARLY,
        LAST,
        "--random",
        2,
        "--alpha",
        2,
        3,
        "--layer",
        "4,5",
        "--tokens",
        "1e6",
        "2e6",
    )


def test_records_hold_every_rate_of_every_emotion_with_n_and_interval():
    rows = exp_pretraining.make_records(made_up_args(), RESULTS)
    assert all(
        list(row) == common.RECORD and row["experiment"] == "pretraining" and row["source"] == LAST
        for row in rows
    )
    assert len(rows) == 2 * (6 * 6 * 2 + 4 * 2 + 2) and {row["layer"] for row in rows} == {"4 -> 5"}
    fear = {"target": LAST, "concept": "fear", "split": "test"}
    (row,) = find(rows, **fear, method="contrans", alpha=2.0, metric="token_acc")
    assert (row["value"], row["n"], row["low"], row["high"]) == (0.75, 4, *common.wilson(3, 4))
    (row,) = find(rows, **fear, method="base", metric="token_acc")
    assert (row["alpha"], row["value"], row["low"], row["high"]) == (0, 0.25, *common.wilson(1, 4))
    (row,) = find(rows, **fear, method="base", metric="logit_acc")
    assert (row["value"], row["low"], row["high"]) == (0.5, *common.wilson(2, 4))
    (mean,) = find(
        rows, target=LAST, concept="mean of six", method="contrans", alpha=2.0, metric="token_acc"
    )
    assert (mean["value"], mean["n"], mean["low"], mean["high"]) == (
        0.75,
        24,
        *common.wilson(18, 24),
    )
    directions = find(rows, target=EARLY, concept="fear", method="random", metric="token_acc")
    assert [(row["split"], row["value"]) for row in directions] == [
        ("test direction 0", 0.25),
        ("test direction 1", 0),
    ]
    assert [
        (row["metric"], row["value"], row["n"]) for row in find(rows, target=EARLY, concept="map")
    ] == [("r2", 0.8, 160), ("cosine", 0.9, 160)]


def test_the_table_pools_six_emotions_and_stands_beside_its_controls():
    lines = exp_pretraining.table(made_up_args(), RESULTS).splitlines()
    header, _, first, last = lines[-4:]
    low, high = common.wilson(18, 24)
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[:2] == ["step_3000", "2e+06"] and cells[3] == "2"
    assert cells[2].startswith("25.0 [") and cells[2].endswith("/ 50.0")
    assert cells[4] == f"75.0 [{100 * low:.0f}, {100 * high:.0f}] / 100.0"
    assert (
        cells[5] == "12.5 (100)"
        and cells[6].startswith("100.0 [")
        and cells[7:] == ["0.80", "0.50"]
    )
    assert first.split("|")[6].strip() == "12.5 (75)"  # as good as the better of two directions
    assert "n = 24" in "".join(lines) and len(header) == len(first) == len(last)


def test_the_figure_shows_both_accuracies_of_the_mean_and_of_each_emotion_against_tokens():
    figure = exp_pretraining.draw(made_up_args(), RESULTS)
    for axis, base in zip(figure.axes, (0.25, 0.5), strict=True):
        lines = {
            line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")
        }
        assert (
            len(lines) == 3 and len(axis.lines) == 3 + 2 * 6 and len(axis.collections) == 3
        )  # intervals as bands
        assert axis.get_xscale() == "log" and all(
            line.get_xdata().tolist() == [1e6, 2e6] for line in axis.lines
        )
        assert lines["without: false positives"].get_ydata().tolist() == [base, base]
    (ours,) = [line for line in figure.axes[0].lines if line.get_label().startswith("with v")]
    assert ours.get_ydata().tolist() == [0.25, 0.75]


# ================================================================ a whole run


SCRIPT = [sys.executable, str(ROOT / "exp_pretraining.py")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run: its folder, what was loaded, and every transplant that was tested, by checkpoint and emotion."""
    out, loads, moves = tmp_path_factory.mktemp("finished"), Loads(), {}
    score_labels = exp_pretraining.score_labels

    def listen(model, prompts, labels, transplants, label):
        moves[model.name, label] = transplants
        return score_labels(model, prompts, labels, transplants, label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_model", loads)
        patch.setattr(exp_pretraining, "score_labels", listen)
        exp_pretraining.main([*TINY, "--out", str(out)])
    (folder,) = (out / "exp_pretraining").iterdir()
    return SimpleNamespace(folder=folder, out=out, loads=loads, moves=moves)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_run_folder_holds_records_table_and_figure(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        "args.json",
        "environment.json",
        "steps",
        *FILES,
        "figure_3.png",
        "figure_3.pdf",
    }
    assert (finished.folder / "figure_3.png").read_bytes().startswith(b"\x89PNG")
    rows = json_rows(finished.folder, "records.jsonl")
    with open(finished.folder / "records.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in rows
        ]
    about = json.loads((finished.folder / "args.json").read_text())
    assert about["inputs"][LAST] == common.fingerprint(LAST) and about["args"]["src"] == LAST


def test_each_checkpoint_is_loaded_once_the_last_first_and_never_two_at_a_time(finished):
    assert finished.loads.names == [LAST, EARLY, MIDDLE] and finished.loads.most == 1


def test_records_agree_with_the_examples(finished):
    examples = json_rows(finished.folder, "examples.jsonl")
    rows = [
        row
        for row in json_rows(finished.folder, "records.jsonl")
        if row["split"] == "test" and row["concept"] in EMOTIONS
    ]
    assert len(rows) == 3 * 6 * 2 * (1 + 2 + 1) and {row["method"] for row in rows} == {
        "base",
        "contrans",
        "self-align",
    }
    for row in rows:
        key = {"token_acc": "said", "logit_acc": "preferred"}[row["metric"]]
        hits = [
            example[key] == EMOTIONS.index(row["concept"])
            for example in find(
                examples,
                target=row["target"],
                emotion=row["concept"],
                method=row["method"],
                alpha=row["alpha"],
            )
        ]
        assert len(hits) == row["n"] == 5 and row["value"] == sum(hits) / 5
        assert (row["low"], row["high"]) == common.wilson(sum(hits), 5)


@pytest.fixture(scope="module")
def again():
    """Eq. 1 and 2 computed anew for MIDDLE, and plain transformers to add the vectors to."""
    args = options(*TINY)
    data = exp_emotion.split(exp_emotion.load_scenarios(TOY), exp_emotion.options(SMALL))
    sentences = common.plain_sentences(args, CHECKPOINTS)
    states, vectors = {}, {}
    for name in (LAST, MIDDLE):
        model = common.load_model(name, device="cpu")
        states[name] = common.hidden_states(model, sentences, [BLOCK])[:, 0].double()
        vectors[name] = {}
        for emotion in EMOTIONS:
            prompts = [
                [
                    f"Scenario: {text}\nThe emotion of the above scenario is"
                    for text in data[emotion][side]
                ]
                for side in ("positive", "negative")
            ]
            positive, negative = (
                common.hidden_states(model, texts, [BLOCK])[:, 0].double() for texts in prompts
            )
            vectors[name][emotion] = positive.mean(0) - negative.mean(0)
    rows = random.Random(0).sample(range(len(sentences)), 100)[:80]
    f = np.linalg.lstsq(states[LAST][rows].numpy(), states[MIDDLE][rows].numpy(), rcond=None)[0]
    mapped = {emotion: vectors[LAST][emotion] @ torch.from_numpy(f) for emotion in EMOTIONS}
    return SimpleNamespace(
        data=data,
        mapped=mapped,
        own=vectors[MIDDLE],
        reference=Reference(Path(MIDDLE), "model.layers", "model.norm"),
    )


def test_the_vectors_that_were_tested_are_those_of_eq_1_and_2(finished, again):
    for emotion in EMOTIONS:
        base, weak, strong, own, *directions = finished.moves[MIDDLE, f"{emotion}, test"]
        assert base == common.BASE and len(directions) == 2
        for move, alphas, vector in (
            (weak, [2], again.mapped),
            (strong, [3], again.mapped),
            (own, [2, 3], again.own),
        ):
            ((layer, alpha, tested),) = move.parts
            assert layer == BLOCK and alpha in alphas
            assert (tested - vector[emotion]).norm() < 1e-3 * tested.norm()


@pytest.mark.parametrize("method, alpha", [("base", 0), ("contrans", 2), ("contrans", 3)])
def test_the_answers_are_those_of_plain_transformers_with_a_hook(finished, again, method, alpha):
    words = {
        again.reference.ids(f"is {emotion}")[0, 1 - again.reference.ids(" is").shape[1] :][
            -1
        ].item(): e
        for e, emotion in enumerate(EMOTIONS)
    }
    assert len(words) == 6
    examples = find(
        json_rows(finished.folder, "examples.jsonl"), target=MIDDLE, method=method, alpha=alpha
    )
    assert len(examples) == 30
    for example in examples:
        steer = (
            {} if method == "base" else {BLOCK: alpha * again.mapped[example["emotion"]].float()}
        )
        logits = again.reference.logits(
            f"Scenario: {example['scenario']}\nThe emotion of the above scenario is", steer
        )[-1]
        assert example["scenario"] in again.data[example["emotion"]]["test"]
        assert example["said"] == words.get(logits.argmax().item(), -1)
        assert example["preferred"] == words[max(words, key=lambda token: logits[token].item())]


def test_the_same_command_ends_at_once_without_a_model(finished, monkeypatch, capsys):
    before = contents(finished.folder)
    (finished.folder / "figure_3.png").unlink()
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    exp_pretraining.main([*TINY, "--out", str(finished.out)])
    assert contents(finished.folder) == before and (finished.folder / "figure_3.png").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(finished.folder)


def stopped_after_each_step(monkeypatch, main, argv: list[str]) -> list[list[str]]:
    """Run main again and again, each time ended after one more step; the models that each of these runs has loaded."""

    class Killed(Exception):
        pass

    runs, write = [], common.write_whole

    def write_and_end(path, content):
        write(path, content)
        if path.parent.name == "steps":
            raise Killed

    monkeypatch.setattr(common, "write_whole", write_and_end)
    monkeypatch.setattr(common.Run, "figure", lambda *_: None)
    while True:
        loads = Loads()
        loads.load = getattr(common.load_model, "load", common.load_model)
        monkeypatch.setattr(common, "load_model", loads)
        runs.append(loads.names)
        try:
            return main(argv) or runs
        except Killed:
            assert len(runs) < 50


def test_a_run_that_is_stopped_after_every_step_ends_with_the_same_records(
    finished, monkeypatch, tmp_path
):
    runs = stopped_after_each_step(
        monkeypatch, exp_pretraining.main, [*TINY, "--out", str(tmp_path)]
    )
    assert runs == [
        [LAST],
        [LAST],
        [EARLY],
        [MIDDLE],
        [],
    ]  # vectors and states of the source; then each checkpoint
    (folder,) = (tmp_path / "exp_pretraining").iterdir()
    assert folder.name == finished.folder.name and contents(folder) == contents(finished.folder)


def test_a_killed_process_goes_on_where_it_stopped(finished, monkeypatch, tmp_path):
    process = subprocess.Popen(
        [*SCRIPT, *TINY, "--out", str(tmp_path)],
        env=surroundings(tmp_path / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wanted = random.choice([1, 2, 3])  # of four steps
    while (
        len(list(tmp_path.glob("exp_pretraining/*/steps/*[sn]"))) < wanted
        and process.poll() is None
    ):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    assert process.wait() == -9
    (folder,) = (tmp_path / "exp_pretraining").iterdir()
    steps = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("steps/*[sn]")
    }
    files = {
        name: common.Run._step_file(
            SimpleNamespace(steps=folder / "steps"), f"checkpoint {name}", "json"
        )
        for name in CHECKPOINTS
    }
    done = [name for name, path in files.items() if path.exists()]
    assert len(steps) >= max(wanted, len(done) + 1) and not any(
        (folder / name).exists() for name in FILES
    )
    monkeypatch.setattr(common, "load_model", loads := Loads())
    exp_pretraining.main([*TINY, "--out", str(tmp_path)])
    assert loads.names == [name for name in (LAST, EARLY, MIDDLE) if name not in done]
    assert all(
        (path.read_bytes(), path.stat().st_mtime_ns) == before for path, before in steps.items()
    )
    assert contents(folder) == contents(finished.folder)


def test_a_process_says_one_line_on_stderr_and_ends_with_2(tmp_path):
    result = subprocess.run(
        [*SCRIPT, "--tgt", EARLY, LAST, "--tokens", "1", "--out", str(tmp_path / "out")],
        env=surroundings(tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


# ================================================================ revisions of a hub repository


ON_A_HUB = """
import json, sys
import common, exp_pretraining
from huggingface_hub import scan_cache_dir, snapshot_download

def held():
    return sorted(ref for repo in scan_cache_dir().repos for found in repo.revisions for ref in found.refs
                  if any(file.file_name.endswith((".safetensors", ".bin")) for file in found.files))

def begin(*more):
    common.model_config.cache_clear()           # as in a new process
    loaded.clear()
    exp_pretraining.main([*sys.argv[1:], *more])

def load_model(name, *options):
    loaded.append((name.partition("@")[2], held()))
    return load(name, *options)

def ends_before_it_removes(name):
    raise KeyboardInterrupt

loaded, report, load, forget = [], {}, common.load_model, exp_pretraining.forget
common.load_model = load_model
common.Run.figure = lambda *_: None             # takes half a second, and is tested elsewhere
snapshot_download("some/amber", revision="middle")
exp_pretraining.forget = ends_before_it_removes
try:
    begin()
except KeyboardInterrupt:
    report["interrupted"] = held()
exp_pretraining.forget = forget
begin()
report["loaded"], report["held"] = loaded[:], held()
snapshot_download("some/amber", revision="early")
begin()
report["again"], report["own download"] = loaded[:], held()
begin("--keep-downloads", "--revisions", "late", "--tokens", "3e6")
report["kept"] = held()
open("report.json", "w").write(json.dumps(report))
"""


@pytest.fixture(scope="module")
def on_a_hub(tmp_path_factory):
    """Three revisions in a process that has a cache of its own, one of them there before: what was in the cache when."""
    home = tmp_path_factory.mktemp("hub")
    shutil.copytree(EARLY, home / "early")  # as Amber's repository has it: no safetensors
    weights = home / "early" / "model.safetensors"
    torch.save(load_file(weights), home / "early" / "pytorch_model.bin")
    weights.unlink()
    (home / "early" / "training.json").unlink()
    repos = {"some/amber": {"early": home / "early", "middle": MIDDLE, "late": LAST}}
    argv = [
        "--model",
        "some/amber",
        "--revisions",
        "early",
        "middle",
        "late",
        "--tokens",
        "1e6",
        "2e6",
        "3e6",
        *SMALL,
        "--alpha",
        "2",
        "3",
        "--allow-pickle",
        "--out",
        str(home / "out"),
    ]
    with Hub(repos) as hub:
        result = subprocess.run(
            [sys.executable, "-c", ON_A_HUB, *argv],
            cwd=home,
            capture_output=True,
            text=True,
            env=hub.surroundings(home) | {"PYTHONPATH": str(ROOT)},
        )
        assert result.returncode == 0, result.stderr
    (folder,) = (home / "out" / "exp_pretraining").glob("*early+*")
    return SimpleNamespace(
        report=json.loads((home / "report.json").read_text()), asked=hub.loaded, folder=folder
    )


def test_a_checkpoint_of_a_hub_is_removed_after_its_use_even_if_a_run_is_killed_before(on_a_hub):
    assert on_a_hub.report["interrupted"] == [
        "late",
        "middle",
    ]  # killed when it was about to remove the first
    assert on_a_hub.report["loaded"] == [["early", ["middle"]], ["middle", ["middle"]]]
    assert on_a_hub.report["held"] == ["middle"]  # which was there before the run


def test_a_finished_run_needs_no_weights_and_leaves_later_downloads_alone(on_a_hub):
    assert on_a_hub.report["again"] == [] and on_a_hub.report["own download"] == ["early", "middle"]


def test_downloads_are_kept_if_that_is_asked_for(on_a_hub):
    assert on_a_hub.report["kept"] == ["early", "late", "middle"]


def test_each_checkpoint_is_downloaded_once_for_each_use(on_a_hub):
    revisions = [revision for _, revision, _ in on_a_hub.asked]
    assert revisions == [
        "middle",
        "late",
        "early",
        "early",
        "late",
    ]  # by hand, run, run, by hand, kept


def test_revisions_give_the_numbers_of_the_same_folders(on_a_hub, finished):
    names = dict(zip(CHECKPOINTS, ("early", "middle", "late")))
    wanted = [
        (
            names[row["target"]],
            row["concept"],
            row["method"],
            row["alpha"],
            row["metric"],
            row["value"],
        )
        for row in json_rows(finished.folder, "records.jsonl")
    ]
    assert [
        (
            row["target"].removeprefix("some/amber@"),
            row["concept"],
            row["method"],
            row["alpha"],
            row["metric"],
            row["value"],
        )
        for row in json_rows(on_a_hub.folder, "records.jsonl")
    ] == wanted


# ================================================================ when the concept forms


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The newcomer's command: mean Token Acc of the six emotions, {checkpoint: {method: value}}."""
    out = tmp_path_factory.mktemp("measured")
    result = subprocess.run(
        [*SCRIPT, "--out", str(out)],
        env=surroundings(out / "cache"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (out / "exp_pretraining").iterdir()
    rows = find(json_rows(folder, "records.jsonl"), metric="token_acc")
    alphas = {row["target"]: row["alpha"] for row in find(rows, method="self-align")}
    return {
        Path(name).name: {
            method: np.mean(
                [
                    row["value"]
                    for row in find(rows, target=name, method=method)
                    if row["alpha"] in (0, alpha)
                ]
            )
            for method in ("base", "contrans", "random", "self-align")
        }
        for name, alpha in alphas.items()
    }


@pytest.mark.slow
def test_the_concept_moves_late_checkpoints_and_not_early_ones(measured):
    effect = {name: values["contrans"] - values["base"] for name, values in measured.items()}
    assert measured["step_3000"]["base"] < measured["step_0400"]["base"]
    assert effect["step_3000"] >= 0.5 and effect["step_3000"] > effect["step_0400"]


@pytest.mark.slow
def test_random_directions_move_no_checkpoint(measured):
    assert all(abs(values["random"] - values["base"]) <= 0.15 for values in measured.values())
