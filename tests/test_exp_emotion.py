"""exp_emotion.py: its data split, its prompts and its records, wrong options, and whole runs on the toy zoo.

    pytest tests/test_exp_emotion.py                    properties and one tiny run, also killed and continued
    pytest tests/test_exp_emotion.py -m slow            the effect, its controls, and the README's numbers

Tests on the real lists need a copy of them in ../shared/data and are skipped without one.
"""

import argparse
import csv
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import exp_emotion
from exp_emotion import EMOTIONS

ROOT = Path(__file__).resolve().parents[1]
TOY, REAL = ROOT / "data" / "toy", ROOT.parent / "shared" / "data"
SOURCE, TARGET = f"{exp_emotion.ZOO}/llama-s", f"{exp_emotion.ZOO}/llama-m"
SHOTS = {  # what the released prompt holds, after PROTOCOL: scenario -> (wrong label, list that it is from)
    "You're told you need to undergo an emergency medical procedure.": ("anger", "fear"),
    "You encounter a new type of crosswalk signal in your city.": ("disgust", "surprise"),
    "You hear someone hocking up phlegm and spitting in a public trash can.": ("fear", "disgust"),
    "You notice your personal information has been leaked online.": ("happiness", "fear"),
    "You find a dirty diaper abandoned on a beach.": ("sadness", "disgust"),
    "You're on public transit and someone starts acting erratically.": ("surprise", "fear"),
}


def options(*argv) -> argparse.Namespace:
    return exp_emotion.options(list(map(str, argv)))


@pytest.fixture(scope="module", params=["toy", "real"])
def scenarios(request):
    """The six lists, of the toy world and of RepE."""
    folder = {"toy": TOY, "real": REAL}[request.param]
    if not folder.is_dir():
        pytest.skip("no copy of the real data in ../shared/data")
    return exp_emotion.load_scenarios(folder)


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip("no copy of the real data in ../shared/data")
    return exp_emotion.load_scenarios(REAL)


@pytest.fixture(scope="module")
def toy():
    return exp_emotion.load_scenarios(TOY)


def counts(texts: list[str], scenarios: dict) -> dict[str, int]:
    """How many of the texts are in each emotion's list."""
    where = {text: emotion for emotion, own in scenarios.items() for text in own}
    return Counter(where[text] for text in texts)


# ================================================================ the split


@pytest.mark.parametrize("seed", [0, 5])
def test_parts_are_disjoint_and_no_test_scenario_is_of_the_target_emotion(scenarios, seed):
    data = exp_emotion.split(scenarios, options("--limit", -1, "--seed", seed))
    for emotion in EMOTIONS:
        parts = {"shots": [text for _, text in data["shots"]], **data[emotion]}
        texts = [text for part in parts.values() for text in part]
        assert len(texts) == len(set(texts))
        assert set(parts["positive"]) <= set(scenarios[emotion])
        assert not set(parts["negative"] + parts["validation"] + parts["test"]) & set(
            scenarios[emotion]
        )


def test_negatives_validation_and_test_have_equally_many_of_each_other_emotion(scenarios):
    data = exp_emotion.split(scenarios, options("--limit", 52))
    for emotion in EMOTIONS:
        for part in ("negative", "validation", "test"):
            found = counts(data[emotion][part], scenarios)
            assert (
                set(found) == set(EMOTIONS) - {emotion}
                and max(found.values()) - min(found.values()) <= 1
            )
        assert len(data[emotion]["positive"]) == len(data[emotion]["negative"]) == 200
        assert len(data[emotion]["validation"]) == 50 and len(data[emotion]["test"]) == 52


@pytest.mark.parametrize("shots", [0, 1, 4, 6, 8, 12])
def test_shots_carry_the_label_that_they_have(scenarios, shots):
    data = exp_emotion.split(scenarios, options("--shots", shots))
    assert len(data["shots"]) == shots and all(
        text in scenarios[label] for label, text in data["shots"]
    )
    labels = Counter(label for label, _ in data["shots"])
    assert not shots or max(labels.values()) <= -(-shots // 6)


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_the_split_follows_the_seed(scenarios, protocol):
    first, again, other = (
        exp_emotion.split(scenarios, options("--protocol", protocol, "--seed", seed))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert all(
        first[emotion][part] != other[emotion][part]
        for emotion in EMOTIONS
        for part in first[emotion]
    )


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_limit_cuts_the_shuffled_list_and_minus_one_takes_all(scenarios, protocol):
    def parts(limit):
        return exp_emotion.split(scenarios, options("--protocol", protocol, "--limit", limit))

    every, few, many = parts(-1), parts(7), parts(10000)
    for emotion in EMOTIONS:
        assert (
            few[emotion]["test"] == every[emotion]["test"][:7]
            and many[emotion]["test"] == every[emotion]["test"]
        )
        assert len(every[emotion]["test"]) >= 200
        assert (
            few[emotion]["positive"] == every[emotion]["positive"]
            and few["shots"] == every["shots"]
        )


def test_the_paper_s_shots_are_six_with_the_wrong_labels(scenarios):
    data = exp_emotion.split(scenarios, options("--protocol", "paper"))
    assert [label for label, _ in data["shots"]] == [label for label, _ in SHOTS.values()]
    assert all(
        text in scenarios[true] for (_, text), (_, true) in zip(data["shots"], SHOTS.values())
    )
    assert not any(text in scenarios[label] for label, text in data["shots"])


def test_the_paper_s_test_scenarios_are_those_that_made_the_vector(scenarios):
    data = exp_emotion.split(scenarios, options("--protocol", "paper", "--limit", -1))
    for emotion in EMOTIONS:
        assert (
            data[emotion]["test"] == data[emotion]["negative"]
            and len(data[emotion]["negative"]) == 200
        )
        assert len(data[emotion]["positive"]) == 200 and set(data[emotion]["positive"]) <= set(
            scenarios[emotion]
        )
        assert not set(data[emotion]["negative"]) & set(scenarios[emotion])


def test_on_the_real_lists_the_released_shots_are_used_word_for_word(real):
    data = exp_emotion.split(real, options("--protocol", "paper"))
    assert data["shots"] == [(label, text) for text, (label, _) in SHOTS.items()]


def test_lists_that_are_too_short_say_how_many_are_needed(toy, capsys):
    short = {emotion: texts[:60] for emotion, texts in toy.items()}
    with pytest.raises(SystemExit):
        exp_emotion.split(short, options())
    assert "has 60 scenarios" in capsys.readouterr().err
    exp_emotion.split({emotion: texts[:61] for emotion, texts in toy.items()}, options())


def test_scenarios_are_read_without_doubles_and_margins(tmp_path):
    shutil.copytree(TOY / "emotions", tmp_path / "emotions")
    (tmp_path / "emotions" / "fear.json").write_text(json.dumps([" One. ", "Two.", "One."]))
    assert exp_emotion.load_scenarios(tmp_path)["fear"] == ["One.", "Two."]


# ================================================================ prompts

DATA = {"shots": [("fear", "You see a wolf."), ("anger", "You meet {label} a liar.")]}
CHOICES = '"happiness", "sadness", "anger", "fear", "disgust", "surprise"'


def test_a_prompt_without_shots_is_the_refinement_prompt():
    wanted = [
        "Scenario: You win.\nThe emotion of the above scenario is",
        "Scenario: You lose.\nThe emotion of the above scenario is",
    ]
    assert exp_emotion.prompts(DATA, ["You win.", "You lose."], options(), shots=False) == wanted
    assert (
        exp_emotion.prompts({"shots": []}, ["You win.", "You lose."], options(), shots=True)
        == wanted
    )


def test_a_prompt_with_shots_is_that_of_the_released_code():
    assert exp_emotion.prompts(DATA, ["You win."], options(), shots=True) == [
        f"Scenario: You see a wolf.\nThe emotion ({CHOICES}) of the above scenario is fear.\n"
        f"Scenario: You meet {{label}} a liar.\nThe emotion ({CHOICES}) of the above scenario is anger.\n"
        "Scenario: You win.\nThe emotion of the above scenario is"
    ]


def test_own_template_and_labels_take_the_place_of_the_paper_s():
    args = options(
        "--template",
        "{scenario} I feel",
        "--labels",
        "glad",
        "low",
        "mad",
        "afraid",
        "sick",
        "amazed",
    )
    assert exp_emotion.prompts(DATA, ["You win."], args, shots=True) == [
        "You see a wolf. I feel afraid.\nYou meet {label} a liar. I feel mad.\nYou win. I feel"
    ]
    args.template = exp_emotion.TEMPLATE
    (prompt,) = exp_emotion.prompts(DATA, ["You win."], args, shots=True)
    assert (
        'The emotion ("glad", "low", "mad", "afraid", "sick", "amazed") of the above scenario is afraid.'
        in prompt
    )


# ================================================================ choices and controls


def choosing(monkeypatch, hits: dict) -> dict:
    """validate() on two pairs of blocks, where (pair, alpha) gets so many of ten validation scenarios right."""

    def score_labels(model, prompts, labels, transplants, label):
        said = torch.full((len(transplants), 10), -1)
        for row, transplant in enumerate(transplants):
            ((block, alpha, _),) = transplant.parts
            said[row, : hits[block, alpha]] = EMOTIONS.index(label.split()[-1])
        return said, said

    monkeypatch.setattr(exp_emotion, "score_labels", score_labels)
    args = options("--alpha", 1, 2, 3)
    data = {emotion: {"validation": ["You win."] * 10} for emotion in EMOTIONS} | {"shots": []}
    pair = SimpleNamespace(grid=[(3, 4), (5, 6)], mapped=lambda i: torch.ones(6, 2), model=None)
    return exp_emotion.validate(pair, args, data)


def test_validation_takes_the_most_hits_and_of_equals_the_smallest_alpha(monkeypatch):
    hits = {(4, 1): 1, (4, 2): 5, (4, 3): 4, (6, 1): 2, (6, 2): 8, (6, 3): 8}
    result = choosing(monkeypatch, hits)
    assert {(row["target_block"], row["alpha"]): row["hits"] for row in result["grid"]} == {
        cell: 6 * n for cell, n in hits.items()
    }
    assert result["chosen"] == {
        "i": 1,
        "source_block": 5,
        "target_block": 6,
        "alpha": 2,
        "hits": 48,
        "n": 60,
    }


def test_every_control_has_the_norm_of_the_mapped_vector_and_the_chosen_strength(monkeypatch):
    generator, seen = torch.Generator().manual_seed(0), []
    vectors = {
        key: torch.randn(6, 8, generator=generator) * 3
        for key in ("mapped", "own", "shuffled", "map", "pairs")
    }

    def mapped(i, pairs=None, number=0, shuffled=False):
        return vectors[
            "shuffled" if shuffled else "pairs" if pairs else "map" if number else "mapped"
        ]

    def score_labels(model, prompts, labels, transplants, label):
        seen.extend(transplants)
        return (torch.zeros(len(transplants), len(prompts), dtype=torch.long),) * 2

    monkeypatch.setattr(exp_emotion, "score_labels", score_labels)
    args = options("--alpha", 1, 2, "--random", 25, "--maps", 3)
    pair = SimpleNamespace(mapped=mapped, own=vectors["own"][:, None], model=None)
    data, chosen = (
        {"fear": {"test": ["You win."]}, "shots": []},
        {"i": 0, "target_block": 4, "alpha": 2.0},
    )
    arms = exp_emotion.score(pair, args, data, "fear", chosen)

    found = {}
    for arm, transplant in zip(arms, seen, strict=True):
        kind = arm["detail"] if arm["detail"].startswith(("map", "pairs")) else arm["method"]
        found.setdefault(kind, []).append((arm, transplant))
    assert [len(t.parts) for _, t in found["base"]] == [0] and found["base"][0][0]["alpha"] == 0
    v = vectors["mapped"][3]
    for method, vector in (
        ("contrans", v),
        ("self-align", vectors["own"][3]),
        ("map 1", vectors["map"][3]),
    ):
        for arm, transplant in found[method]:
            assert transplant.parts[0][:2] == (4, arm["alpha"]) and torch.equal(
                transplant.parts[0][2], vector
            )
    assert (
        [arm["alpha"] for arm, _ in found["contrans"]]
        == [arm["alpha"] for arm, _ in found["self-align"]]
        == [1, 2]
    )
    for method, count in (("random", 25), ("other-concept", 5), ("shuffled-map", 1)):
        assert len(found[method]) == count
        for _, transplant in found[method]:
            ((block, alpha, vector),) = transplant.parts
            assert (block, alpha) == (4, 2.0) and torch.isclose(vector.norm(), v.norm())
    assert len({tuple(t.parts[0][2].tolist()) for _, t in found["random"]}) == 25


@pytest.mark.parametrize(
    "layer, wanted",
    [
        ("0.75", [(6, 7)]),
        ("3", [(3, 3)]),
        ("2,9", [(2, 9)]),
        ("0.5,0.9", [(4, 9)]),
        ("auto", [(3, 4), (4, 5), (4, 6), (5, 7), (6, 8), (7, 9)]),
    ],
)
def test_layer_means_blocks_of_source_and_target(layer, wanted):
    args, target = options("--layer", layer), f"{exp_emotion.ZOO}/llama-l"  # 8 and 10 blocks
    assert exp_emotion.block_grid(args, target) == wanted


def test_alpha_zero_is_the_baseline_alone_and_a_strength_counts_once():
    assert options("--alpha", 0, 2, 2, 1).alpha == [2, 1]


# ================================================================ a concept of one's own

LINES = [json.dumps({"positive": f"You win {n}.", "negative": f"You lose {n}."}) for n in range(40)]


def own(*lines: str, labels: tuple[str, ...] = ("glad", "low")):
    """The options for a file that holds these lines."""

    def make(tmp: Path) -> list:
        (tmp / "my.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return ["--labels", *labels, "--pairs", tmp / "my.jsonl"]

    return make


def test_pairs_are_read_without_margins_and_empty_lines_and_may_hold_any_character(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_bytes(
        '\ufeff{"positive": " Ja\u2028é ", "negative": "Nein", "id": 3}\r\n\r\n'
        '{"negative": "no\\n", "positive": "yes"}'.encode()
    )
    assert exp_emotion.load_pairs(path) == [("Ja\u2028é", "Nein"), ("yes", "no")]


@pytest.mark.parametrize("shots", [0, 5, 6])
def test_a_pair_is_in_one_part_and_each_class_is_tested_on_texts_of_the_other(tmp_path, shots):
    args = options(*own(*LINES)(tmp_path), "--shots", shots, "--limit", -1)
    data = exp_emotion.split_pairs(exp_emotion.load_pairs(args.pair_file), args)
    glad, low = data["glad"], data["low"]
    assert args.concepts == ["glad", "low"] and set(data) == {"shots", "glad", "low"}
    assert low["positive"] == glad["negative"] and low["negative"] == glad["positive"]
    assert [text.replace("win", "lose") for text in glad["positive"]] == glad[
        "negative"
    ]  # still pairs
    assert all("lose" in text for part in ("negative", "validation", "test") for text in glad[part])
    assert all("win" in text for part in ("negative", "validation", "test") for text in low[part])
    parts = [
        {text.split()[-1] for text in texts}
        for texts in (
            [text for _, text in data["shots"]],
            glad["positive"],
            glad["validation"],
            glad["test"],
        )
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) and len(set.union(*parts)) == 40
    assert (
        all(("win" in text) == (label == "glad") for label, text in data["shots"])
        and len(data["shots"]) == shots
    )
    assert (
        abs(len(glad["positive"]) - 20) <= 2
        and len(glad["validation"]) >= 5
        and len(glad["test"]) >= 12
    )
    assert exp_emotion.split_pairs(exp_emotion.load_pairs(args.pair_file), args) == data
    args.seed, args.limit = 1, 3
    other = exp_emotion.split_pairs(exp_emotion.load_pairs(args.pair_file), args)
    assert (
        other["glad"]["positive"] != glad["positive"]
        and len(other["glad"]["test"]) == len(other["low"]["test"]) == 3
    )


def test_the_labels_are_the_words_of_the_shots(tmp_path):
    args = options(*own(*LINES)(tmp_path), "--template", "{scenario} I feel")
    shots = {"shots": [("low", "You lose."), ("glad", "You win.")]}
    assert exp_emotion.prompts(shots, ["So?"], args, shots=True) == [
        "You lose. I feel low.\nYou win. I feel glad.\nSo? I feel"
    ]


# ================================================================ records


def arm(
    emotion: str, method: str, alpha: float, said: list[int], preferred: list[int], detail: str = ""
) -> dict:
    return {
        "emotion": emotion,
        "wanted": EMOTIONS.index(emotion),
        "method": method,
        "alpha": alpha,
        "detail": detail,
        "said": said,
        "preferred": preferred,
    }


ARMS = [
    arm("happiness", "base", 0.0, [1, 2, -1, 0], [1, 2, 0, 0]),
    arm("fear", "base", 0.0, [1, 1, 1, 1], [1, 1, 1, 3]),
    arm("happiness", "contrans", 2.0, [0, 0, 0, -1], [0, 0, 0, 0]),
    arm("fear", "contrans", 2.0, [3, 3, 0, 0], [3, 3, 3, 0]),
    arm("fear", "contrans", 3.0, [3, 3, 3, 3], [3, 3, 3, 3]),
    arm("fear", "random", 2.0, [0, 0, 0, 0], [0, 3, 0, 0], "direction 0"),
    arm("fear", "contrans", 2.0, [3, 0, 0, 0], [3, 0, 0, 0], "pairs 20"),
    arm("fear", "contrans", 2.0, [3, 3, 3, 3], [3, 3, 3, 3], "map 1"),
]
VALIDATION = {
    "grid": [{"i": 0, "source_block": 6, "target_block": 7, "alpha": 2.0, "hits": 3, "n": 12}],
    "chosen": {"i": 0, "source_block": 6, "target_block": 7, "alpha": 2.0, "hits": 3, "n": 12},
}
FITTED = {
    "closed form": [{"r2": 0.8, "cosine": 0.9}, {"r2": 0.7, "cosine": 0.85}],
    "fitted on": 240,
    "gradient descent": {"r2": -0.1, "cosine": 0.2},
    "shuffled": {"r2": -0.6, "cosine": 0.01},
}


def test_pooled_counts_the_target_emotion_over_all_arms_that_match():
    assert exp_emotion.pooled(ARMS, emotion="happiness", method="base")[::3] == (1 / 4, 4)
    assert exp_emotion.pooled(ARMS, "preferred", emotion="happiness", method="base")[::3] == (
        2 / 4,
        4,
    )
    rate, low, high, n = exp_emotion.pooled(ARMS, method="contrans", alpha=2.0, detail="")
    assert (rate, n) == (5 / 8, 8) and (low, high) == common.wilson(5, 8)
    assert exp_emotion.pooled(ARMS)[::3] == (15 / 32, 32)


@pytest.fixture
def rows():
    args = options("--src", SOURCE, "--tgt", TARGET)
    return exp_emotion.make_records(args, TARGET, "13B", VALIDATION, ARMS, FITTED)


def find(rows: list[dict], **match) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in match.items())]


def test_every_record_has_all_fields_and_says_what_it_is_about(rows):
    for row in rows:
        assert list(row) == common.RECORD
        assert (row["experiment"], row["source"], row["target"], row["layer"]) == (
            "emotion",
            SOURCE,
            TARGET,
            "6->7",
        )
        assert row["concept"] in [*EMOTIONS, "map", "mean of six"]
        assert row["metric"] in ("token_acc", "logit_acc", "r2", "cosine")
    assert len(find(rows, metric="token_acc")) == len(ARMS) + 1 and len(
        find(rows, metric="logit_acc")
    ) == len(ARMS)


def test_rates_come_with_n_and_their_interval(rows):
    (row,) = find(
        rows, concept="fear", method="contrans", alpha=2.0, split="test", metric="token_acc"
    )
    assert (row["value"], row["n"], row["low"], row["high"]) == (0.5, 4, *common.wilson(2, 4))
    (row,) = find(
        rows, concept="fear", method="contrans", alpha=2.0, split="test", metric="logit_acc"
    )
    assert row["value"] == 0.75
    (row,) = find(rows, split="validation")
    assert (row["value"], row["n"], row["low"], row["high"]) == (0.25, 12, *common.wilson(3, 12))


def test_the_paper_s_number_stands_where_the_paper_has_one_and_nowhere_else(rows):
    published = {
        (row["concept"], row["alpha"]): row["paper"] for row in rows if row["paper"] is not None
    }
    assert published == {
        ("happiness", 0.0): 0.11,
        ("fear", 0.0): 0.035,
        ("happiness", 2.0): 0.92,
        ("fear", 2.0): 0.84,
    }
    assert all(
        row["metric"] == "token_acc" and row["split"] == "test" and row["item"] == "Figure 2a"
        for row in rows
        if row["paper"] is not None
    )
    assert {row["item"] for row in find(rows, method="random")} == {""}
    assert {row["item"] for row in find(rows, split="test pairs 20")} == {"Figure 5"}


def test_a_target_that_is_not_in_the_paper_gets_no_number_of_it():
    rows = exp_emotion.make_records(options(), TARGET, None, VALIDATION, ARMS, FITTED)
    assert all(row["paper"] is None and row["item"] in (None, "", "Figure 5") for row in rows)


def test_the_published_numbers_are_those_of_the_figures():
    assert exp_emotion.PAPER == {
        "13B": {
            0: [0.11, 0, 0.20, 0.035, 0, 0],
            1: [0.41, 0.455, 0.575, 0.475, 0.025, 0],
            2: [0.92, 0.91, 0.895, 0.84, 0.13, 0.045],
            5: [0.985, 1, 1, 1, 1, 0.575],
        },
        "65B": {
            0: [0, 0.82, 0, 0.005, 0.15, 0],
            1: [0.895, 1, 0.765, 0.81, 0.895, 0],
            2: [1, 1, 1, 0.99, 0.99, 0],
            5: [1, 1, 1, 1, 1, 0],
        },
    }
    assert EMOTIONS == ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]


def test_maps_are_recorded_with_their_held_out_fit(rows):
    fits = find(rows, concept="map")
    assert {(row["method"], row["split"][-1], row["metric"]): row["value"] for row in fits} == {
        ("contrans", "0", "r2"): 0.8,
        ("contrans", "0", "cosine"): 0.9,
        ("contrans", "1", "r2"): 0.7,
        ("contrans", "1", "cosine"): 0.85,
        ("gradient-descent", "0", "r2"): -0.1,
        ("gradient-descent", "0", "cosine"): 0.2,
        ("shuffled-map", "0", "r2"): -0.6,
        ("shuffled-map", "0", "cosine"): 0.01,
    }
    assert all(row["n"] == 240 and row["split"].startswith("held-out map ") for row in fits)


# ================================================================ wrong options


def broken(folder: Path, change) -> list:
    """--data for a copy of the toy data with something wrong in it."""
    for name in ("emotions", "wikisplit"):
        shutil.copytree(TOY / name, folder / name)
    change(folder)
    return ["--data", folder]


def spoilt(path: str, text: str | None):
    """The options for data in which one file holds this text, or is missing."""

    def change(folder: Path) -> None:
        (folder / path).unlink() if text is None else (folder / path).write_text(text)

    return lambda tmp: broken(tmp / "data", change)


FEAR, SENTENCES = "emotions/fear.json", "wikisplit/validation.tsv"
WRONG = {
    "no data folder": (lambda tmp: ["--data", tmp / "nowhere"], "no data folder"),
    "malformed JSON": (spoilt(FEAR, "["), "fear.json"),
    "JSON of numbers": (spoilt(FEAR, "[1, 2]"), "fear.json"),
    "JSON that is no list": (spoilt(FEAR, "7"), "fear.json"),
    "a list is missing": (spoilt(FEAR, None), "fear.json"),
    "lists too short": (
        spoilt(FEAR, json.dumps([f"You see {n}." for n in range(40)])),
        "has 40 scenarios",
    ),
    "no plain sentences": (spoilt(SENTENCES, None), "validation.tsv"),
    "too few sentences": (spoilt(SENTENCES, "a b c d e f\n"), "1 sentences"),
    "template without scenario": (lambda tmp: ["--template", "I feel"], "{scenario}"),
    "two labels alike": (lambda tmp: ["--labels", *"abcdea"], "six different words"),
    "labels with a common start": (
        lambda tmp: ["--labels", "ab", "abc", *"defg"],
        "cannot be told apart",
    ),
    "an empty label": (lambda tmp: ["--labels", "", *"abcde"], "--labels"),
    "five labels": (lambda tmp: ["--labels", *"abcde"], "--labels"),
    "block out of range": (lambda tmp: ["--layer", "8"], "block 8 does not exist"),
    "block of the target out of range": (lambda tmp: ["--layer", "7,8"], "block 8 does not exist"),
    "the whole depth": (lambda tmp: ["--layer", "1.0"], "block 8 does not exist"),
    "prompt longer than the context": (lambda tmp: ["--shots", "20"], "do not fit the context"),
    "prompt too long for a target that is the source": (
        lambda tmp: ["--src", TARGET, "--shots", "20"],
        "do not fit",
    ),
    "template longer than the context": (
        lambda tmp: ["--template", "salt " * 600 + "{scenario}"],
        "do not fit",
    ),
    "no such model folder": (lambda tmp: ["--src", tmp / "no" / "model"], "no model folder"),
    "folder without a model": (lambda tmp: ["--src", tmp], "config.json"),
    "source without target": (lambda tmp: ["--src", SOURCE, "only"], "--src and --tgt go together"),
    "target without source": (lambda tmp: ["--tgt", TARGET, "only"], "--src and --tgt go together"),
    "alpha not a number": (lambda tmp: ["--alpha", "nan"], "--alpha"),
    "alpha infinite": (lambda tmp: ["--alpha", "1", "inf"], "--alpha"),
    "alpha a word": (lambda tmp: ["--alpha", "much"], "--alpha"),
    "limit 0": (lambda tmp: ["--limit", "0"], "--limit"),
    "no pairs": (lambda tmp: ["--pairs", "0"], "--pairs"),
    "no control": (lambda tmp: ["--random", "0"], "--random"),
    "pairs a word": (lambda tmp: ["--pairs", "many"], "--pairs many: give a number"),
    "fewer than no pairs": (lambda tmp: ["--pairs", "-3"], "--pairs -3: give a number"),
    "two labels for six emotions": (lambda tmp: ["--labels", "good", "bad"], "six different words"),
    "no file of pairs": (
        lambda tmp: ["--labels", "a", "b", "--pairs", tmp / "no.jsonl"],
        "no.jsonl",
    ),
    "pairs without labels": (lambda tmp: own(*LINES)(tmp)[3:], "two different words"),
    "pairs with one label": (own(*LINES, labels=("glad",)), "two different words"),
    "pairs with one label twice": (own(*LINES, labels=("glad", "glad")), "two different words"),
    "a label that is no file name": (own(*LINES, labels=("glad", "not/glad")), "must not hold a /"),
    "a label of our own": (own(*LINES, labels=("glad", "shots")), "shots"),
    "pairs under the paper's protocol": (
        lambda tmp: [*own(*LINES)(tmp), "--protocol", "paper"],
        "--protocol paper",
    ),
    "too few pairs": (
        own(*LINES[:22]),
        "has 22 pairs; shots, refinement, validation and test need 23",
    ),
    "an empty file of pairs": (own(), "has 0 pairs"),
    "a line that is not JSON": (
        own(*LINES, "{'positive': 'a', 'negative': 'b'}"),
        "line 41 is not JSON",
    ),
    "a line of JSON that is not a pair": (own(*LINES, '["a", "b"]'), 'line 41 has no "positive"'),
    "a line without negative": (own(*LINES, '{"positive": "a"}'), 'line 41 has no "negative"'),
    "a line with another word": (
        own(*LINES[:2], "", '{"pos": "a", "negative": "b"}', *LINES),
        'line 4 has no "positive"',
    ),
    "a number for a text": (
        own('{"positive": "a", "negative": 3}', *LINES),
        'line 1: "negative" must be a text',
    ),
    "no text": (
        own(*LINES, '{"positive": " ", "negative": "b"}'),
        'line 41: "positive" must be a text',
    ),
    "one text twice in a pair": (
        own(*LINES, '{"positive": "a", "negative": "a"}'),
        'line 41: "negative" is a text',
    ),
    "one text in two pairs": (
        own(*LINES, '{"positive": "a", "negative": "You win 6."}'),
        "stands in line 7 already",
    ),
    "texts that do not fit": (
        own(*LINES, '{"positive": "%s", "negative": "b"}' % ("a " * 900)),
        "do not fit the context",
    ),
    "unknown option": (lambda tmp: ["--layers", "3"], "--layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_before_any_weights_are_loaded(
    case, tmp_path, monkeypatch, capsys
):
    make, says = WRONG[case]
    argv = [str(option) for option in make(tmp_path)]
    models = [] if argv[-1] == "only" else ["--family", "toy", "--tgt", TARGET]
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stopped:
        exp_emotion.main(
            [
                *models,
                *[option for option in argv if option != "only"],
                "--out",
                str(tmp_path / "out"),
            ]
        )
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and says in printed.err
    assert not (tmp_path / "out").exists()


SCRIPT = [sys.executable, str(ROOT / "exp_emotion.py")]


def surroundings(cache: Path) -> dict:
    """The environment of a process: one thread, and a cache of its own."""
    return {**os.environ, "CONTRANS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def run(cache: Path, *argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*SCRIPT, *map(str, argv)], env=surroundings(cache), capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "argv",
    [["--shots", 20, "--family", "toy"], ["--alpha", "nan"], ["--data", "nowhere"]],
    ids=["long prompt", "alpha", "data"],
)
def test_a_process_says_one_line_on_stderr_and_ends_with_2(argv, tmp_path):
    result = run(tmp_path / "cache", *argv, "--out", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_help_answers_at_once_and_does_not_load_torch(tmp_path):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run(tmp_path, "--help")
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0 and "--protocol" in result.stdout and "--alpha" in result.stdout
    assert min(seconds) < 1
    timed = [sys.executable, "-X", "importtime", *SCRIPT[1:], "--help"]
    lines = subprocess.run(timed, capture_output=True, text=True).stderr.splitlines()
    loaded = {line.split("|")[-1].strip() for line in lines}
    assert "numpy" in loaded
    assert not loaded & {"torch._C", "torch.nn", "transformers", "nnsight", "matplotlib", "sklearn"}


# ================================================================ a whole run

TINY = [
    "--family",
    "toy",
    "--tgt",
    TARGET,
    "--data",
    str(TOY),
    "--limit",
    "5",
    "--random",
    "3",
    "--maps",
    "2",
    "--sentences",
    "300",
    "--pairs",
    "20",
    "--alpha",
    "1",
    "2",
]
FILES = ["records.csv", "records.jsonl", "examples.jsonl", "tables.md"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run in a process of its own: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    result = run(out / "cache", *TINY, "--out", out / "results")
    assert result.returncode == 0, result.stderr
    (folder,) = (out / "results" / "exp_emotion").iterdir()
    return SimpleNamespace(folder=folder, printed=result.stdout, out=out / "results")


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """The same run with another cache, killed after its first step and continued here: its folder, its exit code,
    the steps that were there, and the results that should not have been."""
    out = tmp_path_factory.mktemp("continued")
    process = subprocess.Popen(
        [*SCRIPT, *TINY, "--out", str(out)],
        env=surroundings(out / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob("exp_emotion/*/steps/*.json")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    code = process.wait()
    (folder,) = (out / "exp_emotion").iterdir()
    steps = {path: path.read_bytes() for path in folder.glob("steps/*.json")}
    left = [name for name in FILES if (folder / name).exists()]
    exp_emotion.main([*TINY, "--out", str(out)])
    return SimpleNamespace(folder=folder, code=code, steps=steps, left=left)


@pytest.fixture(scope="module")
def target():
    return common.load_model(TARGET, device="cpu")


def csv_rows(folder: Path) -> list[dict]:
    with open(folder / "records.csv", newline="") as file:
        return list(csv.DictReader(file))


def json_rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_run_folder_holds_all_that_the_readme_says(finished):
    files = {path.name for path in finished.folder.iterdir()}
    vectors = {f"v_{emotion}_llama-m.safetensors" for emotion in EMOTIONS}
    figures = {
        f"{name}.{kind}": start
        for name in ("accuracy_llama-m", "pca_llama-m", "tsne_source", "pairs")
        for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"))
    }
    assert files == {"args.json", "environment.json", "steps", *FILES, *figures, *vectors}
    assert all(
        (finished.folder / name).read_bytes().startswith(start) for name, start in figures.items()
    )


def test_what_is_printed_last_is_the_folder_and_before_it_the_tables(finished):
    assert finished.printed.splitlines()[-1] == str(finished.folder)
    assert (finished.folder / "tables.md").read_text().strip() in finished.printed
    parts = [
        "random",
        "other-concept",
        "shuffled-map",
        "Self-Align",
        "percentile",
        "Table 5",
        "Table 8",
    ]
    for part in EMOTIONS + parts:
        assert part in finished.printed  # every effect beside its controls


def test_the_folder_says_with_what_it_was_made(finished):
    about = json.loads((finished.folder / "args.json").read_text())
    args = options(*TINY)
    data = exp_emotion.split(exp_emotion.load_scenarios(TOY), args)
    assert (
        about["args"]["alpha"] == [1, 2]
        and about["args"]["src"] == SOURCE
        and about["args"]["pairs"] == 20
    )
    assert about["inputs"][TARGET] == common.fingerprint(TARGET)
    first, *_ = exp_emotion.prompts(data, data["happiness"]["test"], args, shots=True)
    assert about["inputs"]["first test prompt"] == first
    environment = json.loads((finished.folder / "environment.json").read_text())
    assert {"commit", "python", "transformers", "nnsight", "cores"} <= set(environment)
    assert environment["torch"] == torch.__version__


def test_records_agree_with_the_examples(finished):
    examples, arms = json_rows(finished.folder, "examples.jsonl"), {}
    for row in examples:
        arms.setdefault(
            (row["emotion"], row["method"], row["alpha"], f"test {row['detail']}".strip()), []
        ).append(row)
    records = [
        row
        for row in json_rows(finished.folder, "records.jsonl")
        if row["split"].startswith("test")
    ]
    assert len(records) == 2 * len(arms)
    for row in records:
        key = {"token_acc": "said", "logit_acc": "preferred"}[row["metric"]]
        answers = [
            example[key]
            for example in arms[row["concept"], row["method"], row["alpha"], row["split"]]
        ]
        hits = answers.count(EMOTIONS.index(row["concept"]))
        assert (row["value"], row["n"]) == (hits / 5, 5) and (
            row["low"],
            row["high"],
        ) == common.wilson(hits, 5)


def test_csv_and_jsonl_hold_the_same_records(finished):
    rows = json_rows(finished.folder, "records.jsonl")
    assert csv_rows(finished.folder) == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ]
    assert all(list(row) == common.RECORD for row in rows)


def test_alpha_zero_and_base_are_the_same_thing(finished):
    rows = json_rows(finished.folder, "records.jsonl")
    assert all(
        (row["method"] == "base") == (row["alpha"] == 0) for row in rows if row["alpha"] is not None
    )
    assert {row["method"] for row in rows} == {
        "base",
        "contrans",
        "self-align",
        "random",
        "other-concept",
        "shuffled-map",
        "gradient-descent",
    }


def test_perplexities_are_those_of_plain_sentences_under_the_vector_on_disk(finished, target):
    sentences = common.plain_sentences(options(*TINY), [SOURCE, TARGET])[-50:]
    rows = find(json_rows(finished.folder, "records.jsonl"), metric="perplexity")
    (base,) = find(rows, method="base")
    assert len(rows) == 1 + 6 * (2 + 3) and {row["n"] for row in rows} == {base["n"]}
    vector, about = common.load_concept(finished.folder / "v_fear_llama-m.safetensors", target)
    (steered,) = find(rows, method="contrans", concept="fear", alpha=2)
    transplants = [common.BASE, common.Transplant.of(vector, about["layer"], 2)]
    values, tokens = common.perplexity(target, sentences, transplants)
    assert tokens == base["n"] and values.tolist() == pytest.approx(
        [base["value"], steered["value"]], rel=1e-4
    )
    assert all(row["value"] > 1 and row["low"] is None for row in rows)


def test_no_vector_is_said_to_come_of_more_pairs_than_there_are(finished):
    splits = {
        row["split"]
        for row in json_rows(finished.folder, "records.jsonl")
        if row["item"] == "Figure 5"
    }
    assert splits and all(int(split.split()[-1]) <= 20 for split in splits)


def test_concept_vectors_are_for_the_target_and_say_what_they_are(finished, target):
    for emotion in EMOTIONS:
        vector, about = common.load_concept(
            finished.folder / f"v_{emotion}_llama-m.safetensors", target
        )
        assert (
            vector.shape == (target.config.hidden_size,)
            and torch.isfinite(vector).all()
            and vector.norm() > 0
        )
        assert [about[name] for name in ("concept", "source", "target", "layer", "pairs")] == [
            emotion,
            SOURCE,
            TARGET,
            6,
            20,
        ]
        assert about["first_prompt"].endswith("\nThe emotion of the above scenario is")
    with pytest.raises(ValueError, match="was made for"):
        common.load_concept(
            finished.folder / "v_fear_llama-m.safetensors", common.load_model(SOURCE, device="cpu")
        )


def test_the_vector_on_disk_is_the_one_that_was_scored(finished, target):
    args = options(*TINY)
    data = exp_emotion.split(exp_emotion.load_scenarios(TOY), args)
    examples = json_rows(finished.folder, "examples.jsonl")
    for emotion in EMOTIONS:
        vector, about = common.load_concept(
            finished.folder / f"v_{emotion}_llama-m.safetensors", target
        )
        for alpha in (1, 2):
            rows = find(examples, emotion=emotion, method="contrans", alpha=alpha, detail="")
            assert len(rows) == 5 and [row["scenario"] for row in rows] == data[emotion]["test"]
            prompts = exp_emotion.prompts(data, data[emotion]["test"], args, shots=True)
            transplant = common.Transplant.of(vector, about["layer"], alpha)
            said, preferred = common.score_labels(target, prompts, EMOTIONS, [transplant])
            assert said[0].tolist() == [row["said"] for row in rows]
            assert preferred[0].tolist() == [row["preferred"] for row in rows]


def test_the_same_command_draws_a_finished_run_again_without_a_model(finished, monkeypatch, capsys):
    before = {name: (finished.folder / name).read_bytes() for name in FILES}
    (finished.folder / "pairs.png").unlink()
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    exp_emotion.main([*TINY, "--out", str(finished.out)])
    assert {name: (finished.folder / name).read_bytes() for name in FILES} == before
    assert (finished.folder / "pairs.png").exists() and capsys.readouterr().out.splitlines()[
        -1
    ] == str(finished.folder)
    assert len(list(finished.folder.parent.iterdir())) == 1


def test_a_killed_run_goes_on_where_it_stopped(continued):
    assert continued.code == -9 and continued.steps and continued.left == []
    assert all(path.read_bytes() == content for path, content in continued.steps.items())


def test_two_runs_of_one_command_agree_in_every_number_killed_or_not(finished, continued):
    assert finished.folder.name == continued.folder.name
    for name in FILES:
        assert (finished.folder / name).read_bytes() == (continued.folder / name).read_bytes()


def test_no_model_is_kept_after_a_run(continued):
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is exp_emotion.Pair]


def inputs_of(monkeypatch, argv: list) -> dict:
    """What a run would say its numbers depend on."""

    class Stopped(Exception):
        pass

    def stop(script, args, inputs):
        raise Stopped(inputs)

    monkeypatch.setattr(exp_emotion, "Run", stop)
    with pytest.raises(Stopped) as stopped:
        exp_emotion.main([str(option) for option in argv])
    return stopped.value.args[0]


def test_a_run_depends_on_every_text_that_it_reads(monkeypatch, tmp_path):
    argv = ["--family", "toy", "--tgt", TARGET, *broken(tmp_path / "data", lambda folder: None)]
    before = inputs_of(monkeypatch, argv)
    assert before == inputs_of(monkeypatch, argv)
    for path in (
        tmp_path / "data" / "wikisplit" / "validation.tsv",
        tmp_path / "data" / "emotions" / "fear.json",
    ):
        text = path.read_text()
        path.write_text(text.replace(" the ", " one ", 1))
        assert path.read_text() != text and inputs_of(monkeypatch, argv) != before
        path.write_text(text)


# ================================================================ a whole run on a concept of one's own


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, toy):
    """A tiny run on happiness and sadness as if they were somebody's own pairs: its folder, its command."""
    out = tmp_path_factory.mktemp("own")
    pairs = zip(toy["happiness"][:70], toy["sadness"][:70], strict=True)
    argv = own(
        *(json.dumps({"positive": good, "negative": bad}) for good, bad in pairs),
        labels=("happiness", "sadness"),
    )(out)
    argv = [*TINY[: TINY.index("--pairs")], "--alpha", "1", "2", *map(str, argv), "--out", str(out)]
    exp_emotion.main(argv)
    (folder,) = (out / "exp_emotion").iterdir()
    return SimpleNamespace(folder=folder, argv=argv)


def test_both_classes_are_named_under_their_own_vector_and_under_no_control(chosen):
    rows = find(json_rows(chosen.folder, "records.jsonl"), metric="token_acc")
    assert {row["concept"] for row in rows} == {"happiness", "sadness", "mean of two"}
    assert all(row["paper"] is None and row["item"] in (None, "", "Figure 5") for row in rows)
    for concept in ("happiness", "sadness"):
        test = [row for row in find(rows, concept=concept) if row["split"].startswith("test")]
        assert {row["n"] for row in test} == {5}
        assert all(
            row["value"] == 1 for row in find(test, method="contrans", alpha=2, split="test")
        )
        controls = [
            row["value"]
            for row in test
            if row["method"] in ("base", "random", "other-concept", "shuffled-map")
        ]
        assert len(controls) == 1 + 3 + 1 + 1 and max(controls) <= 0.2
    assert {row["split"] for row in rows if "pairs" in row["split"]} == {
        "test pairs 20",
        "test pairs 33",
    }


def test_examples_are_of_the_other_class_and_unseen(chosen, toy):
    pairs = dict(zip(toy["happiness"][:70], toy["sadness"][:70], strict=True))
    prompt = json.loads((chosen.folder / "args.json").read_text())["inputs"]["first test prompt"]
    for concept, others in (("happiness", set(pairs.values())), ("sadness", set(pairs))):
        tested = {
            row["scenario"]
            for row in json_rows(chosen.folder, "examples.jsonl")
            if row["emotion"] == concept
        }
        assert len(tested) == 5 and tested <= others
        assert not [
            text for text in tested if text in prompt.rsplit("Scenario", 1)[0]
        ]  # no few-shot example
    assert '("happiness", "sadness")' in prompt and {"anger", "fear", "disgust"}.isdisjoint(
        re.findall(r"\w+", prompt)
    )


def test_the_folder_is_about_the_two_classes_alone(chosen, target):
    tables = (chosen.folder / "tables.md").read_text(encoding="utf-8")
    assert tables.startswith("## happiness and sadness: llama-s -> llama-m\n")
    assert not re.search("emotion|six|five|LLaMA|paper", tables)
    vectors = {path.name for path in chosen.folder.glob("*.safetensors")}
    assert vectors == {"v_happiness_llama-m.safetensors", "v_sadness_llama-m.safetensors"}
    (good, about), (bad, _) = (
        common.load_concept(chosen.folder / name, target) for name in sorted(vectors)
    )
    assert torch.allclose(good, -bad, atol=1e-4) and about["pairs"] == 33
    figures = {path.stem for path in chosen.folder.glob("*.png")}
    assert figures == {"accuracy_llama-m", "pca_llama-m", "tsne_source", "pairs"}


def test_the_same_file_continues_the_run_and_a_changed_one_is_refused(
    chosen, monkeypatch, capsys, tmp_path
):
    before = (chosen.folder / "records.jsonl").read_bytes()
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    exp_emotion.main(chosen.argv)
    assert (chosen.folder / "records.jsonl").read_bytes() == before
    path = Path(chosen.argv[chosen.argv.index("--pairs") + 1])
    text = path.read_text()
    path.write_text(text.replace("You", "They", 1))
    with pytest.raises(SystemExit):
        exp_emotion.main(chosen.argv)
    path.write_text(text)
    assert "have changed since" in capsys.readouterr().err


# ================================================================ the effect


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The newcomer's command: its records, and the strength that was chosen for each target."""
    out = tmp_path_factory.mktemp("measured")
    result = run(out / "cache", "--out", out)
    assert result.returncode == 0, result.stderr
    (folder,) = (out / "exp_emotion").iterdir()
    steps = [
        json.loads(path.read_text()) for path in sorted(folder.glob("steps/*validation*.json"))
    ]
    chosen = [step["chosen"]["alpha"] for step in steps]
    return json_rows(folder, "records.jsonl"), dict(
        zip(exp_emotion.FAMILIES["toy"]["tgt"], chosen, strict=True)
    )


def mean(records: list[dict], target: str, **match) -> float:
    """Mean Token Acc of the six emotions, over all test arms that match."""
    rows = find(records, target=target, metric="token_acc", **match)
    values = [row["value"] for row in rows if row["split"].startswith("test")]
    assert values
    return float(np.mean(values))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-m", "llama-l"])
def test_emotions_are_transplanted_and_the_controls_are_not(measured, name):
    records, target = measured[0], f"{exp_emotion.ZOO}/{name}"
    assert mean(records, target, method="base") <= 0.05
    assert mean(records, target, method="contrans", alpha=measured[1][target], split="test") >= 0.8
    for method in ("random", "other-concept", "shuffled-map"):
        assert mean(records, target, method=method) <= 0.1
    directions = [
        mean(records, target, method="random", split=f"test direction {number}")
        for number in range(20)
    ]
    assert max(directions) < 0.3
    assert all(
        mean(records, target, method="contrans", split=f"test map {number}") >= 0.7
        for number in range(1, 5)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-m", "llama-l"])
def test_the_readme_s_table_is_what_the_command_measures(measured, name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \| Token Acc \|(.*)\|$", text, re.MULTILINE).group(1)
    published = [float(cell.split()[0]) for cell in row.split("|")]
    target = f"{exp_emotion.ZOO}/{name}"
    got = [
        100
        * mean(
            measured[0], target, method="contrans" if alpha else "base", alpha=alpha, split="test"
        )
        for alpha in (0, 1, 2, 3, 5)
    ]
    assert got == pytest.approx(published, abs=2)  # other processors round otherwise
