"""When does a concept form? Checkpoints of one pre-training run, Sec. 6.1, Figure 3.

    python exp_pretraining.py                                     checkpoints of the toy zoo, on 2 CPU cores
    python exp_pretraining.py --family amber --data data/paper    Amber-7B, as in the paper: about 14 GB a checkpoint
    python exp_pretraining.py --model EleutherAI/pythia-1b --revisions step1000 step8000 step143000 \\
                              --tokens 2e9 17e9 300e9 --data data/paper
    python exp_pretraining.py --tgt run/step1 run/step2 --tokens 1e6 2e6        folders, the last one is the source

The emotion vectors of the last checkpoint are mapped into every checkpoint and added there. On scenarios of the *other* five
emotions, how often is the target emotion named, without them (false positives) and with them? If the concept is not there
yet, there is nothing that the vector could move.
    Token Acc    the most likely next token is the emotion's word
    Logit Acc    the emotion's word has the highest logit of the six words

The scenarios that make a vector, the few-shot examples and the scenarios that test it are disjoint; alpha is chosen for each
checkpoint on a validation part. One checkpoint is in memory at a time; what is done is kept and not downloaded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common import (BASE, Bridge, Run, Transplant, block_index, concept_vector, context_length, fail, fingerprint,
                    hidden_states, loader, markdown, model_config, option_parser, parse_options, percentile, plain_sentences,
                    random_directions, read_texts, record, run_script, score_labels, torch, wilson)

EMOTIONS = ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]

ZOO = Path(os.path.relpath(Path(__file__).parent / "data" / "toy" / "models" / "amber"))
SETTINGS = {"layer": "0.75", "alpha": [1, 2, 3, 5], "sentences": 2000, "limit": 200}
FAMILIES = {
    "toy": SETTINGS | {"tgt": [str(path) for path in sorted(ZOO.glob("step_*"))], "limit": 50},
    "amber": SETTINGS | {"tgt": [f"LLM360/Amber@ckpt_{k:03d}" for k in (0, 20, 40, 80, 120, 180, 240, 300, 358)]},
    "custom": SETTINGS,
}
AMBER_TOKENS = 1259.13e9 / 360                  # a checkpoint follows each of 360 equal parts of the training data

TEMPLATE = "Scenario: {scenario}\nThe emotion of the above scenario is"
SHOT = "Scenario: {scenario}\nThe emotion ({choices}) of the above scenario is {label}."


# ---------------------------------------------------------------- options


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES)
    add = parser.add_argument
    add("--model", metavar="REPO", help="hub repository with one revision a checkpoint")
    add("--revisions", nargs="+", metavar="NAME", help="its checkpoints, in the order of training; the last is the source")
    add("--tokens", nargs="+", type=float, metavar="N", help="training tokens that each checkpoint has seen")
    add("--keep-downloads", action="store_true", help="do not remove a checkpoint from the hub's cache after its use")
    add("--shots", type=int, default=6, help="few-shot examples before each test prompt (paper: 6)")
    add("--pairs", type=int, default=200, help="example pairs of one vector (paper: 200)")
    add("--random", type=int, default=20, help="random control directions")

    def complete(args):
        if bool(args.model) != bool(args.revisions):
            fail("--model and --revisions go together")
        if args.model and (args.tgt or args.src):
            fail("give checkpoints by --model and --revisions or by --tgt, not by both")
        if args.model and Path(args.model).is_dir():        # a folder has one set of weights, whatever revision is asked for
            fail(f"--model {args.model} is a folder and has no revisions; name the folders of the checkpoints with --tgt")
        if args.model:
            args.tgt = [f"{args.model}@{revision}" for revision in args.revisions]
        if args.tgt is None:
            args.tgt = FAMILIES[args.family or "toy"].get("tgt")
            args.family = args.family or "toy"
        if not args.tgt:
            fail(f"--family {args.family} has no checkpoints: name them with --tgt or with --model and --revisions")
        if not args.src:
            args.src = args.tgt[-1]
    args = parse_options(parser, FAMILIES, argv, complete)
    args.alpha = [alpha for alpha in dict.fromkeys(args.alpha) if alpha]    # α = 0 is the baseline, which is always there
    if not args.alpha:
        fail("--alpha needs a strength other than 0, which is the baseline and always there")
    if args.tgt_chat or args.src_base != args.src:
        fail("checkpoints are base models: --src-base and --tgt-chat have no use here")
    if args.layer == "auto":
        fail("--layer auto has no use here: all checkpoints are compared at one block")
    if args.shots < 0 or args.pairs < 1 or args.random < 1:
        fail("--shots must be 0 or more, --pairs and --random at least 1")
    if len(set(args.tgt)) < len(args.tgt):
        fail("a checkpoint is named twice")
    args.tokens = args.tokens or [known_tokens(name) for name in args.tgt]
    if len(args.tokens) != len(args.tgt):
        fail(f"{len(args.tokens)} --tokens for {len(args.tgt)} checkpoints: give one each")
    growing = all(earlier < later for earlier, later in zip(args.tokens, args.tokens[1:]))
    if not growing or not all(0 < n < np.inf for n in args.tokens):
        fail("--tokens must be positive numbers and grow from checkpoint to checkpoint")
    return args


def known_tokens(name: str) -> float:
    """Training tokens that a checkpoint has seen: from its folder, or known of its repository."""
    try:
        return float(json.loads((Path(name) / "training.json").read_text())["tokens"])
    except (OSError, ValueError, KeyError, TypeError):      # no such note, or another program's
        pass
    if known := re.fullmatch(r"LLM360/Amber@ckpt_(\d+)", name):
        return (int(known[1]) + 1) * AMBER_TOKENS
    fail(f"how many training tokens has {name} seen? Give a number for each checkpoint with --tokens")


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
    """The block that is read and edited: the source takes the first number of --layer SOURCE,TARGET."""
    return block_index(args.layer, model_config(name)[0].num_hidden_layers, name != args.src)


# ---------------------------------------------------------------- refine, reformulate, transplant: one step a checkpoint


def vectors(model, data: dict, layer: int, args) -> torch.Tensor:
    """v of each emotion [6, d] (Eq. 1)."""
    v = []
    for emotion in EMOTIONS:
        n = min(len(data[emotion]["positive"]), len(data[emotion]["negative"]))
        pairs = [prompts(data, data[emotion][side][:n], shots=False) for side in ("positive", "negative")]
        v.append(concept_vector(model, *pairs, [layer], args.refine, label=emotion)[0])
    return torch.stack(v)


def collect(model, data: dict, sentences: list[str], args) -> dict[str, torch.Tensor]:
    """What is needed of the source: its vectors [6, d] and its states of the plain sentences [n, d]."""
    layer = block(args, model.name)
    return {"v": vectors(model, data, layer, args),
            "plain": hidden_states(model, sentences, [layer], label="plain sentences, source")[:, 0]}


def measure(model, source: dict, data: dict, sentences: list[str], args) -> dict:
    """Answers on the negatives of each emotion without a vector, with v^, with random directions and with the own vector."""
    layer = block(args, model.name)
    bridge = Bridge(source["plain"][:, None], hidden_states(model, sentences, [layer], label="plain sentences"), args)
    moved, own = bridge.carry(source["v"], 0), vectors(model, data, layer, args)

    def answers(part, emotion, moves):
        return score_labels(model, prompts(data, data[emotion][part], shots=True), EMOTIONS, moves, label=f"{emotion}, {part}")
    hits = sum((answers("validation", emotion, [Transplant.of(moved[e], layer, alpha) for alpha in args.alpha])[0] == e).sum(1)
               for e, emotion in enumerate(EMOTIONS))
    best = max(range(len(args.alpha)), key=lambda a: (int(hits[a]), -abs(args.alpha[a])))
    alpha, arms = args.alpha[best], []
    for e, emotion in enumerate(EMOTIONS):
        moves = [("base", 0, BASE),
                 *(("contrans", strength, Transplant.of(moved[e], layer, strength)) for strength in args.alpha),
                 ("self-align", alpha, Transplant.of(own[e], layer, alpha)),
                 *(("random", alpha, Transplant.of(direction, layer, alpha))
                   for direction in random_directions(moved[e], args.random, args.seed * 6 + e))]
        said, preferred = answers("test", emotion, [move for *_, move in moves])
        arms += [{"emotion": emotion, "method": method, "alpha": strength, "said": said[m].tolist(),
                  "preferred": preferred[m].tolist()} for m, (method, strength, _) in enumerate(moves)]
    affine = bridge.affine(0)
    return {"alpha": alpha, "arms": arms, "block": layer, "r2": affine.r2, "cosine": affine.cosine, "fitted on": affine.n,
            "|v^|": moved.norm(dim=1).mean().item(), "stream": bridge.y.norm(dim=-1).mean().item(),
            "cosine to own": torch.cosine_similarity(moved, own).mean().item()}


def forget(name: str) -> None:
    """Remove one revision from the hub's cache."""
    from huggingface_hub import scan_cache_dir
    repo, _, revision = name.partition("@")
    cache = scan_cache_dir()
    commits = [found.commit_hash for known in cache.repos if known.repo_id == repo for found in known.revisions
               if (revision or "main") in {*found.refs, found.commit_hash}]
    cache.delete_revisions(*commits).execute()


def is_downloaded(name: str) -> bool:
    """Whether the weights of a hub model lie in the cache already."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound
    repo, _, revision = name.partition("@")
    try:
        return any(file.file_name.endswith((".safetensors", ".bin"))
                   for known in scan_cache_dir().repos if known.repo_id == repo
                   for found in known.revisions if (revision or "main") in {*found.refs, found.commit_hash}
                   for file in found.files)
    except CacheNotFound:
        return False


# ---------------------------------------------------------------- records, table, figure


def pooled(arms: list[dict], key: str = "said", **match) -> tuple[float, float, float, int]:
    """(rate, low, high, n): share of test scenarios on which the target emotion won, over all arms that match."""
    arms = [arm for arm in arms if all(arm[name] == value for name, value in match.items())]
    hits = sum(answer == EMOTIONS.index(arm["emotion"]) for arm in arms for answer in arm[key])
    n = sum(len(arm[key]) for arm in arms)
    return hits / n, *wilson(hits, n), n


def cell(arms: list[dict], **match) -> str:
    """Token Acc [95 % interval] / Logit Acc, in %."""
    (value, low, high, _), (logit, *_) = pooled(arms, **match), pooled(arms, "preferred", **match)
    return f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}] / {100 * logit:.1f}"


def short(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name.partition("@")[2] or Path(name).name


def table(args, results: list[dict]) -> str:
    rows = []
    for name, tokens, result in zip(args.tgt, args.tokens, results):
        arms, alpha = result["arms"], result["alpha"]
        groups = zip(*([arm for arm in arms if (arm["emotion"], arm["method"]) == (emotion, "random")] for emotion in EMOTIONS))
        directions = [pooled(group)[0] for group in groups]
        ours = pooled(arms, method="contrans", alpha=alpha)[0]
        rows.append([short(name), f"{tokens:.3g}", cell(arms, method="base"), f"{alpha:g}",
                     cell(arms, method="contrans", alpha=alpha),
                     f"{100 * np.mean(directions):.1f} ({percentile(ours, directions):.0f})", cell(arms, method="self-align"),
                     f"{result['r2']:.2f}", f"{result['cosine to own']:.2f}"])
    n = pooled(results[0]["arms"], method="base")[3]
    header = ["checkpoint", "tokens", "without (false positives)", "α", "with v^", "random", "own vector", "map R²",
              "cos to own"]
    return (f"## Figure 3: v_emotion of {short(args.src)} in earlier checkpoints\n\n"
            "Token Acc [95 % interval] / Logit Acc in %, mean of six emotions, scenarios of the other five, "
            f"n = {n}; block {args.layer}; α chosen on validation.\n"
            f"random: mean of {args.random} directions of v^'s norm (percentile of v^ among them); own: the "
            "checkpoint's own vector\n\n" + markdown(header, rows))


def make_records(args, results: list[dict]) -> list[dict]:
    records = []
    for name, result in zip(args.tgt, results):
        layer = f"{block(args, args.src)} -> {result['block']}"
        about = {"experiment": "pretraining", "source": args.src, "target": name, "layer": layer, "item": "Figure 3"}
        numbers = Counter()
        for arm in result["arms"]:
            part = "test"
            if arm["method"] == "random":
                part = f"test direction {numbers[arm['emotion']]}"
                numbers[arm["emotion"]] += 1
            for metric, key in (("token_acc", "said"), ("logit_acc", "preferred")):
                value, low, high, n = pooled([arm], key)
                records.append(record(**about, concept=arm["emotion"], method=arm["method"], alpha=arm["alpha"], split=part,
                                      metric=metric, value=value, low=low, high=high, n=n))
        for method, alpha in (("base", 0), *(("contrans", strength) for strength in args.alpha), ("self-align", result["alpha"])):
            for metric, key in (("token_acc", "said"), ("logit_acc", "preferred")):
                value, low, high, n = pooled(result["arms"], key, method=method, alpha=alpha)
                records.append(record(**about, concept="mean of six", method=method, alpha=alpha, metric=metric, value=value, low=low,
                                      high=high, n=n, split="test"))
        for metric in ("r2", "cosine"):
            records.append(record(**about, concept="map", method="contrans", split="held-out", metric=metric,
                                  value=result[metric], n=result["fitted on"]))
    return records


def draw(args, results: list[dict]):
    """Accuracy on negatives against training tokens, without and with the last checkpoint's vectors."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, axes = plt.subplots(ncols=2, figsize=(8.6, 3.4), sharey=True, layout="constrained")
    for axis, key, title in zip(axes, ("said", "preferred"), ("Token Acc", "Logit Acc")):
        for method, colour, label in (("base", "#c8352b", "without: false positives"),
                                      ("contrans", "#2f6db2", "with v̂ of the last checkpoint"),
                                      ("random", "#777", f"{args.random} random directions")):
            def points(**match):
                return np.array([pooled(result["arms"], key, method=method,
                                        alpha=0 if method == "base" else result["alpha"], **match)[:3] for result in results])
            mean = points()
            axis.fill_between(args.tokens, mean[:, 1], mean[:, 2], color=colour, alpha=0.18, lw=0)
            axis.plot(args.tokens, mean[:, 0], "o-", ms=4, color=colour, label=label)
            for emotion in EMOTIONS if method != "random" else []:
                axis.plot(args.tokens, points(emotion=emotion)[:, 0], color=colour, lw=0.6, alpha=0.4)
        axis.set(xscale="log", xlabel="training tokens", ylim=(0, 1.05), title=title)
    axes[0].set_ylabel("accuracy on negative scenarios")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5),
                   title="mean, 95 % interval;\nthin: each emotion")
    figure.suptitle(f"v_emotion of {short(args.src)} in the checkpoints of its own pre-training", fontsize=10)
    return figure


# ---------------------------------------------------------------- from the arguments to the figure


def main(argv=None):
    args = options(argv)
    data = split(load_scenarios(args.data), args)
    names = list(dict.fromkeys([args.src, *args.tgt]))
    for name in names:
        block(args, name)                       # an impossible --layer ends here, before any weights are loaded
        check_prompts(data, name)
    sentences = plain_sentences(args, names)
    run = Run("exp_pretraining", args, {name: fingerprint(name) for name in names} | {
        "emotions": fingerprint(str(args.data / "emotions")),
        "sentences": hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16],
        "first refinement prompt": prompts(data, data["happiness"]["positive"], shots=False)[0],
        "first test prompt": prompts(data, data["happiness"]["test"], shots=True)[0]},
        aside=("tokens", "keep_downloads", "model", "revisions"))
    load = loader(args)

    source, results = None, {}
    for name in names:                          # the source first, so that it is loaded once
        # Noted in the run folder, so that what an interrupted run has downloaded is still known as its own.
        ours = not Path(name).is_dir() and not run.step(f"in the cache before {name}", lambda: is_downloaded(name))
        if source is None:
            source = run.tensors(f"source {name}", lambda: collect(load(name), data, sentences, args))
        if name in args.tgt:
            results[name] = run.step(f"checkpoint {name}", lambda: measure(load(name), source, data, sentences, args))
        if ours and not args.keep_downloads:
            load()                              # lets go of the weights
            run.step(f"removed {name}", lambda: forget(name))
    results = [results[name] for name in args.tgt]
    examples = [{"target": name, "scenario": text, **{key: arm[key] for key in ("emotion", "method", "alpha")}, "said": said,
                 "preferred": preferred} for name, result in zip(args.tgt, results)
                for arm in result["arms"] if arm["method"] != "random"
                for text, said, preferred in zip(data[arm["emotion"]]["test"], arm["said"], arm["preferred"])]
    run.figure(draw(args, results), "figure_3")
    run.save(make_records(args, results), examples, table(args, results))


if __name__ == "__main__":
    run_script(main)
