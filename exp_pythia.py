"""Which sizes can give a concept, and which can take it? One family, Sec. 6.3, Figures 4 and 8.

    python exp_pythia.py                                      toy zoo, two minutes on 2 CPU cores
    python exp_pythia.py --family pythia --data data/paper    Pythia 14m to 6.9b, as in the paper
    python exp_pythia.py --models Qwen/Qwen3-0.6B-Base Qwen/Qwen3-1.7B-Base --data data/paper

The emotion vectors of every model are mapped into every model and added there. On scenarios of the
*other* emotions, how often is the target emotion then the most likely next word (Token Acc),
and how often without? Figure 4: improvement ratio and absolute improvement, every source times
every target. Figure 8: t-SNE of three sizes' states.

alpha is chosen for each pair of models on a validation part.
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import NamedTuple

from common import BASE, Transplant, hidden_states, score_labels
from harness import (
    TOY,
    Run,
    at_least,
    fail,
    map_methods,
    map_options,
    model_options,
    option_parser,
    parse_options,
    read_families,
    read_texts,
    run_script,
)
from models import Models
from report import (
    MAP_METRICS,
    METHODS,
    OWN_CHOICES,
    PAGE,
    PLAIN,
    best_alphas,
    label,
    new_figure,
    of_kind,
    pivot,
    record,
    relative_costs,
    select,
    shades,
    spread,
    strength,
    tsne,
    verdict,
)
from vectors import (
    Context,
    Point,
    Vector,
    Vectors,
    map_texts,
    perplexity_records,
    random_directions,
)

import numpy as np
import torch

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 3, 5], "sentences": 2000, "limit": 200}
# The zoo's models have so few blocks that the last one names the emotion.
ZOO = {"layer": "0.9", "limit": 50, "sentences": 300}
ZOO["models"] = [f"{TOY}/models/pythia-{k}" for k in range(1, 6)]
NOT_CHOSEN = "not chosen"  # variant of v_hat at another alpha
FAMILIES = read_families("sizes", SETTINGS, toy=ZOO)


# ---------------------------------------------------------------- options


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES, models=())
    emotion_options(parser)
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", help="from small to large")
    args = parse_options(parser, FAMILIES, argv, complete)
    check_emotion_options(args)
    if args.layer == "auto" or "," in args.layer:
        fail("--layer takes one index or fraction here: all models are read and edited there")
    return args


def complete(args) -> None:
    """Every model is source and target."""
    if len(args.models or []) < 2:
        fail("--models needs two models or more")
    args.src, args.tgt = args.models[0], args.models


# ---------------------------------------------------------------- the emotion task
# This section is the same, to the letter, in exp_emotion.py, exp_pretraining.py and exp_pythia.py.

EMOTIONS = ["happiness", "sadness", "anger", "fear", "disgust", "surprise"]
TEMPLATE = "Scenario: {scenario}\nThe emotion of the above scenario is"
SHOT = "Scenario: {scenario}\nThe emotion ({choices}) of the above scenario is {label}."
# The few-shot examples of the released emotion code: label, true class, scenario. All are wrong.
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
    add(
        "--protocol",
        choices=["clean", "paper"],
        default="clean",
        help="clean: disjoint parts; paper: as in the released code",
    )
    add(
        "--shots", type=at_least(0), default=6, help="few-shot examples in a test prompt (paper: 6)"
    )
    add("--pairs", type=at_least(1), default=200, help="example pairs of a vector (paper: 200)")
    add("--template", default=TEMPLATE, help="prompt with {scenario} in it, read before the label")
    add("--labels", nargs="+", default=EMOTIONS, metavar="WORD", help="one for each of EMOTIONS")


def check_emotion_options(args) -> None:
    if "{scenario}" not in args.template or "{text}" in args.template:
        fail("--template needs {scenario} in it, and no {text}")
    words = {word for word in args.labels if word.strip()}
    if len(words) != len(EMOTIONS) or len(args.labels) != len(EMOTIONS):
        fail(f"--labels must be {len(EMOTIONS)} different words, for {', '.join(EMOTIONS)}")
    if args.pairs == 1 and args.permutations:
        fail("--pairs 1: labels can be permuted in two pairs or more; add --permutations 0")
    if args.protocol == "paper" and not {true for _, true, _ in PAPER_SHOTS} <= set(EMOTIONS):
        fail("--protocol paper has few-shot examples of the paper's emotions only")


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
        positive = shuffled[emotion][shots_each:]
        n = min(len(positive), len(negative), args.pairs)
        emotions[emotion] = Scenarios(
            positive=positive[:n],
            negative=negative[:n],
            validation=take_turns([texts[40:50] for texts in others]),
            test=take_turns([texts[50:] for texts in others])[:limit],
        )
    return Data(shots, emotions)


def paper_split(args, lists: dict, shuffled: dict, limit: int | None) -> Data:
    """As in the released emotion code: a vector's negatives are also its validation and test."""
    shots = []
    others = {emotion: iter(texts) for emotion, texts in lists.items()}
    for word, true_class, text in PAPER_SHOTS[: args.shots]:
        known = text in lists[true_class]
        shots.append((word, text if known else next(others[true_class])))
    emotions = {}
    for emotion in EMOTIONS:
        others = [text for other in EMOTIONS if other != emotion for text in shuffled[other]]
        n = min(args.pairs, len(lists[emotion]), len(others))
        negative = random.Random(f"{args.seed} {emotion} negative").sample(others, n)
        test = negative[:limit]
        emotions[emotion] = Scenarios(shuffled[emotion][:n], negative, test, test)
    return Data(shots, emotions)


def take_turns(lists: list[list[str]]) -> list[str]:
    """One text of each list in turn, equally many of each."""
    return [text for texts in zip(*lists) for text in texts]


def prompts(args, data: Data, texts: list[str], shots: bool) -> list[str]:
    """The prompts of scenarios: alone for the vector, after the few-shot examples for the test."""
    words = dict(zip(EMOTIONS, args.labels))
    shot = SHOT if args.template == TEMPLATE else args.template + " {label}."
    shot = shot.replace("{choices}", ", ".join(f'"{word}"' for word in args.labels))
    examples = []
    for emotion, text in data.shots if shots else []:
        example = shot.replace("{label}", words[emotion])
        examples.append(example.replace("{scenario}", text))
    asked = []
    for text in texts:
        question = args.template.replace("{scenario}", text)
        asked.append("\n".join([*examples, question]))
    return asked


def pairs(args, data: Data, concept: str) -> tuple[list[str], list[str]]:
    """Positive and negative prompts of an emotion's vector; "fear 50" is of 50 pairs."""
    emotion, _, count = concept.partition(" ")
    positive, negative, *_ = data.emotions[emotion]
    n = int(count or len(positive))
    asked = prompts(args, data, positive[:n] + negative[:n], shots=False)
    return asked[:n], asked[n:]


def read_context(args, data: Data) -> Context:
    """Where the emotions are read: the template, and the negatives of all emotions' vectors. The
    positives of one emotion's vector are test scenarios of the others."""
    template = args.template.replace("{scenario}", "{text}")
    texts: dict[str, None] = {}  # each once, in order
    for each in data.emotions.values():
        texts |= dict.fromkeys(each.negative)
    return Context((template,), tuple(texts))


def check_prompts(args, data: Data, models: Models, name: str) -> None:
    """Refuse, before any weights are loaded, prompts that are too long and labels that look
    alike."""
    texts = [text for parts in data.emotions.values() for part in parts for text in part]
    asked = prompts(args, data, list(dict.fromkeys(texts)), shots=True)
    models.require_fit(name, asked, new_tokens=8, advice="; try fewer --shots")
    models.require_labels(name, asked[0], args.labels)


def named(model, args, data: Data, part: str, emotion: str, transplants) -> list[dict]:
    """Whether a model names the emotion after each scenario of a part: under each transplant, the
    hits of both metrics."""
    asked = prompts(args, data, getattr(data.emotions[emotion], part), shots=True)
    answers = score_labels(model, asked, args.labels, transplants)
    said, preferred = [(each == EMOTIONS.index(emotion)).tolist() for each in answers]
    hits = []
    for token_acc, logit_acc in zip(said, preferred):
        hits.append({"token_acc": token_acc, "logit_acc": logit_acc})
    return hits


# ---------------------------------------------------------------- refine, map


class Lab:
    """What every step needs. Its methods are the steps."""

    def __init__(self, args, data: Data, sentences: list[str], models: Models):
        self.args, self.data, self.models = args, data, models
        context = read_context(args, data)
        self.vectors = Vectors(
            models,
            [Vector(emotion, name, name) for name in args.models for emotion in EMOTIONS],
            args.models,
            pairs=lambda concept, name: pairs(args, data, concept),
            blocks=lambda name: [self.block(name)],
            context=lambda concept, name: context,
            sentences=sentences,
            refine=args.refine,
            both_ways=True,
            **map_options(args),
        )

    def block(self, name: str) -> int:
        """The block that is read and edited."""
        return self.models.block(name, self.args.layer)

    def seed(self, emotion: str) -> int:
        """Of the random directions and permuted labels of an emotion."""
        return self.args.seed * len(EMOTIONS) + EMOTIONS.index(emotion)

    def directions(self, target: str, emotion: str) -> dict[tuple, torch.Tensor]:
        """{(method, source, variant): direction [d]} of an emotion: the target's own vector, v_hat
        of every other model by each map (Eq. 2), and their controls."""
        args, block, methods = self.args, self.block(target), map_methods(self.args)
        own = Vector(emotion, target, target)
        found = {("self-align", target, None): self.vectors.v(own, block)}
        for source in args.models:
            if source == target:
                continue
            directions = self.vectors.directions(
                Vector(emotion, source, source),
                target,
                Point(self.block(source), block, 1),
                methods,
                n_permuted=args.permutations,
                n_maps=args.maps,
                n_random=0,  # they stand beside the strongest vector of all sources
                n_shuffled=0,
                seed=self.seed(emotion),
            )
            for k in range(min(OWN_CHOICES, args.permutations)):
                same = directions[methods[-1], f"permuted {k}"]
                directions[methods[-1], f"own-α permuted {k}"] = same
            for (method, variant), direction in directions.items():
                found[method, source, variant] = direction
        return found

    # ------------------------------------------------------------ transplant, score: the steps

    def measure(self, target: str) -> list[dict]:
        """What one target names without a vector, with its own, with every source's v_hat by each
        map, and with random directions as strong as the strongest of these: records."""
        args, block = self.args, self.block(target)
        about = {"item": "Figure 4", "target": target, "block": block}
        directions = {emotion: self.directions(target, emotion) for emotion in EMOTIONS}
        alphas = self.choose_alphas(target, directions)
        strongest = strongest_key(directions, alphas)
        hits: dict[tuple, list] = {}
        model = self.models.load(target)
        for emotion, found in directions.items():
            moves = {("base", None, None, 0): BASE}
            for (*pair, variant), direction in found.items():
                best = alphas.get((*pair, variant)) or alphas[(*pair, None)]
                for alpha in [best] if variant else args.alpha:
                    name = variant if alpha == best else NOT_CHOSEN
                    moves[*pair, name, alpha] = Transplant.of(direction, block, alpha)
            alpha, v_hat = alphas[strongest], found[strongest]
            randoms = random_directions(v_hat, args.random, self.seed(emotion))
            for r, direction in enumerate(randoms):
                moves[None, None, f"random {r}", alpha] = Transplant.of(direction, block, alpha)
            answers = named(model, args, self.data, "test", emotion, list(moves.values()))
            for key, each in zip(moves, answers):
                hits.setdefault(key, []).extend(each["token_acc"])
        units = [emotion for emotion in EMOTIONS for _ in self.data.emotions[emotion].test]
        records = self.measure_perplexity(target, directions, alphas, about)
        for (method, source, variant, alpha), found in hits.items():
            what = about | {"source": source, "variant": variant, "alpha": alpha}
            what["source_block"] = self.block(source) if source else None
            what |= {"concept": "mean", "metric": "token_acc", "part": "test"}
            for each in [method] if method else map_methods(args):  # a control of both maps
                records.append(record(found, units=units, method=each, **what))
        return records

    def measure_perplexity(self, target: str, directions, alphas, about: dict) -> list[dict]:
        """Perplexity of plain sentences under each vector at its alpha: records."""
        arms = [(about | {"method": "base", "alpha": 0}, BASE)]
        for emotion, found in directions.items():
            for key, direction in found.items():
                method, source, variant = key
                if not variant:
                    what = {"method": method, "source": source, "concept": emotion}
                    move = Transplant.of(direction, about["block"], alphas[key])
                    arms.append((about | what | {"alpha": alphas[key]}, move))
        return perplexity_records(self.models.load(target), self.vectors.sentences, arms)

    def measure_maps(self, target: str) -> list[dict]:
        """What the maps from every other model are worth: records."""
        records = []
        for method, source in product(map_methods(self.args), self.args.models):
            if source == target:
                continue
            point = Point(self.block(source), self.block(target), 1)
            vectors = [Vector(emotion, source, source) for emotion in EMOTIONS]
            own = [Vector(emotion, target, target) for emotion in EMOTIONS]
            inputs = target, point, method, self.args.maps
            found = self.vectors.quality(vectors, *inputs, own)
            what = {"item": "Figure 4", "source": source, "target": target, "method": method}
            what |= {"source_block": point.source_block, "block": point.block, "part": "held-out"}
            records += [record(**what | fields) for fields in found]
        return records

    def choose_alphas(self, target: str, directions: dict[str, dict]) -> dict[tuple, float]:
        """Of each vector, and of permuted labels that choose: the strength with the most hits on
        the validation scenarios; the smaller of equals."""
        hits: dict[tuple, dict] = {}
        for key in directions[EMOTIONS[0]]:
            if key[-1] is None or key[-1].startswith("own-α"):
                hits[key] = dict.fromkeys(self.args.alpha, 0)
        tried = list(product(hits, self.args.alpha))
        block, model = self.block(target), self.models.load(target)
        for emotion, found in directions.items():
            moves = [Transplant.of(found[key], block, alpha) for key, alpha in tried]
            answers = named(model, self.args, self.data, "validation", emotion, moves)
            for (key, alpha), each in zip(tried, answers):
                hits[key][alpha] += sum(each["token_acc"])
        return best_alphas(hits)

    def tsne(self, name: str) -> list:
        """t-SNE of a model's states of 20 scenarios of each emotion [120, 2]."""
        texts = []
        for each in self.data.emotions.values():
            texts += each.positive[-20:]
        shown = prompts(self.args, self.data, texts, shots=False)
        states = hidden_states(self.models.load(name), shown, [self.block(name)])[:, 0]
        return tsne(states.numpy(), self.args.seed)


def strongest_key(directions: dict[str, dict], alphas: dict[tuple, float]) -> tuple:
    """The vector that is longest when added, over all emotions."""
    lengths = {}
    for key, alpha in alphas.items():
        if key[-1] is None:
            of_emotions = torch.stack([found[key] for found in directions.values()])
            lengths[key] = of_emotions.norm() * abs(alpha)
    return max(lengths, key=lengths.get)


# ---------------------------------------------------------------- one target


def one_target(run: Run, lab: Lab, target: str) -> list[dict]:
    """Records of one target: first what the maps are worth, then the effect of each vector, its
    gain over the model without one, and its cost."""
    worth = run.step(f"maps to {target}", lab.measure_maps, target)
    records = run.step(f"target {target}", lab.measure, target)
    lab.vectors.forget_maps()  # the next target needs others
    [base] = select(records, method="base", metric="token_acc")
    derived = []
    for source in lab.args.models:
        mine = [each for each in records if each["source"] in (None, source)]
        ratios = relative_costs(select(mine, metric="perplexity"), PLAIN)
        for each in select(mine, source=source, metric="token_acc", variant=None):
            about = each | dict.fromkeys(("low", "high", "item_low", "item_high", "paper"))
            found = {"absolute_improvement": each["value"] - base["value"]}
            if base["value"]:  # over a baseline of 0 there is no ratio
                found["improvement_ratio"] = each["value"] / base["value"]
            derived += [about | {"metric": name, "value": value} for name, value in found.items()]
            cost = {"metric": "perplexity_ratio", "part": PLAIN, "n": None, "units": None}
            derived.append(about | cost | {"value": ratios[each["method"], each["alpha"]]})
    return worth + records + derived


# ---------------------------------------------------------------- tables


def short(each: dict) -> str:
    return Path(each["target"]).name


def column(each: dict) -> str:
    if each["method"] == "base":
        return "no vector"
    return f"v of {Path(each['source']).name}" if each["source"] else "random [range]"


def pair_table(args, records: list[dict], row=short) -> str:
    """Rows are targets, columns sources, in the order of --models."""
    sources = [f"v of {Path(name).name}" for name in args.models]
    return pivot(records, row, column, order=["no vector", *sources])


def by_method(records: list[dict], method: str) -> list[dict]:
    """The records of a map, and those that it is shown beside: base and the target's own vector."""
    return [each for each in records if each["method"] in ("base", "self-align", method)]


def tables(args, records: list[dict], method: str) -> list[str]:
    shown = []
    for target in args.models:
        mine = select(records, target=target, metric="token_acc")
        directions = of_kind(select(mine, method=method), "random")
        shown += by_method(select(mine, variant=None), method)
        shown.append(spread(directions, "random"))
    samples = []
    for target, source in product(args.models, args.models):
        same = select(records, target=target, source=source, metric="token_acc")
        own = select(same, method="self-align", variant=None)  # on the diagonal
        mapped = select(same, method=method, variant=None)
        mapped += of_kind(select(same, method=method), "map ")
        samples.append(spread(own or mapped, "map"))
    few = select(records, method=method, metric="token_acc", variant="few sentences")
    quality = []
    for metric in ("r2_where_read", "cosine_to_response", "separation"):
        quality += select(records, method=method, metric=metric, variant=None)
    ratios = by_method(select(records, metric="improvement_ratio"), method)
    costs = by_method(select(records, metric="perplexity_ratio"), method)
    chosen_on = "the test scenarios" if args.protocol == "paper" else "validation"
    worth = [
        f"What the maps of {METHODS[method]} are worth, known without any steering: with a "
        "negative R², a cosine below 0.3 or an AUC below 0.7 they rarely work (docs/map.md)",
        pair_table(args, quality, lambda each: f"{short(each)}: {MAP_METRICS[each['metric']]}"),
    ]
    return [
        *(worth if quality else []),
        f"{METHODS[method]}: Token Acc in % [95 % interval], mean of all emotions, on scenarios of "
        f"the others (n = {shown[0]['n']}); rows are targets, columns sources, on the diagonal "
        f"Self-Align; block {args.layer}, α chosen on {chosen_on} for each pair. The {args.random} "
        "random directions are as strong as the strongest vector of the row",
        pair_table(args, shown),
        "Improvement ratio (none over a baseline of 0)",
        pair_table(args, ratios) if ratios else "none",
        "Perplexity of plain sentences at these α, over that without a vector",
        pair_table(args, costs),
        f"By maps on {args.maps} disjoint samples of the text, the first one's α [range]",
        pair_table(args, samples),
        "By maps with the paper's 0.39 sentences for each dimension (no number: the map has fewer)",
        pair_table(args, few) if few else "none",
    ]


def strength_table(args, records: list[dict]) -> str:
    """Token Acc at every alpha, mean [range] of all sources, also where it was not chosen."""
    tested = select(records, metric="token_acc", part="test")
    tested = [each for each in tested if each["variant"] in (None, NOT_CHOSEN)]
    shown = []
    for target, method, alpha in product(args.models, METHODS, (0, *args.alpha)):
        same = select(tested, target=target, method=method, alpha=alpha)
        if same:
            shown.append(spread(same, None))
    title = "Token Acc in %, mean of all emotions, over α: mean of the sources [range]"
    return f"{title}\n\n{pivot(shown, lambda each: f'{short(each)}: {label(each)}', strength)}"


# ---------------------------------------------------------------- figures


def log_or_none(ratios: np.ndarray) -> np.ndarray:
    return np.log(np.where(ratios > 0, ratios, np.nan))


def draw_heat(args, records: list[dict], method: str):
    """Figure 4: improvement ratio and absolute improvement; rows are targets, columns sources."""
    names = [Path(name).name for name in args.models]
    size = len(names)
    figure, axes = new_figure(ncols=2, figsize=(max(PAGE, 1.2 * size), 1.4 + 0.35 * size))
    panels = [
        ("improvement_ratio", "improvement ratio (grey: 0, or over 0)", 1, log_or_none),
        ("absolute_improvement", "absolute improvement [points]", 100, lambda gain: gain),
    ]
    for axis, (metric, title, scale, colour_of) in zip(axes, panels):
        table = np.full((size, size), np.nan)
        for each in by_method(select(records, metric=metric), method):
            cell = args.models.index(each["target"]), args.models.index(each["source"])
            table[cell] = scale * each["value"]
        colours = colour_of(table)
        top = max(np.nanmax(np.abs(colours), initial=0), 1e-9)
        axis.set_facecolor("#ddd")
        axis.imshow(colours, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")  # blue: more
        for (y, x), value in np.ndenumerate(table):
            text = "" if np.isnan(value) else f"{value:.1f}" if scale == 1 else f"{round(value):+d}"
            dark = abs(colours[y, x]) > 0.6 * top
            style = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
            axis.text(x, y, text, fontsize=7, **style)
        ticks = {"xticks": range(size), "yticks": range(size)}
        axis.set(**ticks, xticklabels=names, yticklabels=names, xlabel="source", title=title)
        axis.tick_params(axis="x", rotation=30)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("target")
    title = f"{METHODS[method]}: Token Acc on negative scenarios, mean of all emotions"
    figure.suptitle(title)
    return figure


def draw_tsne(points: dict[str, list]):
    """Figure 8: t-SNE of the states of three sizes."""
    figure, axes = new_figure(ncols=len(points), figsize=(PAGE, 2.8), squeeze=False)
    for axis, (name, states) in zip(axes[0], points.items()):
        parts = np.split(np.array(states), len(EMOTIONS))
        for part, emotion, colour in zip(parts, EMOTIONS, shades(len(EMOTIONS))):
            axis.scatter(*part.T, s=10, lw=0, color=colour, label=emotion)
        axis.set(xticks=[], yticks=[], title=Path(name).name)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6)
    figure.suptitle(f"t-SNE of last-token states, {len(part)} scenarios of each emotion")
    return figure


# ---------------------------------------------------------------- main


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    data = load_data(args)
    for name in args.models:
        models.block(name, args.layer)  # an impossible --layer ends here
        check_prompts(args, data, models, name)
    sentences = map_texts(args, models, args.models)
    lab = Lab(args, data, sentences, models)
    first_prompts = [texts[0] for texts in pairs(args, data, EMOTIONS[0])]
    first_prompts += prompts(args, data, data.emotions[EMOTIONS[0]].test[:1], shots=True)
    run = Run(
        __file__, args, models, [data, sentences], first_prompts, steps=2 * len(args.models) + 3
    )

    found = {name: one_target(run, lab, name) for name in args.models}
    records = [each for name in args.models for each in found[name]]
    middle = args.models[len(args.models) // 2]
    shown = dict.fromkeys([args.models[0], middle, args.models[-1]])  # with two models, both
    points = {name: run.step(f"t-SNE {name}", lab.tsne, name) for name in shown}
    judged = {}
    for name in args.models:
        judged[Path(name).name] = select(records, target=name, metric="token_acc"), {}
    headline = [verdict(judged)]
    for method in map_methods(args):
        headline.append(run.figure(draw_heat(args, records, method), f"figure_4_{method}"))
        headline += tables(args, records, method)
    more = [strength_table(args, records), run.figure(draw_tsne(points), "figure_8")]
    run.save(records, examples(data, records), headline, more)


def examples(data: Data, records: list[dict]) -> list[dict]:
    """Whether the emotion was named (Token Acc), for every test scenario, target and source."""
    scenarios = [(emotion, text) for emotion in EMOTIONS for text in data.emotions[emotion].test]
    rows = []
    for each in select(records, metric="token_acc", variant=None):
        about = {name: each[name] for name in ("target", "source", "method", "alpha")}
        for (emotion, text), hit in zip(scenarios, each["hits"]):
            rows.append(about | {"concept": emotion, "scenario": text, "named": hit})
    return rows


if __name__ == "__main__":
    run_script(main)
