"""Which map carries a concept, and can that be known beforehand? The table of docs/map.md.

    python benchmarks/maps.py                               toy zoo, emotions and MC1, 30 minutes
    python benchmarks/maps.py --src MODEL --tgt MODEL …     your models; options of exp_emotion.py

Each way of fitting a map is tried on disjoint samples of the plain text. alpha (for MC1 also the
block) is chosen on the validation part as in the experiment, and the effect is measured on the test
part. MEASURES are those of the map between these blocks. They need no steering, and are taken at
the positions of another sample (of the same, if there is only one). For random directions and
permuted labels, see the scripts.

    paper                 last tokens of cut sentences, as in the paper
    paper, ridge          the same with an intercept and a ridge of 0.01
    stitching             every token of the sentences, with an intercept (Chen et al. 2025)
    windows               the local map without plain text: pieces of text in the template only
    nearest               the local map without them: the nearest positions of plain text only
    local                 the local map
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exp_emotion
import exp_truthfulqa
from common import BASE, AffineMap, Transplant, fit_affine, fit_quality
from exp_emotion import EMOTIONS
from harness import model_options
from models import Models
from report import markdown, record, spread
from vectors import (
    LAST_TOKEN,
    LOCAL_RIDGE,
    Point,
    Pool,
    Vector,
    Vectors,
    fit_local,
    near_states,
    plain_texts,
    pool_states,
    random_directions,
    response,
    shared_token_ends,
)

import numpy as np
import torch
from scipy.stats import spearmanr


class Column(NamedTuple):
    """An experiment on one target."""

    name: str
    vectors: Vectors
    concepts: list[Vector]  # in the source
    own: list[Vector]  # the same in the target
    target: str
    blocks: list[tuple[int, int]]  # (source block, block) to choose from
    alphas: list[float]
    hits: Any  # hits(part, concept, transplants) -> a list of booleans for each transplant
    best_point: Any  # best_point(records of a validation grid) -> Point, the experiment's own
    n_random: int = 0  # random directions that the grid has beside each vector


def emotion_columns(argv: list[str]) -> list[Column]:
    args = exp_emotion.options(argv)
    models = Models(**model_options(args))
    data = exp_emotion.load_data(args)
    names = [args.src_base, *args.tgt]
    sentences = plain_texts(args.texts, models, names, args.maps * args.sentences)
    vectors = exp_emotion.make_vectors(args, data, sentences, models)
    columns = []
    for target in args.tgt:
        lab = exp_emotion.Lab(args, data, models, vectors, target)

        def hits(part, vector, moves, target=target):
            model = models.load(target)
            found = exp_emotion.named(model, args, data, part, vector.concept, moves)
            return [each["token_acc"] for each in found]

        ours = [lab.source(emotion) for emotion in EMOTIONS]
        own = [Vector(emotion, target, target) for emotion in EMOTIONS]
        name = f"emotions, {Path(args.src).name} → {Path(target).name}"
        columns.append(
            Column(
                name=name,
                vectors=vectors,
                concepts=ours,
                own=own,
                target=target,
                blocks=lab.grid,
                alphas=args.alpha,
                hits=hits,
                best_point=exp_emotion.best_point,
            )
        )
    return columns


def mc1_columns() -> list[Column]:
    args = exp_truthfulqa.options(["--prompt", "paper"])
    models = Models(**model_options(args))
    parts = exp_truthfulqa.plan(args, models)
    rows = [row for part in parts for row in part.rows]
    data = exp_truthfulqa.load_data(args, models, rows)
    lab = exp_truthfulqa.Lab(args, data, models, rows)
    columns = []
    for part in parts:
        [row] = [row for row in part.rows if row.method == "contrans"]
        [own] = [row for row in part.rows if row.method == "self-align"]

        def hits(part, _, moves, row=row):
            questions = data.learn if part == "validation" else data.test
            return [result["mc1"] for result in lab.score(row, questions, moves)]

        pair = f"{Path(row.source).name} → {Path(row.host).name}"
        blocks = list(dict.fromkeys(lab.block_pairs(row)))
        columns.append(
            Column(
                name=f"MC1, {pair}",
                vectors=lab.vectors,
                concepts=[row.vector],
                own=[own.vector],
                target=row.base,
                blocks=blocks,
                alphas=args.alpha,
                hits=hits,
                best_point=exp_truthfulqa.best_point,
                n_random=3,
            )
        )
    return columns


def fitted_maps(column: Column, sample: int, blocks: tuple[int, int]) -> dict[str, AffineMap]:
    """{way: map} between two blocks, all from one sample of the plain text."""
    vectors, vector, target = column.vectors, column.concepts[0], column.target
    source_block, block = blocks
    paper = vectors.maps(vector, target)
    local = vectors.maps(vector, target, "contrans-local")
    x, y = paper.states(source_block, block, sample)
    found = {
        "paper": paper.between(source_block, block, sample),
        "paper, ridge": fit_affine(x, y, intercept=True, ridge=LOCAL_RIDGE),
    }
    source = vectors.models.load(vector.base)
    model = vectors.models.load(target, keep=(vector.base,))
    plain = [vectors.sentences[row] for row in paper.rows(sample)]
    everywhere = Pool(plain, shared_token_ends([source.tokenizer, model.tokenizer], plain))
    x = pool_states(source, everywhere, [source_block])[:, 0]
    y = pool_states(model, everywhere, [block])[:, 0]
    found["stitching"] = fit_affine(x, y, intercept=True)
    pool = local.near[sample].pool
    context = vectors.context(vector.concept, vector.model)
    wanted = {source_block: vectors.states_of_context(vector.model, context)[source_block]}
    for way in ("windows", "nearest"):
        own = [each for each in zip(*pool) if (each[1] == [LAST_TOKEN]) == (way == "windows")]
        part = Pool(*map(list, zip(*own)))
        x = pool_states(source, part, [source_block])
        near = near_states(part, x, wanted, len(plain), sample)
        y = pool_states(model, part, [block], near.rows[source_block])[:, 0]
        found[way] = fit_local(near.x[source_block], y)
    found["local"] = local.between(source_block, block, sample)
    return found


MEASURES = ["R² where v is read", "R² along v̂", "cosine to Cov(Y, X·v)"]


def quality(fitted: AffineMap, x, y, v, v_hat) -> list[float]:
    """MEASURES of a map, on states x [n, d1] and y [n, d2] that it was not fitted on."""
    cosine = torch.cosine_similarity(v_hat.double(), response(v, x, y), dim=0).item()
    predicted, y = fitted.predict(x).double(), y.double()
    r2, _ = fit_quality(predicted, y, y.mean(0))
    along = v_hat.double()[:, None]
    predicted, y = predicted @ along, y @ along
    r2_along, _ = fit_quality(predicted, y, y.mean(0))
    return [r2, r2_along, cosine]


def choose(column: Column, directions: dict[tuple[int, int], list]) -> tuple[Point, float]:
    """The point with the best validation rate, as in the experiment, and the test rate there.

    directions: for each pair of blocks one direction [d] of each concept."""
    points = [Point(*blocks, alpha) for blocks, alpha in product(directions, column.alphas)]

    def tried(part, points, n_random=0):
        """Records of each point, over the items of all concepts: v_hat, and random directions."""
        hits: dict[tuple, list] = {}
        for concept, vector in enumerate(column.concepts):
            moves = {}
            for point in points:
                direction = directions[point[:2]][concept]
                others = random_directions(direction, n_random, seed=1000)
                for number, each in enumerate([direction, *others]):
                    moves[point, number] = Transplant.of(each, point.block, point.alpha)
            for key, found in zip(moves, column.hits(part, vector, list(moves.values()))):
                hits.setdefault(key, []).extend(found)
        return {key: record(found, **key[0]._asdict()) for key, found in hits.items()}

    found = tried("validation", points, column.n_random)
    grid = []
    for point in points:
        ours, *others = [found[point, number] for number in range(1 + column.n_random)]
        grid += [ours, spread(others, "random")] if others else [ours]
    best = column.best_point(grid)
    [tested] = tried("test", [best]).values()
    return best, tested["value"]


def measure(column: Column) -> tuple[list[list], list[list[float]]]:
    """(rows of the table, MEASURES and effect relative to Self-Align of each map)."""
    vectors = column.vectors
    local = vectors.maps(column.concepts[0], column.target, "contrans-local")
    base = np.mean([np.mean(column.hits("test", each, [BASE])[0]) for each in column.concepts])
    own = {}
    for blocks in column.blocks:
        own[blocks] = [vectors.v(each, blocks[1]) for each in column.own]
    _, self_align = choose(column, own)
    effects: dict[str, list] = {}
    for sample in range(len(local.near)):
        directions: dict[str, dict] = {}
        measured: dict[tuple, list] = {}
        for blocks in column.blocks:
            for way, fitted in fitted_maps(column, sample, blocks).items():
                v = [vectors.v(each, blocks[0]) for each in column.concepts]
                v_hat = [fitted.vector(each) for each in v]
                directions.setdefault(way, {})[blocks] = v_hat
                other = local.states(*blocks, (sample + 1) % len(local.near))
                measured[way, blocks] = [quality(fitted, *other, *each) for each in zip(v, v_hat)]
        for way, each in directions.items():
            best, rate = choose(column, each)
            measures = np.mean(measured[way, best[:2]], 0)
            effects.setdefault(way, []).append([*measures, rate])
            print(column.name, sample, way, *effects[way][-1], file=sys.stderr, flush=True)
    rows = [["base / Self-Align", f"{100 * base:.1f} / {100 * self_align:.1f}", "", "", ""]]
    found = []
    for way, each in effects.items():
        *measures, rates = np.array(each).T
        text = f"{100 * rates.mean():.1f} ({100 * rates.min():.0f}–{100 * rates.max():.0f})"
        rows.append([way, text, *(f"{values.mean():.2f}" for values in measures)])
        found += [[*one, (rate - base) / (self_align - base)] for *one, rate in each]
    return rows, found


def prediction(found: list[list[float]]) -> str:
    """How well MEASURES predict the effect relative to Self-Align, over maps."""
    *measures, effects = np.array(found).T
    ranks = []
    for name, values in zip(MEASURES, measures):
        ranks.append(f"{name} {spearmanr(values, effects).statistic:.2f}")
    works, positive = effects >= 0.5, measures[0] > 0
    return (
        f"Spearman with the effect, over {len(found)} maps: {', '.join(ranks)}. At least half of "
        f"Self-Align's effect: {works[positive].sum()} of {positive.sum()} maps with a positive "
        f"{MEASURES[0]}, {works[~positive].sum()} of {(~positive).sum()} others"
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(f"{__doc__}\nThe options of exp_emotion.py:\n")
    columns = emotion_columns(argv)
    if not argv:
        columns += mc1_columns()
    everything = []
    for column in columns:
        rows, found = measure(column)
        table = markdown(["", "rate [%]", *MEASURES], rows)
        print(f"\n{column.name}\n\n{table}\n\n{prediction(found)}")
        everything += found
    print(f"\nAll columns. {prediction(everything)}")


if __name__ == "__main__":
    main()
