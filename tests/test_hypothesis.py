"""Parsers and the affine map under inputs that nobody would write down: hypothesis draws them.

A parser either reads a file or ends in one line and exit code 2; a map is numpy's, whatever rank and scale.
"""

import argparse
import csv
import io
import json
import math
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import exp_emotion
import exp_toxigen
import exp_truthfulqa

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st                # noqa: E402
from hypothesis.extra import numpy as arrays                                         # noqa: E402

settings.register_profile("ours", deadline=None, derandomize=True, max_examples=60, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("ours")
WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
JSON = st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | WORDS,
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=8)
NOISE = st.binary(max_size=80) | WORDS.map(str.encode) | JSON.map(lambda value: json.dumps(value).encode())


def one_line(capsys, call, *says):
    """What call() returns, or None where it ends the program as it should: one line, code 2, a name in it."""
    capsys.readouterr()
    try:
        return call()
    except SystemExit as error:
        said = capsys.readouterr().err
        assert error.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert all(name in said for name in says), said


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


# ================================================================ files


@given(texts=st.lists(WORDS.filter(str.strip), min_size=1, max_size=6), bom=st.booleans(), ascii=st.booleans(),
       indent=st.sampled_from([None, 2]), ends=st.sampled_from([b"\n", b"\r\n"]))
def test_a_scenario_list_comes_back_however_it_was_written(texts, bom, ascii, indent, ends, tmp_path):
    content = json.dumps(texts, ensure_ascii=ascii, indent=indent).encode().replace(b"\n", ends)
    path = put(tmp_path, "list.json", (b"\xef\xbb\xbf" if bom else b"") + content)
    assert common.read_texts(path) == list(dict.fromkeys(text.strip() for text in texts))


@given(content=NOISE)
def test_any_bytes_for_scenarios_are_texts_or_one_line(content, tmp_path, capsys):
    path = put(tmp_path, "list.json", content)
    texts = one_line(capsys, lambda: common.read_texts(path), "list.json")
    assert texts is None or texts and all(text == text.strip() != "" for text in texts) and len(set(texts)) == len(texts)


@given(content=NOISE, lines=st.integers(0, 5))
def test_a_line_that_is_not_utf_8_is_named(content, lines, tmp_path, capsys):
    path = put(tmp_path, "file.tsv", b"a\n" * lines + b"\xff" + content)
    assert one_line(capsys, lambda: common.read_text(path), f"file.tsv, line {lines + 1}: not UTF-8") is None


CHOICES = st.dictionaries(WORDS | st.just("Yes."), st.sampled_from([0, 1, True, None, "1", 0.0]), max_size=4)
ITEM = st.fixed_dictionaries({}, optional={"question": WORDS | st.none(), "mc1_targets": CHOICES | JSON,
                                           "mc2_targets": CHOICES | JSON})


@given(items=st.lists(ITEM, max_size=3) | JSON)
def test_any_mc_task_is_questions_or_one_line(items, tmp_path, capsys):
    put(tmp_path, "truthfulqa/mc_task.json", json.dumps(items).encode())
    questions = one_line(capsys, lambda: exp_truthfulqa.load_questions(tmp_path), "mc_task.json")
    for question in questions or ():
        assert question.text and question.true and question.false and 0 <= question.right < question.choices > 1
        assert all(answer.strip() for answer in question.answers) and len(set(question.answers)) == len(question.answers)


GOOD = st.fixed_dictionaries({"question": WORDS.filter(str.strip), "mc1_targets": st.dictionaries(
    WORDS.filter(str.strip), st.just(0), min_size=2, max_size=5), "mc2_targets": st.just({"T": 1, "F": 0})})


@given(item=GOOD, right=st.integers(0, 9))
def test_a_whole_question_is_read_with_its_right_choice(item, right, tmp_path):
    answer = list(item["mc1_targets"])[right % len(item["mc1_targets"])]
    item["mc1_targets"][answer] = 1
    put(tmp_path, "truthfulqa/mc_task.json", json.dumps([item]).encode())
    question, = exp_truthfulqa.load_questions(tmp_path)
    assert question.answers[question.right] == answer and question.text == item["question"].strip()


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=10)


@given(rows=st.lists(st.tuples(CELL.filter(str.strip), st.sampled_from(["0", "1", " 1 "]), CELL), min_size=1, max_size=5),
       ends=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_facts_come_back_however_the_table_was_written(rows, ends, bom, tmp_path, capsys):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=ends)
    writer.writerow(["statement", "label", "note"]), writer.writerows(rows)
    put(tmp_path, "world_facts/facts_true_false.csv", (b"\xef\xbb\xbf" if bom else b"") + file.getvalue().encode())
    facts = one_line(capsys, lambda: exp_truthfulqa.load_facts(tmp_path), "no true statement")
    assert (facts or []) == [fact.strip() for fact, label, _ in rows if label.strip() == "1"]


@given(content=NOISE | NOISE.map(lambda noise: b"statement,label\n" + noise))
def test_any_bytes_for_facts_are_facts_or_one_line(content, tmp_path, capsys):
    put(tmp_path, "world_facts/facts_true_false.csv", content)
    facts = one_line(capsys, lambda: exp_truthfulqa.load_facts(tmp_path), "facts_true_false.csv")
    assert facts is None or facts and all(map(str.strip, facts))


SENTENCE = st.text(string.ascii_letters + " .,é", min_size=1, max_size=20).filter(lambda text: text.strip("- ").strip())


@given(lists=st.lists(st.lists(SENTENCE, min_size=1, max_size=4), min_size=1, max_size=4),
       slashes=st.sampled_from(["\\n", "\\\\n"]))
def test_toxigen_prompts_come_back_as_lists_of_their_sentences(lists, slashes, tmp_path):
    prompts = ["".join(f"- {' '.join(text.split())}{slashes}" for text in texts) + "-" for texts in lists]
    for tone in ("hate", "neutral"):
        put(tmp_path, f"toxigen/{tone}_cats_1k.txt", "\n".join(prompts).encode())
    read = exp_toxigen.load_prompts(tmp_path)["cats"]["hate"]
    wanted = [[" ".join(text.split()).strip("- ") for text in texts] for texts in lists]
    assert [exp_toxigen.sentences_of(prompt) for prompt in read] == [texts for n, texts in enumerate(wanted) if
                                                                    texts not in wanted[:n]]


@given(lines=st.lists(st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=5), min_size=1, max_size=12), min_size=1,
                      max_size=30))
def test_plain_sentences_lose_two_to_four_words_at_their_end(lines, tmp_path, capsys, monkeypatch):
    put(tmp_path, "wikisplit/validation.tsv", "".join(f"{' '.join(words)}\tx y\n" for words in lines).encode())
    texts = one_line(capsys, lambda: common.plain_sentences(argparse.Namespace(data=tmp_path, sentences=100), []))
    left = [words for words in lines if len(words) > 4]
    if texts is None:                           # too few for a map
        assert len(left) < 10
    else:
        rest = iter(" ".join(words) for words in lines)
        assert all(any(whole.startswith(text) and 2 <= len(whole.split()) - len(text.split()) <= 4 for whole in rest)
                   for text in texts)           # in their order


# ================================================================ options

FAMILIES = {"toy": dict(src="a", tgt=["b"], layer="0.75", alpha=[1.0], limit=5, sentences=10),
            "custom": dict(layer="0.5", alpha=[1.0], limit=5, sentences=10)}


def options(folder, *argv):
    return common.parse_options(common.option_parser("", FAMILIES), FAMILIES, ["--data", str(folder), *argv])


@given(layer=st.text("0123456789.,-+e autox٣", max_size=8) |
       st.from_regex(r"\d{0,12}\.?\d{0,12}(,\d*\.?\d*)?", fullmatch=True) |
       st.integers(10, 500).map(lambda n: "9" * n + ".5"), blocks=st.integers(1, 200), side=st.integers(0, 1))
def test_any_layer_is_a_block_or_one_line(layer, blocks, side, tmp_path, capsys):
    args = one_line(capsys, lambda: options(tmp_path, f"--layer={layer}"), "--layer")
    if args and layer != "auto":
        index = one_line(capsys, lambda: common.block_index(layer, blocks, side), "--layer", "does not exist")
        value = layer.split(",")[min(side, layer.count(","))]
        exact = float(value) * blocks if "." in value else int(value)
        assert index is None and not 0 <= math.floor(exact + 1e-9) < blocks or 0 <= exact - index < 1 + 1e-9 and index < blocks


@given(words=st.lists(st.floats().map(repr) | st.text("0123456789.e-+naif_", min_size=1, max_size=6).filter(
    lambda word: not word.startswith("-")), min_size=1, max_size=3))
def test_any_alpha_is_finite_numbers_or_one_line(words, tmp_path, capsys):
    args = one_line(capsys, lambda: options(tmp_path, "--alpha", *words))

    def number(word):
        try:
            return float(word)
        except ValueError:
            return math.nan
    finite = all(map(math.isfinite, map(number, words)))
    # argparse takes -1e5 for an option, as everywhere
    assert args is None if not finite else args is None and any(re.match(r"-.*[^\d.-]", word) for word in words) or \
        args.alpha == list(map(float, words))


@given(one=JSON, two=JSON)
def test_a_cache_key_tells_any_two_descriptions_apart(one, two):
    assert (common._digest(one) == common._digest(two)) == (repr(one) == repr(two))


# ================================================================ the affine map

NUMBERS = st.integers(-30, 30).map(lambda tenths: tenths / 10)
SCALE = st.sampled_from([1e-20, 1e-8, 1.0, 1e8, 1e20])


@st.composite
def states(draw):
    """x [n, d] and y [n, 2] of any rank: repeated rows and columns, constant columns, columns of zeros, any scale."""
    n, d = draw(st.integers(3, 9)), draw(st.integers(1, 7))
    rank = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) + draw(st.sampled_from([0, 0, 5]))
    for column in range(d):
        kind = draw(st.sampled_from(["as is", "as is", "as is", "constant", "zero", "double"]))
        x[:, column] = {"constant": 1.5, "zero": 0.0, "double": x[:, 0], "as is": x[:, column]}[kind]
    y = draw(arrays.arrays(np.float64, (n, 2), elements=NUMBERS))
    return x * draw(SCALE), y * draw(SCALE)


def error(got, wanted) -> float:
    got, wanted = np.asarray(got), np.asarray(wanted)
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def effective(x: np.ndarray) -> float:
    """Condition number of what is not rounding; None where a singular value is neither clearly there nor clearly not."""
    s = np.linalg.svd(x, compute_uv=False)
    s = s / s[0] if s[0] else s
    kept = s[s > 1e-6]
    return None if ((s > 1e-15) & (s < 1e-6)).any() and (s[(s < 1e-6)] > 3e-16 * max(x.shape)).any() else \
        1 / kept[-1] if len(kept) else 1.0


@settings(max_examples=200)
@given(both=states(), intercept=st.booleans())
def test_a_map_is_the_shortest_least_squares_solution_of_numpy(both, intercept):
    x, y = both
    x_mean, y_mean = (part.mean(0) if intercept else 0 * part[0] for part in both)
    centred = x - x_mean
    condition = effective(centred)
    hypothesis.assume(condition is not None)
    hypothesis.assume(np.abs(centred).max() > 1e-12 * np.abs(x).max())         # the rest would be rounding alone
    fitted = common.fit_affine(*map(torch.from_numpy, both), intercept=intercept, held_out=0)
    wanted = np.linalg.pinv(centred, rcond=1e-9) @ (y - y_mean)
    probe = np.random.default_rng(0).standard_normal((3, x.shape[1])) * max(np.abs(x).max(), 1e-30)
    left, right = fitted.inverse
    ours = torch.from_numpy(probe) @ left @ right @ fitted.y                    # .vector() would round to float32
    assert error(ours, probe @ wanted) < 1e-12 * condition**2 + 1e-7
    solved = np.linalg.lstsq(centred, y - y_mean, rcond=1e-9)[0]
    assert error(fitted.states(torch.from_numpy(x)), centred @ solved + y_mean) < 1e-5


@given(both=states(), ridge=st.sampled_from([1e-3, 0.5, 10.0]), intercept=st.booleans())
def test_ridge_is_the_normal_equations_at_any_scale(both, ridge, intercept):
    x, y = both
    x, y = (part - part.mean(0) if intercept else part for part in (x, y))
    hypothesis.assume(np.abs(x).max() > 0)
    hypothesis.assume(not intercept or np.abs(x).max() > 1e-12 * np.abs(both[0]).max())
    unit = np.abs(x).max()
    scaled = x / unit                           # ridge is in units of the mean squared singular value, so no scale matters
    gram = scaled.T @ scaled
    wanted = np.linalg.solve(gram + ridge * np.trace(gram) / min(x.shape) * np.eye(x.shape[1]), scaled.T @ y)
    left, right = common.fit_affine(*map(torch.from_numpy, both), intercept=intercept, ridge=ridge, held_out=0).inverse
    assert error(left @ right @ torch.from_numpy(y) * unit, wanted) < 1e-8


@given(both=states(), rcond=st.sampled_from([0.05, 0.3, 0.9]))
def test_rcond_is_numpys(both, rcond):
    x, y = both
    s = np.linalg.svd(x, compute_uv=False)
    hypothesis.assume(s[0] > 0 and (np.abs(s / s[0] - rcond) > 1e-6).all())    # not on the edge
    left, right = common.fit_affine(*map(torch.from_numpy, both), rcond=rcond, held_out=0).inverse
    assert error((left @ right) * s[0], np.linalg.pinv(x, rcond=rcond) * s[0]) < 1e-9


@given(both=states(), ridge=st.sampled_from([0.0, 0.0, 1e-4, 1.0]))
def test_the_two_ways_to_the_pseudo_inverse_agree_where_both_apply(both, ridge):
    x = torch.from_numpy(both[0])
    quick, slow = two_ways(x, ridge)
    assert error(quick[0] @ quick[1], (slow[0] @ slow[1]).numpy()) < 1e-6


def two_ways(x, ridge):
    """_pseudo_inverse as it is, and as it is where the Gram matrix has no Cholesky factor."""
    with pytest.MonkeyPatch.context() as patch:
        quick = common._pseudo_inverse(x, 0.0, ridge)
        patch.setattr(torch.linalg, "cholesky_ex", lambda gram: (gram, torch.tensor(1)))
        return quick, common._pseudo_inverse(x, 0.0, ridge)


@pytest.mark.parametrize("n, d", [(50, 20), (20, 50)])
def test_the_quick_way_is_taken_for_the_well_conditioned_alone(n, d):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    quick, slow = two_ways(x, 0.0)
    assert any(factor.data_ptr() == x.data_ptr() for factor in quick) and error(quick[0] @ quick[1], slow[0] @ slow[1]) < 1e-12
    x[:, 0] = x[:, 1] + 1e-7 * x[:, 0] if n > d else x[:, 0]
    x[0] = x[1] + 1e-7 * x[0] if n < d else x[0]
    assert not any(factor.data_ptr() == x.data_ptr() for factor in common._pseudo_inverse(x, 0.0, 0.0))


@given(which=st.integers(0, 1), value=st.sampled_from([math.nan, math.inf, -math.inf]), row=st.integers(0, 9),
       intercept=st.booleans())
def test_nan_and_infinity_are_refused_wherever_they_stand(which, value, row, intercept):
    x, y = torch.randn(10, 3), torch.randn(10, 4)
    (x, y)[which][row, -1] = value
    with pytest.raises(FloatingPointError, match="NaN or infinity in x or y"):
        common.fit_affine(x, y, intercept=intercept)


@given(n=st.integers(0, 3), other=st.integers(0, 3), held_out=st.sampled_from([0.0, 0.2, 0.9]))
def test_too_few_or_unequal_sentences_are_a_clear_error(n, other, held_out):
    x, y = torch.randn(n, 3), torch.randn(other, 2)
    if n != other or n - int(n * held_out) < 2:
        with pytest.raises(ValueError, match="equal n|too few"):
            common.fit_affine(x, y, held_out=held_out)
    else:
        assert common.fit_affine(x, y, held_out=held_out).n == n - int(n * held_out)
