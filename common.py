"""ConTrans (Dong et al. 2024): the method, in the order of the paper.

    1  Hidden states   the residual stream after a block, at the last token           Sec. 3
    2  Refine          v = mean(h_positive - h_negative)                              Eq. 1
    3  Affine map      v_hat = v F,  F = V S^-1 U^T Y                                 Eq. 2, App. A
    4  Transplant      h + alpha v_hat after a block, at every position               Eq. 3
    5  Scoring         choices, labels, text and perplexity under a list of transplants
    6  Engine          what makes it fast: batches, and what is computed only once
    7  Dry run         what all of this would cost, counted without weights

vectors.py has maps on samples of text, local maps, controls and all vectors of an experiment;
models.py loads a model; harness.py has options, files and NDIF; report.py tables and figures.
Blocks are counted from 0, and "after block k" is the output of block k. Every function takes its
settings as arguments, so all of this can be used from a notebook.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import sys
from collections import Counter, deque
from dataclasses import dataclass, replace

from harness import ask_ndif, cached, progress_bar
from models import (
    NARROW,
    Model,
    context_length,
    encode_pairs,
    label_tokens,
    residual_stream,
    spaced,
)

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
    if not layers:
        raise ValueError("layers is empty")
    for layer in layers:
        _require_block(model, layer)
    positions = positions or [[-1]] * len(texts)
    if transplant is not None:
        return _read_states(model, texts, layers, transplant, positions)
    about = [model.fingerprint, model.remote or model.precision, layers, list(texts), positions]
    return cached("states", about, lambda: _read_states(model, texts, layers, BASE, positions))


def _read_states(model: Model, texts, layers, transplant, positions, lens=False) -> torch.Tensor:
    rows, from_end, unread = [], [], []
    for row, places in zip(_encode(model, texts), positions, strict=True):
        if not all(-len(row) <= place < len(row) for place in places):
            raise ValueError(f"a text of {len(row)} tokens has no positions {places}")
        places = [place % len(row) for place in places]
        end = max(places, default=0) + 1  # no later token changes what is read
        rows.append(row[:end])
        from_end.append([place - end for place in places])  # rows are padded on the left
        unread.append(row[: min(places, default=0)])
    wanted = sorted(set(layers))
    shifts = _shifts(model, [transplant])
    parts = [None] * len(rows)
    trees = [(row, []) for row in rows]
    for prefix, members in _by_prefix(model, trees, unread):
        past = len(prefix)
        sharing = _sharing(model) if past else (False,) * 5
        fixed = (prefix, wanted, shifts, sharing, not model.remote, lens)
        costs = [_row_cost(past, len(rows[i]) - past) for i in members]

        def pack(batch, past=past, members=members):
            some = [members[i] for i in batch]
            return {"rows": [rows[i][past:] for i in some], "from_end": [from_end[i] for i in some]}

        for batch, found in _each_batch(model, _state_reader, fixed, pack, costs):
            some = [members[i] for i in batch]
            counts = [len(positions[i]) for i in some]
            for i, states in zip(some, found.float().cpu().split(counts)):
                parts[i] = states
    states = torch.cat(parts)
    _require_finite(states, f"hidden states of {model.name} ({model.precision})")
    return states[:, [wanted.index(layer) for layer in layers]]


def _state_reader(nn, prefix, layers: list[int], shifts: dict, sharing, stop: bool, lens: bool):
    """Make a function that reads the states [n, layers, d] of one batch at the positions from_end
    of each row, in the model's dtype. prefix: tokens before all rows, read once, here. lens: return
    token probabilities [n, 1, vocabulary] instead, read off the last of these blocks."""
    cache, buffers = (), {}
    if prefix:
        _, cache = _forward(nn, [(prefix, [])], shifts, 1, sharing, keep_cache=True)

    def read(rows, from_end):
        trees = [(row, []) for row in rows]
        inputs, *_ = _pack_trees(trees, nn.tokenizer.pad_token_id, len(prefix), nn.dtype)
        kept = {"use_cache": False}
        if prefix:
            kept = {"past_key_values": _kv_cache(cache, len(prefix), buffers)}
        read_rows = [i for i, places in enumerate(from_end) for _ in places]
        read_columns = [place for places in from_end for place in places]
        with torch.no_grad():
            with nn.trace(inputs, logits_to_keep=1, **kept) as tracer:
                found = []
                for layer in range(max(layers) + 1):
                    if layer in layers or layer in shifts:
                        h = residual_stream(nn.layers[layer].output)
                    if layer in shifts:
                        add_shift(h, shifts[layer])
                    if layer in layers:
                        states = h[read_rows, read_columns]
                        found.append(states.cpu())  # blocks may be on several GPUs
                if lens:
                    logits = nn.unembed(nn.final_norm(h[read_rows, read_columns]))
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
        positive_states = hidden_states(model, positive, layers)
        negative_states = hidden_states(model, negative, layers)
        return refine(positive_states, negative_states, method)
    ids = list(zip(_encode(model, positive), _encode(model, negative)))
    wanted = sorted(set(layers))
    costs = [2 * max(map(len, pair)) for pair in ids]
    total = torch.zeros(len(wanted), model.config.hidden_size, dtype=torch.float64)
    for batch, v in _each_batch(model, _pair_refiner, (wanted,), _rows_of(ids), costs):
        total += len(batch) * v.double()
    v = (total / len(ids)).float()
    _require_finite(v, f"hidden states of {model.name} ({model.precision})")
    return v[[wanted.index(layer) for layer in layers]]


def _pair_refiner(nn, layers: list[int]):
    """Make a function that refines the pairs of one batch, on the server."""
    read = _state_reader(nn, [], layers, {}, (), stop=False, lens=False)

    def refine_batch(rows):
        last = [[-1]] * len(rows)
        positive = read([one for one, _ in rows], last)
        negative = read([other for _, other in rows], last)
        return refine(positive, negative)

    return refine_batch


# ================================================================ 3  Affine map


HELD_OUT = 0.2  # share of the rows that a map is not fitted on, as in the released code


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
    stretch: float | None = None  # |v_hat| / |v|; None: as F gives it

    def vector(self, v: torch.Tensor) -> torch.Tensor:
        """v_hat [..., d2] of concept vectors v [..., d1], float32. A difference: no intercept."""
        left, right = self.x_inverse
        if v.shape[-1] != len(left):
            raise ValueError(f"v must be [..., {len(left)}], not {tuple(v.shape)}")
        v_hat = v.double() @ left @ right @ self.y  # Eq. 2: v F
        if self.stretch is not None:
            norm = self.stretch * v.norm(dim=-1, keepdim=True)
            v_hat *= norm / v_hat.norm(dim=-1, keepdim=True)
        return v_hat.float()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """The target's hidden states [n, d2] predicted from the source's [n, d1], float32."""
        left, right = self.x_inverse
        predicted = (x.double() - self.x_mean) @ left @ right @ self.y
        return (predicted + self.y_mean).float()


def fit_affine(
    x: torch.Tensor,
    y: torch.Tensor,
    intercept: bool = False,
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
    _require_finite(x, "x")
    _require_finite(y, "y")
    x_fit, y_fit = x[:n], y[:n]
    x_mean, y_mean = torch.zeros_like(x[0]), torch.zeros_like(y[0])
    if intercept:
        x_mean, y_mean = x_fit.mean(0), y_fit.mean(0)
        x_fit, y_fit = x_fit - x_mean, y_fit - y_mean
    gram = x_fit @ x_fit.T if n < x.shape[1] else x_fit.T @ x_fit
    fitted = AffineMap(
        _pseudo_inverse(x_fit, gram, ridge),
        y_fit,
        x_mean,
        y_mean,
        n=n,
        effective_rank=(gram.trace() ** 2 / (gram**2).sum()).item(),
    )
    if n == len(x):
        return fitted
    predicted = fitted.predict(x[n:])
    r2, cosine = fit_quality(predicted, y[n:], y[:n].mean(0))
    return replace(fitted, r2=r2, cosine=cosine)


def _pseudo_inverse(
    x: torch.Tensor, gram: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [d, r] and [r, n] of the pseudo-inverse X^+ = V S^-1 U^T of x [n, d] (Eq. 2).

    gram: X X^T or X^T X, whichever is smaller."""
    n, d = x.shape
    penalty = ridge * (x**2).sum() / min(n, d)  # in units of the mean squared singular value
    factors = _gram_inverse(x, gram, penalty)
    if factors is not None:
        return factors
    u, s, vt = torch.linalg.svd(x, full_matrices=False)  # Eq. 2
    zero = torch.finfo(s.dtype).eps * max(n, d)  # relative to the largest, in float64
    keep = s > s[0] * zero
    s_inverse = torch.where(keep, s / (s**2 + penalty), 0.0)
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
    residual = y - predicted
    r2 = 1 - (residual**2).sum() / (y**2).sum()
    cosine = torch.cosine_similarity(predicted, y, dim=1).mean()
    return r2.item(), cosine.item()


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
            if len(vector) != width:
                raise ValueError(
                    f"a vector of width {len(vector)} does not fit {model.name} ({width})"
                )
            if layer not in shifts:
                shifts[layer] = torch.zeros(len(transplants), width)
            shifts[layer][row] += alpha * vector.float().cpu()
    for layer, shift in shifts.items():
        _require_block(model, layer)
        # RMSNorm squares the stream. If that overflows, it returns zeros and no NaN.
        _require_finite((shift**2).sum(1), f"alpha * v_hat after block {layer}")
        if not model.remote:
            cast = shift.to(model.nn.dtype)
            _require_finite(cast, f"alpha * v_hat in {model.nn.dtype}")
    return dict(sorted(shifts.items()))


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
    _require_strings("texts", [text for pair in pairs for text in pair])
    heads, tails = zip(*encode_pairs(model.tokenizer, pairs))
    _require_room(model, heads)
    for tail, pair in zip(tails, pairs):
        if not tail:
            raise ValueError(f"tokens do not split between context and continuation: {pair!r}")
    rows = [head + tail for head, tail in zip(heads, tails)]
    _require_room(model, rows)
    _require_eft_fits(model, eft, rows)
    return _logprobs(model, heads, tails, transplants, eft, share_heads=True)


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
    _require_strings("prompts", prompts)
    if len({prompt[-1:].isspace() for prompt in prompts}) > 1:
        raise ValueError("some prompts end in white space, others do not")
    words = label_tokens(model.tokenizer, prompts[0], labels)
    label = spaced(labels[0], prompts[0])
    encoded = encode_pairs(model.tokenizer, [(prompt, label) for prompt in prompts])
    rows = [head for head, _ in encoded]
    _require_room(model, rows)
    heads = [row for row in rows for _ in words]
    tails = words * len(rows)
    sums, greedy = _logprobs(model, heads, tails, transplants, share_heads=True)
    sums = sums.unflatten(1, (len(rows), len(words)))
    greedy = greedy.unflatten(1, (len(rows), len(words)))
    first_greedy = greedy.int().argmax(-1)
    said = torch.where(greedy.any(-1), first_greedy, -1)
    return said, sums.argmax(-1)


def perplexity(
    model: Model,
    texts: list[str],
    transplants: list[Transplant] = (BASE,),
    window: int | None = None,
    eft: tuple[Model, ...] = (),
) -> tuple[torch.Tensor, int]:
    """Perplexity of the texts under each transplant [transplants], and the number of tokens.

    A text longer than `window` tokens (default: the context, at most 1,024) is read in windows that
    overlap by half. Every token except a text's first is counted once. eft: as in
    choice_logprobs."""
    window = min(window or 1024, context_length(model.config))
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
    _require_eft_fits(model, eft, heads + tails)
    sums, _ = _logprobs(model, heads, tails, transplants, eft, share_heads=False)
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
        words = []
        for token, n_texts in counts.most_common():
            words.append((model.tokenizer.decode([token]).strip(), n_texts))
        found.append(words)
    return tuple(found)


def generate(
    model: Model,
    texts: list[str],
    transplants: list[Transplant] = (BASE,),
    max_new_tokens: int = 32,
    sample: bool = False,
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
    options = (max_new_tokens, sample)
    has_cache = all(_sharing(each)[CACHE] for each in (model, *eft))
    is_on_ndif = any(each.remote for each in (model, *eft))
    # EFT on NDIF adds the logits of several places, token by token.
    write = _written if has_cache and not (eft and is_on_ndif) else _written_by_logits
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
# cache     Tokens that many prompts begin with (few-shot examples, a template) are read once, as a
#           KV cache. Generation continues from a cache of the prompt; finished texts leave the
#           batch.
# branches  Continuations of one context (the choices of a question, the labels of a prompt) are
#           one row: the context, then each continuation, with a mask that hides them from each
#           other.
# pieces    The unembedding is applied to a few states at a time, in float32: all logits of a
#           batch would take more memory than the model.
# last      Where logits are read at the last token of each row only, the last block computes keys
#           and values of the tokens before it, and nothing else of them.
#
# All of it is exact. Architectures differ in what they support, so _sharing tests each of the five
# against a plain forward pass on a few tokens of every model, and does without those that fail.
#
# A prompt with its continuations is a tree: (head, tails), token ids of the context and of each
# continuation. Its logits are read at its nodes: the last token of the head, then all tokens of
# each tail but its last. Functions that run on NDIF (_state_reader, _scorer, _writer …) are sent
# there as source text: they take the nnsight model `nn`, tensors, numbers, lists and tuples, and
# use no class of this repo.

BLOCKS, CACHE, BRANCHES, PIECES, LAST = range(5)  # places in `sharing`: what a model supports
JOBS_SENT = 2  # to NDIF at once: one runs, the other waits there
CACHED_PER_COMPUTED = 8  # tokens that only take memory; so many count as one that is computed
PREFIX_LENGTHS = (8, 16, 32, 64)  # rows that begin with as many equal tokens share a prefix
MIN_SAVED = 100  # tokens that a prefix must save to be worth a forward pass of its own
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
    return rows


# ---------------------------------------------------------------- one forward pass


def _forward(
    nn, trees, shifts: dict, copies: int, sharing: tuple, prefix=(), buffers=None, keep_cache=False
):
    """One forward pass of `trees` under each of `copies` transplants.

    shifts: {block: [copies, d]}. prefix: keys and values of each block for the tokens before all
    trees; buffers: a dictionary for _kv_cache. Returns [copies, nodes, d or vocabulary], see _run,
    and with keep_cache keys and values of each block."""
    from transformers.cache_utils import DynamicCache

    past = prefix[0][0].shape[2] if prefix else 0
    inputs, rows, columns = _pack_trees(trees, nn.tokenizer.pad_token_id, past, nn.dtype)
    n = len(trees)
    shifts = {block: shift.repeat_interleave(n, 0) for block, shift in shifts.items()}
    if not (sharing[BLOCKS] and shifts):
        inputs = {name: _repeat(value, copies) for name, value in inputs.items()}
    rows = torch.cat([rows + n * copy for copy in range(copies)])
    columns = columns.repeat(copies)
    cache = DynamicCache() if keep_cache else None
    if prefix:
        cache = _kv_cache(prefix, past, buffers)
    found = _run(nn, inputs, rows, columns, shifts, sharing, cache)
    kept = [(layer.keys, layer.values) for layer in cache.layers] if keep_cache else None
    return found.unflatten(0, (copies, -1)), kept


def _run(nn, inputs, rows, columns, shifts: dict, sharing: tuple, cache=None):
    """One forward pass that adds shifts, {block: [rows of the result, d]}.

    If the result has more rows than the inputs, the blocks up to the first steered one run once for
    all copies of a row. Returns the inputs of the unembedding at the nodes (rows, columns),
    [nodes, d], or the logits [nodes, vocabulary] if a model cannot unembed in pieces."""
    rows_asked = max(map(len, shifts.values()), default=0)
    copies = rows_asked // len(inputs["input_ids"])
    parting = min(shifts) if copies > 1 else None
    width = inputs["input_ids"].shape[1]
    short = None  # the last block, if it computes the last token of each row only
    if sharing[LAST] and width > 1 and bool((columns == width - 1).all()):
        short = len(nn.layers) - 1
        cache = _no_cache() if cache is None else cache
    options = {"use_cache": False} if cache is None else {"past_key_values": cache}
    with torch.no_grad():
        with nn.trace(inputs, **options):
            for block in range(len(nn.layers)):
                if parting is not None and block > parting:
                    args, kwargs = nn.layers[block].inputs
                    args = (args[0], *_repeat(args[1:], copies))  # args[0] is the stream
                    nn.layers[block].inputs = args, _repeat(kwargs, copies)
                if block == short:
                    args, kwargs = nn.layers[block].inputs
                    _keep_keys(nn.layers[block], args, kwargs, cache)
                    nn.layers[block].inputs = _last_token((args, kwargs), width)
                if block in shifts or block == short:
                    output = nn.layers[block].output
                    h = residual_stream(output)
                    if block == parting:
                        h = h.repeat(copies, 1, 1)
                    if block in shifts:
                        add_shift(h, shifts[block])
                    nn.layers[block].output = (h, *output[1:]) if isinstance(output, tuple) else h
            if short is not None:  # as many tokens as the model expects from here on
                nn.final_norm.output = nn.final_norm.output.expand(-1, width, -1)
            h = nn.unembed.input  # a large matrix: only what is asked for goes through it
            h = h[rows.to(h.device), columns.to(h.device)]
            if sharing[PIECES]:
                nn.unembed.input = h[None, :0]  # nothing does here, see _unembed
                found = h.save()
            else:
                nn.unembed.input = h[None]
                found = nn.output.logits[0].save()
    return found


def _unembed(nn, states, sharing: tuple):
    """Logits [..., vocabulary], float32, of what _run returns.

    In bfloat16, logits above 16 would be multiples of 0.125, and many of them equal."""
    if not sharing[PIECES]:
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
    sizes = [len(head) + sum(len(tail) - 1 for tail in tails) for head, tails in trees]
    width = max(sizes)
    ids, branches, places, rows, columns = [], [], [], [], []
    for row, (head, tails) in enumerate(trees):
        padding = width - sizes[row]
        end = past + len(head)
        tokens = [pad_id] * padding + head
        branch = [-1] * padding + [0] * len(head)  # -1 is padding, 0 the head, 1, 2 … the tails
        positions = [0] * padding + list(range(past, end))
        rows += [row] * (sizes[row] - len(head) + 1)
        columns += range(len(tokens) - 1, width)
        for number, tail in enumerate(tails, 1):
            tokens += tail[:-1]
            branch += [number] * (len(tail) - 1)
            positions += range(end, end + len(tail) - 1)
        ids.append(tokens)
        branches.append(branch)
        places.append(positions)
    ids, branches, places = map(torch.tensor, (ids, branches, places))
    mask = (branches >= 0).long()
    mask = torch.nn.functional.pad(mask, (past, 0), value=1)  # the prefix is never padding
    if branches.max() > 1:
        mask = _tree_mask(branches, past, dtype)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    return inputs, torch.tensor(rows), torch.tensor(columns)


def _tree_mask(branches: torch.Tensor, past: int, dtype) -> torch.Tensor:
    """[rows, 1, width, past + width]: 0 where a token may look, a very negative number elsewhere.

    A token sees the prefix, its head, and its own branch up to itself."""
    width = branches.shape[1]
    query, key = branches[:, :, None], branches[:, None, :]
    related = (key == 0) | (key == query)
    sees = (related & (key >= 0)).tril()
    sees |= torch.eye(width, dtype=torch.bool)  # padding sees itself: softmax over nothing is NaN
    sees = torch.nn.functional.pad(sees, (past, 0), value=True)
    mask = torch.zeros(sees.shape, dtype=dtype)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def _repeat(value, copies: int):
    """An argument of a block (mask, positions …) with its rows repeated."""

    def repeat(tensor):
        return torch.cat([tensor] * copies) if tensor.dim() > 1 else tensor

    return _each_tensor(value, repeat)


def _last_token(value, width: int):
    """Arguments of a block (stream, mask, positions …) for the last of `width` tokens alone."""

    def last(tensor):
        if tensor.dim() > 2:  # [rows, tokens, d] or [rows, 1, tokens, keys]
            return tensor[..., -1:, :] if tensor.shape[-2] == width else tensor
        return tensor[..., -1:] if tensor.shape[-1] == width else tensor

    return _each_tensor(value, last)


def _each_tensor(value, change):
    """An argument of a block with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_tensor(each, change) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_each_tensor(each, change) for each in value)
    return value  # a KV cache, a flag


def _keep_keys(block, args, kwargs, cache) -> None:
    """Compute no more of a block than the keys and values of all tokens. What is computed next in
    the block will attend to these."""
    update, kept = cache.update, []

    def keep(*states, **options):
        kept.append(update(*states, **options))
        raise StopIteration

    cache.update = keep
    try:  # noqa: SIM105, NDIF allows no contextlib
        block(*args, **kwargs)
    except StopIteration:
        pass
    cache.update = lambda *_, **__: kept[0]


def _no_cache():
    """A KV cache that keeps nothing."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.update = lambda keys, values, *_, **__: (keys, values)
    return cache


def _kv_cache(blocks, filled: int, buffers: dict | None = None):
    """A KV cache that begins with `filled` tokens of keys and values [rows, H, room, d] of each
    block. New tokens are written in place where there is room for them. Otherwise everything is
    copied to a buffer, each row as often as there are new rows for it. In `buffers` the next batch
    finds it again: batches come longest first, so there is room if they have as many rows."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    buffers = {} if buffers is None else buffers

    def extended(name, old, new):
        rows, heads, count, size = new.shape
        end = filled + count
        whole = buffers.get(name, old)
        if whole.shape[2] < end or len(whole) != rows:
            whole = None
            buffers.pop(name, None)  # frees the memory of the last one first
            buffers[name] = whole = new.new_empty(rows, heads, end, size)
            copies_of_old = whole.unflatten(0, (len(old), -1))
            copies_of_old[:, :, :, :filled] = old[:, None, :, :filled]
        whole[:, :, filled:end] = new
        return whole[:, :, :end]

    def cache_layer(number, keys, values):
        layer = DynamicLayer()
        layer.keys, layer.values = keys[:, :, :filled], values[:, :, :filled]
        layer.is_initialized = True

        def update(new_keys, new_values, *_args, **_kwargs):
            all_keys = extended(("keys", number), keys, new_keys)
            return all_keys, extended(("values", number), values, new_values)

        layer.update = update  # does not know the layer: a cycle would keep the tensors for long
        return layer

    cache = DynamicCache()
    cache.layers = [cache_layer(number, *each) for number, each in enumerate(blocks)]
    return cache


def _sharing(model: Model) -> tuple[bool, ...]:
    """Which of blocks, cache, branches, pieces and last work with this model; tested once."""
    if model.sharing is None:
        fixed = (model.config.hidden_size, model.precision == "torch.float32", not model.remote)
        [(_, model.sharing)] = _each_batch(model, _try_sharing, fixed, lambda batch: {}, [1])
        names = ["blocks", "a KV cache", "branches", "an unembedding in pieces"]
        if not model.remote:  # NDIF runs every block to its end
            names.append("a short last block")
        missing = [name for name, works in zip(names, model.sharing) if not works]
        if missing:
            print(f"{model.name} does without {', '.join(missing)}: slower, or more memory")
    return model.sharing


def _try_sharing(nn, width: int, exact: bool, here: bool):
    first, second = [3, 4, 5, 6], [3, 4, 5, 7, 8]
    generator = torch.Generator().manual_seed(0)
    shifts = {len(nn.layers) // 2: torch.randn(2, width, generator=generator)}

    def at_once(sharing, trees=((first, []), (second, []))):
        states, _ = _forward(nn, trees, shifts, 2, sharing)
        return _unembed(nn, states, sharing)

    def from_cache(sharing):
        prompts = [[first[:-1]], [second[:-1]]]
        _, blocks = _read_prompts(nn, prompts, shifts, 2, sharing, room=0)
        last = torch.tensor([first[-1], second[-1]]).repeat(2)
        mask = torch.ones(4, 5, dtype=torch.long)
        mask[[0, 2], 0] = 0  # `first` is a token shorter
        own = {block: shift.repeat_interleave(2, 0) for block, shift in shifts.items()}
        logits = _read_tokens(nn, last, mask, own, sharing, blocks)
        return logits.unflatten(0, (2, 2))

    def from_branches(sharing):
        tails = [[*whole[3:], 9] for whole in (first, second)]
        tree = (first[:3], tails)
        return at_once(sharing, [tree])[:, [1, 3]]  # the last token of each tail

    def attempt():
        plain = at_once((False,) * 5)
        tolerance = (1e-3 if exact else 0.1) * plain.std()

        def agrees(compute, *shared) -> bool:
            try:
                logits = compute(tuple(each in shared for each in range(5)))
            except Exception:  # whatever this architecture raises
                return False
            return bool((logits - plain).abs().max() <= tolerance)

        blocks = [BLOCKS] if agrees(at_once, BLOCKS) else []
        return (
            bool(blocks),
            agrees(from_cache, *blocks, CACHE),
            agrees(from_branches, *blocks, BRANCHES),
            agrees(at_once, *blocks, PIECES),
            here and agrees(at_once, *blocks, LAST),
        )

    return attempt


# ---------------------------------------------------------------- scores of trees


def _scores(model: Model, trees: list, transplants: list[Transplant], reduce: bool):
    """Yield (indices of transplants [t, 1], indices of trees, scores).

    scores are the logits [t, nodes, vocabulary] of these trees, or with `reduce` the result of
    _reduce, computed where the model is: full logits of a real vocabulary are 100 MB a batch."""
    unread = [head[:-1] for head, _ in trees]
    for prefix, members in _by_prefix(model, trees, unread, len(transplants)):
        mine = [trees[i] for i in members]
        for some, batch, scores in _scores_after(model, prefix, mine, transplants, reduce):
            yield some, [members[i] for i in batch], scores


def _scores_after(model: Model, prefix: list[int], trees, transplants, reduce: bool):
    """As _scores, for trees that begin with the same tokens."""
    sharing = _sharing(model)
    past = len(prefix)
    costs = []
    for head, tails in trees:
        own = len(head) - past + sum(len(tail) - 1 for tail in tails)
        costs.append(_row_cost(past, own))

    def pack(batch):
        some = [trees[i] for i in batch]
        return {"trees": [(head[past:], tails) for head, tails in some]}

    # Else all logits of the copies are in memory.
    shares_blocks = reduce and sharing[BLOCKS] and sharing[PIECES]
    one_node = sharing[LAST] and all(len(tail) == 1 for _, tails in trees for tail in tails)
    for members, weight in _groups(model, transplants, max(costs), shares_blocks, one_node):
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


def _groups(model: Model, transplants, cost: float, shares_blocks=False, one_node=False):
    """Yield (indices of transplants that are computed together, cost of a token under each).

    cost: of the most expensive row. Sorted by the first steered block, since transplants share the
    blocks up to it. shares_blocks: a token costs only its part of the blocks above that block, but
    never less than one that only takes memory. one_node: logits are read at one token of each row,
    and above the last block a row is no more than that."""
    _shifts(model, transplants)  # a wrong one is named before anything is computed
    first_blocks = []
    for transplant in transplants:
        first_blocks.append(min([layer for layer, *_ in transplant.parts], default=sys.maxsize))
    order = sorted(range(len(transplants)), key=first_blocks.__getitem__)
    last_block = model.n_layers - 1
    copied = [i for i in order if shares_blocks and first_blocks[i] >= last_block]
    computed = order[: len(order) - len(copied)]
    for some in (computed, copied):
        while some:
            weight = 1.0
            if shares_blocks:
                blocks_above = last_block - first_blocks[some[0]]
                in_memory = 1 if one_node and not blocks_above else cost  # tokens of each copy
                least = in_memory / cost / CACHED_PER_COMPUTED
                weight = max(blocks_above / model.n_layers, least)
            size = max(1, min(UNEMBED_ROWS, int(model.batch_tokens / (weight * cost))))
            yield some[:size], weight
            some = some[size:]


def _scorer(nn, prefix: list[int], shifts: dict, copies: int, sharing: tuple, reduce: bool):
    """Make a function that scores one batch of trees; the prefix is read once, here."""
    cache, buffers = (), {}
    if prefix:
        _, cache = _forward(nn, [(prefix, [])], shifts, copies, sharing, keep_cache=True)

    def score(trees):
        states, _ = _forward(nn, trees, shifts, copies, sharing, cache, buffers)
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
    window = min(map(_window, models))
    branching = all(_sharing(model)[BRANCHES] for model in models) and _fits(alone, window)
    trees, members, open_trees = [], [], {}
    for i, (head, tail) in enumerate(zip(heads, tails)):
        tree = open_trees.get(tuple(head)) if share_heads else None
        if tree is not None:
            together = [*trees[tree][1], tail]
            size = sum(len(each) - 1 for each in together)
            fits = _fits([(head, together)], window) and size <= BRANCH_TOKENS
            if size and not (branching and fits):
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
    nodes = []  # of each tree
    end = 0
    for _, tails in trees:
        start, end = end, end + 1 + sum(len(tail) - 1 for tail in tails)
        nodes.append(range(start, end))
    result = torch.empty(0)
    for members, batch, logits in _scores(model, trees, list(transplants), reduce=False):
        if not len(result):
            result = torch.empty(len(transplants), end, logits.shape[-1])
        result[members, [node for i in batch for node in nodes[i]]] = logits.cpu()
    return result


def _add_logits(logits: torch.Tensor, sign: int, others: torch.Tensor) -> torch.Tensor:
    """logits + sign * others, both without the padding at the end of either unembedding."""
    width = min(logits.shape[-1], others.shape[-1])
    return logits[..., :width] + sign * others[..., :width].to(logits)


def _by_prefix(model: Model, trees: list, unread: list, copies: int = 1) -> list:
    """[(prefix, indices of the trees that begin with it)] where a prefix is worth a cache, and last
    ([], all others).

    unread: of each tree the tokens before the first that is read; copies: how often each is
    computed."""
    best, most = [], 0
    for length in PREFIX_LENGTHS:
        alike: dict[tuple, list[int]] = {}
        for i, row in enumerate(unread):
            if len(row) >= length:
                alike.setdefault(tuple(row[:length]), []).append(i)
        groups, saved = [], 0
        for members in alike.values():
            prefix = os.path.commonprefix([unread[i] for i in members])
            saves = copies * len(prefix) * (len(members) - 1)
            if saves >= MIN_SAVED:
                groups.append((prefix, members))
                saved += saves
        if saved > most:
            best, most = groups, saved
    if best and not (_fits(trees, _window(model)) and _sharing(model)[CACHE]):
        best = []
    grouped = {i for _, members in best for i in members}
    rest = [i for i in range(len(unread)) if i not in grouped]
    return [*best, ([], rest)] if rest else best


def _row_cost(past: int, own: int) -> float:
    """What a row of `own` tokens behind `past` cached ones costs, in computed tokens."""
    return max(own, (past + own) / CACHED_PER_COMPUTED)


def _window(model: Model) -> int:
    """Tokens of the sliding window of a model; without one, more than any text has."""
    names = ("sliding_window", "window_size", "attention_chunk_size")
    sizes = [getattr(model.config, name, None) for name in names]
    return min([size for size in sizes if size], default=sys.maxsize)


def _fits(trees: list, window: int) -> bool:
    return all(len(head) + sum(map(len, tails)) <= window for head, tails in trees)


# ---------------------------------------------------------------- text


def _written(model: Model, rows, transplants, eft, options: tuple, uniform):
    """Yield (index of a transplant, index of a row, its new tokens)."""
    max_new_tokens = options[0]
    small = tuple((each if each.cost else each.nn, _sharing(each)) for each in eft)
    for members, _ in _groups(model, transplants, max(map(len, rows))):
        copies = len(members)

        def pack(batch, copies=copies):
            # As many rows as are computed at once are fewer than those whose tokens are kept.
            longest = copies * len(rows[batch[0]])
            size = max(1, int(model.batch_tokens // longest))
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
    max_new_tokens, sample = options
    ends = _end_tokens(nn)
    models, signs = [(nn, shifts, sharing)], [1]
    for sign, (small_nn, small_sharing) in zip((1, -1), small):  # EFT: chat minus base
        models.append((small_nn, {}, small_sharing))
        signs.append(sign)

    def write(pieces, uniform):
        lengths = torch.tensor([len(row) for piece in pieces for row in piece])
        n, width = len(lengths), max(lengths)
        alive = torch.arange(copies * n)  # rows that have not ended, copy after copy
        padding = width - lengths.repeat(copies)
        mask = (torch.arange(width) >= padding[:, None]).long()
        new_tokens = torch.full((copies * n, max_new_tokens), -1)
        scores, caches = [], []
        for each, its_shifts, its_sharing in models:
            logits, blocks = _read_prompts(
                each, pieces, its_shifts, copies, its_sharing, max_new_tokens
            )
            scores.append(logits)
            caches.append(blocks)
        for step in range(max_new_tokens):
            logits = scores[0]
            for sign, others in zip(signs[1:], scores[1:]):
                logits = _add_logits(logits, sign, others)
            _require_finite(logits.amax(-1), "logits")
            token = _choose(logits, uniform[alive % n, step], sample)
            new_tokens[alive, step] = token
            going = ~torch.isin(token, ends)
            if step + 1 == max_new_tokens or not going.any():
                break
            alive, token = alive[going], token[going]
            mask = torch.nn.functional.pad(mask[going], (0, 1), value=1)
            for i, (each, its_shifts, its_sharing) in enumerate(models):
                for block, (keys, values) in enumerate(caches[i] if not going.all() else []):
                    caches[i][block] = keys[going], values[going]  # memory is freed block by block
                of_rows = {block: shift[alive // n] for block, shift in its_shifts.items()}
                scores[i] = _read_tokens(each, token, mask, of_rows, its_sharing, caches[i])
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
        rows = sum(map(len, pieces))
        whole = parts[0].new_zeros(copies, rows, heads, width + room, size)
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


def _choose(logits, uniform, sample: bool):
    """A token for each row: the most likely one, or a sample: where the cumulative probability
    reaches `uniform` [rows], random numbers from 0 to 1."""
    if not sample:
        return logits.argmax(-1).cpu()
    mass = logits.softmax(-1).cumsum(-1)
    wanted = uniform[:, None].to(mass) * mass[:, -1:]
    token = torch.searchsorted(mass, wanted, right=True)[:, 0]
    return token.clamp(max=mass.shape[1] - 1).cpu()


def _written_by_logits(model: Model, rows, transplants, eft, options: tuple, uniform):
    """As _written, but every new token takes the logits after the whole text: for models on NDIF
    (with EFT), and for models without a KV cache."""
    max_new_tokens, sample = options
    ends = _end_tokens(model.nn)
    for member, transplant in enumerate(transplants):
        alive = torch.arange(len(rows))
        new_tokens = torch.full((len(rows), max_new_tokens), -1)
        for step in range(max_new_tokens):
            trees = []
            for i in alive:
                whole = [*rows[i], *new_tokens[i, :step].tolist()]
                trees.append((whole, []))
            [logits] = _logits(model, trees, [transplant])
            for sign, small in zip((1, -1), eft):
                logits = _add_logits(logits, sign, _logits(small, trees)[0])
            token = _choose(logits, uniform[alive, step], sample)
            new_tokens[alive, step] = token
            alive = alive[~torch.isin(token, ends)]
            if not len(alive):
                break
        for i, ids in enumerate(new_tokens):
            yield member, i, ids[ids >= 0]


# ---------------------------------------------------------------- EFT, a baseline


def _require_eft_fits(model: Model, eft, rows, new_tokens: int = 0) -> None:
    if not eft:
        return
    vocabulary = model.tokenizer.get_vocab()
    if any(small.tokenizer.get_vocab() != vocabulary for small in eft):
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
    if not all(rows):
        raise ValueError("an empty prompt has no last token")
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


def _count_states(model: Model, prefix, layers, shifts, sharing, stop: bool, lens: bool):
    if prefix:
        model.cost.add_pass([len(prefix)], 0, {}, 1, 1)

    def read(rows, from_end):
        places = torch.tensor([place for own in from_end for place in own])
        width = max(map(len, rows))
        blocks = model.cost.blocks[: max(layers) + 1 if stop else None]
        model.cost.add(len(rows) * width, len(prefix) + width, blocks)
        states = torch.randn(len(places), len(layers), NARROW, generator=model.cost.generator)
        states[places == -1] += 2  # near_states finds that ends of texts are alike
        return states

    return read


def _count_pairs(model: Model, layers):
    read = _count_states(model, [], layers, {}, (), stop=False, lens=False)

    def refine_batch(rows):
        last = [[-1]] * len(rows)
        positive, negative = zip(*rows)
        return refine(read(positive, last), read(negative, last))

    return refine_batch


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
        steered = [(model, shifts)]
        plain = [(each, {}) for each, _ in small]
        for each, own in steered + plain:
            each.cost.add_pass(sizes, 0, own, copies if own else 1, len(rows))
            read = copies * len(rows) * (count - 1)  # one by one, the last is not read
            each.cost.add(read, max(sizes) + count / 2, each.cost.blocks, read)
        written = [(row * count)[:count] for row in rows]
        return torch.tensor(written).repeat(copies, 1)

    return write


COUNTERS = {
    _state_reader: _count_states,
    _pair_refiner: _count_pairs,
    _scorer: _count_scores,
    _writer: _count_texts,
    _try_sharing: lambda *_: lambda: (True,) * 5,
}
