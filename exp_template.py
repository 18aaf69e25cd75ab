"""Your own concept in your own models: copy this file, change what you like.

    python exp_template.py                                    toy zoo, some 20 seconds
    python exp_template.py --pairs my.jsonl --labels polite rude --template "{text} This was" \\
        --src Qwen/Qwen3-0.6B --tgt Qwen/Qwen3-4B --texts my_plain_text.txt

Refine a vector from pairs of texts, map it into larger models, add it there. How often do they then
prefer the positive label on negative texts that made no vector?

What to change: --pairs (a file with {"positive": text, "negative": text} on each line), --template,
which ends where the label begins, and --labels; or `hits`, if your concept shows in something else
than a label (see choice_logprobs, generate and perplexity in common.py).
"""

from pathlib import Path

import harness
from common import BASE, Transplant, score_labels
from harness import TOY, at_least, fail, map_methods
from models import Models
from report import draw_strength, map_table, record, select, summary, verdict
from vectors import Context, Point, Vector, Vectors, map_texts

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 4], "sentences": 1000, "limit": 200}
ZOO = {"sentences": 500, "tgt": [f"{TOY}/models/llama-m"]}
FAMILIES = harness.read_families("base", SETTINGS, toy=ZOO)


def options(argv=None):
    parser = harness.option_parser(__doc__, FAMILIES, models=("src", "src-base", "tgt"))
    add = parser.add_argument
    add("--pairs", type=Path, default=TOY / "pairs.jsonl", metavar="FILE", help="pairs of texts")
    add("--template", default="Scenario: {text}\nThe emotion of the above scenario is")
    add("--labels", nargs=2, default=["happiness", "sadness"], metavar=("POSITIVE", "NEGATIVE"))
    add("--maps", type=at_least(1), default=2, help="maps on different samples of the plain text")
    add("--permutations", type=at_least(0), default=199, help="vectors of permuted labels")
    add("--save-vector", type=harness.folder_path, metavar="FOLDER", help="copy each v_hat there")
    args = harness.parse_options(parser, FAMILIES, argv)
    if "{text}" not in args.template:
        fail("--template needs {text} in it")
    return args


def prompts(args, texts) -> list[str]:
    return [args.template.replace("{text}", text) for text in texts]


def hits(args, model, texts: list[str], transplants: list[Transplant]) -> list[list[bool]]:
    """Whether the positive label is preferred after each text, under each transplant."""
    _, preferred = score_labels(model, prompts(args, texts), args.labels, transplants)
    return (preferred == 0).tolist()


def steer(args, vectors: Vectors, test: list[str], target: str, point: Point) -> list[dict]:
    """Records of the effect of v_hat, of its controls and of the target's own vector."""
    v, own = Vector(args.labels[0], args.src, args.src_base), Vector(args.labels[0], target, target)
    # Refine (Eq. 1): v in the source, and in the target itself for comparison.
    directions = {("self-align", None): vectors.v(own, point.block)}
    # Reformulate (Eq. 2): v_hat by each kind of map, and its controls.
    counts = {"n_maps": args.maps, "n_random": args.random, "seed": args.seed}
    for method in map_methods(args):
        directions[method, None] = vectors.at(v, target, point, method)
        counts["n_permuted"] = args.permutations if method == map_methods(args)[-1] else 0
        controls = vectors.controls(v, target, point, [], method, **counts)
        directions |= {(method, variant): control for variant, control in controls.items()}
    # Transplant (Eq. 3): each of them at each strength.
    moves = {("base", None, 0): BASE}
    for (method, variant), direction in directions.items():
        for alpha in args.alpha:
            moves[method, variant, alpha] = Transplant.of(direction, point.block, alpha)
    answers = hits(args, vectors.models.load(target), test, list(moves.values()))
    about = {"source": args.src, "target": target, "concept": v.concept, "metric": "logit_acc"}
    about |= {"part": "test", "source_block": point.source_block, "block": point.block}
    records = []
    for (method, variant, alpha), found in zip(moves, answers):
        records.append(record(found, method=method, variant=variant, alpha=alpha, **about))
    about["part"] = "held-out"
    for method in map_methods(args):  # what the maps are worth, in the report
        inputs = target, point, method, args.maps, [own], "contrans-local" in map_methods(args)
        for fields in vectors.quality([v], *inputs):
            records.append(record(method=method, **about | fields))
    return records


def main(argv=None):
    args = options(argv)
    models = Models(**harness.model_options(args))
    pairs, test = harness.read_pairs(args.pairs, args.seed, args.limit)
    positive, negative = zip(*pairs)
    models.require_same_shape(args.src, args.src_base)
    for side, name in enumerate([args.src, *args.tgt]):
        models.block(name, args.layer, side)  # an impossible --layer ends here
        models.require_fit(name, prompts(args, [*positive, *negative, *test]), new_tokens=8)
        models.require_labels(name, prompts(args, test)[0], args.labels)
    names = [args.src_base, *args.tgt]
    sentences = map_texts(args, models, names)
    data, first, ignore = [pairs, test, sentences], prompts(args, test[:1]), ["save_vector"]
    run = harness.Run(__file__, args, models, data, first, ignore, steps=len(args.tgt))

    concept, source_block = args.labels[0], models.block(args.src, args.layer)
    points = {}
    for target in args.tgt:  # no strength is chosen: the figure shows all of them
        points[target] = Point(source_block, models.block(target, args.layer, 1), alpha=None)
    v = Vector(concept, args.src, args.src_base)
    vectors = Vectors(
        models,
        wanted=[v, *(Vector(concept, target, target) for target in args.tgt)],
        targets=args.tgt,
        pairs=lambda *_: (prompts(args, positive), prompts(args, negative)),
        blocks=lambda name: [points[name].block if name in points else source_block],
        context=lambda *_: Context((args.template,), positive + negative),
        sentences=sentences,
        refine=args.refine,
        **harness.map_options(args),
    )
    records, figures, judged, quality = [], [], {}, []
    for target, point in points.items():
        name, best = Path(target).name, map_methods(args)[-1]
        found = run.step(f"steer {target}", steer, args, vectors, test, target, point)
        tested = select(found, part="test")
        path = run.folder / f"v_{concept}_{name}.safetensors"
        if args.save_vector or not path.exists():
            v_hat = vectors.at(v, target, point, best)
            about = vectors.describe(v, target, point, best)
            for folder in filter(None, [run.folder, args.save_vector]):
                harness.save_concept(folder / path.name, v_hat, **about)
        for alpha in args.alpha:
            at_alpha = [each for each in tested if each["alpha"] in (0, alpha)]
            judged[f"{name}, α = {alpha:g}"] = at_alpha, {}
        wanted = f"prefers “{concept}”"
        shown = dict.fromkeys(["self-align", *map_methods(args)], point)
        figure = draw_strength(tested, shown, ylabel=wanted, title=f"{name} {wanted}")
        figures.append(run.figure(figure, f"strength_{name}"))
        quality.append(map_table(select(found, part="held-out")))
        records += found
    title = f"How often “{concept}” is preferred, in % (n = {len(test)})"
    run.save(records, [], [verdict(judged), *figures, summary(title, judged)], quality)


if __name__ == "__main__":
    harness.run_script(main)
