"""When does a concept form? Checkpoints of one pre-training run, Sec. 6.1, Figure 3.

    python exp_pretraining.py                                     toy zoo, 30 seconds on 2 CPU cores
    python exp_pretraining.py --family amber --data data/paper    Amber-7B: 14 GB a checkpoint
    python exp_pretraining.py --model EleutherAI/pythia-1b --data data/paper \\
        --revisions step1000 step8000 step143000 --tokens 2e9 17e9 300e9
    python exp_pretraining.py --tgt run/step1 run/step2 --tokens 1e6 2e6

The emotion vectors of the last checkpoint are mapped into every checkpoint and added there. On
scenarios of the *other* five emotions, how often is the target emotion named, without them (false
positives) and with them? A vector cannot move a concept that has not formed yet.
    Token Acc    the most likely next token is the emotion's word
    Logit Acc    the emotion's word has the highest logit of the six words

alpha is chosen for each checkpoint on a validation part. One checkpoint is in memory at a time; one
that this run has downloaded is removed from the hub's cache after its use.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import (
    BASE,
    AffineMaps,
    Models,
    Transplant,
    concept_vector,
    hidden_states,
    plain_sentences,
    random_directions,
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
    percentile,
    pivot,
    read_texts,
    record,
    run_script,
    select,
    spread,
)

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 3, 5], "sentences": 2000, "limit": 200}
AMBER = [f"LLM360/Amber@ckpt_{k:03d}" for k in (0, 20, 40, 80, 120, 180, 240, 300, 358)]
AMBER_TOKENS = 1259.13e9 / 360  # a checkpoint follows each of 360 equal parts of the training data
FAMILIES = {
    "toy": SETTINGS
    | {"tgt": [str(path) for path in sorted(TOY.glob("models/amber/step_*"))], "limit": 50},
    "amber": SETTINGS | {"tgt": AMBER},
    "custom": SETTINGS,
}


# ---------------------------------------------------------------- options


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES, models=("src", "tgt"))
    emotion_options(parser)
    add = parser.add_argument
    add("--model", metavar="REPO", help="hub repository with one revision per checkpoint")
    add("--revisions", nargs="+", metavar="NAME", help="its checkpoints; the last is the source")
    add("--tokens", nargs="+", type=float, metavar="N", help="training tokens of each checkpoint")
    add("--keep-downloads", action="store_true", help="leave checkpoints in the hub's cache")
    args = parse_options(parser, FAMILIES, argv, complete)
    check_emotion_options(args)
    if args.layer == "auto":
        fail("--layer auto has no use here: all checkpoints are compared at one block")
    args.tokens = args.tokens or [known_tokens(name) for name in args.tgt]
    if len(args.tokens) != len(args.tgt):
        fail(f"{len(args.tokens)} --tokens for {len(args.tgt)} checkpoints: give one each")
    growing = all(earlier < later for earlier, later in zip(args.tokens, args.tokens[1:]))
    if not growing or not all(0 < n < np.inf for n in args.tokens):
        fail("--tokens must be positive numbers that grow from checkpoint to checkpoint")
    return args


def complete(args) -> None:
    """The checkpoints are the targets; the last one is the source."""
    if bool(args.model) != bool(args.revisions):
        fail("--model and --revisions go together")
    if args.model and (args.tgt or args.src):
        fail("name the checkpoints with --model and --revisions, or with --tgt")
    if args.model and Path(args.model).is_dir():
        fail(f"--model {args.model} is a folder, which has no revisions; name folders with --tgt")
    if args.model:
        args.tgt = [f"{args.model}@{revision}" for revision in args.revisions]
    if not args.tgt:
        fail("name the checkpoints with --tgt, or with --model and --revisions")
    if len(set(args.tgt)) < len(args.tgt):
        fail("a checkpoint is named twice")
    args.src = args.src or args.tgt[-1]


def known_tokens(name: str) -> float:
    """Training tokens of a checkpoint: from its folder, or known of its repository."""
    try:
        return float(json.loads((Path(name) / "training.json").read_text())["tokens"])
    except (OSError, ValueError, KeyError, TypeError):  # no such note, or another program's
        pass
    if known := re.fullmatch(r"LLM360/Amber@ckpt_(\d+)", name):
        return (int(known[1]) + 1) * AMBER_TOKENS
    fail(f"how many training tokens has {name} seen? Give a number per checkpoint with --tokens")


# ---------------------------------------------------------------- the emotion task
# This section is the same, to the letter, in exp_emotion.py, exp_pretraining.py and exp_pythia.py.

EMOTIONS = ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]
TEMPLATE = "Scenario: {scenario}\nThe emotion of the above scenario is"
SHOT = "Scenario: {scenario}\nThe emotion ({choices}) of the above scenario is {label}."
# The few-shot examples as released: label, true class, scenario. All six labels are wrong.
PAPER_SHOTS = [
    ("anger", "fear", "You're told you need to undergo an emergency medical procedure."),
    ("disgust", "surprise", "You encounter a new type of crosswalk signal in your city."),
    ("fear", "disgust", "You hear someone hocking up phlegm and spitting in a public trash can."),
    ("happiness", "fear", "You notice your personal information has been leaked online."),
    ("sadness", "disgust", "You find a dirty diaper abandoned on a beach."),
    ("surprise", "fear", "You're on public transit and someone starts acting erratically."),
]


def emotion_options(parser) -> None:
    add = parser.add_argument
    add("--protocol", choices=["clean", "paper"], default="clean", help="disjoint, or as released")
    add(
        "--shots", type=at_least(0), default=6, help="few-shot examples in a test prompt (paper: 6)"
    )
    add("--pairs", type=at_least(1), default=200, help="example pairs of a vector (paper: 200)")
    add("--template", default=TEMPLATE, help="prompt with {scenario} in it, read before the label")
    add("--labels", nargs="+", default=EMOTIONS, metavar="WORD", help="words for the six emotions")


def check_emotion_options(args) -> None:
    if "{scenario}" not in args.template:
        fail("--template needs {scenario} in it")
    if len(set(args.labels)) != len(EMOTIONS) or not all(word.strip() for word in args.labels):
        fail(f"--labels must be six different words, for {', '.join(EMOTIONS)}")


class Scenarios(NamedTuple):
    """The scenarios of one emotion."""

    positive: list[str]  # of its own list, for the vector
    negative: list[str]  # of the other lists, for the vector
    validation: list[str]  # of the other lists
    test: list[str]  # of the other lists


class Data(NamedTuple):
    shots: list[tuple[str, str]]  # (label, scenario) of the few-shot examples
    emotions: dict[str, Scenarios]


def load_data(args) -> Data:
    """Scenarios, split into parts.

    clean: each list gives some scenarios to the few-shot prompt, 40 to the negatives of the other
    emotions' vectors, 10 to their validation and the rest to their test."""
    folder = args.data / "emotions"
    lists = {emotion: read_texts(folder / f"{emotion}.json") for emotion in EMOTIONS}
    shuffled = {}
    for emotion, texts in lists.items():
        shuffled[emotion] = random.Random(f"{args.seed} {emotion}").sample(texts, len(texts))
    limit = args.limit if args.limit > 0 else None
    if args.protocol == "paper":
        return paper_split(args, lists, shuffled, limit)

    shots_each = -(-args.shots // len(EMOTIONS))  # rounded up
    shortest = min(map(len, lists.values()))
    if shortest < shots_each + 60:
        fail(f"{folder}: the shortest list has {shortest} scenarios; {shots_each + 60} are needed")
    shots = [(emotion, shuffled[emotion][i]) for i in range(shots_each) for emotion in EMOTIONS]
    shots = random.Random(args.seed).sample(shots, len(shots))[: args.shots]
    emotions = {}
    for emotion in EMOTIONS:
        others = [shuffled[other][shots_each:] for other in EMOTIONS if other != emotion]
        negative = take_turns([texts[:40] for texts in others])
        negative = random.Random(f"{args.seed} {emotion}").sample(negative, len(negative))
        emotions[emotion] = Scenarios(
            positive=shuffled[emotion][shots_each:][: args.pairs],
            negative=negative[: args.pairs],
            validation=take_turns([texts[40:50] for texts in others]),
            test=take_turns([texts[50:] for texts in others])[:limit],
        )
    return Data(shots, emotions)


def paper_split(args, lists: dict, shuffled: dict, limit: int | None) -> Data:
    """As released: the negatives of a vector are its validation and its test, too."""
    shots = []
    for label, true_class, text in PAPER_SHOTS[: args.shots]:
        known = text in lists[true_class]
        shots.append((label, text if known else lists[true_class][0]))
    emotions = {}
    for emotion in EMOTIONS:
        others = [text for other in EMOTIONS if other != emotion for text in shuffled[other]]
        count = min(args.pairs, len(others))
        negative = random.Random(f"{args.seed} {emotion} negative").sample(others, count)
        test = negative[:limit]
        emotions[emotion] = Scenarios(shuffled[emotion][: args.pairs], negative, test, test)
    return Data(shots, emotions)


def take_turns(lists: list[list[str]]) -> list[str]:
    """One text of each list in turn, equally many of each."""
    return [text for texts in zip(*lists) for text in texts]


def prompts(args, data: Data, texts: list[str], shots: bool) -> list[str]:
    """The prompts of scenarios: bare for the vector, after the few-shot examples for the test."""
    words = dict(zip(EMOTIONS, args.labels))
    shot = SHOT if args.template == TEMPLATE else args.template + " {label}."
    shot = shot.replace("{choices}", ", ".join(f'"{word}"' for word in args.labels))
    examples = []
    for label, text in data.shots if shots else []:
        examples.append(shot.replace("{label}", words[label]).replace("{scenario}", text))
    return ["\n".join([*examples, args.template.replace("{scenario}", text)]) for text in texts]


def pairs(args, data: Data, emotion: str) -> tuple[list[str], list[str]]:
    """Positive and negative prompts of an emotion's vector, equally many."""
    positive, negative, *_ = data.emotions[emotion]
    n = min(len(positive), len(negative))
    both = [prompts(args, data, texts[:n], shots=False) for texts in (positive, negative)]
    return both[0], both[1]


def check_prompts(args, data: Data, models: Models, name: str) -> None:
    """Refuse, before any weights are loaded, prompts that are too long and labels that look
    alike."""
    texts = [text for parts in data.emotions.values() for part in parts for text in part]
    asked = prompts(args, data, list(dict.fromkeys(texts)), shots=True)
    models.require_fit(name, asked, new_tokens=8, advice="; try fewer --shots")
    models.require_labels(name, asked[0], args.labels)


def named(model, args, data: Data, part: str, emotion: str, transplants) -> tuple:
    """(said, preferred): the label that the model names after each scenario of a part, per
    transplant."""
    texts = getattr(data.emotions[emotion], part)
    asked = prompts(args, data, texts, shots=True)
    return score_labels(model, asked, args.labels, transplants)


# ---------------------------------------------------------------- refine, map


class Lab:
    """What every step needs. Its methods are the steps."""

    def __init__(self, args, data: Data, sentences: list[str], models: Models):
        self.args, self.data, self.sentences, self.models = args, data, sentences, models

    def block(self, name: str) -> int:
        """The block that is read and edited."""
        return self.models.block(name, self.args.layer, side=name != self.args.src)

    def vectors(self, name: str) -> torch.Tensor:
        """v of each emotion [6, d] (Eq. 1)."""
        model, v = self.models.load(name), []
        for emotion in EMOTIONS:
            both = pairs(self.args, self.data, emotion)
            v.append(concept_vector(model, *both, [self.block(name)], self.args.refine)[0])
        return torch.stack(v)

    def plain_states(self, name: str) -> torch.Tensor:
        """States of the plain sentences [n, d]."""
        return hidden_states(self.models.load(name), self.sentences, [self.block(name)])[:, 0]

    def collect(self) -> dict[str, torch.Tensor]:
        """What is needed of the source."""
        return {"v": self.vectors(self.args.src), "plain": self.plain_states(self.args.src)}

    def maps(self, source: dict, plain: torch.Tensor, block: int) -> AffineMaps:
        args = self.args
        return AffineMaps(
            {self.block(args.src): source["plain"]},
            {block: plain},
            **map_options(args),
        )

    # ------------------------------------------------------------ transplant, score: the steps

    def measure(self, name: str, source: dict) -> dict:
        """What a checkpoint names without a vector, with v_hat, at random, with its own vector."""
        args, block, source_block = self.args, self.block(name), self.block(self.args.src)
        plain = self.plain_states(name)
        maps = self.maps(source, plain, block)
        v_hat, own = maps.vector(source["v"], source_block, block), self.vectors(name)
        alpha = self.choose_alpha(name, v_hat)
        arms = []
        for e, emotion in enumerate(EMOTIONS):
            moves = [("base", None, 0, BASE)]
            for each in args.alpha:
                moves.append(("contrans", None, each, Transplant.of(v_hat[e], block, each)))
            moves.append(("self-align", None, alpha, Transplant.of(own[e], block, alpha)))
            directions = random_directions(v_hat[e], args.random, args.seed * 6 + e)
            for r, direction in enumerate(directions):
                move = Transplant.of(direction, block, alpha)
                moves.append(("contrans", f"random {r}", alpha, move))
            answers = self.named(name, "test", emotion, [move for *_, move in moves])
            for (method, variant, each, _), said, preferred in zip(moves, *answers):
                what = {"emotion": emotion, "method": method, "variant": variant, "alpha": each}
                arms.append(what | {"token_acc": said.tolist(), "logit_acc": preferred.tolist()})
        fitted = maps.fit(source_block, block)
        return {
            "alpha": alpha,
            "arms": arms,
            "r2": fitted.r2,
            "cosine": fitted.cosine,
            "n": fitted.n,
            "norm_v_hat": v_hat.norm(dim=1).mean().item(),
            "stream_target": plain.norm(dim=1).mean().item(),
            "cosine_to_own": torch.cosine_similarity(v_hat, own).mean().item(),
        }

    def choose_alpha(self, name: str, v_hat: torch.Tensor) -> float:
        """The strength with the most hits on the validation scenarios; the smaller of equals."""
        hits = np.zeros(len(self.args.alpha))
        for e, emotion in enumerate(EMOTIONS):
            moves = [Transplant.of(v_hat[e], self.block(name), each) for each in self.args.alpha]
            said, _ = self.named(name, "validation", emotion, moves)
            hits += (said == e).sum(1).numpy()
        return max(zip(hits, self.args.alpha), key=lambda pair: (pair[0], -abs(pair[1])))[1]

    def named(self, name: str, part: str, emotion: str, moves: list[Transplant]) -> tuple:
        return named(self.models.load(name), self.args, self.data, part, emotion, moves)


def is_downloaded(name: str) -> bool:
    """Whether the weights of a hub model are in the hub's cache already."""
    files = [file for revision in cached_revisions(name) for file in revision.files]
    return any(file.file_name.endswith((".safetensors", ".bin")) for file in files)


def delete_revision(name: str) -> None:
    """Remove one revision from the hub's cache."""
    from huggingface_hub import scan_cache_dir

    commits = [revision.commit_hash for revision in cached_revisions(name)]
    scan_cache_dir().delete_revisions(*commits).execute()


def cached_revisions(name: str) -> list:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    repo, _, revision = name.partition("@")
    try:
        repos = [each for each in scan_cache_dir().repos if each.repo_id == repo]
    except CacheNotFound:
        return []
    found = [each for repo in repos for each in repo.revisions]
    return [each for each in found if (revision or "main") in {*each.refs, each.commit_hash}]


# ---------------------------------------------------------------- one target


def one_target(args, run: Run, lab: Lab, name: str, source: dict) -> tuple[list[dict], list[dict]]:
    """(records, examples) of one checkpoint."""
    result = run.step(f"checkpoint {name}", lab.measure, name, source)
    alpha = result["alpha"]
    about = {
        "item": "Figure 3",
        "source": args.src,
        "target": name,
        "source_block": lab.block(args.src),
        "block": lab.block(name),
        "group": f"{args.tokens[args.tgt.index(name)]:.4g} tokens",
    }
    records, pooled = [], {}
    for arm in result["arms"]:
        wanted = EMOTIONS.index(arm["emotion"])
        what = {key: arm[key] for key in ("method", "variant", "alpha")} | {"part": "test"}
        for metric in ("token_acc", "logit_acc"):
            hits = [answer == wanted for answer in arm[metric]]
            what["metric"] = metric
            records.append(record(hits, concept=arm["emotion"], **what, **about))
            pooled.setdefault(tuple(what.items()), []).extend(hits)
    for what, hits in pooled.items():
        records.append(record(hits, concept="mean", **dict(what), **about))
    for metric in ("token_acc", "logit_acc"):
        means = select(records, concept="mean", metric=metric)
        directions = [each for each in means if (each["variant"] or "").startswith("random")]
        ours = select(means, method="contrans", variant=None, alpha=alpha)
        records.append(spread(directions, "random"))
        records.append(ours[0] | {"variant": "chosen alpha"})
    for metric in ("r2", "cosine", "norm_v_hat", "stream_target", "cosine_to_own"):
        what = {"concept": "map", "method": "contrans", "n": result["n"], "part": "held-out"}
        records.append(record(metric=metric, value=result[metric], **what, **about))
    examples = [{"target": name, **arm} for arm in result["arms"] if not arm["variant"]]
    return records, examples


# ---------------------------------------------------------------- tables

LABELS = {
    ("base", None): "without (false positives)",
    ("contrans", "chosen alpha"): "with v_hat",
    ("contrans", "random"): "random directions, mean [range]",
    ("self-align", None): "its own vector",
}


def short(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name.partition("@")[2] or Path(name).name


def column(each: dict) -> str:
    label = LABELS.get((each["method"], each["variant"]), each["metric"])
    return f"{label}, Logit Acc" if each["metric"] == "logit_acc" else label


def accuracy_table(args, records: list[dict]) -> str:
    shown, notes = [], {}
    for name in args.tgt:
        mine = select(records, target=name)
        for method, variant in LABELS:
            match = {"concept": "mean", "method": method, "variant": variant}
            shown += select(mine, metric="token_acc", **match)
        shown += select(mine, metric="logit_acc", concept="mean", variant="chosen alpha")
        shown += select(mine, metric="r2") + select(mine, metric="cosine_to_own")
        [chosen] = select(mine, metric="token_acc", concept="mean", variant="chosen alpha")
        means = select(mine, metric="token_acc", concept="mean")
        directions = [each["value"] for each in means if (each["variant"] or "")[:7] == "random "]
        rank = percentile(chosen["value"], directions)
        notes[row(chosen)] = f"α = {chosen['alpha']:g}, percentile {rank:.0f} of random"
    return (
        f"## Figure 3: v_emotion of {short(args.src)} in earlier checkpoints\n\n"
        "Token Acc in % [95 % interval], mean of six emotions, on scenarios of the other five "
        f"(n = {shown[0]['n']}); block {args.layer}; α chosen on validation\n\n"
        + pivot(shown, row, column, notes=notes)
    )


def row(each: dict) -> str:
    return f"{short(each['target'])}, {each['group']}"


# ---------------------------------------------------------------- figures


def draw_accuracy(args, records: list[dict]):
    """Accuracy on negatives against training tokens, without and with v_hat."""
    figure, axes = new_figure(ncols=2, figsize=(8.6, 3.4), sharey=True)
    curves = [
        ("base", None, "#c8352b", "without: false positives"),
        ("contrans", "chosen alpha", "#2f6db2", "with v̂ of the last checkpoint"),
        ("contrans", "random", "#777777", f"{args.random} random directions, range"),
    ]
    for axis, metric in zip(axes, ("token_acc", "logit_acc")):
        for method, variant, colour, label in curves:
            match = {"metric": metric, "method": method, "part": "test"}
            mean = select(records, concept="mean", variant=variant, **match)
            value, low, high = [[each[k] for each in mean] for k in ("value", "low", "high")]
            axis.plot(args.tokens, value, "o-", ms=4, color=colour, label=label)
            axis.fill_between(args.tokens, low, high, color=colour, alpha=0.18, lw=0)
            if variant == "random":
                continue
            alphas = [each["alpha"] for each in mean]
            for emotion in EMOTIONS:
                thin = []
                for name, alpha in zip(args.tgt, alphas):
                    one = {"target": name, "concept": emotion, "variant": None, "alpha": alpha}
                    thin.append(select(records, **one, **match)[0]["value"])
                axis.plot(args.tokens, thin, color=colour, lw=0.6, alpha=0.4)
        title = "Token Acc" if metric == "token_acc" else "Logit Acc"
        axis.set(xscale="log", xlabel="training tokens", ylim=(0, 1.05), title=title)
    axes[0].set_ylabel("accuracy on negative scenarios")
    style = {"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes[1].legend(title="mean, 95 % interval;\nthin: each emotion", **style)
    title = f"v_emotion of {short(args.src)} in the checkpoints of its own pre-training"
    figure.suptitle(title, fontsize=10)
    return figure


# ---------------------------------------------------------------- main


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    data = load_data(args)
    names = list(dict.fromkeys([args.src, *args.tgt]))  # the source first: loaded once
    for name in names:
        check_prompts(args, data, models, name)
    path = args.data / "wikisplit" / "validation.tsv"
    sentences = plain_sentences(path, models, names, args.sentences)
    lab = Lab(args, data, sentences, models)
    for name in names:
        lab.block(name)  # an impossible --layer ends here, before any weights are loaded
    inputs = {
        "models": {name: models.fingerprint(name) for name in names},
        "data": [data, sentences],
        "first prompts": [texts[0] for texts in pairs(args, data, "happiness")],
        "first test prompt": prompts(args, data, data.emotions["happiness"].test[:1], shots=True),
    }
    run = Run(__file__, args, inputs, ignore=("tokens", "keep_downloads", "model", "revisions"))

    source, results = None, {}
    for name in names:
        # A step, so that an interrupted run still knows which downloads are its own.
        on_hub = not Path(name).is_dir()
        is_ours = on_hub and not run.step(f"in the hub's cache: {name}", is_downloaded, name)
        if source is None:
            source = run.tensors(f"source {name}", lab.collect)
        if name in args.tgt:
            results[name] = one_target(args, run, lab, name, source)
        if is_ours and not args.keep_downloads:
            models.release()
            run.step(f"remove {name}", delete_revision, name)
    records = [each for name in args.tgt for each in results[name][0]]
    examples = [each for name in args.tgt for each in results[name][1]]
    run.figure(draw_accuracy(args, records), "figure_3")
    run.save(records, examples, accuracy_table(args, records))


if __name__ == "__main__":
    run_script(main)
