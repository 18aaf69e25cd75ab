"""Your own concept in your own models: copy this file, change what you like.

    python exp_template.py                                    toy zoo, under 20 seconds
    python exp_template.py --pairs my.jsonl --labels polite rude --template "{text} This was" \\
        --src Qwen/Qwen3-0.6B --tgt Qwen/Qwen3-4B

Refine a vector from pairs of texts, map it into larger models, add it there. How often do they then
prefer the positive label on negative texts that made no vector?

The ten lines to change: --pairs (a file with {"positive": text, "negative": text} on each line),
--template, which ends where the label begins, and --labels; or `hits`, if your concept shows in
something else than a label (see choice_logprobs, generate and perplexity in common.py).
"""

import random
from pathlib import Path

from common import (
    BASE,
    AffineMaps,
    Models,
    Transplant,
    concept_vector,
    control_directions,
    hidden_states,
    plain_sentences,
    score_labels,
)
from harness import (
    TOY,
    Run,
    at_least,
    fail,
    map_options,
    model_options,
    new_figure,
    option_parser,
    parse_options,
    pivot,
    read_pairs,
    record,
    run_script,
    save_concept,
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
    if args.layer == "auto":
        fail("--layer auto has no use here: give a block, or a fraction of the depth")
    return args if "{text}" in args.template else fail("--template needs {text} in it")


def prompts(args, texts: list[str]) -> list[str]:
    return [args.template.replace("{text}", text) for text in texts]


def hits(args, model, texts: list[str], transplants: list[Transplant]) -> list[list[bool]]:
    """Whether the positive label is preferred after each text, under each transplant."""
    _, preferred = score_labels(model, prompts(args, texts), args.labels, transplants)
    return (preferred == 0).tolist()


def steer(args, models: Models, pairs: list, test: list[str], sentences: list[str], target: str):
    """The effect of v_hat, of its controls and of the target's own vector, as records."""
    source_block, block = models.block(args.src, args.layer), models.block(target, args.layer, 1)
    positive, negative = [prompts(args, side) for side in zip(*pairs)]
    source, base = models.load(args.src), models.load(args.src_base, keep=[args.src])
    x = hidden_states(base, sentences, [source_block])[:, 0]
    v = concept_vector(source, positive, negative, [source_block], args.refine)[0]  # Eq. 1
    model = models.load(target)
    y = hidden_states(model, sentences, [block])[:, 0]
    maps = AffineMaps({source_block: x}, {block: y}, **map_options(args))
    v_hat = maps.vector(v, source_block, block)  # Eq. 2
    counts = {"n_maps": args.maps, "n_random": args.random, "seed": args.seed}
    directions = {None: v_hat} | control_directions(maps, v, {}, source_block, block, **counts)
    own = concept_vector(model, positive, negative, [block], args.refine)[0]
    arms = [("base", None, 0, BASE)]
    for alpha in args.alpha:
        for variant, direction in directions.items():
            arms.append(
                ("contrans", variant, alpha, Transplant.of(direction, block, alpha))
            )  # Eq. 3
        arms.append(("self-align", None, alpha, Transplant.of(own, block, alpha)))
    records = []
    for arm, found in zip(arms, hits(args, model, test, [move for *_, move in arms])):
        what = dict(zip(("method", "variant", "alpha"), arm)) | {"concept": args.labels[0]}
        where = {"source": args.src, "target": target, "source_block": source_block, "block": block}
        records.append(record(found, metric="logit_acc", part="test", **what, **where))
    if args.save_vector:
        path = args.save_vector / f"v_{args.labels[0]}_{Path(target).name}.safetensors"
        about = {"concept": args.labels[0], "source": args.src, "target": target, "layer": block}
        about |= {"method": args.refine, "pairs": len(pairs), "first_prompt": positive[0]}
        save_concept(path, v_hat, fingerprint=model.fingerprint, **about)
    return records


def summarize(args, records: list[dict]) -> list[dict]:
    """Base, ConTrans and Self-Align, and controls as mean and range, at each alpha."""
    shown = [each for each in records if not each["variant"]]
    for alpha in args.alpha:
        for kind in ("random", "map", "shuffled map"):
            same = [each for each in records if each["alpha"] == alpha and each["variant"]]
            shown.append(
                spread([e for e in same if e["variant"].startswith(kind)], f"{kind}, range")
            )
    return shown


def label(each: dict) -> str:
    return each["variant"] or each["method"]


def draw(args, records: list[dict]):
    figure, axis = new_figure(figsize=(5, 3.2))
    for name in dict.fromkeys(label(each) for each in records if each["alpha"]):
        curve = [each for each in records if label(each) in ("base", name)]
        axis.plot([e["alpha"] for e in curve], [e["value"] for e in curve], "o-", label=name)
    axis.set(xlabel="steering strength α", ylabel=f"prefers “{args.labels[0]}”", ylim=(-0.02, 1.02))
    axis.legend(frameon=False, fontsize=8)
    return figure


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    pairs = read_pairs(args.pairs)
    pairs = random.Random(args.seed).sample(pairs, len(pairs))
    half = len(pairs) // 2
    test = [negative for _, negative in pairs[half:]][: args.limit if args.limit > 0 else None]
    for side, name in enumerate([args.src, *args.tgt]):
        models.block(name, args.layer, side)  # an impossible --layer ends here
        models.require_fit(name, prompts(args, [text for pair in pairs for text in pair]), 8)
        models.require_labels(name, prompts(args, test)[0], args.labels)
    if not models.same_shape(args.src, args.src_base):
        fail(f"{args.src} and {args.src_base} differ in width or depth")
    names = [args.src, args.src_base, *args.tgt]
    path = args.data / "wikisplit" / "validation.tsv"
    sentences = plain_sentences(path, models, names[1:], args.sentences)
    inputs = {"models": [models.fingerprint(name) for name in names], "data": [pairs, sentences]}
    run = Run(__file__, args, inputs | {"first prompt": prompts(args, test)[0]})
    records, report = [], []
    for target in args.tgt:
        inputs = args, models, pairs[:half], test, sentences, target
        found = run.step(f"steer {target}", steer, *inputs)
        shown = summarize(args, found)
        run.figure(draw(args, shown), f"strength_{Path(target).name}")
        title = f"{Path(target).name}: prefers “{args.labels[0]}”, in %, by α (n = {len(test)})"
        records, report = records + found, [*report, title, pivot(shown, label, "alpha")]
    run.save(records, [], "\n\n".join(report))


if __name__ == "__main__":
    run_script(main)
