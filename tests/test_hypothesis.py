"""Inputs that nobody would write down, drawn by hypothesis."""

import json
import math
from dataclasses import replace

from common import Transplant, choice_logprobs, fit_affine, next_token_logits, perplexity
from harness import read_table, read_text, read_texts
from models import Models

import numpy as np
import pytest
import torch
from conftest import close, vectors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_harness import parse

settings.register_profile(
    "ours",
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("ours")


def value_or_line(capsys, call, *words):
    """What call() returns, or None if it ends the program with one line that has these words."""
    capsys.readouterr()
    try:
        return call()
    except SystemExit as stopped:
        said = capsys.readouterr().err
        assert stopped.code == 2
        assert said.startswith("error: ") and said.count("\n") == 1
        assert all(word in said for word in words), said


# ================================================================ prompts, batches, transplants

WORDS = ["Tom", " felt", " very", " happy", " sad", " dog", " x", " q.", " 7"]
PREFIX = "Tom found a red ball in the park. Lily lost her old cat. The happy dog ran to the house."
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)
CHOICE = st.lists(st.sampled_from(WORDS[1:]), min_size=1, max_size=4).map("".join)
PARTS = st.tuples(st.integers(0, 3), st.sampled_from([-2.0, 0.0, 0.5, 3.0]), st.integers(0, 3))
MOVES = st.lists(st.lists(PARTS, max_size=2), min_size=1, max_size=3)
DIRECTIONS = vectors(4)


@settings(max_examples=30)
@given(
    family=st.sampled_from(["llama", "gpt2", "gpt_neo", "mistral", "opt"]),
    texts=st.lists(TEXT, min_size=1, max_size=4),
    choices=st.lists(CHOICE, min_size=1, max_size=5),
    moves=MOVES,
    prefix=st.sampled_from(["", "", PREFIX]),
    batch_tokens=st.sampled_from([1, 40, 200, 2048]),
)
def test_what_is_shared_and_batched_changes_no_score(
    zoo, family, texts, choices, moves, prefix, batch_tokens
):
    model, _ = zoo(family)
    fast = replace(model, batch_tokens=batch_tokens)
    plain = replace(model, sharing=(False,) * 5)
    transplants = []
    for parts in moves:
        transplant = Transplant()
        for layer, alpha, row in parts:
            transplant += Transplant.of(DIRECTIONS[row], layer, alpha)
        transplants.append(transplant)
    prompts = [f"{prefix}Tom{text}" for text in texts]
    pairs = [(prompt, choice) for prompt in prompts for choice in choices]
    for score, about in (
        (choice_logprobs, pairs),
        (next_token_logits, prompts),
        (perplexity, prompts),
    ):
        got, wanted = (score(each, about, transplants) for each in (fast, plain))
        if isinstance(got, tuple):
            got, wanted = got[0], wanted[0]
        close(got, wanted, 1e-4)


# ================================================================ the affine map

NUMBERS = st.integers(-30, 30).map(lambda tenths: tenths / 10)
SCALE = st.sampled_from([1e-20, 1e-8, 1.0, 1e8, 1e20])
KINDS = st.sampled_from(["as is", "as is", "as is", "constant", "zero", "double"])


@st.composite
def states(draw):
    """x [n, d] and y [n, 2] of any rank and scale: repeated, constant and empty columns."""
    n, d = draw(st.integers(3, 9)), draw(st.integers(1, 7))
    rank = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))
    x += draw(st.sampled_from([0, 0, 5]))
    for column in range(d):
        kind = draw(KINDS)
        columns = {"constant": 1.5, "zero": 0.0, "double": x[:, 0], "as is": x[:, column]}
        x[:, column] = columns[kind]
    y = draw(arrays.arrays(np.float64, (n, 2), elements=NUMBERS))
    return x * draw(SCALE), y * draw(SCALE)


def inverse(x, y, **options):
    """The pseudo-inverse of x that a map from x to y is made of, and the map."""
    fitted = fit_affine(torch.from_numpy(x), torch.from_numpy(y), held_out=0, **options)
    left, right = fitted.x_inverse
    return (left @ right).numpy(), fitted


def error(got, wanted):
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def condition(x):
    """Condition number of what is not rounding; None if that cannot be told."""
    s = np.linalg.svd(x, compute_uv=False)
    s = s / s[0] if s[0] else s
    if ((s > 3e-16 * max(x.shape)) & (s < 1e-6)).any():
        return None
    return 1 / min(s[s > 1e-6], default=1.0)


@settings(max_examples=200)
@given(both=states(), intercept=st.booleans())
def test_a_map_is_the_shortest_least_squares_solution_of_numpy(both, intercept):
    x, y = both
    x_mean, y_mean = (part.mean(0) if intercept else 0 * part[0] for part in both)
    centred = x - x_mean
    number = condition(centred)
    assume(number is not None)
    assume(np.abs(centred).max() > 1e-12 * np.abs(x).max())  # the rest is rounding
    _, fitted = inverse(x, y, intercept=intercept)
    probe = vectors(3, x.shape[1]).double() * max(np.abs(x).max(), 1e-30)
    wanted = probe.numpy() @ np.linalg.pinv(centred, rcond=1e-9) @ (y - y_mean)
    assert error(fitted.vector(probe).numpy(), wanted) < 1e-12 * number**2 + 1e-7
    predicted = fitted.predict(torch.from_numpy(x)).numpy()
    solved = np.linalg.lstsq(centred, y - y_mean, rcond=1e-9)[0]
    assert error(predicted, centred @ solved + y_mean) < 1e-5


@given(both=states(), ridge=st.sampled_from([1e-3, 0.5, 10.0]), intercept=st.booleans())
def test_ridge_is_the_normal_equations_at_any_scale(both, ridge, intercept):
    x, y = both
    centred = x - x.mean(0) if intercept else x
    unit = np.abs(centred).max()
    assume(unit > 1e-12 * np.abs(x).max())
    scaled = centred / unit
    gram = scaled.T @ scaled
    penalty = ridge * np.trace(gram) / min(x.shape)  # in units of the mean squared singular value
    wanted = np.linalg.solve(gram + penalty * np.eye(x.shape[1]), scaled.T)
    got, _ = inverse(x, y, ridge=ridge, intercept=intercept)
    assert error(got * unit, wanted) < 1e-8


@pytest.mark.parametrize("ridge", [0.0, 1e-12])  # as large as the smallest squared value
@pytest.mark.parametrize("n, d", [(60, 20), (20, 60), (60, 60)])
def test_states_that_are_nearly_dependent_lose_no_precision(n, d, ridge):
    """The Gram matrix squares a condition number of 1e6, the singular values do not."""
    rank = min(n, d)
    u, v = (np.linalg.qr(vectors(size, rank).double().numpy())[0] for size in (n, d))
    s = np.logspace(6, 0, rank)
    got, _ = inverse(u * s @ v.T, np.ones((n, 1)), ridge=ridge)
    shrunk = s / (s**2 + ridge * (s**2).mean())
    assert error(got, v * shrunk @ u.T) < 1e-8


@given(
    which=st.integers(0, 1),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    row=st.integers(0, 9),
)
def test_nan_and_infinity_are_refused_wherever_they_stand(which, value, row):
    both = vectors(10, 3), vectors(10, 4)
    both[which][row, -1] = value
    with pytest.raises(FloatingPointError, match=f"in {'xy'[which]}:"):
        fit_affine(*both)


@given(n=st.integers(0, 3), other=st.integers(0, 3), held_out=st.sampled_from([0.0, 0.2, 0.9]))
def test_too_few_or_unequal_sentences_are_a_clear_error(n, other, held_out):
    x, y, left = vectors(n, 3), vectors(other, 2), n - int(n * held_out)
    if n == other and left >= 2:
        assert fit_affine(x, y, held_out=held_out).n == left
        return
    with pytest.raises(ValueError, match="equal n|too few"):
        fit_affine(x, y, held_out=held_out)


# ================================================================ files and options

LETTERS = st.text(st.characters(codec="utf-8"), max_size=12)
SCALAR = st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | LETTERS
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
NOISE = st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode())


@given(content=NOISE, lines=st.integers(0, 5))
def test_any_bytes_are_read_or_end_in_one_line(content, lines, tmp_path, capsys):
    path = tmp_path / "any"
    path.write_bytes(content)
    texts = value_or_line(capsys, lambda: read_texts(path), "any")
    assert texts is None or all(text == text.strip() != "" for text in texts)
    path.write_bytes(b"a,b\n" + content)
    rows = value_or_line(capsys, lambda: read_table(path, "a"), "any")
    assert rows is None or all({"a", "b"} == set(row) for row in rows)
    path.write_bytes(b"a\n" * lines + b"\xff" + content)
    assert value_or_line(capsys, lambda: read_text(path), f"line {lines + 1}: not UTF-8") is None


LAYERS = st.from_regex(r"\d{0,12}\.?\d{0,12}(,\d*\.?\d*)?", fullmatch=True)
LAYERS |= st.text("0123456789.,-+e autox٣", max_size=8)


@given(layer=LAYERS, side=st.integers(0, 1))
def test_any_layer_is_a_block_or_one_line(layer, side, llama, tmp_path, capsys):
    args = value_or_line(capsys, lambda: parse(tmp_path, "", f"--layer={layer}"), "--layer")
    if args is None or layer in ("auto", "--"):  # argparse lets "--" pass unchecked
        return
    name = llama[0].name
    block = value_or_line(capsys, lambda: Models().block(name, layer, side), "does not exist")
    value = layer.split(",")[min(side, layer.count(","))]
    exact = float(value) * 4 if "." in value else int(value)
    assert block == math.floor(exact + 1e-9) if exact < 4 - 1e-9 else block is None
