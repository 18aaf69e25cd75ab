"""Your own concept in your own models: copy this file, change what you like.

    python exp_template.py                                    toy zoo, under 20 seconds
    python exp_template.py --pairs my.jsonl --labels polite rude --template "{text} This was" \\
        --src Qwen/Qwen3-0.6B --tgt Qwen/Qwen3-4B

Refine a vector from pairs of texts, map it into larger models, add it there. On texts of the opposite
class that made no vector, how often does the model then prefer the label of the positive class?

What to change: the file of pairs ({"positive": text, "negative": text} on each line), the template
that ends where the label begins, and the two labels, here or on the command line; `answers`, if your
concept shows in something else than a label (see choice_logprobs, generate, perplexity in common.py).
"""

import random
from pathlib import Path

from common import BASE, AffineMaps, Models, Transplant, concept_vector, control_directions
from common import hidden_states, plain_sentences, score_labels
from harness import TOY, Run, at_least, fail, map_options, model_options, new_figure, option_parser
from harness import (
    parse_options,
    pivot,
    read_pairs,
    record,
    run_script,
    save_concept,
    select,
    spread,
)

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 4], "sentences": 2000, "limit": 200}
ZOO = {"src": f"{TOY}/models/llama-s", "tgt": [f"{TOY}/models/llama-m"]}
FAMILIES = {"toy": SETTINGS | ZOO, "custom": SETTINGS}


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES, models=("src", "src-base", "tgt"))
    add = parser.add_argument
    add("--pairs", type=Path, default=TOY / "pairs.jsonl", metavar="FILE", help="pairs of texts")
    add("--template", default="Scenario: {text}\nThe emotion of the above scenario is")
    add("--labels", nargs=2, default=["happiness", "sadness"], metavar=("POSITIVE", "NEGATIVE"))
    add("--maps", type=at_least(1), default=5, help="affine maps on different samples of the text")
    add("--save-vector", type=Path, metavar="FOLDER")
    args = parse_options(parser, FAMILIES, argv)
    if "{text}" not in args.template:
        fail("--template needs {text} in it")
    return args


def prompts(args, texts: list[str]) -> list[str]:
    return [args.template.replace("{text}", text) for text in texts]


def answers(args, model, texts: list[str], transplants: list[Transplant]) -> list[list[bool]]:
    """For each transplant: whether each text is continued with the positive label."""
    _, preferred = score_labels(model, prompts(args, texts), args.labels, transplants)
    return (preferred == 0).tolist()


def steer(args, models: Models, learn: list, test: list[str], sentences: list[str], target: str):
    """Records of one target, as a step of a run."""
    source_block, block = [
        models.block(name, args.layer, s) for s, name in enumerate([args.src, target])
    ]
    positive, negative = [prompts(args, side) for side in zip(*learn)]
    # 1. Refine (Eq. 1)
    v = concept_vector(models.load(args.src), positive, negative, [source_block], args.refine)[0]
    # 2. Map (Eq. 2)
    x = hidden_states(models.load(args.src_base), sentences, [source_block])[:, 0]
    model = models.load(target)
    y = hidden_states(model, sentences, [block])[:, 0]
    maps = AffineMaps({source_block: x}, {block: y}, **map_options(args))
    v_hat = maps.vector(v, source_block, block)
    # 3. Transplant (Eq. 3), beside its controls
    own = concept_vector(model, positive, negative, [block], args.refine)[0]
    counts = {"n_maps": args.maps, "n_random": args.random, "seed": args.seed}
    controls = control_directions(maps, v, {}, source_block, block, **counts)
    arms = [("base", None, 0, BASE)]
    for alpha in args.alpha:
        for variant, direction in {None: v_hat, **controls}.items():
            arms.append(("contrans", variant, alpha, Transplant.of(direction, block, alpha)))
        arms.append(("self-align", None, alpha, Transplant.of(own, block, alpha)))
    hits = answers(args, model, test, [move for *_, move in arms])
    about = {"source": args.src, "target": target, "source_block": source_block, "block": block}
    records = []
    for (method, variant, alpha, _), found in zip(arms, hits):
        what = {"method": method, "variant": variant, "alpha": alpha, "concept": args.labels[0]}
        records.append(record(found, metric="logit_acc", part="test", **what, **about))
    if args.save_vector:
        about |= {
            "concept": args.labels[0],
            "layer": block,
            "method": args.refine,
            "pairs": len(learn),
        }
        about |= {"fingerprint": model.fingerprint, "first_prompt": positive[0]}
        path = args.save_vector / f"v_{args.labels[0]}_{Path(target).name}.safetensors"
        save_concept(path, v_hat, **about)
    return records


def draw(args, records: list[dict]):
    figure, axis = new_figure(figsize=(5, 3.2))
    for name in dict.fromkeys(each["variant"] or each["method"] for each in records):
        curve = [each for each in records if name in (each["variant"], each["method"])]
        curve = [each for each in curve if each["variant"] in (None, name)]
        axis.plot(
            [each["alpha"] for each in curve], [each["value"] for each in curve], "o-", label=name
        )
    axis.set(xlabel="steering strength α", ylabel=f"prefers “{args.labels[0]}”", ylim=(-0.02, 1.02))
    axis.legend(frameon=False, fontsize=8)
    return figure


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    pairs = read_pairs(args.pairs)
    pairs = random.Random(args.seed).sample(pairs, len(pairs))
    learn = pairs[: len(pairs) // 2]
    test = [negative for _, negative in pairs[len(learn) :]][
        : args.limit if args.limit > 0 else None
    ]
    path = args.data / "wikisplit" / "validation.tsv"
    sentences = plain_sentences(path, models, [args.src_base, *args.tgt], args.sentences)
    for name in [args.src, *args.tgt]:
        models.require_fit(name, prompts(args, [text for pair in pairs for text in pair]), 8)
        models.require_labels(name, prompts(args, test)[0], args.labels)
    names = [args.src, args.src_base, *args.tgt]
    inputs = {"models": [models.fingerprint(name) for name in names], "data": [pairs, sentences]}
    run = Run(__file__, args, inputs | {"first prompt": prompts(args, test)[0]})
    records = []
    for target in args.tgt:
        records += run.step(f"steer {target}", steer, args, models, learn, test, sentences, target)
    shown = []
    for target, alpha in [(target, alpha) for target in args.tgt for alpha in [0, *args.alpha]]:
        mine = select(records, target=target, alpha=alpha)
        shown += select(mine, variant=None)
        for kind in ("random", "map", "shuffled") if alpha else ():
            shown.append(
                spread(
                    [e for e in mine if (e["variant"] or "").startswith(kind)], f"{kind} [range]"
                )
            )
    for target in args.tgt:
        run.figure(draw(args, select(shown, target=target)), f"strength_{Path(target).name}")
    table = pivot(
        shown,
        lambda each: f"{Path(each['target']).name}, {each['variant'] or each['method']}",
        "alpha",
    )
    run.save(records, [], f"Prefers “{args.labels[0]}”, in % (n = {len(test)}), by α\n\n{table}")


if __name__ == "__main__":
    run_script(main)
