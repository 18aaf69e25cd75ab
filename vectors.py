"""What a study needs around the method: text, maps, controls, vectors of many concepts and models.

    1  Plain text    that maps are fitted on, in disjoint samples
    2  Maps          fitted on plain sentences, as in the paper                   Eq. 2
    3  Local maps    the same, fitted near the states that v is computed from     docs/map.md
    4  Controls      permuted labels, random directions, other vectors and maps
    5  Vectors       every v and v_hat of an experiment, each model read once

common.py has the method itself.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common import (
    HELD_OUT,
    AffineMap,
    concept_vector,
    fit_affine,
    fit_quality,
    hidden_states,
    perplexity,
    refine,
)
from harness import TOY, fail, read_text, save_concept
from models import Model, Models
from report import LIMITING, PLAIN, record

import numpy as np
import torch

# ================================================================ 1  Plain text


def map_texts(args, models: Models, names: list[str]) -> list[str]:
    """Plain text for args.maps disjoint samples, or fewer (args.maps is then lowered), that these
    models can read. Ends the program if their tokenizers cannot serve a local map."""
    for name in names if args.map != "paper" else []:
        if not models.tokenizer(name).is_fast:
            advice = "which a local map needs: add --map paper"
            fail(f"the tokenizer of {name} knows no character offsets, {advice}")
    paths = [args.texts, *map(Path, names)]
    in_toy, *are_toy = [TOY.absolute() in path.absolute().parents for path in paths]
    if in_toy and not all(are_toy):
        print("note: maps are fitted on text of the toy world; your models need --texts or --data")
    texts = plain_texts(args.texts, models, names, args.maps * args.sentences)
    args.maps = count_samples(args.maps, texts, args.sentences)
    return texts


def plain_texts(path: Path, models: Models, names: list[str], count: int) -> list[str]:
    """The plain text that affine maps are fitted on, at most `count` texts.

    path: one text a line (of a .tsv file its first column, as in WikiSplit), or a .jsonl file with
    {"text": …} on each line. Left out: texts of fewer than five words, and those too long for one
    of the models `names`."""
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        text = line.split("\t")[0] if path.suffix == ".tsv" else line
        if path.suffix == ".jsonl" and line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                fail(f'{path}, line {number}: must be {{"text": …}}')
        words = text.split()
        if len(words) > 4:
            texts.append(" ".join(words))
    kept, read = [], 0
    while len(kept) < count and read < len(texts):
        some = texts[read : read + count - len(kept)]
        fits = np.ones(len(some), bool)
        for name in set(names):
            fits &= models.fits(name, some)
        kept += itertools.compress(some, fits)
        read += len(some)
    if len(kept) < read:
        print(f"{read - len(kept)} of {read} plain texts exceed a context: left out")
    if len(kept) < 10:
        fail(f"{path}: only {len(kept)} texts fit the contexts; a map needs more")
    return kept


def count_samples(wanted: int, sentences: list[str], n_sentences: int) -> int:
    """How many maps can be fitted on disjoint samples of the text: at most `wanted`, at least 1."""
    count = max(1, min(wanted, len(sentences) // n_sentences))
    if count < wanted:
        print(f"{len(sentences)} plain texts: {count} instead of {wanted} maps on other sentences")
    return count


def cut_ends(texts: list[str]) -> list[str]:
    """Each text without its last 2 to 4 words, as the paper's map reads it (released code)."""
    draw = np.random.RandomState(42)
    cut = []
    for text in texts:
        words = text.split()[: -draw.randint(2, 5)]
        cut.append(" ".join(words))
    return cut


def perplexity_records(model: Model, sentences: list[str], arms: list, eft=()) -> list[dict]:
    """Records of the perplexity of 30 plain sentences under every arm, and of 30 others, which
    limit alpha, under those that are no controls. arms: (fields of report.record, transplant)."""
    texts = cut_ends(sentences)[-60:]
    half = len(texts) // 2
    own = [arm for arm in arms if not arm[0].get("variant")]
    records = []
    for part, some, tried in ((LIMITING, texts[:half], own), (PLAIN, texts[half:], arms)):
        values, n = perplexity(model, some, [move for _, move in tried], eft=eft)
        for (about, _), value in zip(tried, values.tolist()):
            what = {"metric": "perplexity", "part": part, "n": n, "value": value}
            records.append(record(**about | what))
    return records


def sample_rows(n: int, size: int, sample: int) -> list[int]:
    """Row indices of sample 0, 1 … out of n rows: disjoint until all rows are used."""
    order = random.Random(0).sample(range(n), n)
    start = sample * size
    return [order[(start + i) % n] for i in range(min(size, n))]


# ================================================================ 2  Maps


class Maps:
    """What AffineMaps and LocalMaps share: maps between the blocks of two models, each fitted once.

    Subclasses define states(source_block, block, sample), which gives x [n, d1] and y [n, d2], and
    fit(x, y)."""

    def __init__(self):
        self.known: dict[tuple, AffineMap] = {}

    def between(
        self,
        source_block: int,
        block: int,
        sample: int = 0,
        shuffled: int | None = None,
        n: int | None = None,
    ) -> AffineMap:
        """The map between two blocks. shuffled: fitted on mismatched rows, as a control (the seed
        of their order); n: fitted on the first n rows only."""
        key = source_block, block, sample, shuffled, n
        if key not in self.known:
            x, y = [states[:n] for states in self.states(source_block, block, sample)]
            if shuffled is not None:
                order = random.Random(f"{sample} {shuffled}").sample(range(len(y)), len(y))
                y = y[order]
            self.known[key] = self.fit(x, y)
        return self.known[key]

    def vector(self, v: torch.Tensor, source_block: int, block: int, **which) -> torch.Tensor:
        """v_hat [..., d2] of concept vectors v [..., d1] (Eq. 2). which: sample, shuffled and n of
        between."""
        return self.between(source_block, block, **which).vector(v)


class AffineMaps(Maps):
    """Affine maps from the blocks of one base model to those of another.

    x, y: {block: states [n, d] of the same plain sentences} of source and target. Each map is
    fitted on its own random sample of `n_sentences` of them, to show how much depends on the
    sample. fitting: intercept and ridge of fit_affine."""

    def __init__(self, x: dict, y: dict, n_sentences: int, **fitting):
        super().__init__()
        self.x, self.y, self.n_sentences, self.fitting = x, y, n_sentences, fitting

    def rows(self, sample: int = 0) -> list[int]:
        """Indices of the plain sentences that a map is fitted on, see sample_rows."""
        n = len(next(iter(self.x.values())))
        return sample_rows(n, self.n_sentences, sample)

    def states(self, source_block: int, block: int, sample: int = 0) -> tuple:
        """x [n, d1] and y [n, d2]: both models' states of the sentences of a sample."""
        rows = self.rows(sample)
        return self.x[source_block][rows], self.y[block][rows]

    def fit(self, x: torch.Tensor, y: torch.Tensor) -> AffineMap:
        return fit_affine(x, y, **self.fitting)

    def stream_norms(self, source_block: int, block: int) -> tuple[float, float]:
        """Mean norm of the residual stream after both blocks."""
        streams = self.x[source_block], self.y[block]
        return tuple(stream.norm(dim=1).mean().item() for stream in streams)


# ================================================================ 3  Local maps
#
# The linear relation between two models differs from one kind of position to another, so a map
# works best where it was fitted. Local maps are fitted near the states that v is computed from. No
# label, answer or test item is used.

WINDOWS = 2.0  # texts inside the refinement templates, for each plain text
POSITIONS = 1.6  # positions that a local map is fitted on, for each plain text
LOCAL_RIDGE = 0.01
LAST_TOKEN = -1  # the place of a text's last token


class Context(NamedTuple):
    """Where a concept is read: refinement templates with {text}, and the texts in that slot.

    others: unlabelled texts of the same kind that are used nowhere else. Without any, pieces of
    plain text take their place."""

    templates: tuple[str, ...]
    texts: tuple[str, ...]
    others: tuple[str, ...] = ()


class Pool(NamedTuple):
    """Texts, and the places in each of them where states may be read: character offsets at which
    tokens end, or LAST_TOKEN."""

    texts: list[str]
    places: list[list[int]]


class NearStates(NamedTuple):
    """A source's states x at the places of a pool nearest to the states that v is computed from.

    rows: {block: indices of the places [n]}, x: {block: [n, d]}."""

    pool: Pool
    rows: dict[int, list[int]]
    x: dict[int, torch.Tensor]


def local_pool(
    models: Models, names: list[str], context: Context, plain: list[str], seed: int = 0
) -> Pool:
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
        return Pool(windows, [[LAST_TOKEN]] * len(windows))
    places = shared_token_ends([models.tokenizer(name) for name in names], plain)
    return Pool(plain + windows, places + [[LAST_TOKEN]] * len(windows))


def cut_windows(plain: list[str], texts, count: int, seed: int = 0) -> list[str]:
    """`count` pieces of plain text with the lengths [words] and the final marks of the concept's
    texts."""
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("a Context needs texts, for the lengths of the pieces")
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


def shared_token_ends(tokenizers: list, texts: list[str]) -> list[list[int]]:
    """For each text the character offsets where a token of every tokenizer ends."""
    of_tokenizers = [token_ends(tokenizer, texts) for tokenizer in tokenizers]
    shared = []
    for ends in zip(*of_tokenizers):  # of one text
        everywhere = set.intersection(*map(set, ends))
        shared.append(sorted(everywhere))
    return shared


def token_ends(tokenizer, texts: list[str]) -> list[dict[int, int]]:
    """For each text {character offset where a token ends: index of the token}."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
    found = []
    for offsets in encoded.offset_mapping:  # of special tokens they are empty
        token_at = {}
        for i, (start, end) in enumerate(offsets):
            if end > start:
                token_at[end] = i
        found.append(token_at)
    return found


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
    inside = [pool.texts[i] for i, own in kept.items() if own != [LAST_TOKEN]]
    ends = dict(zip(inside, token_ends(model.tokenizer, inside)))
    positions = []
    for text, own in zip(texts, kept.values()):
        at = ends.get(text, {}) | {LAST_TOKEN: LAST_TOKEN}
        positions.append([at[place] for place in own])
    states = hidden_states(model, texts, blocks, positions=positions)
    number = {row: k for k, row in enumerate(wanted)}
    return states[[number[row] for row in rows]]


def near_states(
    pool: Pool, x: torch.Tensor, concept_states: dict, n_sentences: int, seed: int = 0
) -> NearStates:
    """The places of a pool whose states are nearest to those that v is computed from.

    x: states [N, blocks, d] at all places of the pool; concept_states: {block: states [m, d]} of
    the refinement prompts, of the same blocks. The places of each block are in random order, since
    fit_affine holds out the last fifth."""
    rows, nearest = {}, {}
    rank = random.Random(seed).sample(range(len(x)), len(x))  # of each place
    count = int(POSITIONS * n_sentences)
    for number, block in enumerate(concept_states):
        chosen = nearest_positions(x[:, number], concept_states[block], count)
        # If rounding changes which places are near, the others keep their order.
        rows[block] = sorted(chosen, key=rank.__getitem__)
        nearest[block] = x[rows[block], number]
    return NearStates(pool, rows, nearest)


def nearest_positions(x: torch.Tensor, states: torch.Tensor, count: int) -> list[int]:
    """Rows of x [N, d] nearest to `states` [m, d]: the nearest to every state, then the second
    nearest to every state, and so on, by cosine similarity of standardized dimensions."""
    mean = x.mean(0)
    deviation = x.std(0, correction=1 if len(x) > 1 else 0).clamp(min=1e-12)  # some are constant
    pool = torch.nn.functional.normalize((x - mean) / deviation, dim=1)
    wanted = torch.nn.functional.normalize((states - mean) / deviation, dim=1)
    similarity = wanted @ pool.T
    depth = min(len(x), 4 * count // len(states) + 8)
    while True:
        ranked = similarity.topk(depth, dim=1).indices
        chosen = list(dict.fromkeys(ranked.T.flatten().tolist()))
        if len(chosen) >= count or depth == len(x):
            return chosen[:count]
        depth = min(len(x), 2 * depth)


def fit_local(x: torch.Tensor, y: torch.Tensor) -> AffineMap:
    """A local map of states x [n, d1] and y [n, d2] at near places.

    v_hat is rescaled: relative to the spread of y it is as long as v relative to the spread of x.
    Ridge, and what the source cannot predict, shorten v F."""

    def spread(states):
        return (states - states.mean(0)).double().norm().item()

    fitted = fit_affine(x, y, intercept=True, ridge=LOCAL_RIDGE)
    return replace(fitted, stretch=spread(y) / spread(x))


class LocalMaps(Maps):
    """Affine maps fitted at the places of a pool that are nearest to a concept's states.

    near: the source's near states, one for each sample of text. The target is read at the same
    places: self.y has for each sample {row of the pool: row of y} and y [n, len(blocks), d]; from a
    remote target only the states of maps that are asked for travel. whole: for each sample the
    target's states at all places of the pool, if they are known."""

    def __init__(self, near: list[NearStates], target: Model, blocks: list[int], whole=None):
        super().__init__()
        self.near, self.blocks = near, blocks
        self.y: list[tuple[dict, torch.Tensor]] = []
        self.remote = None if whole or not target.remote else target
        self.remote_y: dict[tuple, torch.Tensor] = {}
        for sample, each in enumerate([] if self.remote else near):
            rows = sorted(set().union(*each.rows.values()))
            number = {row: k for k, row in enumerate(rows)}
            y = whole[sample][rows] if whole else pool_states(target, each.pool, blocks, rows)
            self.y.append((number, y))

    def states(self, source_block: int, block: int, sample: int = 0) -> tuple:
        """x [n, d1] and y [n, d2]: both models' states at the chosen positions."""
        if sample >= len(self.near):
            raise ValueError(f"there is text for {len(self.near)} samples, none for {sample}")
        near = self.near[sample]
        if self.remote:  # only what is asked for travels
            key = source_block, block, sample
            if key not in self.remote_y:
                rows = near.rows[source_block]
                self.remote_y[key] = pool_states(self.remote, near.pool, [block], rows)[:, 0]
            return near.x[source_block], self.remote_y[key]
        number, y = self.y[sample]
        rows = [number[row] for row in near.rows[source_block]]
        return near.x[source_block], y[rows, self.blocks.index(block)]

    def fit(self, x: torch.Tensor, y: torch.Tensor) -> AffineMap:
        return fit_local(x, y)

    def r2_where_read(self, other: AffineMap, source_block: int, block: int, along=None) -> float:
        """R² of any map between these blocks where v is read, on the rows held out here.

        along: only in this direction [d2]."""
        x, y = self.states(source_block, block)
        n = self.between(source_block, block).n
        predicted, y = other.predict(x[n:]).double(), y.double()
        if along is not None:
            along = along.double()[:, None]
            predicted, y = predicted @ along, y @ along
        return fit_quality(predicted, y[n:], y[:n].mean(0))[0]

    def cosine_to_response(
        self, v: torch.Tensor, v_hat: torch.Tensor, source_block: int, block: int
    ) -> float:
        """Cosine of v_hat [d2] with the direction in which the target's states move where the
        source's move along v [d1], at the positions of the second sample of text. With one sample:
        at those held out."""
        second = len(self.near) > 1
        x, y = self.states(source_block, block, sample=int(second))
        first = 0 if second else self.between(source_block, block).n
        direction = response(v, x[first:], y[first:])
        return torch.cosine_similarity(v_hat.double(), direction, dim=0).item()


def response(v: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cov(y, x·v): the direction [d2] in which states y [n, d2] move where states x [n, d1] of the
    same positions move along v [d1]. No label is used."""
    along = (x - x.mean(0)).double() @ v.double()
    return along @ (y - y.mean(0)).double() / len(y)


def separation(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """AUC: how often a positive lies further along v than a negative, states [n, d] of pairs.

    Each half of the pairs is judged by the v of the other half (Eq. 1). 0.5 is chance: v is then no
    more than noise, and the model hardly has the concept."""
    halves = [(positive[k::2], negative[k::2]) for k in (0, 1)]
    found = []
    for (fit_positive, fit_negative), (positive, negative) in (halves, halves[::-1]):
        v = refine(fit_positive[:, None], fit_negative[:, None])[0]
        above = (positive @ v)[:, None] > negative @ v
        found.append(above.double().mean().item())
    return float(np.mean(found))


# ================================================================ 4  Controls

SHUFFLED_MAPS = 5  # one alone can be far from the others
PAPER_N_OVER_D = 0.39  # 1,600 sentences for 4,096 dimensions


def permuted_vectors(
    positive: torch.Tensor, negative: torch.Tensor, count: int, seed: int
) -> torch.Tensor:
    """The null of Eq. 1: mean differences [count, layers, d] of pairs [n, layers, d] with the
    labels swapped in a random half of the pairs.

    Exactly half, so that the concept cancels. If each pair were swapped at random, some of the
    concept would be left, and rescaling to the norm of v would amplify it. Of an odd number of
    pairs a random one is left out."""
    difference = positive.double() - negative.double()
    half = len(difference) // 2
    if count and not half:
        raise ValueError("labels can be permuted in two pairs or more, not in one")
    signs = torch.zeros(count, len(difference), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for row in signs:
        order = torch.randperm(len(difference), generator=generator)
        row[order[:half]], row[order[half : 2 * half]] = 1.0, -1.0
    v = signs @ difference.flatten(1) / len(difference)
    return v.unflatten(1, difference.shape[1:]).float()


def random_directions(v: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Random directions of the norm of v [d], isotropic: [count, d]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, len(v), generator=generator)
    return rescale(directions, v)


def rescale(direction: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`direction` [..., d] with the norm of v [..., d]."""
    unit = direction / direction.norm(dim=-1, keepdim=True)
    return unit * v.norm(dim=-1, keepdim=True)


def control_directions(
    maps: Maps,
    v: torch.Tensor,
    others: dict[str, torch.Tensor],
    source_block: int,
    block: int,
    n_maps: int,
    n_random: int,
    seed: int,
    n_shuffled: int = SHUFFLED_MAPS,
) -> dict[str, torch.Tensor]:
    """Controls for the effect of v_hat: {variant: direction [d]}.

    "map k": v through maps fitted on other samples of the plain text. All others have v_hat's norm.
    "few sentences": v through a map with the paper's number of sentences per dimension; "shuffled
    map k": v through a map of mismatched sentences; "other NAME": another concept's vector through
    the same map; "random r": isotropic directions."""
    v_hat = maps.vector(v, source_block, block)
    directions = {}
    for number in range(1, n_maps):
        directions[f"map {number}"] = maps.vector(v, source_block, block, sample=number)
    if PAPER_N_OVER_D * len(v) < maps.between(source_block, block).n:
        few = round(PAPER_N_OVER_D * len(v) / (1 - HELD_OUT))
        directions["few sentences"] = rescale(maps.vector(v, source_block, block, n=few), v_hat)
    for number in range(n_shuffled):
        shuffled = maps.vector(v, source_block, block, shuffled=number)
        directions[f"shuffled map {number}"] = rescale(shuffled, v_hat)
    for name, other in others.items():
        directions[f"other {name}"] = rescale(maps.vector(other, source_block, block), v_hat)
    for number, direction in enumerate(random_directions(v_hat, n_random, seed)):
        directions[f"random {number}"] = direction
    return directions


# ================================================================ 5  Vectors


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
    """Vectors of many concepts in the space of several targets; each model is read once.

    wanted: every Vector that will be asked for. targets: names of base models. pairs(concept,
    model): positive and negative prompts. blocks(model): sorted blocks to read. context(concept,
    model): where a concept is read, for local maps. sentences: plain text to fit maps between base
    models on. refine: mean, pca or probe. known: other Vectors whose models are not read again.
    both_ways: the targets are sources, too, so each reads all places of a pool for local maps once.
    where_read: measure all maps where v is read, too, for which local maps are fitted. maps:
    options of AffineMaps, n_sentences among them."""

    def __init__(
        self,
        models,
        wanted,
        targets,
        pairs,
        blocks,
        context,
        sentences,
        refine,
        known: Vectors | None = None,
        both_ways: bool = False,
        where_read: bool = True,
        **maps,
    ):
        self.models = models
        self.wanted = list(dict.fromkeys(wanted))
        self.targets = list(targets)
        self.pairs, self.blocks, self.context = pairs, blocks, context
        self.sentences, self.refine_method, self.map_options = sentences, refine, maps
        self.known, self.both_ways, self.where_read = known, both_ways, where_read
        self.refined: dict[Vector, dict[int, torch.Tensor]] = {}
        self.known_states: dict[str, dict[str, torch.Tensor]] = {}  # model -> prompt -> [blocks, d]
        self.plain: dict[str, dict[int, torch.Tensor]] = {}
        self.known_maps: dict[tuple, AffineMaps | LocalMaps] = {}
        self.known_near: dict[tuple, list[NearStates]] = known.known_near if known else {}
        self.known_pools: dict[tuple, list[Pool]] = known.known_pools if known else {}
        self.known_whole: dict[tuple, torch.Tensor] = {}  # states at all places of a pool
        self.known_permuted: dict[tuple, torch.Tensor] = {}

    def v(self, vector: Vector, block: int) -> torch.Tensor:
        """v [d] after a block of the model that it was refined in (Eq. 1)."""
        self._read_models()
        return self.refined[vector][block]

    def maps(self, vector: Vector, target: str, method: str = "contrans"):
        """The paper's maps, or for "contrans-local" those fitted where this vector is read."""
        self._read_models()
        if method == "contrans":
            key = vector.base, target
            if key not in self.known_maps:
                x, y = self.plain[vector.base], self.plain[target]
                self.known_maps[key] = AffineMaps(x, y, **self.map_options)
        elif method == "contrans-local":
            context = self.context(vector.concept, vector.model)
            key = vector.model, vector.base, target, context
            if key not in self.known_maps:
                near, whole = self._read_near(vector, target, context), None
                model, blocks = self.models.load(target), self.blocks(target)
                if self.both_ways and self.models.same_vocabulary(vector.base, target):
                    pools = self._pool_key(vector, target, context)
                    samples = range(len(near))
                    whole = [self._read_pool(target, blocks, pools, sample) for sample in samples]
                self.known_maps[key] = LocalMaps(near, model, blocks, whole)
        else:
            raise ValueError(f"unknown map {method!r}: contrans or contrans-local")
        return self.known_maps[key]

    def forget_maps(self) -> None:
        """Let go of all maps and of what went through them, when a target is done."""
        self.known_maps.clear()
        self.known_permuted.clear()

    def v_hat(self, vector: Vector, target: str, point: Point, method="contrans", **which):
        """v_hat [d] of a vector in the space of a target (Eq. 2). which: see Maps.between."""
        v = self.v(vector, point.source_block)
        if method == "self-align":  # the target's own vector needs no map
            return v
        maps = self.maps(vector, target, method)
        return maps.vector(v, point.source_block, point.block, **which)

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
            self.known_permuted[key] = rescale(null, self.v_hat(vector, target, point, method))
        return self.known_permuted[key]

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

    def directions(
        self, vector, target, point, methods: list[str], n_permuted=0, **counts
    ) -> dict[tuple, torch.Tensor]:
        """{(method, variant): direction [d]}: v_hat by each kind of map (variant None), and its
        controls. Permuted labels stand beside the last map only, since they are many."""
        found = {}
        for method in methods:
            found[method, None] = self.v_hat(vector, target, point, method)
            if method == methods[-1]:
                counts["n_permuted"] = n_permuted
            controls = self.controls(vector, target, point, [], method, **counts)
            for variant, direction in controls.items():
                found[method, variant] = direction
        return found

    def quality(self, vectors, target, point, method, n_maps=1, own=(None,)) -> list[dict]:
        """What the maps of several vectors are worth, as fields of report.record: of each map of
        the first vector _map_quality, of all vectors the mean of _vector_quality.

        own: the target's own vectors, where they are known."""
        found = []
        for number in range(n_maps):
            fitted, metrics = self._map_quality(vectors[0], target, point, method, number)
            about = {"concept": "map", "variant": f"map {number}" if number else None}
            about |= {"part": "held-out", "n": fitted.n}
            found += [about | {"metric": name, "value": x} for name, x in metrics.items()]
        means: dict[str, list] = {}
        for vector, theirs in zip(vectors, own, strict=True):
            each = self._vector_quality(vector, target, point, method, theirs)
            for metric, value in each.items():
                means.setdefault(metric, []).append(value)
        concept = vectors[0].concept if len(vectors) == 1 else "mean"
        for metric, values in means.items():
            found.append({"metric": metric, "value": float(np.mean(values)), "concept": concept})
        return found

    def _map_quality(self, vector, target, point, method, number: int) -> tuple[AffineMap, dict]:
        """A map of a vector, and {metric: value}."""
        blocks = point.source_block, point.block
        fitted = self.maps(vector, target, method).between(*blocks, sample=number)
        found = {"r2": fitted.r2, "cosine": fitted.cosine}
        if self.where_read:
            local = self.maps(vector, target, "contrans-local")
            found["r2_where_read"] = local.r2_where_read(fitted, *blocks)
        found["n_over_d"] = fitted.n / len(fitted.x_mean)
        found["effective_rank"] = fitted.effective_rank
        return fitted, found

    def _vector_quality(self, vector, target, point, method, own=None) -> dict[str, float]:
        """{metric: value}: norms of v, v_hat and both streams; where v is read the separation of
        its pairs, R² along v_hat and cosine_to_response; and the cosine of v_hat with the target's
        own vector."""
        blocks = point.source_block, point.block
        v, v_hat = self.v(vector, blocks[0]), self.v_hat(vector, target, point, method)
        source_norm, target_norm = self.maps(vector, target).stream_norms(*blocks)
        found = {"norm_v": v.norm().item(), "norm_v_hat": v_hat.norm().item()}
        found |= {"stream_source": source_norm, "stream_target": target_norm}
        if self.where_read:
            fitted = self.maps(vector, target, method).between(*blocks)
            local = self.maps(vector, target, "contrans-local")
            found["r2_along_v"] = local.r2_where_read(fitted, *blocks, along=v_hat)
            found["cosine_to_response"] = local.cosine_to_response(v, v_hat, *blocks)
            column = self.blocks(vector.model).index(blocks[0])
            positive, negative = [states[:, column] for states in self.pair_states(vector)]
            if len(positive) > 1:
                found["separation"] = separation(positive, negative)
        if own:
            theirs = self.v(own, point.block)
            found["norm_own"] = theirs.norm().item()
            found["cosine_to_own"] = torch.cosine_similarity(v_hat, theirs, dim=0).item()
        return found

    def save(
        self, path: str | Path, vector: Vector, target: str, point: Point, method: str
    ) -> None:
        """Write v_hat at a point, with a description, see harness.save_concept."""
        about = self.describe(vector, target, point, method)
        save_concept(path, self.v_hat(vector, target, point, method), **about)

    def describe(self, vector: Vector, target: str, point: Point, method: str) -> dict:
        """What harness.save_concept writes beside v_hat at a point."""
        positive, _ = self.pairs(vector.concept, vector.model)
        fitted = self.maps(vector, target, method).between(point.source_block, point.block)
        return {
            "concept": vector.concept,
            "source": vector.model,
            "target": target,
            "fingerprint": self.models.fingerprint(target),
            "source_layer": point.source_block,
            "layer": point.block,
            "alpha": point.alpha,
            "method": self.refine_method,
            "map": method,
            "pairs": len(positive),
            "first_prompt": positive[0],
            "fitted_on": fitted.n,
            "r2": fitted.r2,
            "cosine": fitted.cosine,
        }

    def pair_states(self, vector: Vector) -> list[torch.Tensor]:
        """States [n, blocks, d] of a vector's positive and of its negative prompts."""
        states = self.prompt_states(vector.model)
        positive, negative = self.pairs(vector.concept, vector.model)
        return [torch.stack([states[text] for text in side]) for side in (positive, negative)]

    def states_of_context(self, name: str, context: Context) -> dict[int, torch.Tensor]:
        """{block: states [m, d] of a model} of the texts of a context in its templates, which are
        prompts of a vector."""
        known = self.prompt_states(name)
        states = []
        for template, text in itertools.product(context.templates, context.texts):
            states.append(known[template.replace("{text}", text)])
        return dict(zip(self.blocks(name), torch.stack(states).unbind(1)))

    def prompt_states(self, name: str) -> dict[str, torch.Tensor]:
        """{prompt: states [blocks, d]} of all vectors of a model, which share many prompts."""
        if name not in self.known_states:
            texts: dict[str, None] = {}  # each once, in order
            for vector in self.wanted:
                if vector.model == name:
                    for side in self.pairs(vector.concept, name):
                        texts |= dict.fromkeys(side)
            states = hidden_states(self.models.load(name), list(texts), self.blocks(name))
            self.known_states[name] = dict(zip(texts, states))
        return self.known_states[name]

    def _read_models(self) -> None:
        """Read all models, one after the other; the first target last, since it is used next."""
        if self.refined:
            return
        refined, plain = {}, {}  # kept when all models were read
        if self.known:
            self.known._read_models()
            refined, plain = dict(self.known.refined), dict(self.known.plain)
            self.known_states |= self.known.known_states
        mapped = {vector.base for vector in self.wanted} | set(self.targets)
        sources = (mapped | {vector.model for vector in self.wanted}) - set(self.targets)
        for name in [*sorted(sources), *reversed(self.targets)]:
            if name in plain:
                continue
            model, blocks = self.models.load(name), self.blocks(name)
            for vector in self.wanted:
                if vector.model == name:
                    if model.remote:  # no states travel
                        pairs = self.pairs(vector.concept, name)
                        v = concept_vector(model, *pairs, blocks, self.refine_method)
                    else:
                        v = refine(*self.pair_states(vector), self.refine_method)
                    refined[vector] = dict(zip(blocks, v))
            if name in mapped:
                states = hidden_states(model, cut_ends(self.sentences), blocks)
                plain[name] = dict(zip(blocks, states.unbind(1)))
            del model  # so that it can make room for the next
        self.refined, self.plain = refined, plain

    def _read_near(self, vector: Vector, target: str, context: Context) -> list[NearStates]:
        """The near states of the source's base model, for each sample of text: the same for all
        targets with the same vocabulary."""
        key = vector.model, vector.base, context, self.models.vocabulary(target)
        if key in self.known_near:
            return self.known_near[key]
        concept_states = self.states_of_context(vector.model, context)
        blocks, pools = list(concept_states), self._pool_key(vector, target, context)
        size = min(self.map_options["n_sentences"], len(self.sentences))
        found = []
        for sample, pool in enumerate(self._make_pools(*pools)):
            x = self._read_pool(vector.base, blocks, pools, sample)
            found.append(near_states(pool, x, concept_states, size, seed=sample))
        self.known_near[key] = found
        return found

    def _read_pool(self, name: str, blocks: list[int], pools: tuple, sample: int) -> torch.Tensor:
        """A model's states at all places of the pool of a sample; kept if both_ways."""
        key = name, *blocks, *pools, sample
        if key in self.known_whole:
            return self.known_whole[key]
        pool = self._make_pools(*pools)[sample]
        states = pool_states(self.models.load(name), pool, blocks)
        if self.both_ways:
            self.known_whole[key] = states
        return states

    def _pool_key(self, vector: Vector, target: str, context: Context) -> tuple:
        """The models whose tokens end at the places of a pool, and the pool's context."""
        vocabulary = self.models.vocabulary(target)
        alike = [name for name in self.targets if self.models.vocabulary(name) == vocabulary]
        return frozenset({vector.base, *alike}), context

    def _make_pools(self, names: frozenset[str], context: Context) -> list[Pool]:
        """The candidate places of a context for each sample of text."""
        key = names, context
        if key not in self.known_pools:
            size, others = self.map_options["n_sentences"], context.others
            samples = max(1, len(self.sentences) // size)
            pools = []
            for sample in range(samples):
                rows = sample_rows(len(self.sentences), size, sample)
                plain = [self.sentences[row] for row in rows]
                rows = sample_rows(len(others), max(1, len(others) // samples), sample)
                own = context._replace(others=tuple(others[row] for row in rows))
                pools.append(local_pool(self.models, sorted(names), own, plain, seed=sample))
            self.known_pools[key] = pools  # when all are made
        return self.known_pools[key]
