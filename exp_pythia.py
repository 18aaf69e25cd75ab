"""Which sizes can give a concept, and which can take it? Five models of one family, Sec. 6.3, Figures 4 and 8.

    python exp_pythia.py                                      a ladder of five sizes in the toy zoo, on 2 CPU cores
    python exp_pythia.py --family pythia --data data/paper    Pythia 14m, 70m, 410m, 1.4b, 6.9b, as in the paper
    python exp_pythia.py --models Qwen/Qwen3-0.6B-Base Qwen/Qwen3-1.7B-Base Qwen/Qwen3-4B-Base --data data/paper

The emotion vectors of every model are mapped into every model and added there: every source times every target. On
scenarios of the *other* five emotions, how often is the target emotion then the likeliest next word (Token Acc), against
without? Figure 4: improvement ratio and absolute improvement as heat maps. Figure 8: t-SNE of three sizes' states.

The scenarios that make a vector, the few-shot examples and the scenarios that test it are disjoint; alpha is chosen for each
pair on a validation part. Each model is loaded once and stays (--one-at-a-time: only one is in memory, and all but the last are
loaded twice).
"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import numpy as np

from common import (BASE, Bridge, Run, Transplant, block_index, concept_vector, context_length, fail, fingerprint,
                    hidden_states, loader, markdown, mcnemar, model_config, option_parser, parse_options, percentile,
                    plain_sentences, random_directions, read_texts, record, run_script, score_labels, torch, wilson)

EMOTIONS = ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]
COLOURS = dict(zip(EMOTIONS, ["#f2b134", "#3b6fb6", "#c8352b", "#4f9d69", "#8a5a9e", "#e07b39"]))

ZOO = os.path.relpath(Path(__file__).parent / "data" / "toy" / "models")
SETTINGS = {"layer": "0.75", "alpha": [1, 2, 3, 5], "sentences": 2000, "limit": 200}
FAMILIES = {
    "toy": SETTINGS | {"tgt": [f"{ZOO}/pythia-{k}" for k in range(1, 6)], "limit": 50},
    "pythia": SETTINGS | {"tgt": [f"EleutherAI/pythia-{size}" for size in ("14m", "70m", "410m", "1.4b", "6.9b")]},
    "custom": SETTINGS,
}

TEMPLATE = "Scenario: {scenario}\nThe emotion of the above scenario is"
SHOT = "Scenario: {scenario}\nThe emotion ({choices}) of the above scenario is {label}."


# ---------------------------------------------------------------- options


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES)
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", help="models from small to large; each is source and target")
    add("--one-at-a-time", action="store_true", help="hold one model in memory; all but the last are then loaded twice")
    add("--shots", type=int, default=6, help="few-shot examples before each test prompt (paper: 6)")
    add("--pairs", type=int, default=200, help="example pairs of one vector (paper: 200)")
    add("--random", type=int, default=20, help="random control directions of each target")

    def complete(args):
        if args.src or args.tgt:
            fail("every model is source and target here: name them with --models")
        args.tgt = args.models or FAMILIES[args.family or "toy"].get("tgt")
        args.family = args.family or ("custom" if args.models else "toy")
        if not args.tgt:
            fail(f"--family {args.family} has no models: name them with --models")
        args.src = args.tgt[0]
    args = parse_options(parser, FAMILIES, argv, complete)
    args.alpha = [alpha for alpha in dict.fromkeys(args.alpha) if alpha]    # α = 0 is the baseline, which is always there
    if not args.alpha:
        fail("--alpha needs a strength other than 0, which is the baseline and always there")
    if args.tgt_chat or args.src_base != args.src:
        fail("these are base models: --src-base and --tgt-chat have no use here")
    if args.layer == "auto" or "," in args.layer:
        fail("--layer takes one index or fraction here: all models are read and edited there")
    if args.shots < 0 or args.pairs < 1 or args.random < 1:
        fail("--shots must be 0 or more, --pairs and --random at least 1")
    if len(args.tgt) < 2 or len({Path(name).name for name in args.tgt}) < len(args.tgt):
        fail("--models needs two models or more, each with a name of its own")
    return args


# ---------------------------------------------------------------- data


def load_scenarios(folder: Path) -> dict[str, list[str]]:
    return {emotion: read_texts(folder / "emotions" / f"{emotion}.json") for emotion in EMOTIONS}


def split(scenarios: dict[str, list[str]], args) -> dict:
    """{"shots": [(label, scenario)], emotion: {"positive", "negative", "validation", "test"}}, lists of scenarios.

    As the clean protocol of exp_emotion.py: each list gives some scenarios to the few-shot prompt, 40 to the negatives of the
    other emotions' vectors, 10 to their validation and the rest to their test. A vector's positives are its own emotion's
    list, which its test never sees."""
    each = -(-args.shots // 6)
    if (shortest := min(map(len, scenarios.values()))) < each + 60:
        fail(f"the shortest list has {shortest} scenarios; shots, refinement, validation and test need {each + 60}")
    shuffled = {e: random.Random(f"{args.seed} {e}").sample(texts, len(texts)) for e, texts in scenarios.items()}
    shots = [(emotion, shuffled[emotion][i]) for i in range(each) for emotion in EMOTIONS]
    data = {"shots": random.Random(args.seed).sample(shots, len(shots))[:args.shots]}
    for emotion in EMOTIONS:
        others = [shuffled[other][each:] for other in EMOTIONS if other != emotion]
        negative, validation, test = ([text for texts in zip(*(other[part] for other in others)) for text in texts]
                                      for part in (slice(0, 40), slice(40, 50), slice(50, None)))
        negative = random.Random(f"{args.seed} {emotion}").sample(negative, len(negative))
        data[emotion] = {"positive": shuffled[emotion][each:][:args.pairs], "negative": negative[:args.pairs],
                         "validation": validation, "test": test[:args.limit if args.limit > 0 else None]}
    return data


def prompts(data: dict, texts: list[str], shots: bool) -> list[str]:
    """The prompts of scenarios: bare for refinement, after the few-shot examples for evaluation."""
    choices = ", ".join(f'"{emotion}"' for emotion in EMOTIONS)
    examples = [SHOT.format(scenario=text, choices=choices, label=label) for label, text in data["shots"]] if shots else []
    return ["\n".join([*examples, TEMPLATE.format(scenario=text)]) for text in texts]


def check_prompts(data: dict, name: str) -> None:
    """Refuse, before any weights are loaded, prompts that do not fit the context."""
    config, tokenizer = model_config(name)
    texts = [text for emotion in EMOTIONS for part in data[emotion].values() for text in part]
    longest = max(map(len, tokenizer(prompts(data, texts, shots=True), verbose=False).input_ids))
    if longest + 8 > context_length(config):
        fail(f"a prompt of {longest} tokens and the answer do not fit the context of {name} ({context_length(config)} tokens); "
             "try fewer --shots")


def block(args, name: str) -> int:
    return block_index(args.layer, model_config(name)[0].num_hidden_layers)


# ---------------------------------------------------------------- refine, reformulate, transplant


def collect(model, data: dict, sentences: list[str], args) -> dict[str, torch.Tensor]:
    """What a model gives to the others: v of each emotion [6, d], states of the plain sentences [n, d], and states of 20
    scenarios of each emotion to look at [120, d]."""
    layer, v = block(args, model.name), []
    for emotion in EMOTIONS:
        n = min(len(data[emotion]["positive"]), len(data[emotion]["negative"]))
        pairs = [prompts(data, data[emotion][side][:n], shots=False) for side in ("positive", "negative")]
        v.append(concept_vector(model, *pairs, [layer], args.refine, label=emotion)[0])
    shown = prompts(data, [text for emotion in EMOTIONS for text in data[emotion]["positive"][-20:]], shots=False)
    return {"v": torch.stack(v), "plain": hidden_states(model, sentences, [layer], label="plain sentences")[:, 0],
            "shown": hidden_states(model, shown, [layer], label="scenarios")[:, 0]}


def answers(model, data: dict, part: str, emotion: str, moves: list[Transplant]) -> torch.Tensor:
    """The emotion that the model names after each scenario of a part, under each transplant [moves, scenarios]."""
    asked = prompts(data, data[emotion][part], shots=True)
    return score_labels(model, asked, EMOTIONS, moves, label=f"{emotion}, {part}")[0]


def measure(model, states: dict, data: dict, args) -> dict:
    """One target: hits on the negatives of each emotion without a vector, with every source's v^, with random directions."""
    layer, own = block(args, model.name), states[model.name]
    moved, fits = {}, {}
    for source in args.tgt:
        bridge = Bridge(states[source]["plain"][:, None], own["plain"][:, None], args)
        moved[source] = own["v"] if source == model.name else bridge.carry(states[source]["v"], 0)   # its own needs no map
        fits[source] = {"r2": bridge.affine(0).r2, "cosine": bridge.affine(0).cosine, "fitted on": bridge.affine(0).n}
    grid = [(source, alpha) for source in args.tgt for alpha in args.alpha]
    hits = sum((answers(model, data, "validation", emotion, [Transplant.of(moved[source][e], layer, alpha)
                                                             for source, alpha in grid]) == e).sum(1)
               for e, emotion in enumerate(EMOTIONS)).tolist()
    validation = {source: {alpha: count for (name, alpha), count in zip(grid, hits) if name == source} for source in args.tgt}
    chosen = {source: max(counts, key=lambda alpha: (counts[alpha], -abs(alpha))) for source, counts in validation.items()}
    # the control is as strong as the strongest
    largest = max(args.tgt, key=lambda source: moved[source].norm() * abs(chosen[source]))
    result = {"base": [], "with": {source: [] for source in args.tgt}, "random": [[] for _ in range(args.random)]}
    for e, emotion in enumerate(EMOTIONS):
        moves = [BASE, *(Transplant.of(moved[source][e], layer, chosen[source]) for source in args.tgt),
                 *(Transplant.of(direction, layer, chosen[largest])
                   for direction in random_directions(moved[largest][e], args.random, args.seed * 6 + e))]
        base, *rest = (answers(model, data, "test", emotion, moves) == e).int().tolist()
        result["base"] += base
        for source, found in zip(args.tgt, rest):
            result["with"][source] += found
        for found, direction in zip(rest[len(args.tgt):], result["random"]):
            direction += found
    return result | {"alpha": chosen, "fits": fits, "block": layer, "|v^|": {source: moved[source].norm(dim=1).mean().item()
                                                                           for source in args.tgt},
                     "stream": own["plain"].norm(dim=1).mean().item()}


def scatter(states: torch.Tensor, seed: int) -> list:
    """t-SNE of a model's states."""
    from sklearn.manifold import TSNE
    return TSNE(2, perplexity=min(30, len(states) // 4), init="pca", random_state=seed).fit_transform(states.numpy()).tolist()


# ---------------------------------------------------------------- records, tables, figures


def rate(hits: list[int]) -> tuple[float, float, float, int]:
    return sum(hits) / len(hits), *wilson(sum(hits), len(hits)), len(hits)


def ratio(with_v: list[int], base: list[int]) -> str:
    """Improvement ratio; over a baseline of 0 there is none, and the counts are shown instead."""
    return f"{sum(with_v) / sum(base):.1f}" if sum(base) else f"{sum(with_v)} / 0"


def tables(args, results: dict) -> str:
    short = [Path(name).name for name in args.tgt]
    rows = []
    for target, name in zip(args.tgt, short):
        result = results[target]
        base, (value, low, high, _) = result["base"], rate(result["base"])
        directions = [rate(hits)[0] for hits in result["random"]]
        cells = []
        for source in args.tgt:
            (ours, ours_low, ours_high, _), p = rate(result["with"][source]), mcnemar(base, result["with"][source])
            cells.append(f"{100 * ours:.0f} [{100 * ours_low:.0f}, {100 * ours_high:.0f}]{'*' if p < 0.001 else ''} "
                         f"({percentile(ours, directions):.0f})")
        rows.append([name, f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]",
                     f"{100 * np.mean(directions):.1f} (to {100 * max(directions):.1f})", *cells])
    ratios = [[name, *(ratio(results[target]["with"][source], results[target]["base"]) for source in args.tgt)]
              for target, name in zip(args.tgt, short)]
    n = len(results[args.tgt[0]]["base"])
    return (f"## Figure 4: v_emotion of every model in every model\n\n"
            f"Token Acc [95 % interval] in %, mean of six emotions, scenarios of the other five, n = {n}; rows are targets, "
            f"columns sources; block {args.layer}, α chosen on validation for each pair.\n"
            f"*: p < 0.001 against no vector (McNemar); in brackets the percentile among {args.random} random directions as "
            "strong as the strongest v^ of the row\n\n"
            + markdown(["target", "no vector", "random", *(f"v of {name}" for name in short)], rows)
            + "\n\nImprovement ratio (over a baseline of 0 the counts: hits with / without)\n\n"
            + markdown(["target", *short], ratios))


def make_records(args, results: dict) -> list[dict]:
    records = []
    for target, result in results.items():
        about = {"experiment": "pythia", "item": "Figure 4", "target": target, "concept": "mean of six", "split": "test",
                 "n": len(result["base"])}

        def add(hits, **fields):
            value, low, high, _ = rate(hits)
            records.append(record(**about | {"metric": "token_acc", "value": value, "low": low, "high": high} | fields))
        add(result["base"], method="base", alpha=0)
        for number, hits in enumerate(result["random"]):
            add(hits, method="random", split=f"test direction {number}")
        for source in args.tgt:
            where = {"source": source, "method": "self-align" if source == target else "contrans",
                     "alpha": result["alpha"][source],
                     "layer": f"{block(args, source)} -> {result['block']}"}
            add(result["with"][source], **where)
            gain = sum(result["with"][source]) - sum(result["base"])
            records.append(record(**about, metric="absolute improvement", value=gain / about["n"], **where))
            if sum(result["base"]):             # over a baseline of 0 there is no ratio
                records.append(record(**about, metric="improvement ratio",
                                      value=sum(result["with"][source]) / sum(result["base"]), **where))
            for metric in ("r2", "cosine"):
                records.append(record(experiment="pythia", target=target, concept="map", metric=metric, split="held-out",
                                      value=result["fits"][source][metric], n=result["fits"][source]["fitted on"],
                                      **where | {"alpha": None}))
    return records


def new_figure(**size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    return plt.subplots(**size)


def draw_heat(args, results: dict):
    """Figure 4: improvement ratio and absolute improvement; rows are targets, columns sources, small to large."""
    short, size = [Path(name).name for name in args.tgt], len(args.tgt)
    figure, axes = new_figure(ncols=2, figsize=(3.4 + 1.5 * size, 1.6 + 0.6 * size), layout="constrained")
    hits = np.array([[sum(results[target]["with"][source]) for source in args.tgt] for target in args.tgt])
    base = np.array([sum(results[target]["base"]) for target in args.tgt])[:, None]
    n = len(results[args.tgt[0]]["base"])
    absolute = 100 * (hits - base) / n
    ratios = np.where(base > 0, hits / np.maximum(base, 1), np.nan)
    words = [[ratio(results[target]["with"][source], results[target]["base"]) for source in args.tgt] for target in args.tgt]
    for axis, values, text, title in [          # blue: more with v^, red: less; the ratio is coloured by its logarithm
            (axes[0], np.log(np.where(hits > 0, ratios, np.nan)), words, "improvement ratio\n(grey: a count of 0, hits with / without)"),
            (axes[1], absolute, [[f"{value:+.0f}" for value in row] for row in absolute], "absolute improvement [points]")]:
        axis.set_facecolor("#ddd")
        top = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 1
        axis.imshow(values, cmap="RdBu", vmin=-max(top, 1e-9), vmax=max(top, 1e-9))
        for (y, x), value in np.ndenumerate(values):
            axis.text(x, y, text[y][x], ha="center", va="center", fontsize=8, color="white" if abs(value) > 0.6 * top else "black")
        axis.set(xticks=range(size), xticklabels=short, yticks=range(size), yticklabels=short, xlabel="source", title=title)
        axis.tick_params(axis="x", rotation=30)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("target")
    figure.suptitle(f"Token Acc on negative scenarios, mean of six emotions, n = {n}", fontsize=10)
    return figure


def draw_scatter(points: dict[str, list]):
    """Figure 8: t-SNE of the states of three sizes."""
    figure, axes = new_figure(ncols=len(points), figsize=(3.2 * len(points) + 1, 3.2), layout="constrained")
    for axis, (name, xy) in zip(np.atleast_1d(axes), points.items()):
        for part, emotion in zip(np.split(np.array(xy), len(EMOTIONS)), EMOTIONS):
            axis.scatter(*part.T, s=12, lw=0, color=COLOURS[emotion], label=emotion)
        axis.set(xticks=[], yticks=[], title=Path(name).name)
    np.atleast_1d(axes)[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    each = min(map(len, points.values())) // len(EMOTIONS)
    figure.suptitle(f"t-SNE of last-token states, {each} scenarios of each emotion", fontsize=10)
    return figure


# ---------------------------------------------------------------- from the arguments to the figures


def main(argv=None):
    args = options(argv)
    data = split(load_scenarios(args.data), args)
    for name in args.tgt:
        block(args, name)                       # an impossible --layer ends here, before any weights are loaded
        check_prompts(data, name)
    sentences = plain_sentences(args, args.tgt)
    run = Run("exp_pythia", args, {name: fingerprint(name) for name in args.tgt} | {
        "emotions": fingerprint(str(args.data / "emotions")),
        "sentences": hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16],
        "first refinement prompt": prompts(data, data["happiness"]["positive"], shots=False)[0],
        "first test prompt": prompts(data, data["happiness"]["test"], shots=True)[0]},
        aside=("one_at_a_time",))
    load = loader(args)

    loaded = []                                 # all of them stay, unless one at a time is to be held

    def get(name: str):
        if args.one_at_a_time:
            return load(name)
        loaded[:] = dict.fromkeys([*loaded, name])
        return dict(zip(loaded, load(*loaded) if len(loaded) > 1 else [load(name)]))[name]
    states = {name: run.tensors(f"states {name}", lambda: collect(get(name), data, sentences, args)) for name in args.tgt}
    backwards = [run.step(f"target {name}", lambda: measure(get(name), states, data, args))
                 for name in reversed(args.tgt)]                            # the last, and largest, is still in memory
    results = dict(zip(args.tgt, reversed(backwards)))
    three = dict.fromkeys([args.tgt[0], args.tgt[len(args.tgt) // 2], args.tgt[-1]])
    points = {name: run.step(f"t-SNE {name}", lambda: scatter(states[name]["shown"], args.seed)) for name in three}

    run.figure(draw_heat(args, results), "figure_4")
    run.figure(draw_scatter(points), "figure_8")
    asked = [(emotion, text) for emotion in EMOTIONS for text in data[emotion]["test"]]
    examples = [{"target": target, "source": source, "emotion": emotion, "scenario": text, "named": bool(hit)}
                for target, result in results.items() for source, hits in {"none": result["base"], **result["with"]}.items()
                for (emotion, text), hit in zip(asked, hits)]
    run.save(make_records(args, results), examples, tables(args, results))


if __name__ == "__main__":
    run_script(main)
