"""common.py, room by room: each number against plain transformers with hooks, or against the formula written out.

    pytest tests/test_common.py

The models are tiny and random, the families those of conftest.py. The last test measures the happy/sad line on two
real pretrained models; it needs ../shared and is skipped without it.
"""

import argparse
import csv
import gc
import hashlib
import json
import math
import random
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS, Reference, make_tokenizer, save_model

import common
from common import BASE, Transplant

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOY = Path(__file__).resolve().parents[1] / "data" / "toy"
TEXTS = ["Tom felt very", "Lily lost her old cat in the park. Lily felt very", "A",
         "The big dog sat on the red ball and it ran"]
PREFIX = "Tom found a red ball in the park. Lily lost her old cat. The happy dog ran to the big house. "\
         "A spider sat in the old town. "


def close(got, wanted, tolerance: float = 1e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def vectors(count: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def steering(*parts) -> tuple[Transplant, dict]:
    """The same (block, strength, vector) parts as a Transplant and as {block: shift} for the reference."""
    shifts = {}
    for layer, alpha, vector in parts:
        shifts[layer] = shifts.get(layer, 0) + alpha * vector
    return sum((Transplant.of(vector, layer, alpha) for layer, alpha, vector in parts), Transplant()), shifts


A, B = vectors(2)
STEERED = [steering(), steering((1, 2.0, A)), steering((0, -1.0, A), (2, 1.5, B)), steering((1, 0.5, A), (1, 3.0, B)),
           steering((3, 2.0, B))]
TRANSPLANTS = [transplant for transplant, _ in STEERED]


def pushing(model, reference: Reference, words: dict[str, float], alpha: float) -> tuple[Transplant, dict]:
    """A shift of the last block that raises the logits of these tokens at every position."""
    rows = {word: reference.head.weight[model.tokenizer.convert_tokens_to_ids(word)] for word in words}
    v = sum(share * rows[word] * reference.norm.weight for word, share in words.items())
    return steering((len(model.layers) - 1, alpha, v / v.norm()))


# ================================================================ 2  Model


def test_any_family_has_the_same_paths_to_its_parts(any_pair):
    model, reference = any_pair
    assert [type(block._module) for block in model.layers] == [type(block) for block in reference.blocks]
    assert torch.equal(model.final_norm.weight, reference.norm.weight)
    assert torch.equal(model.unembed.weight, reference.head.weight)


def test_an_unknown_architecture_names_its_module_lists(tmp_path):
    folder = save_model(tmp_path / "biogpt", transformers.BioGptConfig, intermediate_size=64)
    with pytest.raises(ValueError, match=r"BioGptForCausalLM.*biogpt\.layers.*PATHS"):
        common.load_model(str(folder), device="cpu")


def test_a_tokenizer_without_padding_token_pads_with_its_end(tmp_path):
    folder = save_model(tmp_path / "unpadded", *CONFIGS["llama"][:1], **CONFIGS["llama"][1])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None
    model, reference = common.load_model(str(folder), device="cpu"), Reference(folder, *CONFIGS["llama"][2:])
    close(common.next_token_logits(model, TEXTS)[0], reference.next_logits(TEXTS))


def test_a_bfloat16_stream_takes_the_vector_in_its_own_type(llama):
    model = common.load_model(llama[0].name, dtype="bfloat16", device="cpu")
    reference = Reference(Path(model.name), *CONFIGS["llama"][2:], dtype=torch.bfloat16)
    transplant, shifts = STEERED[2]
    states = common.hidden_states(model, TEXTS[:1], transplant=transplant)
    assert model.dtype == torch.bfloat16 and states.dtype == torch.float32
    close(states[0], reference.states(TEXTS[0], shifts).float(), 0.05)
    logits = common.next_token_logits(model, TEXTS[:1], [transplant])
    close(logits[0], reference.next_logits(TEXTS[:1], shifts).float(), 0.05)
    assert common.generate(model, TEXTS[:1], transplant, 4)


def test_the_fingerprint_follows_the_files_of_a_folder_or_the_commit_of_the_hub(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", transformers.LlamaConfig, **CONFIGS["llama"][1])
    before = common.fingerprint(str(folder))
    assert before == common.fingerprint(str(folder))
    save_model(folder, transformers.LlamaConfig, seed=1, **CONFIGS["llama"][1])
    assert common.fingerprint(str(folder)) != before
    assert common.fingerprint("some/repo@abc") == "some/repo@abc"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file, revision: f"/hub/snapshots/123/{file}")
    assert common.fingerprint("some/repo@abc") == "some/repo@123"


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "no-such-model"}', '{"model_type": "llama"}'],
                         ids=["no config", "broken", "unknown", "no tokenizer"])
def test_a_folder_that_is_no_model_ends_in_one_line(tmp_path, capsys, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert_one_line(capsys, lambda: common.model_config(str(tmp_path)))
    assert_one_line(capsys, lambda: common.model_config(str(tmp_path / "not" / "there")))


def test_config_and_tokenizer_are_read_without_the_weights(llama):
    config, tokenizer = common.model_config(llama[0].name)
    assert config.num_hidden_layers == 4 and tokenizer("Tom").input_ids == llama[0].tokenizer("Tom").input_ids


def test_a_loader_keeps_the_models_of_the_last_call_and_frees_the_others_before_it_loads(monkeypatch):
    class Model:
        def __init__(self, name):
            self.name = name

    alive, loaded = weakref.WeakSet(), []

    def names() -> str:
        gc.collect()
        return "".join(sorted(model.name for model in alive))

    def load_model(name, *settings):
        loaded.append((name, names(), settings))
        model = Model(name)
        alive.add(model)
        return model
    monkeypatch.setattr(common, "load_model", load_model)
    args = SimpleNamespace(dtype="float32", device="cpu", remote="target", ndif_host="http://127.0.0.1", tgt=["b"], tgt_chat=[None],
                           batch_tokens=7)
    load = common.loader(args)
    assert load("a") is load("a") and names() == "a"
    assert [model.name for model in load("c", "b")] == ["c", "b"] and names() == "bc"
    kept = load("b")
    assert names() == "b" and load("d", "b", "d")[1] is kept and names() == "bd"
    settings = {name: ("float32", "cpu", "http://127.0.0.1" if name == "b" else None, 7) for name in "abcd"}     # targets only
    assert loaded == [("a", "", settings["a"]), ("c", "", settings["c"]), ("b", "c", settings["b"]),
                      ("d", "b", settings["d"])]


def test_a_prompt_longer_than_the_context_is_refused(llama):
    model, _ = llama
    with pytest.raises(ValueError, match=r"does not fit the context .*128"):
        common.next_token_logits(model, ["Tom felt very sad. " * 40])
    with pytest.raises(ValueError, match="do not fit the context"):
        common.generate(model, ["Tom"], max_new_tokens=127)


def test_an_empty_prompt_is_refused_where_the_tokenizer_adds_nothing(llama, monkeypatch):
    class Bare:                                     # as the tokenizer of GPT-2
        def __call__(self, texts):
            return argparse.Namespace(input_ids=[llama[1].tokenizer(text).input_ids[1:] for text in texts])
    monkeypatch.setattr(llama[0], "tokenizer", Bare())
    with pytest.raises(ValueError, match="empty prompt"):
        common.encode(llama[0], ["Tom", ""])


def test_batches_hold_each_prompt_once_and_stay_within_the_tokens():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    batches = list(common._batches(SimpleNamespace(batch_tokens=100, pass_tokens=100), lengths, rows_each=3))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) == 1 or 3 * len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)


# ================================================================ 3  Hidden states


def test_states_of_one_prompt_equal_plain_hooks_exactly(pair):
    model, reference = pair
    for text in TEXTS:
        assert torch.equal(common.hidden_states(model, [text])[0], reference.states(text))


def test_states_of_mixed_lengths_equal_one_at_a_time(any_pair):
    model, reference = any_pair
    close(common.hidden_states(model, TEXTS), torch.stack([reference.states(text) for text in TEXTS]))


@pytest.mark.parametrize("layers", [[2], [0], [3, 0], [2, 1, 3], [0, 3, 0]], ids=str)
def test_blocks_may_be_asked_for_in_any_order(pair, layers):
    model, _ = pair
    assert torch.equal(common.hidden_states(model, TEXTS, layers), common.hidden_states(model, TEXTS)[:, layers])


def test_a_block_that_does_not_exist_is_refused(llama):
    for layer in (4, -1):
        with pytest.raises(ValueError, match=f"block {layer} does not exist"):
            common.hidden_states(llama[0], TEXTS, [layer])


def test_states_are_read_from_disk_the_second_time(llama, zoo, monkeypatch):
    class Traced(Exception):
        pass

    def trace(*_, **__):
        raise Traced
    texts = [text + " now" for text in TEXTS]
    first = common.hidden_states(llama[0], texts, [1, 2])
    other = zoo("gpt2")[0]
    for model in (llama[0], other):
        monkeypatch.setattr(model, "trace", trace)
    assert torch.equal(common.hidden_states(llama[0], texts, [1, 2]), first)
    for model, asked, layers, transplant in [(other, texts, [1, 2], None), (llama[0], texts[:-1], [1, 2], None),
                                             (llama[0], texts[::-1], [1, 2], None), (llama[0], texts, [2, 1], None),
                                             (llama[0], texts, [1, 2], TRANSPLANTS[1])]:
        with pytest.raises(Traced):
            common.hidden_states(model, asked, layers, transplant)


def test_steered_states_equal_plain_hooks(pair):
    model, reference = pair
    for transplant, shifts in STEERED[1:]:
        states = common.hidden_states(model, TEXTS, transplant=transplant)
        close(states, torch.stack([reference.states(text, shifts) for text in TEXTS]))


def test_blocks_below_the_steered_one_do_not_change(pair):
    model, _ = pair
    plain = common.hidden_states(model, TEXTS)
    steered = common.hidden_states(model, TEXTS, transplant=Transplant.of(A, 2, 1.0))
    assert torch.equal(steered[:, :2], plain[:, :2]) and not torch.isclose(steered[:, 2:], plain[:, 2:]).all(-1).any()


def test_infinite_states_are_refused(llama):
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        common.hidden_states(llama[0], TEXTS, transplant=Transplant.of(A * math.nan, 1, 1.0))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        common.next_token_logits(llama[0], TEXTS, [Transplant.of(A * math.inf, 1, 1.0)])


# ================================================================ 4  Refine


def planted(n: int = 200, layers: int = 3, width: int = 16):
    """Pairs that share most of their variation and differ by a direction of each layer, and noise."""
    r = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(layers, width, generator=r), dim=1)
    shared, noise = torch.randn(n, layers, width, generator=r), 0.3 * torch.randn(2, n, layers, width, generator=r)
    return shared + 2 * direction + noise[0], shared - 2 * direction + noise[1], direction


def test_mean_is_equation_1():
    positive, negative, _ = planted()
    wanted = sum(p - n for p, n in zip(positive.double(), negative.double())) / len(positive)
    close(common.refine(positive, negative), wanted.float(), 1e-6)


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_refine_finds_a_planted_direction(method):
    positive, negative, direction = planted()
    v = common.refine(positive, negative, method)
    assert v.shape == direction.shape and v.dtype == torch.float32
    assert (torch.cosine_similarity(v, direction, dim=1) > 0.95).all()


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_the_vector_points_to_the_positives_whatever_the_order(method):
    positive, negative, direction = planted()
    order = torch.randperm(len(positive), generator=torch.Generator().manual_seed(1))
    v = common.refine(positive, negative, method)
    close(common.refine(positive[order], negative[order], method), v, 1e-3)
    close(common.refine(negative, positive, method), -v, 1e-3)


@pytest.mark.parametrize("method", ["pca", "probe"])
def test_pca_and_probe_have_the_norm_of_the_mean(method):
    positive, negative, _ = planted()
    close(common.refine(positive, negative, method).norm(dim=1), common.refine(positive, negative).norm(dim=1))


def test_refine_refuses_what_are_no_pairs():
    x = torch.zeros(4, 3, 8)
    for positive, negative in [(x, x[:3]), (x[:, 0], x[:, 0]), (x[:0], x[:0]), (x, x[..., :4])]:
        with pytest.raises(ValueError, match="must be pairs"):
            common.refine(positive, negative)
    with pytest.raises(ValueError, match="unknown refine method"):
        common.refine(x, x, "median")


# ================================================================ 5  Reformulate


def regression(n: int, d1: int = 12, d2: int = 7, noise: float = 0.5, rank: int | None = None):
    """x, y = x W + an offset + noise, in float64, x around a mean of its own."""
    r = np.random.default_rng(0)
    x = r.normal(size=(n, d1)) + r.normal(size=d1)
    if rank is not None:
        x = x[:, :rank] @ r.normal(size=(rank, d1))
    y = x @ r.normal(size=(d1, d2)) + 3 * r.normal(size=d2) + noise * r.normal(size=(n, d2))
    return torch.from_numpy(x), torch.from_numpy(y)


def matrix(fitted: common.AffineMap) -> torch.Tensor:
    """F in float64, multiplied out from its factors."""
    left, right = fitted.inverse
    return left @ right @ fitted.y


def test_the_map_is_the_formula_of_the_paper():
    x, y = regression(50)
    u, s, v = np.linalg.svd(x.numpy(), full_matrices=False)
    wanted = v.T @ np.diag(1 / s) @ u.T @ y.numpy()
    fitted = common.fit_affine(x, y, held_out=0)
    close(matrix(fitted), torch.from_numpy(wanted), 1e-8)
    close(matrix(fitted), torch.from_numpy(np.linalg.lstsq(x.numpy(), y.numpy())[0]), 1e-8)
    close(fitted.vector(torch.eye(12)), torch.from_numpy(wanted).float(), 1e-6)
    assert fitted.n == 50 and math.isnan(fitted.r2)


def test_fewer_sentences_than_dimensions_interpolate():
    x, y = regression(8)
    fitted = common.fit_affine(x, y, held_out=0)
    close(x @ matrix(fitted), y, 1e-8)
    close(matrix(fitted), torch.from_numpy(np.linalg.pinv(x.numpy()) @ y.numpy()), 1e-8)


@pytest.mark.parametrize("n, rank", [(50, 5), (8, 5)])
def test_dependent_dimensions_give_the_shortest_solution(n, rank):
    x, y = regression(n, rank=rank)
    close(matrix(common.fit_affine(x, y, held_out=0)), torch.from_numpy(np.linalg.pinv(x.numpy()) @ y.numpy()), 1e-8)


def test_an_intercept_is_a_column_of_ones_that_vectors_ignore():
    x, y = regression(50)
    fitted = common.fit_affine(x, y, intercept=True, held_out=0)
    wanted = torch.from_numpy(np.linalg.lstsq(np.c_[x.numpy(), np.ones(50)], y.numpy())[0])
    close(matrix(fitted), wanted[:-1], 1e-8)
    close(fitted.states(x), (x @ wanted[:-1] + wanted[-1]).float(), 1e-5)
    close(fitted.vector(x[0]), (x[0] @ wanted[:-1]).float(), 1e-5)


@pytest.mark.parametrize("n", [50, 8])
def test_ridge_solves_the_normal_equations_in_its_own_unit(n):
    x, y = regression(n)
    penalty = 0.1 * float((torch.linalg.svdvals(x)**2).mean())
    wanted = torch.linalg.solve(x.T @ x + penalty * torch.eye(12), x.T @ y)
    close(matrix(common.fit_affine(x, y, ridge=0.1, held_out=0)), wanted, 1e-8)


@pytest.mark.parametrize("rcond", [0.15, 0.3, 0.6])
def test_rcond_is_that_of_the_pseudo_inverse(rcond):
    x, y = regression(50)
    wanted = torch.from_numpy(np.linalg.pinv(x.numpy(), rcond=rcond) @ y.numpy())
    close(matrix(common.fit_affine(x, y, rcond=rcond, held_out=0)), wanted, 1e-8)
    assert not torch.allclose(wanted, matrix(common.fit_affine(x, y, held_out=0)))


@pytest.mark.parametrize("intercept", [False, True])
def test_the_last_fifth_is_held_out_and_scored(intercept):
    x, y = regression(100)
    fitted = common.fit_affine(x, y, intercept=intercept)
    train = common.fit_affine(x[:80], y[:80], intercept=intercept, held_out=0)
    assert fitted.n == 80 and torch.equal(matrix(fitted), matrix(train))
    predicted, true, mean = train.states(x[80:]).double().numpy(), y[80:].numpy(), y[:80].numpy().mean(0)
    r2 = 1 - ((true - predicted)**2).sum() / ((true - mean)**2).sum()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(predicted - mean, true - mean)]
    assert fitted.r2 == pytest.approx(r2, abs=1e-6) and fitted.cosine == pytest.approx(np.mean(cosines), abs=1e-6)


def test_held_out_scores_tell_a_real_map_from_none():
    r = torch.Generator().manual_seed(0)
    x, w, noise = (torch.randn(*shape, generator=r) for shape in [(300, 40), (40, 20), (300, 20)])
    real, none = common.fit_affine(x, x @ w + 0.1 * noise), common.fit_affine(x, noise)
    assert real.r2 > 0.99 and real.cosine > 0.99
    assert none.r2 < 0.2 and abs(none.cosine) < 0.2
    close(real.vector(x[0]), x[0] @ w, 0.1)


def test_maps_refuse_what_they_cannot_fit():
    x, y = regression(20)
    with pytest.raises(ValueError, match="equal n"):
        common.fit_affine(x, y[:10])
    with pytest.raises(ValueError, match="too few"):
        common.fit_affine(x[:1], y[:1])
    for bad in (math.nan, math.inf):
        for which in (0, 1):
            pair = [x.clone(), y.clone()]
            pair[which][3, 2] = bad
            with pytest.raises(FloatingPointError):
                common.fit_affine(*pair)


# ---------------------------------------------------------------- plain sentences, bridges


def released(lines: list[str]) -> list[str]:
    """Plain sentences as the released code makes them: numpy's global seed, and 2 to 4 words dropped a line."""
    state = np.random.get_state()
    np.random.seed(42)
    texts = [" ".join(line.split("\t")[0].split(" ")[:-np.random.randint(2, 5)]) for line in lines]
    np.random.set_state(state)
    return texts


def sentences(data: Path, count: int, *names: str) -> list[str]:
    args = SimpleNamespace(data=data, sentences=count)
    return common.plain_sentences(args, list(names or (str(TOY / "models" / "llama-s"), str(TOY / "models" / "llama-m"))))


def test_plain_sentences_lose_two_to_four_words_as_in_the_released_code(capsys):
    lines = (TOY / "wikisplit" / "validation.tsv").read_text().splitlines()
    assert sentences(TOY, 200) == released(lines)[:500]
    assert capsys.readouterr().out == ""


def test_on_the_real_sentences_too():
    if not (SHARED / "data").is_dir():
        pytest.skip("no copy of the real data in ../shared/data")
    lines = (SHARED / "data" / "wikisplit" / "validation.tsv").read_text(encoding="utf-8").split("\n")
    wanted = [" ".join(text.split()) for text in released(lines[:1000])]
    kept = sentences(SHARED / "data", 400)
    assert len(kept) > 990 and kept == [text for text in wanted if text in set(kept)]


def sentence_folder(folder: Path, lines: list[str]) -> Path:
    (folder / "wikisplit").mkdir()
    (folder / "wikisplit" / "validation.tsv").write_text("".join(f"{line}\tOne . <::::> Two .\n" for line in lines))
    return folder


def test_sentences_that_no_model_can_read_are_left_out_and_counted(tmp_path, capsys):
    lines = [f"the market of Zafi sells {word} to every baker" for word in ("salt", "wool", "fish", "honey") * 5]
    folder = sentence_folder(tmp_path, [*lines[:3], "salt " * 600, "too short", *lines[3:]])
    kept = sentences(folder, 400)
    assert len(kept) == 20 and all(text.startswith("the market of Zafi") for text in kept)
    assert capsys.readouterr().out == "1 of 21 plain sentences are empty or longer than a model's context, and left out\n"


def test_a_sentence_must_fit_each_of_the_models_and_have_a_token_in_each(tmp_path, monkeypatch):
    """The tokenizers: words without BOS; the third model knows no word with a Z."""
    def model_config(name):
        words = lambda text: [1 for word in text.split() if name != "no Z" or "Z" not in word]
        return (SimpleNamespace(max_position_embeddings={"wide": 50, "narrow": 8, "no Z": 50}[name]),
                lambda texts, verbose: SimpleNamespace(input_ids=[words(text) for text in texts]))
    monkeypatch.setattr(common, "model_config", model_config)
    folder = sentence_folder(tmp_path, ["a b c d e f g"] * 12 + ["Za Zb Zc Zd Ze Zf"] * 12 + ["a b c " * 5] * 12)
    kept = {names: sentences(folder, 400, *names) for names in [("wide",), ("wide", "narrow"), ("narrow", "no Z", "wide")]}
    assert [len(texts) for texts in kept.values()] == [36, 24, 12]
    assert all(text.startswith("a b c") and len(text.split()) <= 5 for text in kept["narrow", "no Z", "wide"])


def bridge(**options) -> common.Bridge:
    """60 sentences at two pairs of blocks; y follows from x, by a matrix of each pair, but for an offset and noise."""
    r = torch.Generator().manual_seed(0)
    x, w, noise = (torch.randn(*shape, generator=r) for shape in [(60, 2, 12), (2, 12, 7), (60, 2, 7)])
    settings = {"sentences": 50, "intercept": False, "rcond": 0.0, "ridge": 0.0, "norm": "as-is", **options}
    return common.Bridge(x + 1, torch.einsum("npd,pde->npe", x, w) + 2 + 0.1 * noise, SimpleNamespace(**settings))


V = vectors(6, 12)


def test_each_map_of_a_bridge_has_a_sample_of_its_own():
    samples = [bridge().sample(number) for number in range(5)]
    assert all(len(rows) == len(set(rows)) == 50 and set(rows) < set(range(60)) for rows in samples)
    assert samples == [bridge().sample(number) for number in range(5)] and len(set(map(frozenset, samples))) == 5
    assert sorted(bridge(sentences=100).sample(1)) == list(range(60))


@pytest.mark.parametrize("options", [{}, {"intercept": True}, {"ridge": 0.2}, {"rcond": 0.5}], ids=str)
def test_a_bridge_carries_by_the_map_of_the_pair_of_blocks_and_of_the_sample(options):
    over, carried = bridge(**options), []
    for i in (0, 1):
        for number in (0, 3):
            rows = over.sample(number)
            fitted = common.fit_affine(over.x[rows, i], over.y[rows, i], **options)
            carried.append(over.carry(V, i, number=number))
            assert torch.equal(carried[-1], fitted.vector(V)) and over.affine(i, number).r2 == fitted.r2
            close(over.carry(V[2], i, number=number), carried[-1][2])
    assert torch.equal(over.carry(V, 1), carried[2])
    others = [*carried[1:], *([bridge().carry(V, 0)] if options else [])]
    assert not any(torch.allclose(carried[0], other, atol=1e-4) for other in others)


def test_a_shuffled_map_has_the_same_sentences_in_the_source_and_others_of_the_sample_in_the_target():
    over = bridge(intercept=True)
    true, shuffled = over.affine(0, 2), over.affine(0, 2, shuffled=True)
    assert true.inverse is shuffled.inverse and not torch.equal(true.y, shuffled.y)
    rows = {tuple(row) for row in over.y[over.sample(2), 0].double().tolist()}
    used = [tuple(row) for row in (shuffled.y + shuffled.y_mean).float().double().tolist()]
    assert len(set(used)) == len(used) == 40
    assert all(min(math.dist(row, other) for other in rows) < 1e-5 for row in used)
    assert true.r2 > 0.95 and true.cosine > 0.95 and shuffled.r2 < 0.2 and shuffled.cosine < 0.3


def test_norm_match_gives_the_source_s_ratio_of_vector_to_stream_and_keeps_the_direction():
    plain, over = bridge(), bridge(norm="match")
    for which in ({"number": 0}, {"number": 1}, {"shuffled": True}):
        for i in (0, 1):
            got = over.carry(V, i, **which)
            ratio = V.norm(dim=1) / over.x[:, i].norm(dim=1).mean()
            close(got.norm(dim=1) / over.y[:, i].norm(dim=1).mean(), ratio)
            close(torch.cosine_similarity(got, plain.carry(V, i, **which), dim=1), torch.ones(6))
            close(over.carry(V[3], i, **which), got[3])
            assert not torch.allclose(got, plain.carry(V, i, **which), atol=1e-2)


def test_each_map_of_a_bridge_is_fitted_once(monkeypatch):
    fitted, inner = [], common.fit_affine

    def spy(*args, **options):
        fitted.append(inner(*args, **options))
        return fitted[-1]
    monkeypatch.setattr(common, "fit_affine", spy)
    over = bridge()
    for _ in range(2):
        for which in ({"i": 0}, {"i": 0, "number": 0}, {"i": 1}, {"i": 0, "number": 1}, {"i": 0, "shuffled": True}):
            over.carry(V, **which)
    assert len(fitted) == 4 and over.affine(0) is fitted[0] and over.affine(1) is fitted[1]


def test_random_directions_have_the_norm_and_no_memory():
    state = torch.get_rng_state()
    v = 3 * A
    directions = common.random_directions(v, 20, seed=5)
    close(directions.norm(dim=1), v.norm().expand(20))
    assert torch.equal(directions, common.random_directions(v, 20, seed=5)) and len(directions.unique(dim=0)) == 20
    assert not torch.equal(directions, common.random_directions(v, 20, seed=6))
    assert torch.equal(state, torch.get_rng_state())


# ================================================================ 6  Transplant


def test_steered_logits_equal_plain_hooks(any_pair):
    """One block, two blocks, two concepts at one block, and none, each in a call of its own."""
    model, reference = any_pair
    for transplant, shifts in STEERED:
        close(common.next_token_logits(model, TEXTS, [transplant])[0], reference.next_logits(TEXTS, shifts))


def test_a_list_of_transplants_equals_one_at_a_time(pair):
    model, _ = pair
    together = common.next_token_logits(model, TEXTS, TRANSPLANTS)
    assert together.shape == (len(TRANSPLANTS), len(TEXTS), len(model.tokenizer))
    close(together, torch.cat([common.next_token_logits(model, TEXTS, [transplant]) for transplant in TRANSPLANTS]))


def test_alpha_0_equals_base_bit_for_bit(pair):
    model, _ = pair
    zero = Transplant.of(A, 1, 0.0) + Transplant.of(B, 2, 0.0)
    base = common.next_token_logits(model, TEXTS)
    assert torch.equal(common.next_token_logits(model, TEXTS, [zero]), base)
    sweep = common.next_token_logits(model, TEXTS, [zero, TRANSPLANTS[1], TRANSPLANTS[2]])
    assert torch.equal(sweep[0], common.next_token_logits(model, TEXTS, [BASE, TRANSPLANTS[1], TRANSPLANTS[2]])[0])
    assert torch.equal(common.hidden_states(model, TEXTS, transplant=zero), common.hidden_states(model, TEXTS))
    assert common.generate(model, TEXTS, zero, 4) == common.generate(model, TEXTS, BASE, 4)


def hooks_of(module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def digest(module) -> str:
    return hashlib.sha256(b"".join(weights.numpy().tobytes() for weights in module.state_dict().values())).hexdigest()


def test_the_model_is_untouched_afterwards(pair):
    model, _ = pair
    base, weights, hooks = common.next_token_logits(model, TEXTS), digest(model._module), hooks_of(model._module)
    common.next_token_logits(model, [PREFIX + text for text in TEXTS], TRANSPLANTS)
    common.hidden_states(model, TEXTS, transplant=TRANSPLANTS[1])
    common.generate(model, TEXTS, TRANSPLANTS[2], 4)
    common.logit_lens(model, TEXTS, 1, TRANSPLANTS)
    with pytest.raises(Exception):
        common.next_token_logits(model, TEXTS, [Transplant.of(torch.ones(7), 1, 1.0)])      # of another model
    assert digest(model._module) == weights and hooks_of(model._module) == hooks
    assert not any(weights.requires_grad for weights in model._module.parameters())
    assert torch.equal(common.next_token_logits(model, TEXTS), base)


@pytest.mark.parametrize("layer", [4, -1])
def test_a_transplant_to_a_block_that_does_not_exist_is_refused(llama, layer):
    transplant = Transplant.of(A, layer, 1.0)
    for score in (lambda: common.next_token_logits(llama[0], TEXTS, [transplant]),
                  lambda: common.generate(llama[0], TEXTS, transplant, 2),
                  lambda: common.hidden_states(llama[0], TEXTS, transplant=transplant)):
        with pytest.raises(ValueError, match=f"block {layer} does not exist"):
            score()


# ================================================================ 7  Scoring


@pytest.fixture
def prefixes(monkeypatch):
    """Lengths of the prefixes that were read once for all rows."""
    taken, inner = [], common._scorer

    def spy(model, prefix, *rest):
        if prefix:
            taken.append(len(prefix))
        return inner(model, prefix, *rest)
    monkeypatch.setattr(common, "_scorer", spy)
    return taken


def test_a_shared_prefix_gives_the_logits_of_each_prompt_alone(any_pair, prefixes):
    """Also through windows (GPT-Neo: 8, Mistral: 16), where a prefix may be kept only if nothing changes by it."""
    model, reference = any_pair
    prompts = [PREFIX + text for text in TEXTS]
    got = common.next_token_logits(model, prompts, TRANSPLANTS)
    for row, (_, shifts) in zip(got, STEERED):
        close(row, reference.next_logits(prompts, shifts), 2e-5)
    if model.config.model_type not in ("gpt_neo", "mistral"):
        assert len(prefixes) == 1 and prefixes[0] >= 32


def test_a_window_longer_than_the_prefix_sees_the_same_tokens(tmp_path):
    """The prompts differ in length, so padding must not push the prefix out of a window."""
    config_class, settings, *paths = CONFIGS["mistral"]
    folder = save_model(tmp_path / "window", config_class, **{**settings, "sliding_window": 44})
    model, reference = common.load_model(str(folder), device="cpu"), Reference(folder, *paths)
    prompts = [PREFIX + text for text in TEXTS]
    close(common.next_token_logits(model, prompts)[0], reference.next_logits(prompts))


def test_a_short_prefix_and_a_single_prompt_are_computed_in_full(llama, prefixes):
    common.next_token_logits(llama[0], ["Tom felt very happy", "Tom felt very sad"], TRANSPLANTS)
    common.next_token_logits(llama[0], [PREFIX + "Tom"], TRANSPLANTS)
    assert prefixes == []


def test_a_prefix_that_is_a_whole_prompt_leaves_a_token_to_predict_from(llama):
    model, reference = llama
    prompts = [PREFIX.strip(), PREFIX.strip() + " Tom felt very", PREFIX.strip()]
    close(common.next_token_logits(model, prompts)[0], reference.next_logits(prompts))


def test_small_batches_give_the_same_numbers(pair, monkeypatch):
    model, _ = pair
    texts = [*TEXTS, *(PREFIX + text for text in TEXTS)]
    pairs = [(text, word) for text in TEXTS for word in (" happy", " very sad dog")]
    wanted = (common.next_token_logits(model, texts, TRANSPLANTS),
              common.next_token_logits(model, texts[4:], TRANSPLANTS),      # behind a prefix
              common.choice_logprobs(model, pairs, TRANSPLANTS)[0], common.generate(model, TEXTS, TRANSPLANTS[1], 4))
    monkeypatch.setattr(model, "batch_tokens", 60)
    close(common.next_token_logits(model, texts, TRANSPLANTS), wanted[0])
    close(common.next_token_logits(model, texts[4:], TRANSPLANTS), wanted[1])
    close(common.choice_logprobs(model, pairs, TRANSPLANTS)[0], wanted[2], 2e-5)
    assert common.generate(model, TEXTS, TRANSPLANTS[1], 4) == wanted[3]


def test_choices_are_sums_of_log_probabilities(pair):
    model, reference = pair
    pairs = [(text, word) for text in TEXTS for word in (" happy", " sad dog in the house.", " x")]
    got, greedy = common.choice_logprobs(model, pairs, TRANSPLANTS)
    assert got.shape == greedy.shape == (len(TRANSPLANTS), len(pairs)) and greedy.dtype == torch.bool
    for row, (_, shifts) in zip(got, STEERED):
        for value, (context, text) in zip(row, pairs):
            start = len(reference.tokenizer(context).input_ids)
            ids = reference.tokenizer(context + text).input_ids
            close(value, reference.logprobs(ids, start, shifts).sum())


def test_choices_behind_a_long_prefix_equal_those_computed_in_full(pair, prefixes, monkeypatch):
    model, _ = pair
    pairs = [(2 * PREFIX + text, word) for text in TEXTS for word in (" happy", " sad dog in the house.")]
    kept = common.choice_logprobs(model, pairs, TRANSPLANTS)
    assert model.config.model_type == "gpt_neo" or len(prefixes) == 1 and prefixes[0] >= 32     # its window is 8
    monkeypatch.setattr(common, "_common_prefix", lambda *_: 0)
    full = common.choice_logprobs(model, pairs, TRANSPLANTS)
    close(kept[0], full[0], 2e-5)
    assert torch.equal(kept[1], full[1])


def test_the_greedy_flag_says_whether_each_token_is_the_most_likely(pair):
    model, reference = pair
    transplant, shifts = pushing(model, reference, {"Ġhappy": 1.0}, 200.0)
    pairs = [("Tom felt", word) for word in (" happy", " happy happy", " happy sad", " sad happy", " sad")]
    _, greedy = common.choice_logprobs(model, pairs, [transplant, BASE])
    happy = model.tokenizer.convert_tokens_to_ids("Ġhappy")
    assert (reference.logits("Tom felt happy happy", shifts).argmax(-1) == happy).all()
    assert greedy[0].tolist() == [True, True, False, False, False]
    assert reference.logits("Tom felt")[-1].argmax() not in model.tokenizer.convert_tokens_to_ids(["Ġhappy", "Ġsad"])
    assert not greedy[1].any()


@pytest.mark.parametrize("context, text", [("Tom felt hap", "py"), ("Tom felt hap", "py, the dog"), ("Tom felt", "")],
                         ids=["merged", "merged and more", "empty"])
def test_a_continuation_that_does_not_split_at_the_context_is_refused(llama, context, text):
    with pytest.raises(ValueError, match="do not split at the context"):
        common.choice_logprobs(llama[0], [("Tom felt", " sad"), (context, text)])


def test_labels_of_one_token_are_judged_by_the_next_token(pair):
    model, reference = pair
    labels = ["happy", "sad", "dog"]
    pushes = [pushing(model, reference, {f"Ġ{word}": 1.0}, alpha) for word in labels for alpha in (1.0, 5.0, 200.0)]
    pushes += STEERED
    said, preferred = common.score_labels(model, TEXTS, labels, [transplant for transplant, _ in pushes])
    tokens = model.tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in labels])
    for i, (_, shifts) in enumerate(pushes):
        for j, text in enumerate(TEXTS):
            logits = reference.logits(text, shifts)[-1]
            assert preferred[i, j] == logits[tokens].argmax()
            assert said[i, j] == (tokens.index(logits.argmax()) if logits.argmax() in tokens else -1)
    assert set(said.unique().tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize("labels", [["q", "z", "K"], ["xq", "xz", "zx"], ["happy", "xq", "xz"], ["xq", "happy", "xz"]],
                         ids=" ".join)
def test_labels_that_share_their_first_token_are_judged_by_as_many_as_tell_them_apart(pair, labels):
    model, reference = pair
    pushes = [pushing(model, reference, {"Ġ": 1.0, labels[0][-1]: share}, alpha) for alpha in (3.0, 10.0, 50.0)
              for share in (0.8, 0.9, 1.0, 1.1, 1.2)]
    pushes += [pushing(model, reference, {f"Ġ{label}": 1.0}, 200.0) for label in labels if label == "happy"]
    transplants = [transplant for transplant, _ in pushes]
    texts = [*TEXTS, *("Tom " * n + "sat" for n in range(1, 12))]
    said, preferred = common.score_labels(model, texts, labels, transplants)
    pairs = [(text, f" {label}") for text in texts for label in labels]
    wanted, greedy = common.choice_logprobs(model, pairs, transplants)
    wanted, greedy = (values.view(len(pushes), len(texts), len(labels)) for values in (wanted, greedy))
    assert torch.equal(preferred, wanted.argmax(-1))
    assert torch.equal(said, torch.where(greedy.any(-1), greedy.int().argmax(-1), -1))
    if len(labels[0]) == 1 or "happy" in labels:
        assert greedy.any() and not greedy.any(-1).all()        # else `said` is not tested


@pytest.mark.parametrize("labels", [["happy", "happy"], ["sad", "xq", "xq"], ["x", "xq"]], ids=" ".join)
def test_labels_that_cannot_be_told_apart_are_refused(llama, labels):
    with pytest.raises(ValueError, match="cannot be told apart"):
        common.score_labels(llama[0], TEXTS, labels)


# ---------------------------------------------------------------- text


def test_greedy_text_equals_that_of_transformers(any_pair):
    model, reference = any_pair
    for transplant, shifts in STEERED[:3]:
        wanted = [reference.generate(text, shifts)[0] for text in TEXTS]
        assert common.generate(model, TEXTS, transplant, 8) == wanted
        assert [common.generate(model, [text], transplant, 8)[0] for text in TEXTS] == wanted


@pytest.mark.parametrize("steered", [0, 1], ids=["base", "steered"])
def test_rows_that_end_early_keep_their_text_and_leave_the_others(pair, monkeypatch, steered):
    model, reference = pair
    transplant, shifts = STEERED[steered]
    eos = reference.generate(TEXTS[1], shifts)[1][2]                        # the end comes at the latest as third token
    monkeypatch.setattr(model._module.generation_config, "eos_token_id", eos)
    wanted = [reference.generate(text, shifts, eos=eos) for text in TEXTS]
    assert min(len(ids) for _, ids in wanted) <= 3 and max(len(ids) for _, ids in wanted) == 8
    assert common.generate(model, TEXTS, transplant, 8) == [text for text, _ in wanted]
    assert common.generate(model, TEXTS[1:2], transplant, 8) == [wanted[1][0]]      # here every row ends early


def test_the_settings_of_a_model_folder_do_not_change_how_text_is_made(llama, monkeypatch):
    model, _ = llama
    own = dict(repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=3, temperature=0.1, top_p=0.1, do_sample=True)
    wanted = [common.generate(model, TEXTS, max_new_tokens=8, sample=sample) for sample in (False, True)]
    for name, value in own.items():
        monkeypatch.setattr(model._module.generation_config, name, value)
    assert [common.generate(model, TEXTS, max_new_tokens=8, sample=sample) for sample in (False, True)] == wanted


def test_samples_repeat_and_leave_the_global_generator_alone(llama):
    model, _ = llama
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = common.generate(model, TEXTS, TRANSPLANTS[1], 8, sample=True, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert common.generate(model, TEXTS, TRANSPLANTS[1], 8, sample=True, seed=3) == first
    assert common.generate(model, TEXTS, TRANSPLANTS[1], 8, sample=True, seed=4) != first


def test_samples_of_a_small_share_are_greedy(llama):
    model, _ = llama
    greedy = common.generate(model, TEXTS, TRANSPLANTS[1], 8)
    assert common.generate(model, TEXTS, TRANSPLANTS[1], 8, sample=True, top_p=1e-6) == greedy
    assert common.generate(model, TEXTS, TRANSPLANTS[1], 8, sample=True, temperature=1e-4) == greedy


def test_samples_are_drawn_from_all_tokens(llama):
    """transformers keeps the 50 most likely tokens unless it is told not to."""
    drawn = common.generate(llama[0], ["Tom felt"] * 400, max_new_tokens=1, sample=True, temperature=100.0)
    assert len(set(drawn)) > 100


# ---------------------------------------------------------------- emulated fine-tuning


C, D = vectors(2, 64, seed=1)
WIDE = [steering(), steering((1, 2.0, C)), steering((0, -1.0, C), (2, 1.5, D))]


def make_trio(folder: Path, family: str, vocabularies=(0, 0, 0)) -> tuple[list, list]:
    """Models and References of a target, a small chat and a small base model: other seeds, the target wider and deeper;
    so many rows of padding at the end of each unembedding."""
    config_class, settings, *paths = CONFIGS[family]
    size, made = len(make_tokenizer()), []
    for seed, (width, blocks, more) in enumerate(zip((64, 32, 32), (4, 3, 2), vocabularies)):
        path = save_model(folder / str(seed), config_class, seed, **{
            **settings, "hidden_size": width, "num_hidden_layers": blocks, "vocab_size": size + more})
        made.append((common.load_model(str(path), device="cpu"), Reference(path, *paths)))
    return tuple(map(list, zip(*made)))


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def trio(request, tmp_path_factory):
    """GPT-2 learns its positions one by one, so that padding must not move them."""
    return make_trio(tmp_path_factory.mktemp("trio"), request.param)


def eft_logits(references: list[Reference], ids: list[int], shifts: dict) -> torch.Tensor:
    """target + chat - base [positions, vocabulary], each computed alone and in full; the target alone is steered."""
    target, chat, base = [reference.logits(ids, steer)[:, :len(reference.tokenizer)]
                          for reference, steer in zip(references, (shifts, {}, {}))]     # without rows of padding
    return target + chat - base


def eft_greedy(references: list[Reference], text: str, shifts: dict, new: int = 8, eos: int = 1) -> tuple[str, list[int]]:
    """The greedy continuation: its text and its tokens."""
    tokenizer, ids = references[0].tokenizer, references[0].tokenizer(text).input_ids
    start = len(ids)
    while len(ids) < start + new and eos not in ids[start:]:
        ids.append(eft_logits(references, ids, shifts)[-1].argmax().item())
    return tokenizer.decode(ids[start:], skip_special_tokens=True), ids[start:]


def assert_eft_choices(models, references, pairs, steered):
    """Sums and greedy flags of pairs under EFT are those of the reference; returns the sums."""
    got, greedy = common.choice_logprobs(models[0], pairs, [transplant for transplant, _ in steered], eft=tuple(models[1:]))
    assert got.shape == greedy.shape == (len(steered), len(pairs))
    for row, flags, (_, shifts) in zip(got, greedy, steered):
        for value, flag, (context, text) in zip(row, flags, pairs):
            start = len(references[0].tokenizer(context).input_ids)
            ids = references[0].tokenizer(context + text).input_ids
            scores, tokens = eft_logits(references, ids, shifts)[start - 1:-1].log_softmax(-1), torch.tensor(ids[start:])
            close(value, scores.gather(1, tokens[:, None]).sum(), 1e-4)
            assert flag == (scores.argmax(-1) == tokens).all()
    return got, greedy


PAIRS = [(text, word) for text in TEXTS for word in (" happy", " sad dog in the house.", " x")]


def test_eft_choices_are_log_probabilities_of_the_added_up_logits(trio):
    models, references = trio
    steered = [*WIDE, pushing(models[0], references[0], {"Ġhappy": 1.0}, 200.0)]
    got, greedy = assert_eft_choices(models, references, PAIRS, steered)
    assert greedy.any() and not greedy.all()            # else the flag is not tested
    plain, _ = common.choice_logprobs(models[0], PAIRS, [transplant for transplant, _ in WIDE])
    assert ((got[:3] - plain).abs() > 0.5).float().mean() > 0.5


def test_eft_choices_behind_a_long_prefix_and_in_small_batches_are_the_same(trio, prefixes, monkeypatch):
    models, references = trio
    pairs = [(2 * PREFIX + context, text) for context, text in PAIRS]
    got, _ = assert_eft_choices(models, references, pairs, WIDE)
    assert len(prefixes) >= 3 and min(prefixes) >= 32           # each of the three models keeps its own
    for model in models:
        monkeypatch.setattr(model, "batch_tokens", 150)
    transplants = [transplant for transplant, _ in WIDE]
    close(common.choice_logprobs(models[0], pairs, transplants, eft=tuple(models[1:]))[0], got, 1e-4)


def test_eft_text_is_greedy_in_the_added_up_logits(trio):
    models, references = trio
    for transplant, shifts in WIDE:
        wanted = [eft_greedy(references, text, shifts)[0] for text in TEXTS]
        assert common.generate(models[0], TEXTS, transplant, 8, eft=tuple(models[1:])) == wanted
        assert [common.generate(models[0], [text], transplant, 8, eft=tuple(models[1:]))[0] for text in TEXTS] == wanted
        assert not set(wanted) & set(common.generate(models[0], TEXTS, transplant, 8))


def test_eft_text_does_not_depend_on_batches_or_on_the_call_before(trio, monkeypatch):
    models, _ = trio
    first = common.generate(models[0], TEXTS, WIDE[1][0], 8, eft=tuple(models[1:]))
    monkeypatch.setattr(models[0], "batch_tokens", 40)
    assert common.generate(models[0], TEXTS[::-1], WIDE[1][0], 8, eft=tuple(models[1:])) == first[::-1]


def test_eft_rows_that_end_early_keep_their_text_and_leave_the_others(trio, monkeypatch):
    models, references = trio
    eos = eft_greedy(references, TEXTS[1], {})[1][2]
    monkeypatch.setattr(models[0]._module.generation_config, "eos_token_id", eos)
    wanted = [eft_greedy(references, text, {}, eos=eos) for text in TEXTS]
    assert len(wanted[1][1]) <= 3 and max(len(ids) for _, ids in wanted) == 8
    assert common.generate(models[0], TEXTS, max_new_tokens=8, eft=tuple(models[1:])) == [text for text, _ in wanted]


def test_eft_samples_of_a_small_share_are_greedy(trio):
    """Temperature and top-p are applied after the logits are added up."""
    models, _ = trio
    greedy = common.generate(models[0], TEXTS, WIDE[1][0], 8, eft=tuple(models[1:]))
    for options in ({"top_p": 1e-6}, {"temperature": 1e-4}):
        assert common.generate(models[0], TEXTS, WIDE[1][0], 8, sample=True, eft=tuple(models[1:]), **options) == greedy


def test_eft_of_a_chat_model_that_is_its_base_changes_nothing(trio):
    target, chat, _ = trio[0]
    transplants = [transplant for transplant, _ in WIDE]
    close(common.choice_logprobs(target, PAIRS, transplants, eft=(chat, chat))[0],
          common.choice_logprobs(target, PAIRS, transplants)[0])
    assert common.generate(target, TEXTS, WIDE[2][0], 8, eft=(chat, chat)) == common.generate(target, TEXTS, WIDE[2][0], 8)


@pytest.mark.parametrize("vocabularies", [(13, 0, 0), (0, 13, 13), (0, 0, 5), (13, 5, 0)], ids=str)
def test_eft_leaves_rows_of_padding_in_an_unembedding_out(tmp_path, vocabularies):
    models, references = make_trio(tmp_path, "llama", vocabularies)
    assert_eft_choices(models, references, PAIRS, WIDE)
    for transplant, shifts in WIDE:
        wanted = [eft_greedy(references, text, shifts)[0] for text in TEXTS]
        assert common.generate(models[0], TEXTS, transplant, 8, eft=tuple(models[1:])) == wanted


def test_eft_leaves_the_models_untouched(trio):
    models, _ = trio
    before = [(digest(model._module), hooks_of(model._module), common.next_token_logits(model, TEXTS)) for model in models]
    common.choice_logprobs(models[0], PAIRS, [WIDE[1][0]], eft=tuple(models[1:]))
    common.generate(models[0], TEXTS, WIDE[1][0], 4, eft=tuple(models[1:]))
    for model, (weights, hooks, logits) in zip(models, before):
        assert digest(model._module) == weights and hooks_of(model._module) == hooks
        assert torch.equal(common.next_token_logits(model, TEXTS), logits)


@pytest.mark.parametrize("which", [1, 2], ids=["chat", "base"])
def test_eft_refuses_another_vocabulary_and_names_the_models(trio, monkeypatch, which):
    models, other = trio[0], make_tokenizer()
    assert common.same_vocabulary([model.tokenizer for model in models])
    other.add_tokens(["zebra"])
    monkeypatch.setattr(models[which], "tokenizer", other)
    for score in (lambda: common.choice_logprobs(models[0], PAIRS, eft=tuple(models[1:])),
                  lambda: common.generate(models[0], TEXTS, eft=tuple(models[1:]))):
        with pytest.raises(ValueError, match="vocabular") as refused:
            score()
        assert all(model.name in str(refused.value) for model in models)


def test_the_same_pieces_at_other_numbers_are_another_vocabulary():
    first, second = ({"a": 0, "b": 1}, {"a": 1, "b": 0})
    tokenizers = [SimpleNamespace(get_vocab=lambda vocabulary=vocabulary: vocabulary) for vocabulary in (first, second)]
    assert not common.same_vocabulary(tokenizers) and common.same_vocabulary(tokenizers[:1] * 3)


# ---------------------------------------------------------------- perplexity, logit lens


def test_perplexity_of_a_text_is_exp_of_the_mean_loss(pair):
    model, reference = pair
    got, tokens = common.perplexity(model, TEXTS[1:2], TRANSPLANTS)
    ids = reference.tokenizer(TEXTS[1]).input_ids
    wanted = [(-reference.logprobs(ids, 1, shifts).double().mean()).exp() for _, shifts in STEERED]
    assert tokens == len(ids) - 1
    close(got, torch.stack(wanted))


@pytest.mark.parametrize("window", [2, 5, 8, 200])
def test_a_long_text_is_read_in_windows_that_count_each_token_once(llama, window):
    model, reference = llama
    texts = [PREFIX, TEXTS[1], "Tom", ""]           # the empty one is <s> alone: nothing to predict
    losses = []
    for ids in (reference.tokenizer(text).input_ids for text in texts):
        done = 1
        while done < len(ids):
            end = min(len(ids), window if done == 1 else done + window // 2)
            begin = max(0, end - window)
            for position in range(done, end):       # one token at a time, with what its window has before it
                losses.append(-reference.logprobs(ids[begin:position + 1], position - begin)[0].double())
            done = end
    got, tokens = common.perplexity(model, texts, [BASE], window)
    assert tokens == len(losses) == sum(len(reference.tokenizer(text).input_ids) - 1 for text in texts)
    close(got[0], torch.stack(losses).mean().exp())


def test_perplexity_of_nothing_is_refused(llama):
    with pytest.raises(ValueError, match="nothing to predict"):
        common.perplexity(llama[0], ["", ""])
    with pytest.raises(ValueError, match="window"):
        common.perplexity(llama[0], TEXTS, window=1)


def test_the_logit_lens_at_the_last_block_is_the_models_own_answer(any_pair):
    model, _ = any_pair
    logits = common.next_token_logits(model, TEXTS, TRANSPLANTS)
    close(common.logit_lens(model, TEXTS, 3, TRANSPLANTS), logits.softmax(-1))


def test_the_logit_lens_is_norm_and_unembedding_at_its_block(any_pair):
    model, reference = any_pair
    got = common.logit_lens(model, TEXTS, 1, TRANSPLANTS)
    for row, (_, shifts) in zip(got, STEERED):
        states = torch.stack([reference.states(text, shifts)[1] for text in TEXTS])
        close(row, reference.head(reference.norm(states)).softmax(-1))


# ================================================================ 8  Records


@pytest.mark.parametrize("successes, n, low, high", [
    (0, 10, .0, .2775), (5, 10, .2366, .7634), (10, 10, .7225, 1.0), (81, 263, .2553, .3662), (15, 148, .0624, .1605),
    (1, 29, .0061, .1718)])
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    """Those of n > 10: Newcombe 1998, Table I, method 3."""
    assert common.wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_a_rate_of_nothing_may_be_anything():
    assert common.wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_the_exact_binomial_test():
    from scipy.stats import binomtest
    r = np.random.default_rng(0)
    for n, share in [(5, 0.5), (40, 0.2), (40, 0.8), (300, 0.6)]:
        before, after = r.random(n) < 0.5, r.random(n) < share
        gained, changed = int((after & ~before).sum()), int((after != before).sum())
        assert common.mcnemar(before, after) == pytest.approx(binomtest(gained, changed).pvalue, rel=1e-9)
        assert common.mcnemar(after.tolist(), before.tolist()) == pytest.approx(common.mcnemar(before, after))
    assert common.mcnemar([True, False], [True, False]) == common.mcnemar([], []) == 1.0


def test_a_bootstrap_interval_is_about_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = common.bootstrap(values)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert common.bootstrap(values.tolist()) == (low, high)
    other = common.bootstrap(values, seed=1)
    assert other != (low, high) and other == pytest.approx((low, high), abs=0.15 * half)


def test_bootstrap_intervals_hold_the_true_mean_about_95_times_in_100():
    r = np.random.default_rng(1)
    intervals = [common.bootstrap(r.exponential(2.0, 60), draws=500) for _ in range(300)]
    assert 0.88 <= np.mean([low <= 2.0 <= high for low, high in intervals]) <= 0.98


def test_a_bootstrap_interval_of_equal_values_is_a_point():
    assert common.bootstrap([0.25] * 7) == (0.25, 0.25) and common.bootstrap([True]) == (1.0, 1.0)


def test_percentiles_count_ties_half():
    assert common.percentile(3, [1, 2, 3, 4]) == 62.5
    assert common.percentile(torch.tensor(2.5), torch.tensor([1.0, 2.0, 3.0, 4.0])) == 50
    assert common.percentile(0, [1, 2]) == 0 and common.percentile(9, iter([1, 2])) == 100


def test_a_record_has_all_fields_and_no_others():
    assert list(common.record(value=0.5, metric="mc1")) == common.RECORD
    with pytest.raises(ValueError, match="valeu"):
        common.record(valeu=0.5)


def test_tables_line_up():
    assert common.markdown(["a", "long"], [["xyz", 1], ["", 2.5]]).splitlines() == [
        "| a   | long |", "|-----|------|", "| xyz | 1    |", "|     | 2.5  |"]


ABOUT = dict(concept="happiness", source="a", target="b", layer=3, method="mean", pairs=60,
             first_prompt="Tom felt\nvery — ünï")


def test_a_concept_vector_comes_back_with_what_it_is(tmp_path, llama, zoo):
    path = tmp_path / "new" / "happiness.safetensors"
    common.save_concept(path, A.double(), **ABOUT, fingerprint=llama[0].fingerprint, r2=0.4)
    vector, about = common.load_concept(path, llama[0])
    assert torch.equal(vector, A) and vector.dtype == torch.float32
    assert about.items() >= {**ABOUT, "r2": 0.4, "token": "last", "sign": "positive minus negative"}.items()
    with pytest.raises(ValueError, match="was made for b"):
        common.load_concept(path, zoo("gpt2")[0])


def test_a_vector_that_does_not_say_what_it_is_is_refused(tmp_path):
    from safetensors.torch import save_file
    for name, metadata in [("bare", None), ("other", {"format": "pt"})]:
        save_file({"vector": A}, tmp_path / name, metadata)
        with pytest.raises(ValueError, match="does not say what it is"):
            common.load_concept(tmp_path / name)
    about = {**ABOUT, "fingerprint": "f"}
    for missing in about:
        with pytest.raises(ValueError, match=f"missing: {missing}$"):
            common.save_concept(tmp_path / "x", A, **{name: about[name] for name in about if name != missing})
    assert not (tmp_path / "x").exists()


def text_of(field) -> str:
    return bytes(field.parts[field.data[0]]).decode()


def as_llama_cpp_reads(path: Path, blocks: int, strength: float = 1.0) -> dict[int, torch.Tensor]:
    """{block, from 0: what is added to its output}, in the steps of llama.cpp: common_control_vector_load_one fills a buffer
    without a row for block 0, llama_adapter_cvec::apply hands it out to the blocks after the first."""
    rows = {}
    for tensor in gguf.GGUFReader(path).tensors:
        prefix, number = tensor.name.split(".")
        assert prefix == "direction" and int(number) > 0, "llama.cpp refuses the file"
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and len(tensor.shape) == 1
        rows[int(number) - 1] = strength * torch.tensor(tensor.data)
    return {block: rows[block - 1] for block in range(1, blocks) if block - 1 in rows}


@pytest.mark.parametrize("layer", [1, 3])
def test_gguf_s_own_reader_finds_one_direction_with_block_sign_and_strength(llama, tmp_path, layer):
    model, _ = llama
    path = tmp_path / "new" / "v.gguf"
    common.export_gguf(path, model, A.double(), layer, -1.5)
    reader = gguf.GGUFReader(path)
    assert text_of(reader.fields["general.architecture"]) == "controlvector"
    assert text_of(reader.fields["controlvector.model_hint"]) == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == len(reader.tensors) == 1
    tensor, = reader.tensors
    assert tensor.name == f"direction.{layer}" and tensor.shape.tolist() == [32]
    assert tensor.data.dtype == np.float32 and np.array_equal(tensor.data, (-1.5 * A).numpy())
    assert [file.name for file in path.parent.iterdir()] == ["v.gguf"]


def test_llama_cpp_s_steps_with_a_plain_hook_give_our_steered_logits(any_pair, tmp_path):
    model, plain = any_pair
    common.export_gguf(tmp_path / "v.gguf", model, A, 2, 3.0)
    added = as_llama_cpp_reads(tmp_path / "v.gguf", blocks=4)
    for strength in (1.0, 0.5):                     # --control-vector, --control-vector-scaled
        wanted = common.next_token_logits(model, TEXTS, [Transplant.of(A, 2, 3.0 * strength)])[0]
        steer = as_llama_cpp_reads(tmp_path / "v.gguf", blocks=4, strength=strength)
        assert torch.allclose(plain.next_logits(TEXTS, steer), wanted, atol=1e-3)
    wanted = common.next_token_logits(model, TEXTS, [Transplant.of(A, 2, 3.0)])[0]
    for wrong in ({1: added[2]}, {3: added[2]}, {2: -added[2]}, {2: 3.0 * added[2]}, {}):
        assert (plain.next_logits(TEXTS, wrong) - wanted).abs().max() > 0.1


def test_the_first_block_cannot_travel_to_llama_cpp(llama, tmp_path):
    with pytest.raises(ValueError, match="no control vector after block 0"):
        common.export_gguf(tmp_path / "v.gguf", llama[0], A, 0, 1.0)
    for export in (common.export_gguf, common.export_steered):
        with pytest.raises(ValueError, match="block 4 does not exist"):
            export(tmp_path / "v", llama[0], A, 4, 1.0)
    assert not list(tmp_path.iterdir())


def test_write_whole_leaves_the_old_file_and_nothing_else_when_it_fails(tmp_path):
    def broken(file):
        file.write(b"half")
        raise RuntimeError("disk full")
    common.write_whole(tmp_path / "kept", lambda file: file.write(b"old"))
    for name in ("kept", "new"):
        with pytest.raises(RuntimeError):
            common.write_whole(tmp_path / name, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_bytes() == b"old"


# ---------------------------------------------------------------- options

FAMILIES = {
    "toy": dict(src="toy/a", tgt=["toy/b"], tgt_chat=["toy/b-chat"], layer="0.75", alpha=[1.0, 2.0], limit=50,
                sentences=100),
    "custom": dict(layer="0.5", alpha=[1.0], limit=-1, sentences=2000),
}


def parse(tmp_path, *options: str) -> argparse.Namespace:
    """Options as a script reads them, with a data folder of the test."""
    argv = [*options] if "--data" in options else ["--data", str(tmp_path), *options]
    return common.parse_options(common.option_parser("A script.", FAMILIES), FAMILIES, argv)


def assert_one_line(capsys, call):
    """call() ends the program with code 2 and one line on stderr that starts with error:."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call()
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err


@pytest.mark.parametrize("line", [
    "--src a", "--tgt a", "--src a --tgt b --tgt-chat c d", "--family no-such", "--family custom", "--no-such-option",
    "--src", "stray", "--alpha x", "--alpha nan", "--alpha 1 inf", "--alpha", "--alpha auto 1", "--alpha 1 auto",
    "--alpha auto auto", "--norm no-such", "--refine median", "--tgt-chat none none",
    "--sentences 0", "--sentences many", "--limit 0", "--limit -2", "--limit 1.5", "--batch-tokens 0",
    "--batch-tokens -1", "--rcond -0.1", "--rcond nan", "--ridge -1", "--ridge nan", "--ridge inf", "--layer x",
    "--layer 1,2,3", "--layer -1", "--layer 1,", "--layer 1.2.3", "--layer .", "--layer auto,3",
    "--data no/such/folder", "--dtype int3", "--seed x", "--remote"])
def test_bad_options_end_in_one_line(tmp_path, capsys, monkeypatch, line):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    assert_one_line(capsys, lambda: parse(tmp_path, *line.split()))


def test_no_option_means_the_toy_family(tmp_path):
    args = parse(tmp_path)
    assert args.family == "toy" and vars(args).items() >= {**FAMILIES["toy"], "src_base": "toy/a"}.items()


def test_own_models_take_nothing_from_the_toy_family(tmp_path):
    args = parse(tmp_path, "--src", "a", "--tgt", "b", "c")
    wanted = {**FAMILIES["custom"], "family": "custom", "src_base": "a", "tgt": ["b", "c"], "tgt_chat": []}
    assert vars(args).items() >= wanted.items()


def test_an_option_goes_before_the_family(tmp_path):
    args = parse(tmp_path, "--family", "toy", "--src", "a", "--alpha", "0.5", "-3", "--layer", "2,3", "--limit", "-1")
    assert (args.src, args.alpha, args.layer, args.limit, args.tgt) == ("a", [0.5, -3.0], "2,3", -1, ["toy/b"])


@pytest.mark.parametrize("line, wanted", [("", [1.0, 2.0]), ("--src a --tgt b", [1.0])], ids=["toy", "own models"])
def test_alpha_auto_stands_for_the_strengths_of_the_family(tmp_path, line, wanted):
    got, same = parse(tmp_path, *line.split(), "--alpha", "auto"), parse(tmp_path, *line.split())
    assert got.alpha == wanted and vars(got) == vars(same) | {"command": got.command}


def test_a_target_without_a_chat_model_says_none(tmp_path):
    assert parse(tmp_path, *"--src a --tgt b c --tgt-chat none d".split()).tgt_chat == [None, "d"]
    assert parse(tmp_path, "--tgt-chat", "none").tgt_chat == [None]


PARTNERS = {"toy": {**FAMILIES["toy"], "src_base": "toy/a-base"}, "custom": FAMILIES["custom"]}


@pytest.mark.parametrize("line, wanted", [
    ("", ("toy/a", "toy/a-base", ["toy/b"], ["toy/b-chat"])),
    ("--family toy --src a", ("a", "a", ["toy/b"], ["toy/b-chat"])),
    ("--family toy --src a --src-base c", ("a", "c", ["toy/b"], ["toy/b-chat"])),
    ("--src-base c", ("toy/a", "c", ["toy/b"], ["toy/b-chat"])),
    ("--family toy --tgt b c", ("toy/a", "toy/a-base", ["b", "c"], [])),
    ("--family toy --tgt b --tgt-chat d", ("toy/a", "toy/a-base", ["b"], ["d"])),
    ("--tgt-chat d", ("toy/a", "toy/a-base", ["toy/b"], ["d"])),
    ("--family toy --src a --tgt b", ("a", "a", ["b"], []))])
def test_a_model_of_one_s_own_does_not_take_the_partner_of_the_one_that_it_replaces(tmp_path, line, wanted):
    argv = ["--data", str(tmp_path), *line.split()]
    args = common.parse_options(common.option_parser("A script.", PARTNERS), PARTNERS, argv)
    assert (args.src, args.src_base, args.tgt, args.tgt_chat) == wanted


def test_help_comes_without_torch_or_transformers():
    """In a process of its own, since this one has loaded both."""
    code = ("import sys, common\n"
            "try: common.parse_options(common.option_parser('A script.', {'toy': {}}), {'toy': {}}, ['--help'])\n"
            "except SystemExit as e: print(e.code, type(sys.modules['torch']).__name__, 'transformers' in sys.modules)")
    folder = Path(common.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout.startswith("usage") and done.stdout.splitlines()[-1] == "0 _LazyModule False", done.stderr


@pytest.mark.parametrize("layer, blocks, side, index", [
    ("0.75", 32, 0, 24), ("0.75", 40, 1, 30), ("0.75", 80, 1, 60), ("0.75", 8, 0, 6), ("24,30", 32, 0, 24),
    ("24,30", 40, 1, 30), ("24", 40, 1, 24), ("0.5,0.75", 8, 0, 4), ("0.5,0.75", 8, 1, 6), ("0", 1, 0, 0),
    ("0.0", 5, 0, 0), ("0.7", 10, 0, 7), ("0.29", 100, 0, 29)])
def test_block_index(layer, blocks, side, index):
    assert common.block_index(layer, blocks, side) == index


@pytest.mark.parametrize("layer, blocks, side", [("32", 32, 0), ("1.0", 32, 0), ("24,40", 40, 1), ("7.5", 8, 0)])
def test_a_block_out_of_range_ends_in_one_line(capsys, layer, blocks, side):
    assert_one_line(capsys, lambda: common.block_index(layer, blocks, side))


# ---------------------------------------------------------------- run folder


@pytest.fixture
def start(tmp_path):
    """start(*options, inputs) -> a Run in the test's folder."""
    def run(*options, inputs={"models": "m1"}):
        return common.Run("exp_test", parse(tmp_path, "--out", str(tmp_path / "out"), *options), inputs)
    return run


def test_a_step_is_computed_once_and_read_back_by_the_next_run(start):
    calls = []
    value = {"α": [1.5, None, True], "text": "ü\n", "n": 3}
    for _ in range(2):
        run = start()
        for _ in range(2):
            assert run.step("steer α 2 / x", lambda: calls.append(1) or value) == value
    assert len(calls) == 1


def test_the_first_value_is_the_one_that_is_read_back(start):
    """What is no JSON value changes at once, not only in the second run."""
    assert start().step("pair", lambda: (1, {2: 3})) == start().step("pair", lambda: None) == [1, {"2": 3}]


def test_steps_of_like_names_are_kept_apart(start):
    run, names = start(), ["a b", "a-b", "a/b", "a +1", "a -1", "α", "β", "a (b)", "a b "]
    assert [run.step(name, lambda: name) for name in names] == names


def test_steps_of_500_characters_are_kept_and_told_apart_by_their_ends(start):
    names = [f"{'x' * 499}{end}" for end in "ab"] + [f"score {'/deep folder' * 40} {end}" for end in (1, 2)] + ["/" * 500]
    run = start()
    assert [run.step(name, lambda: name) for name in names] == names
    assert [start().step(name, lambda: None) for name in names] == names
    assert len(list(run.steps.iterdir())) == len(names) and max(len(path.name) for path in run.steps.iterdir()) < 80


def test_a_step_that_fails_leaves_nothing(start):
    def interrupted():
        raise KeyboardInterrupt
    run = start()
    run.step("done", lambda: 1)
    for bad, error in [(interrupted, KeyboardInterrupt), (lambda: {"x": object()}, TypeError)]:
        with pytest.raises(error):
            run.step("failed", bad)
    assert len(list(run.steps.iterdir())) == 1
    assert start().step("failed", lambda: 2) == 2 and start().step("done", lambda: None) == 1


def test_fresh_starts_over(start):
    start().step("a", lambda: 1)
    assert start("--fresh").step("a", lambda: 2) == 2 and start().step("a", lambda: 3) == 2


def test_changed_inputs_are_refused_until_fresh(start, capsys):
    start().step("a", lambda: 1)
    assert_one_line(capsys, lambda: start(inputs={"models": "m2"}))
    assert start("--fresh", inputs={"models": "m2"}).step("a", lambda: 2) == 2
    assert start(inputs={"models": "m2"}).step("a", lambda: 3) == 2


def test_the_same_inputs_are_the_same_after_json(start):
    inputs = {"layers": (1, 2), "by layer": {3: "x"}}
    start(inputs=inputs).step("a", lambda: 1)
    assert start(inputs=inputs).step("a", lambda: 2) == 1


def test_other_arguments_have_a_folder_of_their_own(start):
    folder = start().folder
    assert folder.parent.name == "exp_test" and folder.name.startswith("a--b--")
    for options in (["--alpha", "3"], ["--seed", "1"], ["--intercept"]):
        assert start(*options).folder != folder
    for options in (["--family", "toy"], ["--fresh"]):                      # the same, said in other words
        assert start(*options).folder == folder


def test_saved_records_read_back(start, capsys):
    run = start()
    records = [common.record(experiment="emotion", alpha=0.0, value=1 / 3, n=10, concept='joy, "big"\nline'),
               common.record(metric="token_acc", value=math.pi)]
    examples = [{"prompt": "a\nb — ü", "said": None}]
    run.save(records, examples, "| a |\n|---|\n| α |")
    for name, rows in (("records.jsonl", records), ("examples.jsonl", examples)):
        assert [json.loads(line) for line in (run.folder / name).read_text().splitlines()] == rows
    with open(run.folder / "records.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: "" if value is None else str(value) for name, value in row.items()} for row in records]
    assert (run.folder / "tables.md").read_text() == "| a |\n|---|\n| α |\n"
    assert capsys.readouterr().out.rstrip().endswith(str(run.folder))
    run.save([], [], "")
    assert (run.folder / "examples.jsonl").read_text() == (run.folder / "records.jsonl").read_text() == ""


def test_the_folder_says_what_was_run(start):
    run = start("--alpha", "2", "4")
    args, environment = (json.loads((run.folder / name).read_text()) for name in ("args.json", "environment.json"))
    assert args["inputs"] == {"models": "m1"} and args["args"]["alpha"] == [2.0, 4.0]
    assert args["command"][0] == "exp_test"
    assert environment["torch"] == torch.__version__ and environment["transformers"] == transformers.__version__
    assert set(environment) >= {"commit", "python", "nnsight", "gpus", "cores"}


def test_a_machine_without_git_can_run(start, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert json.loads((start().folder / "environment.json").read_text())["commit"] == "unknown"


def test_figures_come_as_png_and_pdf(start):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    class Figure(matplotlib.figure.Figure):
        def savefig(self, file, format, **_):
            file.write(format.encode())
    run, figure = start(), plt.figure(FigureClass=Figure)
    run.figure(figure, "figure_2a")
    assert not plt.fignum_exists(figure.number)             # a long run does not keep its figures in memory
    assert [(run.folder / f"figure_2a.{suffix}").read_text() for suffix in ("png", "pdf")] == ["png", "pdf"]


def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_one_line(capsys, lambda: common.Run("exp_test", parse(tmp_path, "--out", str(tmp_path / "file")), {}))


# ================================================================ real models


@pytest.fixture(scope="module")
def happy_sad():
    """Two pretrained models on TinyStories, pairs of happy and sad openings, and fragments of 1,000 stories."""
    if not SHARED.is_dir():
        pytest.skip("the pretrained models and their texts are not at ../shared")
    names = ("stories260K", "babyllama-tok361")
    models = [common.load_model(str(SHARED / "models" / name), device="cpu") for name in names]
    files = [SHARED / "data" / "text" / name for name in ("happy_sad.json", "tinystories_1000.json")]
    texts = [json.loads(file.read_text()) for file in files]
    return *models, *texts


def fragments(stories: list[str], count: int = 1600) -> list[str]:
    """8 to 34 words of each story in turn, begun anywhere."""
    rng, result = random.Random(0), []
    for i in range(count):
        words = stories[i % len(stories)].split()
        start, length = rng.randint(0, max(0, len(words) - 34)), rng.randint(8, 34)
        result.append(" ".join(words[start:start + length]))
    return result


def test_a_happy_vector_of_one_model_makes_another_happy(happy_sad):
    """Mean log p(" happy") - log p(" sad") of the larger model rises with the strength of the smaller one's vector.

    Measured before, with plain hooks and fragments whose sampling is not on record, strengths -4, -2, 0, 1, 2, 4, 8:
    -1.02, -0.74, -0.41, -0.23, -0.04, +0.33, +0.66. Some 125 samplings were tried to find it again: words cut by
    split() and by split(" "); the first words of a story, any words of it, consecutive pieces, one running text,
    whole sentences, sentences without their last 2 to 4 words; stories in turn, drawn, 2 or 4 fragments each; random
    and numpy.random, seeds 0, 1, 7, 42. Strength 0 is always -0.41; none gives all seven within 0.03 (the nearest are
    off by 0.084 and 0.092), and strength 4 gives anything from 0.03 to 1.66. So the sampling here is a plain one, and
    what is tested is strength 0 and the rise."""
    source, target, texts, stories = happy_sad
    v = common.refine(*(common.hidden_states(source, texts["train"][side], [3]) for side in ("pos", "neg")))[0]
    x, y = (common.hidden_states(model, fragments(stories), [3])[:, 0] for model in (source, target))
    fitted = common.fit_affine(x, y)
    moved, alphas = fitted.vector(v), [-4, -2, 0, 1, 2, 4, 8]
    prompts = texts["eval"]["pos"] + texts["eval"]["neg"]

    def happier(prompts: list[str], *transplants: Transplant) -> torch.Tensor:
        pairs = [(prompt, word) for word in texts["continuations"] for prompt in prompts]
        total, _ = common.choice_logprobs(target, pairs, transplants)
        return (total[:, :len(prompts)] - total[:, len(prompts):]).mean(1)
    got = happier(prompts, *(Transplant.of(moved, 3, alpha) for alpha in alphas))
    controls = common.random_directions(moved, 40, seed=0)
    ours, *chance = happier(prompts[::4], *(Transplant.of(d, 3, 4) for d in [moved, *controls])).tolist()
    share = common.percentile(ours, chance)
    print(f"\nn {fitted.n}, held-out R2 {fitted.r2:.3f}, |v| {v.norm():.3f} -> {moved.norm():.4f}")
    print("  ".join(f"{alpha:+d}: {value:+.2f}" for alpha, value in zip(alphas, got)))
    print(f"every 4th prompt at 4: {ours:+.2f}, above {share:.0f} % of 40 random directions, which give "
          f"{np.mean(chance):+.2f} +- {np.std(chance):.2f}")
    assert len(prompts) == 80 and fitted.n == 1280
    assert got[alphas.index(0)] == pytest.approx(-0.41, abs=0.03)
    assert (got.diff() > 0).all()
    assert len(chance) == 40 and share > 50


@pytest.mark.parametrize("words", ["You are trying to access a gated repo.\nMake sure to have access to it at …",
                                   "401 Client Error. Cannot access gated repo for url …"])
def test_a_gated_model_without_access_names_the_licence_page_and_the_variable(words, monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError(words)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refused)
    with pytest.raises(SystemExit) as stopped:
        common.model_config("meta-llama/Llama-2-7b-chat-hf")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf" in error and "HF_TOKEN" in error
