"""ConTrans (Dong et al. 2024): the method, in the order of the paper.

    1  Hidden states   the residual stream after a block, at the last token           Sec. 3
    2  Refine          v = mean(h_positive - h_negative)                              Eq. 1
    3  Affine map      v_hat = v F,  F = V S^-1 U^T Y                                 Eq. 2, App. A
                       LocalMaps: fitted where v is read                              docs/map.md
    4  Transplant      h + alpha v_hat after a block, at every position               Eq. 3
    5  Scoring         choices, labels, text and perplexity under a list of transplants
    6  Engine          what makes it fast: batches, and what is computed only once
    7  Dry run         what all of this would cost, counted without weights

models.py loads a model, harness.py has options, files and NDIF, report.py tables and figures.
Blocks are counted from 0, and "after block k" is the output of block k. Every function takes its
settings as arguments, so all of this can be used from a notebook.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import math
import os
import random
import sys
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from harness import ask_ndif, cached, fail, progress_bar, read_text
from models import (
    NARROW,
    Model,
    Models,
    context_length,
    fit_space,
    label_tokens,
    pad_left,
    residual_stream,
    spaced,
)

import numpy as np
import torch

# ================================================================ 1  Hidden states


def hidden_states(
    model: Model,
    texts: list[str],
    layers: list[int] | None = None,
    transplant: Transplant | None = None,
    positions: list[list[int]] | None = None,
) -> torch.Tensor:
    """The residual stream after each block in `layers` (default: all), last token of each text.

    positions: for each text the tokens to read instead; -1 is the last one. Returns
    [n, len(layers), d] in float32 on the CPU, one row for each token read. The forward pass stops
    after the last block needed. Without a transplant the states are cached on disk. Raises
    ValueError for a block that does not exist or a prompt that does not fit the context,
    FloatingPointError for NaN."""
    if isinstance(layers, (int, str)):
        raise TypeError("layers must be a list of block numbers")
    layers = list(range(model.n_layers)) if layers is None else list(layers)
    for layer in layers:
        _require_block(model, layer)
    positions = positions or [[-1]] * len(texts)
    if transplant is not None:
        return _read_states(model, texts, layers, transplant, positions)
    about = [model.fingerprint, model.remote or model.precision, layers, list(texts), positions]
    return cached("states", about, lambda: _read_states(model, texts, layers, BASE, positions))


def _read_states(model: Model, texts, layers, transplant, positions, lens=False) -> torch.Tensor:
    ids = _encode(model, texts)
    wanted = sorted(set(layers))
    fixed = (wanted, _shifts(model, [transplant]), not model.remote, lens)
    parts = [None] * len(ids)

    def pack(batch):
        from_end = []  # positions counted from the end, for rows are padded on the left
        for i in batch:
            from_end.append([at - len(ids[i]) if at >= 0 else at for at in positions[i]])
        return {"rows": [ids[i] for i in batch], "from_end": from_end}

    for batch, found in _each_batch(model, _state_reader, fixed, pack, list(map(len, ids))):
        counts = [len(positions[i]) for i in batch]
        for i, states in zip(batch, found.float().cpu().split(counts)):
            parts[i] = states
    states = torch.cat(parts)
    _require_finite(states, f"hidden states of {model.name} ({model.precision})")
    return states[:, [wanted.index(layer) for layer in layers]]


def _state_reader(nn, layers: list[int], shifts: dict, stop: bool, lens: bool = False):
    """Make a function that reads the states [n, layers, d] of one batch at the positions from_end
    of each row, in the model's dtype. lens: return token probabilities [n, 1, vocabulary] instead,
    read off the last of these blocks."""

    def read(rows, from_end):
        inputs = pad_left(rows, nn.tokenizer.pad_token_id)
        row = [i for i, places in enumerate(from_end) for _ in places]
        column = [place for places in from_end for place in places]
        with torch.no_grad():
            with nn.trace(inputs, use_cache=False, logits_to_keep=1) as tracer:
                found = []
                for layer in range(max(layers) + 1):
                    if layer in layers or layer in shifts:
                        h = residual_stream(nn.layers[layer].output)
                    if layer in shifts:
                        add_shift(h, shifts[layer])
                    if layer in layers:
                        found.append(h[row, column].cpu())  # blocks may be on several GPUs
                if lens:
                    logits = nn.unembed(nn.final_norm(h[row, column]))
                    found = [logits.float().softmax(-1).cpu()]
                found = torch.stack(found, 1).save()
                if stop:  # in NDIF's sandbox a trace fails after a stop
                    tracer.stop()
        return found

    return read


# ================================================================ 2  Refine


def refine(positive: torch.Tensor, negative: torch.Tensor, method: str = "mean") -> torch.Tensor:
    """Concept vector of each layer [layers, d] from the states of pairs, [n, layers, d] each.

    mean: the paper's mean difference (Eq. 1). pca: first principal component of the differences,
    uncentred, pointing towards the positives. probe: weights of a logistic regression. The last two
    are scaled to the norm of the mean difference, so that alpha means the same for all three."""
    if positive.shape != negative.shape or positive.dim() != 3 or not len(positive):
        shapes = f"{tuple(positive.shape)} and {tuple(negative.shape)}"
        raise ValueError(f"positive and negative must be pairs [n, layers, d]; got {shapes}")
    difference = positive.double() - negative.double()
    v = difference.mean(0)  # Eq. 1
    if method == "mean":
        return v.float()
    directions = []
    for layer in range(len(v)):
        if method == "pca":
            direction = torch.linalg.svd(difference[:, layer], full_matrices=False).Vh[0]
        elif method == "probe":
            direction = _probe_direction(positive[:, layer], negative[:, layer])
        else:
            raise ValueError(f"unknown refine method {method!r}: mean, pca or probe")
        sign = 1.0 if direction @ v[layer] >= 0 else -1.0  # a principal direction has no sign
        directions.append(sign * direction / direction.norm() * v[layer].norm())
    return torch.stack(directions).float()


def permuted_vectors(
    positive: torch.Tensor, negative: torch.Tensor, count: int, seed: int
) -> torch.Tensor:
    """The null of Eq. 1: mean differences [count, layers, d] of pairs [n, layers, d] with the
    labels swapped in a random half of the pairs.

    Exactly half, so that the concept cancels. If each pair were swapped at random, some of the
    concept would be left, and rescaling to the norm of v would amplify it."""
    difference = positive.double() - negative.double()
    half = len(difference) // 2
    signs = torch.zeros(count, len(difference), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for row in signs:
        order = torch.randperm(len(difference), generator=generator)
        row[order[:half]], row[order[half : 2 * half]] = 1.0, -1.0
    v = signs @ difference.flatten(1) / len(difference)
    return v.unflatten(1, difference.shape[1:]).float()


def _probe_direction(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([positive, negative]).double()
    x = x / x.std(0).mean()
    labels = [1] * len(positive) + [0] * len(negative)
    fitted = LogisticRegression(max_iter=1000).fit(x.numpy(), labels)
    return torch.from_numpy(fitted.coef_[0])


def concept_vector(
    model: Model, positive: list[str], negative: list[str], layers: list[int], method: str = "mean"
) -> torch.Tensor:
    """Refine a concept vector from the texts of pairs: [len(layers), d].

    On NDIF the mean difference is computed on the server, batch by batch: no states travel."""
    if len(positive) != len(negative) or not positive:
        raise ValueError(f"need pairs; got {len(positive)} positives, {len(negative)} negatives")
    if not model.remote or method != "mean":
        return refine(
            hidden_states(model, positive, layers), hidden_states(model, negative, layers), method
        )
    ids = list(zip(_encode(model, positive), _encode(model, negative)))
    wanted = sorted(set(layers))
    costs = [2 * max(len(one), len(other)) for one, other in ids]
    total = torch.zeros(len(wanted), model.config.hidden_size, dtype=torch.float64)
    for batch, v in _each_batch(model, _pair_refiner, (wanted,), _rows_of(ids), costs):
        total += len(batch) * v.double()
    v = (total / len(ids)).float()
    _require_finite(v, f"hidden states of {model.name} ({model.precision})")
    return v[[wanted.index(layer) for layer in layers]]


def _pair_refiner(nn, layers: list[int]):
    """Make a function that refines the pairs of one batch, on the server."""
    read = _state_reader(nn, layers, {}, False)

    def refine_batch(rows):
        last = [[-1]] * len(rows)
        positive = read([one for one, _ in rows], last)
        negative = read([other for _, other in rows], last)
        return refine(positive, negative)

    return refine_batch


# ================================================================ 3  Affine map


HELD_OUT = 0.2  # share of the rows that a map is not fitted on (App. A)
PAPER_N_OVER_D = 0.39  # 1,600 sentences for 4,096 dimensions


@dataclass(frozen=True)
class AffineMap:
    """x -> (x - x_mean) F + y_mean with F = V S^-1 U^T Y (Eq. 2).

    F [d1, d2] is never built: v F = (v X^+) Y is a weighted sum of the target's own hidden states.
    Both means are zero unless the map was fitted with an intercept."""

    x_inverse: tuple[torch.Tensor, torch.Tensor]  # factors [d1, r] and [r, n] of X^+, float64
    y: torch.Tensor  # [n, d2], float64
    x_mean: torch.Tensor
    y_mean: torch.Tensor
    r2: float = math.nan  # on held-out sentences, all dimensions pooled
    cosine: float = math.nan  # mean over held-out sentences, about the mean of y
    n: int = 0  # rows it was fitted on
    effective_rank: float = math.nan  # of these rows: (sum of s²)² / sum of s⁴
    length: float | None = None  # |v_hat| / |v|; None: whatever F gives

    def vector(self, v: torch.Tensor) -> torch.Tensor:
        """v_hat [..., d2] of concept vectors v [..., d1], float32. A difference: no intercept."""
        left, right = self.x_inverse
        if v.shape[-1] != len(left):
            raise ValueError(f"v must be [..., {len(left)}], not {tuple(v.shape)}")
        v_hat = v.double() @ left @ right @ self.y  # Eq. 2: v F
        if self.length is not None:
            v_hat *= self.length * v.norm(dim=-1, keepdim=True) / v_hat.norm(dim=-1, keepdim=True)
        return v_hat.float()

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [n, d2] predicted from the source's [n, d1], float32."""
        left, right = self.x_inverse
        predicted = (x.double() - self.x_mean) @ left @ right @ self.y
        return (predicted + self.y_mean).float()


def fit_affine(
    x: torch.Tensor,
    y: torch.Tensor,
    intercept: bool = False,
    rcond: float = 0.0,
    ridge: float = 0.0,
    held_out: float = HELD_OUT,
) -> AffineMap:
    """Least squares from source states x [n, d1] to target states y [n, d2] of the same sentences.

    The defaults are the paper's (Eq. 2, App. A): no intercept, no ridge, and no cut-off except for
    singular values that are zero in float64. ridge is in units of the mean squared singular value.
    The last `held_out` share of the rows is kept for R² and cosine. Computed in float64. Raises
    ValueError for shapes that do not match or fewer than 2 rows, FloatingPointError for NaN."""
    x, y = x.double(), y.double()
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"x and y must be [n, d] with equal n; got {shapes}")
    n = len(x) - int(len(x) * held_out)
    if n < 2:
        raise ValueError(f"{len(x)} sentences are too few to fit a map")
    _require_finite(torch.stack([*x.aminmax(), *y.aminmax()]), "x or y")
    x_mean, y_mean = torch.zeros_like(x[0]), torch.zeros_like(y[0])
    if intercept:
        x_mean, y_mean = x[:n].mean(0), y[:n].mean(0)
    x_fit, y_fit = (x[:n] - x_mean, y[:n] - y_mean) if intercept else (x[:n], y[:n])
    gram = x_fit @ x_fit.T if n < x.shape[1] else x_fit.T @ x_fit
    fitted = AffineMap(
        _pseudo_inverse(x_fit, gram, rcond, ridge),
        y_fit,
        x_mean,
        y_mean,
        n=n,
        effective_rank=(gram.trace() ** 2 / (gram**2).sum()).item(),
    )
    if n == len(x):
        return fitted
    r2, cosine = fit_quality(fitted.states(x[n:]), y[n:], y[:n].mean(0))
    return replace(fitted, r2=r2, cosine=cosine)


def _pseudo_inverse(
    x: torch.Tensor, gram: torch.Tensor, rcond: float, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [d, r] and [r, n] of the pseudo-inverse X^+ = V S^-1 U^T of x [n, d] (Eq. 2).

    gram: X X^T or X^T X, whichever is smaller."""
    n, d = x.shape
    penalty = ridge * (x**2).sum() / min(n, d)  # in units of the mean squared singular value
    if not rcond:
        factors = _gram_inverse(x, gram, penalty)
        if factors is not None:
            return factors
    u, s, vt = torch.linalg.svd(x, full_matrices=False)  # Eq. 2
    keep = s > s[0] * max(rcond, torch.finfo(s.dtype).eps * max(n, d))
    s_inverse = torch.where(keep, s / (s**2 + penalty), 0.0).nan_to_num(0.0)
    return vt.T * s_inverse, u.T


def _gram_inverse(x: torch.Tensor, gram: torch.Tensor, penalty: torch.Tensor) -> tuple | None:
    """The same as X^T (X X^T)^-1 or (X^T X)^-1 X^T: ten times faster than the SVD.

    This squares the condition number of X, so it returns None unless the error in float64 stays
    below the precision of float32."""
    wide = x.shape[0] < x.shape[1]
    gram = gram.clone()
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return None
    inverse = torch.cholesky_inverse(factor)
    condition = gram.trace() * torch.linalg.matrix_norm(inverse)  # an upper bound
    if not condition < 1e8:
        return None
    return (x.T, inverse) if wide else (inverse, x.T)


def fit_quality(
    predicted: torch.Tensor, y: torch.Tensor, mean: torch.Tensor
) -> tuple[float, float]:
    """(R², cosine) of predicted states [n, d] against y, both about `mean` [d] of the training
    rows."""
    predicted, y = predicted.double() - mean, y.double() - mean
    r2 = 1 - ((y - predicted) ** 2).sum() / (y**2).sum()
    cosine = torch.cosine_similarity(predicted, y, dim=1).mean()
    return r2.item(), cosine.item()


class _Maps:
    """Maps between the blocks of two models, each fitted once.

    Subclasses define states(source_block, block, sample), which gives x [n, d1] and y [n, d2], and
    fitted(x, y)."""

    def __init__(self):
        self.known: dict[tuple, AffineMap] = {}

    def fit(
        self,
        source_block: int,
        block: int,
        sample: int = 0,
        shuffled: bool = False,
        n: int | None = None,
    ) -> AffineMap:
        """The map between two blocks. shuffled: fitted on mismatched rows, as a control; n: fitted
        on the first n rows only."""
        key = source_block, block, sample, shuffled, n
        if key not in self.known:
            x, y = [states[:n] for states in self.states(source_block, block, sample)]
            if shuffled:
                y = y[random.Random(sample).sample(range(len(y)), len(y))]
            self.known[key] = self.fitted(x, y)
        return self.known[key]

    def vector(self, v: torch.Tensor, source_block: int, block: int, **which) -> torch.Tensor:
        """v_hat [..., d2] of concept vectors v [..., d1] (Eq. 2). which: as in fit."""
        return self.fit(source_block, block, **which).vector(v)


class AffineMaps(_Maps):
    """Affine maps from the blocks of one base model to those of another.

    x, y: {block: states [n, d] of the same plain sentences} of source and target. Each map is
    fitted on its own random sample of `n_sentences` of them, to show how much depends on the
    sample. norm "match": the norm of v_hat relative to the target's stream is that of v relative to
    the source's."""

    def __init__(self, x: dict, y: dict, n_sentences: int, norm: str = "as-is", **fitting):
        super().__init__()
        self.x, self.y, self.n_sentences, self.norm = x, y, n_sentences, norm
        self.fitting = fitting  # intercept, rcond, ridge

    def rows(self, sample: int = 0) -> list[int]:
        """Numbers of the plain sentences that a map is fitted on, see sample_rows."""
        n = len(next(iter(self.x.values())))
        return sample_rows(n, self.n_sentences, sample)

    def states(self, source_block: int, block: int, sample: int = 0) -> tuple:
        """x [n, d1] and y [n, d2]: both models' states of the sentences of a sample."""
        rows = self.rows(sample)
        return self.x[source_block][rows], self.y[block][rows]

    def fitted(self, x: torch.Tensor, y: torch.Tensor) -> AffineMap:
        return fit_affine(x, y, **self.fitting)

    def vector(self, v: torch.Tensor, source_block: int, block: int, **which) -> torch.Tensor:
        """As _Maps.vector, with the norm that `norm` asks for."""
        v_hat = super().vector(v, source_block, block, **which)
        if self.norm == "match":
            source_norm, norm = self.stream_norms(source_block, block)
            wanted = v.norm(dim=-1, keepdim=True) / source_norm * norm
            v_hat = v_hat / v_hat.norm(dim=-1, keepdim=True) * wanted
        return v_hat

    def stream_norms(self, source_block: int, block: int) -> tuple[float, float]:
        """Mean norm of the residual stream after both blocks."""
        streams = self.x[source_block], self.y[block]
        return tuple(stream.norm(dim=1).mean().item() for stream in streams)


def sample_rows(n: int, size: int, sample: int) -> list[int]:
    """Row numbers of sample 0, 1 … out of n rows: disjoint until all rows are used."""
    order = random.Random(0).sample(range(n), n)
    start = sample * size
    return [order[(start + i) % n] for i in range(min(size, n))]


def plain_texts(path: Path, models: Models, names: list[str], count: int) -> list[str]:
    """The plain text that affine maps are fitted on, at most `count` texts.

    path: one text a line (of a .tsv file its first column, as in WikiSplit), or a .jsonl file with
    {"text": …} on each line. Texts too long for one of the models `names` are left out."""
    texts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if path.suffix == ".jsonl" and line.strip():
            try:
                line = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                fail(f'{path}, line {number}: must be {{"text": …}}')
        texts.append(" ".join(line.split("\t")[0].split()))
    texts = [text for text in texts if len(text.split()) > 4][:count]
    keep = np.ones(len(texts), bool)
    for name in set(names):
        keep &= models.fits(name, texts)
    if not keep.all():
        print(f"{(~keep).sum()} of {len(texts)} plain texts exceed a context: left out")
    if keep.sum() < 10:
        fail(f"{path}: only {keep.sum()} texts fit the contexts; a map needs more")
    return [text for text, kept in zip(texts, keep) if kept]


def cut_ends(texts: list[str]) -> list[str]:
    """Each text without its last 2 to 4 words, as the paper's map reads it (released code)."""
    drop = np.random.RandomState(42)
    return [" ".join(text.split()[: -drop.randint(2, 5)]) for text in texts]


# ---------------------------------------------------------------- fitted where v is read
#
# The linear relation between two models differs from one kind of position to another, so a map
# works best where it was fitted. Local maps are fitted near the states that v is computed from. No
# label, answer or test item is used (docs/map.md).

WINDOWS = 2.0  # texts inside the refinement templates, for each plain text
POSITIONS = 1.6  # positions that a local map is fitted on, for each plain text
LOCAL_RIDGE = 0.01
LAST = -1  # the place of a text's last token


class Context(NamedTuple):
    """Where a concept is read: refinement templates with {text}, and the texts in that slot.

    others: unlabelled texts of the same kind that are used nowhere else. Without any, pieces of
    plain text take their place."""

    templates: tuple[str, ...]
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()


class Pool(NamedTuple):
    """Texts, and the places in each of them where states may be read: character offsets at which
    tokens end, or LAST."""

    texts: list[str]
    places: list[list[int]]


class NearStates(NamedTuple):
    """A source's states x at the places of a pool nearest to the states that v is computed from.

    rows: {block: numbers of the places [n]}, x: {block: [n, d]}."""

    pool: Pool
    rows: dict[int, list[int]]
    x: dict[int, torch.Tensor]


def local_pool(models: Models, names: list[str], context: Context, plain: list[str], seed=0):
    """Candidate places for a local map: other texts of the concept's kind in its refinement
    templates, read at their last token. Without such texts: pieces of plain text in the templates,
    and every place in the plain texts where a token of all models `names` ends."""
    count = int(WINDOWS * len(plain))
    texts = list(context.others)
    inside = random.Random(seed).sample(texts, min(count, len(texts)))
    inside = inside or cut_windows(plain, context.texts, count, seed)
    windows = []
    for i, text in enumerate(inside):
        template = context.templates[i % len(context.templates)]
        windows.append(template.replace("{text}", text))
    keep = np.ones(len(windows), bool)
    for name in names:
        keep &= models.fits(name, windows)
    windows = list(itertools.compress(windows, keep))
    if texts:
        return Pool(windows, [[LAST]] * len(windows))
    places = shared_token_ends([models.tokenizer(name) for name in names], plain)
    return Pool(plain + windows, places + [[LAST]] * len(windows))


def pool_states(model: Model, pool: Pool, blocks: list[int], rows=None) -> torch.Tensor:
    """States [n, len(blocks), d] at the places `rows` of a pool (default: all, text after text)."""
    places = [(i, place) for i, each in enumerate(pool.places) for place in each]
    rows = range(len(places)) if rows is None else rows
    wanted = sorted(set(rows))
    kept: dict[int, list[int]] = {}  # only these texts are read
    for row in wanted:
        i, place = places[row]
        kept.setdefault(i, []).append(place)
    texts = [pool.texts[i] for i in kept]
    positions = []
    for token_at, own in zip(token_ends(model.tokenizer, texts), kept.values()):
        positions.append([LAST if place == LAST else token_at[place] for place in own])
    states = hidden_states(model, texts, blocks, positions=positions)
    number = {row: k for k, row in enumerate(wanted)}
    return states[[number[row] for row in rows]]


def near_states(model: Model, pool: Pool, near: dict, n_sentences: int, seed=0) -> NearStates:
    """The nearest places of a pool. near: {block: states [m, d] that v is computed from}."""
    blocks, rows, nearest = list(near), {}, {}
    x = pool_states(model, pool, blocks)
    for number, block in enumerate(blocks):
        chosen = nearest_positions(x[:, number], near[block], int(POSITIONS * n_sentences))
        chosen.sort()  # by place, since the order of distances can depend on rounding
        rows[block] = random.Random(seed).sample(chosen, len(chosen))  # the last fifth is held out
        nearest[block] = x[rows[block], number]
    return NearStates(pool, rows, nearest)


def fit_local(x: torch.Tensor, y: torch.Tensor) -> AffineMap:
    """A local map of states x [n, d1] and y [n, d2] at near places.

    v_hat is rescaled: relative to the spread of y it is as long as v relative to the spread of x.
    Ridge, and what the source cannot predict, shorten v F."""

    def spread(states):
        return (states - states.mean(0)).double().norm().item()

    fitted = fit_affine(x, y, intercept=True, ridge=LOCAL_RIDGE)
    return replace(fitted, length=spread(y) / spread(x))


class LocalMaps(_Maps):
    """Affine maps fitted at the places of plain text that are nearest to a concept's states.

    near: the source's near states, one for each sample of text. y: for each of them {row of the
    pool: row of the states}, and the target's states [n, len(blocks), d]."""

    def __init__(self, near: list[NearStates], target: Model, blocks: list[int]):
        super().__init__()
        self.near, self.blocks = near, blocks
        self.y: list[tuple[dict, torch.Tensor]] = []
        for each in near:
            rows = sorted({row for chosen in each.rows.values() for row in chosen})
            number = {row: k for k, row in enumerate(rows)}
            self.y.append((number, pool_states(target, each.pool, blocks, rows)))

    def states(self, source_block: int, block: int, sample: int = 0) -> tuple:
        """x [n, d1] and y [n, d2]: both models' states at the chosen positions."""
        near = self.near[sample % len(self.near)]
        number, y = self.y[sample % len(self.near)]
        rows = [number[row] for row in near.rows[source_block]]
        return near.x[source_block], y[rows, self.blocks.index(block)]

    def fitted(self, x: torch.Tensor, y: torch.Tensor) -> AffineMap:
        return fit_local(x, y)

    def r2_where_read(self, other: AffineMap, source_block: int, block: int, along=None) -> float:
        """R² of any map between these blocks where v is read, on the rows held out here.

        along: only in this direction [d2]."""
        x, y = self.states(source_block, block)
        n = self.fit(source_block, block).n
        predicted, y = other.states(x[n:]).double(), y.double()
        if along is not None:
            along = along.double()[:, None]
            predicted, y = predicted @ along, y @ along
        return fit_quality(predicted, y[n:], y[:n].mean(0))[0]


def cut_windows(plain: list[str], texts, count: int, seed: int = 0) -> list[str]:
    """`count` pieces of plain text with the lengths [words] and the final marks of the concept's
    texts."""
    draw = random.Random(seed)
    lengths = [len(text.split()) for text in texts]
    marks = ["" if text[-1].isalnum() else text[-1] for text in texts]
    pieces = []
    for _ in range(count):
        words = draw.choice(plain).split()
        length = min(draw.choice(lengths), len(words))
        start = draw.randint(0, len(words) - length)
        piece = " ".join(words[start : start + length])
        piece = piece[0].upper() + piece[1:]
        pieces.append(piece.rstrip(".,;:!?-\"'") + draw.choice(marks))
    return pieces


def token_ends(tokenizer, texts: list[str]) -> list[dict[int, int]]:
    """For each text {character offset where a token ends: index of the token}."""
    encoded = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    found = []
    for offsets in encoded.offset_mapping:  # special tokens are empty
        found.append({end: i for i, (start, end) in enumerate(offsets) if end > start})
    return found


def shared_token_ends(tokenizers: list, texts: list[str]) -> list[list[int]]:
    """For each text the character offsets where a token of every tokenizer ends."""
    ends = [token_ends(tokenizer, texts) for tokenizer in tokenizers]
    return [sorted(set(first).intersection(*others)) for first, *others in zip(*ends)]


def nearest_positions(x: torch.Tensor, states: torch.Tensor, count: int) -> list[int]:
    """Rows of x [N, d] nearest to `states` [m, d]: the nearest to every state, then the second
    nearest to every state, and so on, by cosine similarity of standardized dimensions."""
    mean, spread = x.mean(0), x.std(0)
    pool = torch.nn.functional.normalize((x - mean) / spread, dim=1)
    wanted = torch.nn.functional.normalize((states - mean) / spread, dim=1)
    similarity = wanted @ pool.T
    depth = min(len(x), max(4, 4 * count // len(states) + 8))
    while True:
        ranked = similarity.topk(depth, dim=1).indices
        chosen = list(dict.fromkeys(ranked.T.flatten().tolist()))
        if len(chosen) >= count or depth == len(x):
            return chosen[:count]
        depth = min(len(x), 2 * depth)


# ================================================================ 4  Transplant


@dataclass(frozen=True)
class Transplant:
    """Which vectors are added after which blocks, at which strength. Transplant() changes nothing.

    Transplant.of(v_hat, layer=6, alpha=2.0)
    Transplant.of(honesty, 6, 2.0) + Transplant.of(fairness, 6, 1.0)"""

    parts: tuple[tuple[int, float, torch.Tensor], ...] = ()

    @staticmethod
    def of(vector: torch.Tensor, layer: int, alpha: float) -> Transplant:
        """alpha * vector [d] after block `layer`, at every position of prompt and continuation."""
        if not isinstance(layer, int):
            raise TypeError(f"layer must be the number of a block, not {layer!r}")
        if vector.dim() != 1:
            raise ValueError(f"vector must be [d], not {tuple(vector.shape)}")
        return Transplant(((layer, float(alpha), vector),))

    def __add__(self, other: Transplant) -> Transplant:
        return Transplant(self.parts + other.parts)

    def __iter__(self):
        raise TypeError("transplants must be a list of Transplants, not one")


BASE = Transplant()


def add_shift(h: torch.Tensor, shift: torch.Tensor) -> None:
    """Add alpha * v_hat, shift [rows or 1, d], to the stream h [rows, tokens, d], in place.

    The only place that adds. Inside a trace of nnsight, this edits the model's forward pass."""
    h += shift[:, None].to(h)  # Eq. 3


def _shifts(model: Model, transplants: list[Transplant]) -> dict[int, torch.Tensor]:
    """{block: alpha * v_hat of each transplant [len(transplants), d]}, blocks in forward order.

    alpha = 0 adds exact zeros, which leave every bit of the stream as it was."""
    width = model.config.hidden_size
    shifts: dict[int, torch.Tensor] = {}
    for row, transplant in enumerate(transplants):
        if not isinstance(transplant, Transplant):
            raise TypeError(f"transplant must be a Transplant, not {type(transplant).__name__}")
        for layer, alpha, vector in transplant.parts:
            _require_block(model, layer)
            if len(vector) != width:
                raise ValueError(
                    f"a vector of width {len(vector)} does not fit {model.name} ({width})"
                )
            shifts.setdefault(layer, torch.zeros(len(transplants), width))
            shifts[layer][row] += alpha * vector.float().cpu()
    for layer, shift in shifts.items():
        # RMSNorm squares the stream. If that overflows, it returns zeros and no NaN.
        _require_finite((shift**2).sum(1), f"alpha * v_hat after block {layer}")
        if not model.remote:
            cast = shift.to(model.nn.dtype)
            _require_finite(cast, f"alpha * v_hat in {model.nn.dtype}")
    return dict(sorted(shifts.items()))


def random_directions(v: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Random directions of the norm of v [d], isotropic: [count, d]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, len(v), generator=generator)
    return rescale(directions, v)


def rescale(direction: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`direction` [..., d] with the norm of v [..., d]."""
    return direction / direction.norm(dim=-1, keepdim=True) * v.norm(dim=-1, keepdim=True)


def control_directions(
    maps: AffineMaps,
    v: torch.Tensor,
    others: dict[str, torch.Tensor],
    source_block: int,
    block: int,
    n_maps: int,
    n_random: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Controls for the effect of v_hat: {variant: direction [d]}.

    "map k": v through maps fitted on other samples of the plain text. All others have v_hat's norm.
    "few sentences": v through a map with the paper's number of sentences per dimension; "shuffled
    map": v through a map of mismatched sentences; "other NAME": another concept's vector through
    the same map; "random r": isotropic directions."""
    v_hat = maps.vector(v, source_block, block)
    directions = {}
    for number in range(1, n_maps):
        directions[f"map {number}"] = maps.vector(v, source_block, block, sample=number)
    few = round(PAPER_N_OVER_D * len(v) / (1 - HELD_OUT))
    if few < maps.fit(source_block, block).n:
        directions["few sentences"] = rescale(maps.vector(v, source_block, block, n=few), v_hat)
    shuffled = maps.vector(v, source_block, block, shuffled=True)
    directions["shuffled map"] = rescale(shuffled, v_hat)
    for name, other in others.items():
        directions[f"other {name}"] = rescale(maps.vector(other, source_block, block), v_hat)
    for number, direction in enumerate(random_directions(v_hat, n_random, seed)):
        directions[f"random {number}"] = direction
    return directions


class Point(NamedTuple):
    """Where a vector is read, where it is added, and how strongly."""

    source_block: int
    block: int
    alpha: float


class Vector(NamedTuple):
    """A concept vector: of which concept, refined in which model, and that model's base model."""

    concept: str
    model: str
    base: str


class Vectors:
    """Concept vectors of several models in the space of several targets; each model is read once.

    pairs(concept, model): positive and negative prompts. blocks(model): the blocks whose states are
    needed. context(concept, model): where a concept is read, for LocalMaps. sentences: plain text
    to fit maps between base models on. maps: options of AffineMaps."""

    def __init__(self, models, wanted, targets, pairs, blocks, context, sentences, refine, **maps):
        self.models, self.wanted, self.targets = models, list(dict.fromkeys(wanted)), list(targets)
        self.pairs, self.blocks, self.context = pairs, blocks, context
        self.sentences, self.refine, self.map_options = sentences, refine, maps
        self.refined: dict[Vector, dict[int, torch.Tensor]] = {}
        self.known_states: dict[str, dict[str, torch.Tensor]] = {}  # model -> prompt -> [blocks, d]
        self.plain: dict[str, dict[int, torch.Tensor]] = {}
        self.known_maps: dict[tuple, AffineMaps | LocalMaps] = {}
        self.known_permuted: dict[tuple, torch.Tensor] = {}

    def at(self, vector: Vector, target: str, point: Point, method="contrans", **which):
        """v_hat [d] of a vector in the space of a target (Eq. 2). which: see AffineMaps.vector."""
        v = self.v(vector, point.source_block)
        if vector.base == target:  # its own vector needs no map
            return v
        maps = self.maps(vector, target, method)
        return maps.vector(v, point.source_block, point.block, **which)

    def controls(
        self, vector, target, point, others: list, method="contrans", n_permuted=0, **counts
    ) -> dict[str, torch.Tensor]:
        """control_directions of a vector, and "permuted k". others: other concepts' vectors."""
        blocks = point.source_block, point.block
        v, maps = self.v(vector, point.source_block), self.maps(vector, target, method)
        known = {other.concept: self.v(other, point.source_block) for other in others}
        directions = control_directions(maps, v, known, *blocks, **counts)
        if n_permuted:
            null = self.permuted(vector, target, point, method, n_permuted, counts["seed"])
            directions |= {f"permuted {k}": each for k, each in enumerate(null)}
        return directions

    def permuted(
        self, vector: Vector, target: str, point: Point, method: str, count: int, seed: int
    ) -> torch.Tensor:
        """Vectors of permuted labels through the same map, rescaled to v_hat: [count, d]."""
        key = vector, target, point[:2], method, count, seed
        if key not in self.known_permuted:
            column = self.blocks(vector.model).index(point.source_block)
            positive, negative = [states[:, [column]] for states in self.pair_states(vector)]
            null = permuted_vectors(positive, negative, count, seed)[:, 0]
            null = self.maps(vector, target, method).vector(null, point.source_block, point.block)
            self.known_permuted[key] = rescale(null, self.at(vector, target, point, method))
        return self.known_permuted[key]

    def map_quality(self, vector, target, point, method, n_maps=1, where_read=True) -> list[dict]:
        """Quality of the maps of a vector, as fields of report.record.

        where_read: also R² where v is read, for which a local map is fitted."""
        blocks = point.source_block, point.block
        maps = self.maps(vector, target, method)
        found = []
        for number in range(n_maps):
            fitted = maps.fit(*blocks, sample=number)
            metrics = {"r2": fitted.r2, "cosine": fitted.cosine}
            if where_read:
                local = self.maps(vector, target, "contrans-local")
                metrics["r2_where_read"] = local.r2_where_read(fitted, *blocks)
            metrics["n_over_d"] = fitted.n / len(fitted.x_mean)
            metrics["effective_rank"] = fitted.effective_rank
            about = {"concept": "map", "variant": f"map {number}" if number else None}
            about |= {"part": "held-out", "n": fitted.n}
            found += [about | {"metric": name, "value": x} for name, x in metrics.items()]
        return found

    def vector_quality(self, vector, target, point, method, own=None, where_read=True) -> dict:
        """{metric: value}: norms of v, v_hat and both streams; R² along v_hat where v is read; and
        the cosine of v_hat with the target's own vector."""
        blocks = point.source_block, point.block
        v, v_hat = self.v(vector, blocks[0]), self.at(vector, target, point, method)
        streams = self.plain[vector.base][blocks[0]], self.plain[target][blocks[1]]
        found = {"norm_v": v.norm().item(), "norm_v_hat": v_hat.norm().item()}
        for name, states in zip(("stream_source", "stream_target"), streams):
            found[name] = states.norm(dim=1).mean().item()
        if where_read:
            fitted = self.maps(vector, target, method).fit(*blocks)
            local = self.maps(vector, target, "contrans-local")
            found["r2_along_v"] = local.r2_where_read(fitted, *blocks, along=v_hat)
        if own:
            theirs = self.v(own, point.block)
            found["norm_own"] = theirs.norm().item()
            found["cosine_to_own"] = torch.cosine_similarity(v_hat, theirs, dim=0).item()
        return found

    def describe(self, vector: Vector, target: str, point: Point, method="contrans") -> dict:
        """What harness.save_concept writes beside v_hat at a point."""
        positive, _ = self.pairs(vector.concept, vector.model)
        fitted = self.maps(vector, target, method).fit(point.source_block, point.block)
        return {
            "concept": vector.concept,
            "source": vector.model,
            "target": target,
            "fingerprint": self.models.fingerprint(target),
            "source_layer": point.source_block,
            "layer": point.block,
            "alpha": point.alpha,
            "method": self.refine,
            "map": method,
            "pairs": len(positive),
            "first_prompt": positive[0],
            "fitted_on": fitted.n,
            "r2": fitted.r2,
            "cosine": fitted.cosine,
        }

    def pair_states(self, vector: Vector) -> list[torch.Tensor]:
        """States [n, blocks, d] of a vector's positive and of its negative prompts."""
        states, pairs = self.prompt_states(vector.model), self.pairs(vector.concept, vector.model)
        return [torch.stack([states[text] for text in side]) for side in pairs]

    def states_of_context(self, name: str, context: Context) -> dict[int, torch.Tensor]:
        """{block: states [m, d] of all prompts of a model that are read in this context}."""
        states = self.prompt_states(name)
        states = torch.stack([states[text] for text in self.prompts(name, context)])
        return dict(zip(self.blocks(name), states.unbind(1)))

    def prompt_states(self, name: str) -> dict[str, torch.Tensor]:
        """{prompt: states [blocks, d]} of all vectors of a model, which share many prompts."""
        if name not in self.known_states:
            texts = self.prompts(name)
            states = hidden_states(self.models.load(name), texts, self.blocks(name))
            self.known_states[name] = dict(zip(texts, states))
        return self.known_states[name]

    def prompts(self, name: str, context: Context | None = None) -> list[str]:
        """The prompts of all vectors of a model, or of those that are read in one context."""
        texts: dict[str, None] = {}
        for vector in self.wanted:
            if vector.model == name and context in (None, self.context(vector.concept, name)):
                for side in self.pairs(vector.concept, name):
                    texts |= dict.fromkeys(side)
        return list(texts)

    def v(self, vector: Vector, block: int) -> torch.Tensor:
        """v [d] after a block of the model that it was refined in (Eq. 1)."""
        self._read_models()
        return self.refined[vector][block]

    def maps(self, vector: Vector, target: str, method: str = "contrans"):
        """The paper's maps, or for "contrans-local" those fitted where this vector is read."""
        self._read_models()
        if method == "contrans":
            key = vector.base, target
        else:
            context = self.context(vector.concept, vector.model)
            key = vector.model, vector.base, target, context
        if key not in self.known_maps:
            if method == "contrans":
                x, y = self.plain[vector.base], self.plain[target]
                self.known_maps[key] = AffineMaps(x, y, **self.map_options)
            else:
                near = self._read_near(vector, target, context)
                self.known_maps[key] = LocalMaps(
                    near, self.models.load(target), self.blocks(target)
                )
        return self.known_maps[key]

    def _read_near(self, vector: Vector, target: str, context: Context) -> list[NearStates]:
        """The near states of the source's base model, for each sample of text."""
        size = self.map_options["n_sentences"]
        names, others = [vector.base, target], context.others
        samples = max(1, len(self.sentences) // size)
        near = self.states_of_context(vector.model, context)
        found = []
        for sample in range(samples):
            rows = sample_rows(len(self.sentences), size, sample)
            plain = [self.sentences[row] for row in rows]
            rows = sample_rows(len(others), len(others) // samples, sample)
            own = context._replace(others=tuple(others[row] for row in rows))
            pool = local_pool(self.models, names, own, plain, seed=sample)
            model = self.models.load(vector.base)
            found.append(near_states(model, pool, near, len(plain), seed=sample))
        return found

    def _read_models(self) -> None:
        if self.refined:
            return
        mapped = {vector.base for vector in self.wanted} | set(self.targets)
        for name in sorted(mapped | {vector.model for vector in self.wanted}):
            model, blocks = self.models.load(name), self.blocks(name)
            for vector in self.wanted:
                if vector.model == name:
                    if model.remote:  # no states travel
                        pairs = self.pairs(vector.concept, name)
                        v = concept_vector(model, *pairs, blocks, self.refine)
                    else:
                        v = refine(*self.pair_states(vector), self.refine)
                    self.refined[vector] = dict(zip(blocks, v))
            if name in mapped:
                states = hidden_states(model, cut_ends(self.sentences), blocks)
                self.plain[name] = dict(zip(blocks, states.unbind(1)))


# ================================================================ 5  Scoring


def next_token_logits(
    model: Model, texts: list[str], transplants: list[Transplant] = (BASE,)
) -> torch.Tensor:
    """Logits of the token after each text: [transplants, texts, vocabulary], float32 on the CPU."""
    return _logits(model, [(row, []) for row in _encode(model, texts)], transplants)


def choice_logprobs(
    model: Model,
    pairs: list[tuple[str, str]],
    transplants: list[Transplant] = (BASE,),
    eft: tuple[Model, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [nats] of each continuation given its context, and whether it is greedy.

    pairs: (context, continuation). Both are tokenized together and split where the context's
    tokens end. eft: (small chat, small base) whose difference in logits is added at every token
    (emulated fine-tuning, proxy-tuning); all three need one vocabulary. Returns float32 sums and
    booleans, [transplants, pairs] each. Raises ValueError if a continuation changes the tokens of
    its context, or if the vocabularies differ."""
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise TypeError("pairs must be a list of (context, continuation)")
    contexts = [fit_space(model.tokenizer, *pair)[0] for pair in pairs]
    contexts = _encode(model, contexts)
    rows = _encode(model, [context + text for context, text in pairs])
    for context, row, pair in zip(contexts, rows, pairs):
        if row[: len(context)] != context or len(row) == len(context):
            raise ValueError(f"tokens do not split between context and continuation: {pair!r}")
    _require_eft_fits(model, eft, rows)
    tails = [row[len(context) :] for context, row in zip(contexts, rows)]
    return _logprobs(model, contexts, tails, transplants, eft, share_heads=True)


def score_labels(
    model: Model, prompts: list[str], labels: list[str], transplants: list[Transplant] = (BASE,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which label each prompt is continued with: two integer tensors [transplants, prompts].

    A blank comes before the label, unless the prompts end in white space (all or none of them).
    said: index of the label that the most likely next token begins, -1 for none (Token Acc).
    preferred: index of the label whose first token has the highest logit among the labels (Logit
    Acc). Where labels share their first token (a character-level tokenizer), as many tokens as tell
    them apart take its place, scored by log-probability. Raises ValueError if no number of tokens
    does."""
    _require_strings("labels", labels)
    _require_strings("texts", prompts)
    if len({prompt[-1:].isspace() for prompt in prompts}) > 1:
        raise ValueError("some prompts end in white space, others do not")
    words = label_tokens(model.tokenizer, prompts[0], labels)
    label = spaced(labels[0], prompts[0])
    prompts = [fit_space(model.tokenizer, prompt, label)[0] for prompt in prompts]
    rows = _encode(model, prompts)
    heads = [row for row in rows for _ in words]
    tails = words * len(rows)
    sums, greedy = _logprobs(model, heads, tails, transplants, share_heads=True)
    sums = sums.unflatten(1, (len(rows), len(words)))
    greedy = greedy.unflatten(1, (len(rows), len(words)))
    said = torch.where(greedy.any(-1), greedy.int().argmax(-1), -1)
    return said, sums.argmax(-1)


def perplexity(
    model: Model,
    texts: list[str],
    transplants: list[Transplant] = (BASE,),
    window: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Perplexity of the texts under each transplant [transplants], and the number of its tokens.

    A text longer than `window` tokens (default: the context, at most 1,024) is read in windows that
    overlap by half. Every token except a text's first is counted once."""
    window = window or min(context_length(model.config), 1024)
    if window < 2:
        raise ValueError("a window of fewer than 2 tokens predicts nothing")
    _require_strings("texts", texts)
    heads, tails = [], []
    for ids in model.tokenizer(list(texts)).input_ids:
        end = min(window, len(ids))
        if end > 1:
            heads.append(ids[:1])
            tails.append(ids[1:end])
        while end < len(ids):
            overlap = window - min(window // 2, len(ids) - end)
            end += window - overlap
            heads.append(ids[end - window : end - window + overlap])
            tails.append(ids[end - window + overlap : end])
    if not heads:
        raise ValueError("no text has two tokens or more, so there is nothing to predict")
    sums, _ = _logprobs(model, heads, tails, transplants, share_heads=False)
    tokens = sum(map(len, tails))
    return (-sums.double().sum(1) / tokens).exp(), tokens


def logit_lens(
    model: Model, texts: list[str], layer: int, transplants: list[Transplant] = (BASE,)
) -> torch.Tensor:
    """Token probabilities [transplants, texts, vocabulary] read off the stream after `layer` (B.3).

    Final norm and unembedding are applied to the last token there; the blocks above are skipped."""
    _require_block(model, layer)
    last = [[-1]] * len(texts)
    lenses = [_read_states(model, texts, [layer], each, last, lens=True) for each in transplants]
    return torch.stack(lenses)[:, :, 0]


def token_changes(
    model: Model, texts: list[str], layer: int, transplant: Transplant
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The tokens that gain and that lose most probability under a transplant (Table 8).

    Two lists of (token, number of texts in which it is among the ten that change most), most
    frequent first. Probabilities are those of logit_lens."""
    gains, losses = Counter(), Counter()
    for first in range(0, len(texts), 100):  # a whole vocabulary for each text
        some = texts[first : first + 100]
        plain, moved = logit_lens(model, some, layer, [BASE, transplant])
        gains.update((moved - plain).topk(10).indices.flatten().tolist())
        losses.update((plain - moved).topk(10).indices.flatten().tolist())
    found = []
    for counts in (gains, losses):
        tokens = counts.most_common()
        found.append([(model.tokenizer.decode([token]).strip(), n) for token, n in tokens])
    return tuple(found)


def generate(
    model: Model,
    texts: list[str],
    transplants: list[Transplant] = (BASE,),
    max_new_tokens: int = 32,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eft: tuple[Model, ...] = (),
) -> list[list[str]]:
    """The continuation of each text under each transplant, [transplants][texts]. Every token of
    text and continuation is steered.

    Greedy, or sampled with `seed`: the k-th token of a text is drawn with the same random number
    under every transplant and in every batch. A text ends at the end-of-sequence token. eft:
    (small chat, small base) as in choice_logprobs; a model on NDIF is then asked for its logits
    token by token."""
    transplants = list(transplants)
    rows = _encode(model, texts)
    _require_eft_fits(model, eft, rows, max_new_tokens)
    _require_room(model, rows, max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(texts), max_new_tokens, generator=generator)
    options = (max_new_tokens, temperature if sample else 0.0, top_p)
    several = eft and any(each.remote for each in (model, *eft))  # places, one of them NDIF
    cached = all(_sharing(each)[1] for each in (model, *eft))
    write = _written if cached and not several else _written_by_logits
    result = [[""] * len(texts) for _ in transplants]
    for member, i, ids in write(model, rows, transplants, eft, options, uniform):
        result[member][i] = model.tokenizer.decode(ids, skip_special_tokens=True)
    return result


# ================================================================ 6  Engine
#
# Everything above asks for one of three things: hidden states, logits after given tokens, or text.
# It is fast because nothing that is shared is computed twice:
#
# blocks    Nothing below the first steered block depends on the transplant. Each prompt goes
#           through those blocks once, and through the blocks above once per transplant.
# cache     Tokens that all prompts begin with (a few-shot prefix) are read once, as a KV cache.
#           Generation continues from a cache of the prompt; finished texts leave the batch.
# branches  Continuations of one context (the choices of a question, the labels of a prompt) are
#           one row: the context, then each continuation, with a mask that hides them from each
#           other.
# pieces    The unembedding is applied to a few states at a time, in float32: all logits of a
#           batch would take more memory than the model.
#
# All of it is exact. Architectures differ in what they support, so _sharing tests each of the four
# against a plain forward pass on a few tokens of every model, and does without those that fail.
#
# A prompt with its continuations is a tree: (head, tails), token ids of the context and of each
# continuation. Its logits are read at its nodes: the last token of the head, then all tokens of
# each tail but its last. Functions that run on NDIF (_state_reader, _scorer, _writer …) are sent
# there as source text: they take the nnsight model `nn`, tensors, numbers, lists and tuples, and
# use no class of this repo.

JOBS_SENT = 2  # to NDIF at once: one runs, the other waits there
CACHED_PER_COMPUTED = 8  # tokens that only take memory; so many count as one that is computed
MIN_PREFIX = 32  # tokens that a shared prefix must have to be worth a cache
BRANCH_TOKENS = 512  # tokens of all tails of one tree
UNEMBED_ROWS = 256  # of logits in memory at once: 125 MB for 128,256 tokens


def _each_batch(model: Model, make, fixed: tuple, pack, costs: list[float], batches_per_job=8):
    """Yield (indices, answer) for each batch, where answer is make(nn, *fixed)(**pack(indices)).

    costs: computed tokens of each row; a batch costs at most model.batch_tokens. On NDIF several
    batches are one job, and the next job is sent while one runs. A job that runs out of memory, or
    takes the server too long, is halved."""
    ask = _asker(model, make, fixed, pack)
    batches = _batches(model, costs)
    per_job, ahead = (batches_per_job, JOBS_SENT) if model.remote else (1, 1)
    halves, sent = [], deque()  # jobs; jobs that were sent, and functions that wait for the answers
    with progress_bar(len(costs), model.name, delay=10, leave=False) as bar:
        while True:
            while len(sent) < ahead:
                job = halves.pop() if halves else list(itertools.islice(batches, per_job))
                if not job:
                    break
                sent.append((job, ask(job)))
            if not sent:
                return
            job, wait = sent.popleft()
            try:
                answers = wait()
            except (torch.OutOfMemoryError, TimeoutError) as error:
                halves += _halves(model, job, error)
                continue
            yield from zip(job, answers)
            bar.update(sum(map(len, job)))


def _asker(model: Model, make, fixed: tuple, pack):
    """ask(job) starts a job, which is a list of batches, and returns a function that waits for its
    answers. A local model computes when it is waited for."""
    nn = model.nn
    if model.cost:
        nn, make = model, COUNTERS[make]
    start = functools.cache(lambda: make(nn, *fixed))  # what batches share is computed once

    def ask_here(job):
        return lambda: [start()(**pack(batch)) for batch in job]

    def ask_there(job):
        packs, about = [pack(batch) for batch in job], [model.fingerprint, model.remote]
        return ask_ndif(nn, model.remote, make, fixed, packs, about)

    return ask_there if model.remote else ask_here


def _batches(model: Model, costs: list[float]):
    """Yield lists of row indices, longest rows first, so that rows of similar length are together.

    Once a batch is a quarter full, it ends before a much shorter row: padding would cost more."""
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    while order:
        largest = costs[order[0]]
        size = int(model.batch_tokens // largest)  # batch_tokens may have shrunk meanwhile
        alike = sum(costs[i] > 0.85 * largest for i in order[:size])
        size = max(1, alike, size // 4)
        yield order[:size]
        order = order[size:]


def _halves(model: Model, job: list[list[int]], error: Exception) -> list:
    """A job of several batches as two, of one batch as two smaller ones; second half first."""
    middle = len(job) // 2
    if middle:
        return [job[middle:], job[:middle]]
    [batch] = job
    middle = len(batch) // 2
    if not middle:
        raise error
    model.batch_tokens = max(1, model.batch_tokens // 2)
    gc.collect()
    torch.cuda.empty_cache()
    return [[batch[middle:]], [batch[:middle]]]


def _rows_of(rows: list):
    return lambda batch: {"rows": [rows[i] for i in batch]}


def _encode(model: Model, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the tokenizer adds."""
    _require_strings("texts", texts)
    rows = model.tokenizer(list(texts)).input_ids
    _require_room(model, rows)
    if not all(rows):
        raise ValueError("an empty prompt has no last token")
    return rows


# ---------------------------------------------------------------- one forward pass


def _forward(nn, trees, shifts: dict, copies: int, sharing: tuple, prefix=(), keep_cache=False):
    """One forward pass of `trees` under each of `copies` transplants.

    shifts: {block: [copies, d]}. prefix: keys and values of each block for the tokens before all
    trees. Returns [copies, nodes, d or vocabulary], see _run, and with keep_cache keys and values
    of each block."""
    from transformers.cache_utils import DynamicCache

    past = prefix[0][0].shape[2] if prefix else 0
    inputs, rows, columns = _pack_trees(trees, nn.tokenizer.pad_token_id, past, nn.dtype)
    n = len(trees)
    shifts = {block: shift.repeat_interleave(n, 0) for block, shift in shifts.items()}
    if not (sharing[0] and shifts):
        inputs = {name: _repeat(value, copies) for name, value in inputs.items()}
    rows = torch.cat([rows + n * copy for copy in range(copies)])
    columns = columns.repeat(copies)
    cache = _kv_cache(prefix, past) if prefix else DynamicCache() if keep_cache else None
    found = _run(nn, inputs, rows, columns, shifts, sharing, cache)
    kept = [(layer.keys, layer.values) for layer in cache.layers] if keep_cache else None
    return found.unflatten(0, (copies, -1)), kept


def _run(nn, inputs, rows, columns, shifts: dict, sharing: tuple, cache=None):
    """One forward pass that adds shifts, {block: [rows of the result, d]}.

    If the result has more rows than the inputs, the blocks up to the first steered one run once for
    all copies of a row. Returns the inputs of the unembedding at the nodes (rows, columns),
    [nodes, d], or the logits [nodes, vocabulary] if a model cannot unembed in pieces."""
    copies = max(map(len, shifts.values()), default=0) // len(inputs["input_ids"])
    parting = min(shifts) if copies > 1 else None
    options = {"use_cache": False} if cache is None else {"past_key_values": cache}
    with torch.no_grad():
        with nn.trace(inputs, **options):
            for block in range(len(nn.layers)):
                if parting is not None and block > parting:
                    args, kwargs = nn.layers[block].inputs
                    args = (args[0], *_repeat(args[1:], copies))  # args[0] is the stream
                    nn.layers[block].inputs = args, _repeat(kwargs, copies)
                if block == parting:
                    output = nn.layers[block].output
                    h = residual_stream(output).repeat(copies, 1, 1)
                    add_shift(h, shifts[block])
                    nn.layers[block].output = (h, *output[1:]) if isinstance(output, tuple) else h
                elif block in shifts:
                    add_shift(residual_stream(nn.layers[block].output), shifts[block])
            h = nn.unembed.input  # a large matrix: only what is asked for goes through it
            h = h[rows.to(h.device), columns.to(h.device)]
            if sharing[3]:
                nn.unembed.input = h[None, :0]  # nothing does here, see _unembed
                found = h.save()
            else:
                nn.unembed.input = h[None]
                found = nn.output.logits[0].save()
    return found


def _unembed(nn, states, sharing: tuple):
    """Logits [..., vocabulary], float32, of what _run returns.

    In bfloat16, logits above 16 would be multiples of 0.125, and many of them equal."""
    if not sharing[3]:
        return states.float()
    weight, bias = nn.unembed.weight, nn.unembed.bias
    if weight.is_cuda and weight.dtype != torch.float32:
        logits = torch.mm(states.flatten(0, -2), weight.T, out_dtype=torch.float32)
        logits = logits.unflatten(0, states.shape[:-1])
    else:
        logits = torch.nn.functional.linear(states.float(), weight.float())
    return logits if bias is None else logits + bias


def _pack_trees(trees, pad_id: int, past: int, dtype):
    """Inputs of trees, left-padded, and where their nodes are: rows [nodes], columns [nodes].

    past: tokens of the prefix that all trees continue."""
    packed = []
    for head, tails in trees:
        tokens, branch = list(head), [0] * len(head)  # 0 is the head, 1, 2 … are the tails
        positions = list(range(past, past + len(head)))
        for number, tail in enumerate(tails, 1):
            tokens += tail[:-1]
            branch += [number] * (len(tail) - 1)
            positions += range(past + len(head), past + len(head) + len(tail) - 1)
        packed.append((tokens, branch, positions, len(head) - 1))
    width = max(len(tokens) for tokens, *_ in packed)
    ids = torch.full((len(trees), width), pad_id)
    branches = torch.full((len(trees), width), -1)  # -1 is padding
    places = torch.full((len(trees), width), 0)
    rows, columns = [], []
    for row, (tokens, branch, positions, last) in enumerate(packed):
        start = width - len(tokens)
        ids[row, start:] = torch.tensor(tokens)
        branches[row, start:] = torch.tensor(branch)
        places[row, start:] = torch.tensor(positions)
        rows += [row] * (len(tokens) - last)
        columns += range(start + last, width)
    mask = (branches >= 0).long()
    if past:
        mask = torch.cat([torch.ones(len(trees), past, dtype=torch.long), mask], 1)
    if branches.max() > 1:
        mask = _tree_mask(branches, past, dtype)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    return inputs, torch.tensor(rows), torch.tensor(columns)


def _tree_mask(branches: torch.Tensor, past: int, dtype) -> torch.Tensor:
    """[rows, 1, width, past + width]: 0 where a token may look, a very negative number elsewhere.

    A token sees the prefix, its head, and its own branch up to itself."""
    n, width = branches.shape
    query, key = branches[:, :, None], branches[:, None, :]
    sees = (((key == 0) | (key == query)) & (key >= 0)).tril()
    sees |= torch.eye(width, dtype=torch.bool)  # padding sees itself: softmax over nothing is NaN
    sees = torch.cat([torch.ones(n, width, past, dtype=torch.bool), sees], 2)
    mask = torch.zeros(sees.shape, dtype=dtype)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def _repeat(value, copies: int):
    """An argument of a block (mask, positions …) with its rows repeated."""
    if isinstance(value, torch.Tensor):
        return value.repeat(copies, *[1] * (value.dim() - 1)) if value.dim() > 1 else value
    if isinstance(value, dict):
        return {name: _repeat(each, copies) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeat(each, copies) for each in value)
    return value  # a KV cache, a flag


def _kv_cache(blocks, filled: int):
    """A KV cache that begins with `filled` tokens of keys and values [rows, H, room, d] of each
    block. New tokens are written in place while there is room. Otherwise everything is copied, each
    row as often as there are new rows for it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    def extended(whole, new):
        end = filled + new.shape[2]
        if whole.shape[2] < end:
            old, whole = whole, new.new_empty(*new.shape[:2], end, new.shape[3])
            whole.unflatten(0, (len(old), -1))[:, :, :, :filled] = old[:, None]
        whole[:, :, filled:end] = new
        return whole[:, :, :end]

    def cache_layer(keys, values):
        layer = DynamicLayer()
        layer.keys, layer.values = keys[:, :, :filled], values[:, :, :filled]
        layer.is_initialized = True

        def update(new_keys, new_values, *_args, **_kwargs):
            layer.keys, layer.values = extended(keys, new_keys), extended(values, new_values)
            return layer.keys, layer.values

        layer.update = update
        return layer

    cache = DynamicCache()
    cache.layers = [cache_layer(keys, values) for keys, values in blocks]
    return cache


def _sharing(model: Model) -> tuple[bool, bool, bool, bool]:
    """Which of blocks, cache, branches and pieces work with this model; tested once."""
    if model.sharing is None:
        fixed = (model.config.hidden_size, model.precision == "torch.float32")
        [(_, model.sharing)] = _each_batch(model, _try_sharing, fixed, lambda batch: {}, [1])
        names = ("blocks", "a KV cache", "branches", "an unembedding in pieces")
        missing = [name for name, works in zip(names, model.sharing) if not works]
        if missing:
            print(f"{model.name} does without {', '.join(missing)}: slower, or more memory")
    return model.sharing


def _try_sharing(nn, width: int, exact: bool):
    first, second = [3, 4, 5, 6], [3, 4, 5, 7, 8]
    generator = torch.Generator().manual_seed(0)
    shifts = {len(nn.layers) // 2: torch.randn(2, width, generator=generator)}

    def at_once(sharing, trees=((first, []), (second, []))):
        states, _ = _forward(nn, trees, shifts, 2, sharing)
        return _unembed(nn, states, sharing)

    def from_cache(sharing):
        pieces = [[first[:-1]], [second[:-1]]]
        _, blocks = _read_prompts(nn, pieces, shifts, 2, sharing, room=0)
        mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]] * 2)
        own = {block: shift.repeat_interleave(2, 0) for block, shift in shifts.items()}
        logits = _read_tokens(nn, torch.tensor([6, 8, 6, 8]), mask, own, sharing, blocks)
        return logits.unflatten(0, (2, 2))

    def from_branches(sharing):
        tree = (first[:3], [first[3:] + [9], second[3:] + [9]])
        return at_once(sharing, [tree])[:, [1, 3]]  # the last token of each tail

    def attempt():
        plain = at_once((False, False, False, False))

        def agrees(compute, *sharing) -> bool:
            try:
                logits = compute(sharing)
            except Exception:  # whatever this architecture raises
                return False
            return bool((logits - plain).abs().max() <= (1e-3 if exact else 0.1) * plain.std())

        blocks = agrees(at_once, True, False, False, False)
        return (
            blocks,
            agrees(from_cache, blocks, True, False, False),
            agrees(from_branches, blocks, False, True, False),
            agrees(at_once, blocks, False, False, True),
        )

    return attempt


# ---------------------------------------------------------------- scores of trees


def _scores(model: Model, trees: list, transplants: list[Transplant], reduce: bool):
    """Yield (indices of transplants [t, 1], indices of trees, scores).

    scores are the logits [t, nodes, vocabulary] of these trees, or with `reduce` the result of
    _reduce, computed where the model is: full logits of a real vocabulary are 100 MB a batch."""
    sharing = _sharing(model)
    heads = [head for head, _ in trees]
    past = _common_prefix(heads) if sharing[1] and _fits_window(model, trees) else 0
    prefix = heads[0][:past]
    costs = []
    for head, tails in trees:
        own = len(head) - past + sum(len(tail) - 1 for tail in tails)
        costs.append(max(own, (past + own) / CACHED_PER_COMPUTED))

    def pack(batch):
        return {"trees": [(trees[i][0][past:], trees[i][1]) for i in batch]}

    copy = reduce and sharing[0] and sharing[3]  # else all logits of the copies are in memory
    for members, weight in _groups(model, transplants, max(costs), copy):
        copies = len(members)
        shifts = _shifts(model, [transplants[i] for i in members])
        fixed = (prefix, shifts, copies, sharing, reduce)
        all_costs = [cost * max(1, weight * copies) for cost in costs]
        per_job = 1
        if reduce:  # little comes back; every job reads the prefix anew
            per_job = max(8, int(4 * past * copies / model.batch_tokens))
        for batch, scores in _each_batch(model, _scorer, fixed, pack, all_costs, per_job):
            _require_finite(
                scores[0] if reduce else scores, f"logits of {model.name} ({model.precision})"
            )
            yield torch.tensor(members)[:, None], batch, scores


def _groups(model: Model, transplants, cost: float, copy=False):
    """Yield (indices of transplants that are computed together, cost of a token under each).

    cost: that of the most expensive row. Transplants with the same first block are neighbours,
    since they share the blocks up to it. copy: after the last block, tokens are only copied."""

    def first_block(i: int) -> int:
        return min(_shifts(model, [transplants[i]]), default=sys.maxsize)

    order = sorted(range(len(transplants)), key=first_block)
    copied = [i for i in order if copy and first_block(i) >= model.n_layers - 1]
    computed = order[: len(order) - len(copied)]
    for some, weight in ((computed, 1), (copied, 1 / CACHED_PER_COMPUTED)):
        size = max(1, min(UNEMBED_ROWS, int(model.batch_tokens / (weight * cost))))
        for first in range(0, len(some), size):
            yield some[first : first + size], weight


def _scorer(nn, prefix: list[int], shifts: dict, copies: int, sharing: tuple, reduce: bool):
    """Make a function that scores one batch of trees; the prefix is read once, here."""
    cache = ()
    if prefix:
        _, cache = _forward(nn, [(prefix, [])], shifts, copies, sharing, keep_cache=True)

    def score(trees):
        states, _ = _forward(nn, trees, shifts, copies, sharing, cache)
        if reduce:
            return _reduce(lambda some: _unembed(nn, some, sharing), states, trees)
        return _unembed(nn, states, sharing)

    return score


def _reduce(unembed, states: torch.Tensor, trees) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each tail, and whether all its tokens are the likeliest: [T, tails].

    unembed(states [T, some nodes, …]) makes logits of them, a few at a time."""
    nodes, tokens, tail_of = [], [], []
    n_tails = start = 0
    for _, tails in trees:
        last = 0  # the node before the tail that comes next; node 0 is the end of the head
        for tail in tails:
            nodes += [start, *range(start + last + 1, start + last + len(tail))]
            tokens += tail
            tail_of += [n_tails] * len(tail)
            last += len(tail) - 1
            n_tails += 1
        start += last + 1
    nodes, tokens, tail_of = (
        torch.tensor(each, device=states.device) for each in (nodes, tokens, tail_of)
    )
    sums = torch.zeros(len(states), n_tails, dtype=torch.float64, device=states.device)
    misses = torch.zeros_like(sums)
    size = max(1, UNEMBED_ROWS // len(states))
    for first in range(0, start, size):
        logits = unembed(states[:, first : first + size])
        here = (nodes >= first) & (nodes < first + size)
        at = nodes[here] - first
        given = logits[:, at, tokens[here]]
        logprobs = given - logits.logsumexp(-1)[:, at]
        sums.index_add_(1, tail_of[here], logprobs.double())
        missed = given < logits.amax(-1)[:, at]
        misses.index_add_(1, tail_of[here], missed.double())
    return sums.float().cpu(), (misses == 0).cpu()


def _logprobs(
    model: Model, heads, tails, transplants, eft=(), share_heads=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of tails[i] after heads[i], and whether it is greedy: [transplants, n]."""
    transplants = list(transplants)
    if model.cost:  # has few logits
        tails = [[token % NARROW for token in tail] for tail in tails]
    trees, members = _group_by_head([model, *eft], heads, tails, share_heads)
    sums = torch.empty(len(transplants), len(heads))
    greedy = torch.empty(len(transplants), len(heads), dtype=torch.bool)
    for some, batch, scores in _scores(model, trees, transplants, reduce=not eft):
        if eft:
            mine = [trees[i] for i in batch]
            for sign, small in zip((1, -1), eft):
                scores = _add_logits(scores, sign, _logits(small, mine))
            scores = _reduce(lambda logits: logits, scores, mine)
        indices = [i for tree in batch for i in members[tree]]
        sums[some, indices], greedy[some, indices] = scores
    return sums, greedy


def _group_by_head(models: list[Model], heads, tails, share_heads: bool) -> tuple[list, list]:
    """(trees, members): trees of the tails that continue the same head, and which tails they
    hold."""
    alone = [(head, [tail]) for head, tail in zip(heads, tails)]
    # The mask of a batch of trees knows no window, so every row of it must fit the window.
    branching = all(_sharing(model)[2] and _fits_window(model, alone) for model in models)
    trees, members, open_trees = [], [], {}
    for i, (head, tail) in enumerate(zip(heads, tails)):
        tree = open_trees.get(tuple(head)) if share_heads else None
        if tree is not None:
            size = sum(len(other) - 1 for other in trees[tree][1]) + len(tail) - 1
            whole = [(head, [*trees[tree][1], tail])]
            fits = all(_fits_window(model, whole) for model in models)
            if size and not (branching and fits and size <= BRANCH_TOKENS):
                tree = None
        if tree is None:
            tree = open_trees[tuple(head)] = len(trees)
            trees.append((head, []))
            members.append([])
        trees[tree][1].append(tail)
        members[tree].append(i)
    return trees, members


def _logits(model: Model, trees: list, transplants=(BASE,)) -> torch.Tensor:
    """Logits at all nodes of the trees, in their order: [transplants, nodes, vocabulary]."""
    ends = np.cumsum([1 + sum(len(tail) - 1 for tail in tails) for _, tails in trees]).tolist()
    nodes = [range(*each) for each in zip([0, *ends], ends)]  # of each tree
    result = torch.empty(0)
    for members, batch, logits in _scores(model, trees, list(transplants), reduce=False):
        if not len(result):
            result = torch.empty(len(transplants), ends[-1], logits.shape[-1])
        result[members, [node for i in batch for node in nodes[i]]] = logits.cpu()
    return result


def _add_logits(logits: torch.Tensor, sign: int, others: torch.Tensor) -> torch.Tensor:
    """logits + sign * others, both without the padding at the end of either unembedding."""
    width = min(logits.shape[-1], others.shape[-1])
    return logits[..., :width] + sign * others[..., :width].to(logits)


def _common_prefix(rows: list[list[int]]) -> int:
    """Number of tokens that all rows begin with; 0 if too few to be worth a cache."""
    if len(rows) < 2:
        return 0
    shared = os.path.commonprefix(rows)
    length = min(len(shared), min(map(len, rows)) - 1)  # every row keeps a token of its own
    return length if length >= MIN_PREFIX else 0


def _fits_window(model: Model, trees: list) -> bool:
    """Whether these trees fit the sliding window of the model, if it has one."""
    names = ("sliding_window", "window_size", "attention_chunk_size")
    sizes = [getattr(model.config, name, None) for name in names]
    window = min([size for size in sizes if size], default=sys.maxsize)
    return all(len(head) + sum(map(len, tails)) <= window for head, tails in trees)


# ---------------------------------------------------------------- text


def _written(model: Model, rows, transplants, eft, options: tuple, uniform):
    """Yield (transplant, row, its new tokens)."""
    max_new_tokens = options[0]
    small = tuple((each if each.cost else each.nn, _sharing(each)) for each in eft)
    for members, _ in _groups(model, transplants, max(map(len, rows))):
        copies = len(members)

        def pack(batch, copies=copies):
            # As many rows as are computed at once are fewer than those whose tokens are kept.
            size = max(1, int(model.batch_tokens // (copies * len(rows[batch[0]]))))
            pieces = [batch[first : first + size] for first in range(0, len(batch), size)]
            return {
                "pieces": [[rows[i] for i in piece] for piece in pieces],
                "uniform": uniform[batch],
            }

        shifts = _shifts(model, [transplants[i] for i in members])
        fixed = (shifts, copies, _sharing(model), options, small)
        costs = [copies * (len(row) + max_new_tokens) / CACHED_PER_COMPUTED for row in rows]
        for batch, new_tokens in _each_batch(model, _writer, fixed, pack, costs):
            for member, written in zip(members, new_tokens.unflatten(0, (copies, -1))):
                for i, ids in zip(batch, written):
                    yield member, i, ids[ids >= 0]


def _writer(nn, shifts: dict, copies: int, sharing: tuple, options: tuple, small: tuple):
    """Make a function that continues one batch under all transplants: new tokens
    [copies * rows, max_new_tokens], -1 after the end."""
    max_new_tokens, *sampling = options
    ends = _end_tokens(nn)
    models = [(1, nn, shifts, sharing)]
    models += [(sign, each, {}, its) for sign, (each, its) in zip((1, -1), small)]

    def write(pieces, uniform):
        lengths = torch.tensor([len(row) for piece in pieces for row in piece])
        n, width = len(lengths), max(lengths)
        alive = torch.arange(copies * n)  # rows that have not ended, copy after copy
        mask = (torch.arange(width) >= width - lengths.repeat(copies)[:, None]).long()
        new_tokens = torch.full((copies * n, max_new_tokens), -1)
        scores, caches = [], []
        for _, each, own, its in models:
            logits, blocks = _read_prompts(each, pieces, own, copies, its, max_new_tokens)
            scores.append(logits)
            caches.append(blocks)
        for step in range(max_new_tokens):
            logits = scores[0]
            for (sign, *_), others in zip(models[1:], scores[1:]):
                logits = _add_logits(logits, sign, others)
            _require_finite(logits.amax(-1), "logits")
            token = _choose(logits, uniform[alive % n, step], *sampling)
            new_tokens[alive, step] = token
            going = ~torch.isin(token, ends)
            if step + 1 == max_new_tokens or not going.any():
                break
            alive, token = alive[going], token[going]
            mask = torch.nn.functional.pad(mask[going], (0, 1), value=1)
            for i, (_, each, own, its) in enumerate(models):
                if not going.all():
                    caches[i] = [(keys[going], values[going]) for keys, values in caches[i]]
                of_rows = {block: shift[alive // n] for block, shift in own.items()}
                scores[i] = _read_tokens(each, token, mask, of_rows, its, caches[i])
        return new_tokens

    return write


def _end_tokens(nn):
    """The tokens that end a text; a model may have several, or none."""
    ends = nn.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.long)


def _read_prompts(nn, pieces, shifts: dict, copies: int, sharing: tuple, room: int):
    """Logits after each prompt [copies * rows, vocabulary], and keys and values of each block, all
    prompts padded on the left, with room for more tokens."""
    own = copies if shifts else 1
    logits, kept = [], []
    for piece in pieces:
        trees = [(row, []) for row in piece]
        states, blocks = _forward(nn, trees, shifts, own, sharing, keep_cache=True)
        logits.append(_unembed(nn, states, sharing).expand(copies, -1, -1))
        kept.append(blocks)
    width = max(blocks[0][0].shape[2] for blocks in kept)

    def join(parts):
        _, heads, _, size = parts[0].shape
        whole = parts[0].new_zeros(copies, sum(map(len, pieces)), heads, width + room, size)
        start = 0
        for part, piece in zip(parts, pieces):
            end = start + len(piece)
            part = part.unflatten(0, (-1, len(piece)))  # [1 or copies, rows, …]
            whole[:, start:end, :, width - part.shape[3] : width] = part
            start = end
        return whole.flatten(0, 1)

    joined = []
    for _ in range(len(kept[0])):
        keys, values = zip(*[blocks.pop(0) for blocks in kept])  # memory is freed block by block
        joined.append((join(keys), join(values)))
    return torch.cat(logits, 1).flatten(0, 1), joined


def _read_tokens(nn, tokens, mask, shifts: dict, sharing: tuple, blocks):
    """Logits [rows, vocabulary] after one more token of each row, whose keys and values are added
    to those of the blocks."""
    inputs = {"input_ids": tokens[:, None], "attention_mask": mask}
    inputs["position_ids"] = mask.sum(1, keepdim=True) - 1
    rows = torch.arange(len(tokens))
    cache = _kv_cache(blocks, mask.shape[1] - 1)
    states = _run(nn, inputs, rows, torch.zeros_like(rows), shifts, sharing, cache)
    return _unembed(nn, states, sharing)


def _choose(logits, uniform, temperature: float, top_p: float):
    """A token for each row: where the cumulative probability reaches `uniform` [rows], random
    numbers from 0 to 1. At temperature 0 the most likely one."""
    if not temperature:
        return logits.argmax(-1).cpu()
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(temperature)(None, logits)
    logits = TopPLogitsWarper(top_p)(None, logits)
    mass = logits.softmax(-1).cumsum(-1)
    wanted = uniform[:, None].to(mass) * mass[:, -1:]
    return torch.searchsorted(mass, wanted, right=True)[:, 0].clamp(max=mass.shape[1] - 1).cpu()


def _written_by_logits(model: Model, rows, transplants, eft, options: tuple, uniform):
    """As _written, but every new token takes the logits after the whole text: for models on NDIF
    (with EFT), and for models without a KV cache."""
    max_new_tokens, *sampling = options
    ends = _end_tokens(model.nn)
    for member, transplant in enumerate(transplants):
        alive = torch.arange(len(rows))
        new_tokens = torch.full((len(rows), max_new_tokens), -1)
        for step in range(max_new_tokens):
            whole = [[*rows[i], *new_tokens[i, :step].tolist()] for i in alive]
            trees = [(row, []) for row in whole]
            [logits] = _logits(model, trees, [transplant])
            for sign, small in zip((1, -1), eft):
                logits = _add_logits(logits, sign, _logits(small, trees)[0])
            token = _choose(logits, uniform[alive, step], *sampling)
            new_tokens[alive, step] = token
            alive = alive[~torch.isin(token, ends)]
            if not len(alive):
                break
        for i, ids in enumerate(new_tokens):
            yield member, i, ids[ids >= 0]


# ---------------------------------------------------------------- EFT, a baseline


def _require_eft_fits(model: Model, eft, rows, new_tokens: int = 0) -> None:
    vocabularies = [each.tokenizer.get_vocab() for each in (model, *eft)]
    if any(vocabulary != vocabularies[0] for vocabulary in vocabularies):
        names = ", ".join(each.name for each in (model, *eft))
        raise ValueError(f"EFT adds logits token by token, but the vocabularies of {names} differ")
    for each in eft:
        _require_room(each, rows, new_tokens)


# ---------------------------------------------------------------- checks


def _require_strings(name: str, texts) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a list of strings")
    if not len(texts):
        raise ValueError(f"{name} is empty")


def _require_block(model: Model, layer: int) -> None:
    if not 0 <= layer < model.n_layers:
        last = model.n_layers - 1
        raise ValueError(f"block {layer} does not exist in {model.name} (0 to {last})")


def _require_room(model: Model, rows: list[list[int]], new_tokens: int = 0) -> None:
    longest = max(map(len, rows)) + new_tokens
    limit = context_length(model.config)
    if longest > limit:
        raise ValueError(f"{longest} tokens do not fit the context of {model.name} ({limit})")


def _require_finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"NaN or infinity in {what}: try another --dtype or a smaller alpha"
        )


# ================================================================ 7  Dry run
#
# A script runs unchanged on models without weights: instead of computing a batch, _each_batch
# counts what _state_reader, _scorer, _writer … would do, and answers with made-up numbers.


def _count_states(model: Model, layers, shifts, stop: bool, lens: bool = False):
    def read(rows, from_end):
        places = torch.tensor([place for own in from_end for place in own])
        width = max(map(len, rows))
        blocks = slice(max(layers) + 1 if stop else None)
        model.cost.add(len(rows) * width, width, blocks)
        states = torch.randn(len(places), len(layers), NARROW, generator=model.cost.generator)
        states[places == -1] += 2  # near_states finds that ends of texts are alike
        return states

    return read


def _count_pairs(model: Model, layers):
    read = _count_states(model, layers, {}, False)
    return lambda rows: refine(*(read(side, [[-1]] * len(rows)) for side in zip(*rows)))


def _count_scores(model: Model, prefix, shifts, copies: int, sharing, reduce: bool):
    if prefix:
        model.cost.add_pass([len(prefix)], 0, shifts, copies, 0)

    def score(trees):
        sizes = [len(head) + sum(len(tail) - 1 for tail in tails) for head, tails in trees]
        lengths = torch.tensor([len(tail) for _, tails in trees for tail in tails])
        nodes = len(trees) + int((lengths - 1).sum())
        model.cost.add_pass(sizes, len(prefix), shifts, copies, nodes)
        if not reduce:
            return torch.arange(float(NARROW)).expand(copies, nodes, -1)
        noise = torch.randn(copies, len(lengths), generator=model.cost.generator)
        return noise / 100 - lengths, noise > 0  # no transplant changes the perplexity

    return score


def _count_texts(model: Model, shifts, copies: int, sharing, options: tuple, small: tuple):
    count = options[0]  # of new tokens

    def write(pieces, uniform):
        rows = [row for piece in pieces for row in piece]
        sizes = list(map(len, rows))
        for each, own in [(model, shifts), *((each, {}) for each, _ in small)]:
            each.cost.add_pass(sizes, 0, own, copies if own else 1, len(rows))
            read = copies * len(rows) * (count - 1)  # one by one, the last is not read
            each.cost.add(read, max(sizes) + count / 2, slice(None), read)
        return torch.tensor([(row * count)[:count] for row in rows]).repeat(copies, 1)

    return write


COUNTERS = {
    _state_reader: _count_states,
    _pair_refiner: _count_pairs,
    _scorer: _count_scores,
    _writer: _count_texts,
    _try_sharing: lambda *_: lambda: (True, True, True, True),
}
