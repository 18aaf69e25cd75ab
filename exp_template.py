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

import random
import shutil
from pathlib import Path

from common import BASE, Transplant, score_labels
from harness import (
    TOY,
    Run,
    at_least,
    fail,
    folder_path,
    map_methods,
    map_options,
    model_options,
    option_parser,
    parse_options,
    read_families,
    read_pairs,
    run_script,
    save_concept,
)
from models import Models
from report import draw_strength, record, summary, verdict
from vectors import Context, Point, Vector, Vectors, count_samples, plain_texts

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 4], "sentences": 1000, "limit": 200}
FAMILIES = read_families("base", SETTINGS, toy={"sentences": 500, "tgt": [f"{TOY}/models/llama-m"]})


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES, models=("src", "src-base", "tgt"))
    add = parser.add_argument
    add("--pairs", type=Path, default=TOY / "pairs.jsonl", metavar="FILE", help="pairs of texts")
    add("--template", default="Scenario: {text}\nThe emotion of the above scenario is")
    add("--labels", nargs=2, default=["happiness", "sadness"], metavar=("POSITIVE", "NEGATIVE"))
    add("--maps", type=at_least(1), default=2, help="maps on different samples of the plain text")
    add("--permutations", type=at_least(0), default=199, help="vectors of permuted labels")
    add("--save-vector", type=folder_path, metavar="FOLDER", help="copy each v_hat there")
    args = parse_options(parser, FAMILIES, argv)
    if args.layer == "auto":
        fail("--layer auto has no use here: give a block, or a fraction of the depth")
    if "{text}" not in args.template:
        fail("--template needs {text} in it")
    return args


def prompts(args, texts) -> list[str]:
    return [args.template.replace("{text}", text) for text in texts]


def hits(args, model, texts: list[str], transplants: list[Transplant]) -> list[list[bool]]:
    """Whether the positive label is preferred after each text, under each transplant."""
    _, preferred = score_labels(model, prompts(args, texts), args.labels, transplants)
    return (preferred == 0).tolist()


def steer(args, models: Models, pairs, test, sentences, target: str, folder: str) -> list[dict]:
    """Records of the effect of v_hat, its controls and the target's own vector; saves v_hat."""
    concept = args.labels[0]
    positive, negative = zip(*pairs)
    v, own = Vector(concept, args.src, args.src_base), Vector(concept, target, target)
    source_block, block = models.block(args.src, args.layer), models.block(target, args.layer, 1)
    point = Point(source_block, block, alpha=1.0)
    vectors = Vectors(
        models,
        wanted=[v, own],
        targets=[target],
        pairs=lambda *_: (prompts(args, positive), prompts(args, negative)),
        blocks=lambda name: [block if name == target else source_block],
        context=lambda *_: Context((args.template,), positive + negative),
        sentences=sentences,
        refine=args.refine,
        **map_options(args),
    )
    # Refine (Eq. 1): v in the source, and in the target itself for comparison.
    directions = {("self-align", None): vectors.v(own, block)}
    # Reformulate (Eq. 2): v_hat by each kind of map, and its controls.
    for method in map_methods(args):
        directions[method, None] = vectors.at(v, target, point, method)
        counts = {"n_maps": args.maps, "n_random": args.random, "seed": args.seed}
        counts["n_permuted"] = args.permutations if method == map_methods(args)[-1] else 0
        controls = vectors.controls(v, target, point, [], method, **counts)
        for variant, control in controls.items():
            directions[method, variant] = control
    # Transplant (Eq. 3): each of them at each strength.
    arms = [("base", None, 0, BASE)]
    for (method, variant), direction in directions.items():
        for alpha in args.alpha:
            arms.append((method, variant, alpha, Transplant.of(direction, block, alpha)))
    about = {"source": args.src, "target": target, "concept": concept, "metric": "logit_acc"}
    about |= {"part": "test", "source_block": source_block, "block": block}
    answers = hits(args, models.load(target), test, [move for *_, move in arms])
    records = []
    for (method, variant, alpha, _), found in zip(arms, answers):
        records.append(record(found, method=method, variant=variant, alpha=alpha, **about))
    best = map_methods(args)[-1]
    path = Path(folder) / f"v_{concept}_{Path(target).name}.safetensors"
    about = vectors.describe(v, target, point, best) | {"alpha": None}  # none is chosen
    save_concept(path, directions[best, None], **about)
    return records


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    pairs = read_pairs(args.pairs)
    pairs = random.Random(args.seed).sample(pairs, len(pairs))
    half = len(pairs) // 2
    seen = {text for pair in pairs[:half] for text in pair}
    test = dict.fromkeys(negative for _, negative in pairs[half:] if negative not in seen)
    test = list(test)[: args.limit if args.limit > 0 else None]
    if not test:
        fail(f"{args.pairs} repeats its negatives: none is left that made no vector")
    if not models.same_shape(args.src, args.src_base):
        fail(f"{args.src} and {args.src_base} differ in width or depth")
    for side, name in enumerate([args.src, *args.tgt]):
        models.block(name, args.layer, side)  # an impossible --layer ends here
        for texts in zip(*pairs):
            models.require_fit(name, prompts(args, texts), new_tokens=8)
        models.require_labels(name, prompts(args, test)[0], args.labels)
    count = args.maps * args.sentences
    sentences = plain_texts(args.texts, models, [args.src_base, *args.tgt], count)
    args.maps = count_samples(args.maps, sentences, args.sentences)
    first, ignore = prompts(args, test)[:1], ["save_vector"]
    run = Run(__file__, args, models, [pairs, sentences], first, ignore, steps=len(args.tgt))
    records, figures, judged = [], [], {}
    for target in args.tgt:
        name = Path(target).name
        inputs = (args, models, pairs[:half], test, sentences, target, str(run.folder))
        found = run.step(f"steer {target}", steer, *inputs)
        for alpha in args.alpha:
            at_alpha = [each for each in found if each["alpha"] in (0, alpha)]
            judged[f"{name}, α = {alpha:g}"] = at_alpha, {}
        point = models.block(args.src, args.layer), models.block(target, args.layer, 1), None
        points = dict.fromkeys(["self-align", *map_methods(args)], point)
        wanted = f"prefers “{args.labels[0]}”"
        figure = draw_strength(found, points, ylabel=wanted, title=f"{name} {wanted}")
        figures.append(run.figure(figure, f"strength_{name}"))
        records += found
    title = f"How often “{args.labels[0]}” is preferred, in % (n = {len(test)})"
    run.save(records, [], [verdict(judged), *figures, summary(title, judged)])
    for path in run.folder.glob("v_*.safetensors") if args.save_vector else []:
        args.save_vector.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, args.save_vector)


if __name__ == "__main__":
    run_script(main)
