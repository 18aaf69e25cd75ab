"""Your own concept in your own models: copy this file, change what you like.

    python exp_template.py                                    toy zoo, some 20 seconds
    python exp_template.py --pairs my.jsonl --labels polite rude --template "{text} This was" \\
        --src Qwen/Qwen3-0.6B --tgt Qwen/Qwen3-4B --texts my_plain_text.txt

Refine a vector from pairs of texts, map it into larger models, add it there. How often do they then
prefer the positive label on held-out negative texts? What to change: --pairs (a file with
{"positive": text, "negative": text} on each line), --template, which ends where the label begins,
and --labels; or `hits`, if your concept shows in something else (see section 5 of common.py)."""

from pathlib import Path

import harness
from common import BASE, Transplant, score_labels
from harness import TOY, map_methods
from models import Models
from report import draw_strength, map_table, map_warnings, record, select, summary, verdict
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
    parser.set_defaults(maps=2)
    args = harness.parse_options(parser, FAMILIES, argv)
    if "{text}" not in args.template:
        harness.fail("--template needs {text} in it")
    return args


def prompts(args, texts) -> list[str]:
    return [args.template.replace("{text}", text) for text in texts]


def hits(args, model, texts: list[str], transplants: list[Transplant]) -> list[list[bool]]:
    """Whether the positive label is preferred after each text, under each transplant."""
    _, preferred = score_labels(model, prompts(args, texts), args.labels, transplants)
    return (preferred == 0).tolist()


def steer(args, vectors: Vectors, source: Vector, own: Vector, point: Point, test) -> list[dict]:
    """The effect of each direction at each strength, and what the maps are worth: records."""
    target, methods = own.model, map_methods(args)
    # Refine (Eq. 1): v in the target itself, for comparison.
    directions = {("self-align", None): vectors.v(own, point.block)}
    # Reformulate (Eq. 2): the source's v through each kind of map, and controls.
    counts = {"n_maps": args.maps, "n_random": args.random, "n_permuted": args.permutations}
    directions |= vectors.directions(source, target, point, methods, seed=args.seed, **counts)
    # Transplant (Eq. 3): each of them at each strength.
    moves = {("base", None, 0): BASE}
    for (method, variant), direction in directions.items():
        for alpha in args.alpha:
            moves[method, variant, alpha] = Transplant.of(direction, point.block, alpha)
    answers = hits(args, vectors.models.load(target), test, list(moves.values()))
    about = {"target": target, "concept": source.concept} | point._asdict()
    records = []
    for (method, variant, alpha), found in zip(moves, answers):
        of = {"base": None, "self-align": target}.get(method, args.src)
        what = about | {"source": of, "method": method, "variant": variant, "alpha": alpha}
        records.append(record(found, metric="logit_acc", part="test", **what))
    for method in methods:
        for fields in vectors.quality([source], target, point, method, args.maps, [own]):
            records.append(record(**about | {"source": args.src, "method": method} | fields))
    return records


def main(argv=None):
    args = options(argv)
    models = Models(**harness.model_options(args))
    pairs, test = harness.read_pairs(args.pairs, args.seed, args.limit)
    positive, negative = zip(*pairs)
    blocks = {}
    for name in (args.src, args.src_base, *args.tgt):  # what cannot work ends before weights load
        blocks[name] = models.block(name, args.layer, side=int(name in args.tgt))
        models.require_fit(name, prompts(args, [*positive, *negative, *test]), new_tokens=8)
        models.require_labels(name, prompts(args, test)[0], args.labels)
    models.require_same_shape(args.src, args.src_base)
    sentences = map_texts(args, models, [args.src_base, *args.tgt])
    data, first_prompts = [pairs, test, sentences], prompts(args, test[:1])
    run = harness.Run(__file__, args, models, data, first_prompts, steps=2 * len(args.tgt))
    source = Vector(args.labels[0], args.src, args.src_base)
    own_vectors = [Vector(source.concept, target, target) for target in args.tgt]
    vectors = Vectors(
        models,
        wanted=[source, *own_vectors],
        targets=args.tgt,
        pairs=lambda *_: (prompts(args, positive), prompts(args, negative)),
        blocks=lambda name: [blocks[name]],
        context=lambda *_: Context((args.template,), positive + negative),
        sentences=sentences,
        refine=args.refine,
        **harness.map_options(args),
    )
    records, figures, tables, judged = [], [], [], {}
    title, methods = f"prefers “{source.concept}”", map_methods(args)
    for own in own_vectors:  # no strength is chosen: table and figure show all of them
        target, name = own.model, Path(own.model).name
        point = Point(blocks[args.src], blocks[target], alpha=None)
        found = run.step(f"steer {target}", steer, args, vectors, source, own, point, test)
        path = run.folder / f"v_{source.concept}_{name}.safetensors"
        run.step(f"save {target}", vectors.save, path, source, target, point, methods[-1])
        for alpha in args.alpha:
            at_alpha = [each for each in found if each["alpha"] in (0, alpha)]
            judged[f"{name}, α = {alpha:g}"] = at_alpha, {}
        points = dict.fromkeys(["self-align", *methods], point)
        curves = select(found, part="test")
        figure = draw_strength(curves, points, ylabel=title, title=f"{name} {title}")
        figures.append(run.figure(figure, f"strength_{name}"))
        tables.append(map_table(found))
        records += found
    table = summary(f"{title}, in % (n = {len(test)})", judged)
    run.save(records, [], [verdict(judged), *figures, table, *map_warnings(records)], tables)


if __name__ == "__main__":
    harness.run_script(main)
