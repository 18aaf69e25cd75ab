"""Your own concept in your own models: copy this file, change what you like.

    python exp_template.py                                    toy zoo, some 20 seconds
    python exp_template.py --pairs my.jsonl --labels polite rude --template "{text} This was" \\
        --src Qwen/Qwen3-0.6B --tgt Qwen/Qwen3-4B --texts my_plain_text.txt

Refine a vector from pairs of texts, map it into larger models, add it there. How often do they then
prefer the positive label on negative texts that made no vector? What to change: --pairs (a file
with {"positive": text, "negative": text} on each line), --template, which ends where the label
begins, and --labels; or the ten lines of `prompts` and `hits`, if your concept shows in something
else than a label (see choice_logprobs and generate in common.py)."""

from pathlib import Path

import harness
from common import BASE, Transplant, score_labels
from harness import TOY, at_least, map_methods
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
    add("--maps", type=at_least(1), default=2, help="maps on different samples of the plain text")
    add("--permutations", type=at_least(0), default=199, help="vectors of permuted labels")
    add("--save-vector", type=harness.folder_path, metavar="FOLDER", help="copy each v_hat there")
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


def steer(args, vectors: Vectors, test: list[str], target: str, point: Point) -> list[dict]:
    """Records of what the maps are worth, and of the effect of v_hat, its controls and own v."""
    v, own = Vector(args.labels[0], args.src, args.src_base), Vector(args.labels[0], target, target)
    about = {"source": args.src, "target": target, "concept": v.concept} | point._asdict()
    # Refine (Eq. 1): v in the source, and in the target itself for comparison.
    directions = {("self-align", None): vectors.v(own, point.block)}
    # Reformulate (Eq. 2): v_hat by each kind of map, what the map is worth, and controls.
    records, counts = [], {"n_maps": args.maps, "n_random": args.random, "seed": args.seed}
    for method in map_methods(args):
        for fields in vectors.quality([v], target, point, method, args.maps, [own]):
            records.append(record(method=method, **about | fields))
        directions[method, None] = vectors.v_hat(v, target, point, method)
        counts["n_permuted"] = args.permutations if method == map_methods(args)[-1] else 0
        controls = vectors.controls(v, target, point, [], method, **counts)
        directions |= {(method, variant): control for variant, control in controls.items()}
    # Transplant (Eq. 3): each of them at each strength.
    moves = {("base", None, 0): BASE}
    for (method, variant), direction in directions.items():
        for alpha in args.alpha:
            moves[method, variant, alpha] = Transplant.of(direction, point.block, alpha)
    answers = hits(args, vectors.models.load(target), test, list(moves.values()))
    about |= {"metric": "logit_acc", "part": "test"}
    for (method, variant, alpha), found in zip(moves, answers):
        arm = {"method": method, "variant": variant, "alpha": alpha}
        records.append(record(found, **about | arm))
    return records


def main(argv=None):
    args = options(argv)
    models = Models(**harness.model_options(args))
    pairs, test = harness.read_pairs(args.pairs, args.seed, args.limit)
    positive, negative = zip(*pairs)
    blocks, names = {}, [args.src, args.src_base, *args.tgt]
    for name in names:  # what cannot work ends here, before any weights are loaded
        blocks[name] = models.block(name, args.layer, side=int(name in args.tgt))
        models.require_fit(name, prompts(args, [*positive, *negative, *test]), new_tokens=8)
        models.require_labels(name, prompts(args, test)[0], args.labels)
    models.require_same_shape(args.src, args.src_base)
    sentences = map_texts(args, models, names[1:])
    data, first = [pairs, test, sentences], prompts(args, test[:1])
    run = harness.Run(__file__, args, models, data, first, ["save_vector"], 2 * len(args.tgt))
    v = Vector(args.labels[0], args.src, args.src_base)
    vectors = Vectors(
        models,
        wanted=[v, *(Vector(v.concept, target, target) for target in args.tgt)],
        targets=args.tgt,
        pairs=lambda *_: (prompts(args, positive), prompts(args, negative)),
        blocks=lambda name: [blocks[name]],
        context=lambda *_: Context((args.template,), positive + negative),
        sentences=sentences,
        refine=args.refine,
        **harness.map_options(args),
    )
    records, figures, worth, judged = [], [], [], {}
    for target in args.tgt:  # no strength is chosen: table and figure show all of them
        point, name = Point(blocks[args.src], blocks[target], alpha=None), Path(target).name
        found = run.step(f"steer {target}", steer, args, vectors, test, target, point)
        file, which = f"v_{v.concept}_{name}.safetensors", (v, target, point, map_methods(args)[-1])
        run.step(f"save {target}", vectors.save, run.folder / file, *which)
        if args.save_vector:  # whenever it is asked for, since that folder may be gone
            vectors.save(args.save_vector / file, *which)
        for alpha in args.alpha:
            at_alpha = [each for each in found if each["alpha"] in (0, alpha)]
            judged[f"{name}, α = {alpha:g}"] = at_alpha, {}
        points = dict.fromkeys(["self-align", *map_methods(args)], point)
        tested, wanted = select(found, part="test"), f"prefers “{v.concept}”"
        figure = draw_strength(tested, points, ylabel=wanted, title=f"{name} {wanted}")
        figures.append(run.figure(figure, f"strength_{name}"))
        worth.append(map_table(found))
        records += found
    title = f"How often “{v.concept}” is preferred, in % (n = {len(test)})"
    headline = [verdict(judged), *figures, summary(title, judged), *map_warnings(records)]
    run.save(records, [], headline, worth)


if __name__ == "__main__":
    harness.run_script(main)
