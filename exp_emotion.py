"""Can a concept be moved from one model into another? Emotions, Sec. 4, App. A, B.2 and B.3.

    python exp_emotion.py                                     toy zoo, 2 to 5 minutes on 2 CPU cores
    python exp_emotion.py --family llama --data data/paper    LLaMA-7B -> 13B and 65B
    python exp_emotion.py --src Qwen/Qwen3-0.6B --tgt Qwen/Qwen3-4B --data data/paper

Emotion vectors of a small model are mapped into larger ones and added there. On scenarios of the
*other* emotions, how often does the larger model then name the target emotion?
    Token Acc    its most likely next token is the emotion's word
    Logit Acc    the emotion's word has the highest logit of all emotions' words
Figures 2a and 6 (both accuracies against alpha), 2b (PCA before and after), 5 (number of pairs),
7 (t-SNE); Tables 5 (generations) and 8 (tokens that gain and lose); the map of App. A by gradient
descent. Every effect is shown with controls.

--protocol clean (default): the scenarios that make a vector, the few-shot examples and the
scenarios that test it are disjoint, and alpha and block are chosen on a validation part. --protocol
paper: as in the released code, tested on the scenarios that made the vector, with six wrong labels
in the few-shot prompt."""

from __future__ import annotations

import random
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

from common import (
    BASE,
    HELD_OUT,
    Transplant,
    fit_quality,
    generate,
    hidden_states,
    score_labels,
    token_changes,
)
from harness import (
    Run,
    add_paper_numbers,
    at_least,
    fail,
    map_methods,
    map_options,
    model_options,
    option_parser,
    paper_names,
    parse_options,
    read_families,
    read_texts,
    run_script,
)
from models import Models, context_length
from report import (
    COLUMN,
    LOOK,
    METHODS,
    OWN_CHOICES,
    PAGE,
    PLAIN,
    arrow,
    beside_controls,
    draw_curve,
    draw_fluency,
    draw_grid,
    effect_notes,
    fluency_notes,
    fluent,
    is_permuted,
    label,
    map_table,
    map_warnings,
    markdown,
    new_figure,
    of_kind,
    pivot,
    pool,
    record,
    select,
    shades,
    spread,
    strength,
    summary,
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

SETTINGS = {"layer": "0.75", "alpha": [1, 2, 5], "sentences": 2000, "limit": 200}
TOY_SETTINGS = {"alpha": [0.5, 1, 2, 3, 5], "sentences": 1000, "limit": 50}
FAMILIES = read_families("base", SETTINGS, toy=TOY_SETTINGS)
PAPER_NAMES = paper_names(toy="llama")
DEPTHS = ["0.4", "0.5", "0.6", "0.7", "0.8", "0.9"]  # tried by --layer auto
PAIRS_OF_FIGURE_5 = [20, 50, 100, 150, 200]


# ---------------------------------------------------------------- options


def options(argv=None):
    parser = option_parser(__doc__, FAMILIES, models=("src", "src-base", "tgt"))
    emotion_options(parser)
    args = parse_options(parser, FAMILIES, argv)
    check_emotion_options(args)
    return args


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


def blocks(args, models: Models, name: str) -> list[int]:
    """The blocks of a model that --layer means; the source takes its first number."""
    depths = DEPTHS if args.layer == "auto" else [args.layer]
    return [models.block(name, depth, side=int(name in args.tgt)) for depth in depths]


def make_vectors(args, data: Data, sentences: list[str], models: Models) -> Vectors:
    """The source's vectors of all emotions, also of fewer pairs, and the targets' own."""
    counts = ["", *(f" {n}" for n in pair_counts(args, data))]
    context = read_context(args, data)
    wanted = []
    for emotion in EMOTIONS:
        wanted += [Vector(emotion + count, args.src, args.src_base) for count in counts]
        wanted += [Vector(emotion, target, target) for target in args.tgt]
    return Vectors(
        models,
        wanted,
        args.tgt,
        pairs=lambda concept, name: pairs(args, data, concept),
        blocks=lambda name: sorted(set(blocks(args, models, name))),
        context=lambda concept, name: context,
        sentences=sentences,
        refine=args.refine,
        **map_options(args),
    )


class Lab:
    """What every step needs to know about one target. Its methods are the steps."""

    def __init__(self, args, data: Data, models: Models, vectors: Vectors, target: str):
        self.args, self.data, self.models = args, data, models
        self.vectors, self.target = vectors, target
        pairs_of_blocks = zip(blocks(args, models, args.src), blocks(args, models, target))
        self.grid = list(dict.fromkeys(pairs_of_blocks))
        self.points: dict[str, Point] = {}  # of each method, chosen on the validation scenarios

    def source(self, concept: str) -> Vector:
        return Vector(concept, self.args.src, self.args.src_base)

    @property
    def model(self):
        return self.models.load(self.target)

    def methods(self) -> list[str]:
        """What is steered with: the target's own vector, and v_hat of each kind of map."""
        return ["self-align", *map_methods(self.args)]

    def own_choices(self) -> list[str]:
        """Vectors of permuted labels whose alpha and block are chosen by the same rule as
        v_hat's."""
        count = min(OWN_CHOICES, self.args.permutations)
        return [f"own-α permuted {number}" for number in range(count)]

    def alphas(self) -> dict[str, float]:
        return {method: self.points[method].alpha for method in self.methods()}

    def seed(self, emotion: str) -> int:
        """Of the random directions and permuted labels of an emotion."""
        return self.args.seed * len(EMOTIONS) + EMOTIONS.index(emotion)

    def direction(self, concept: str, method: str, point: Point | None = None) -> torch.Tensor:
        """The vector [d] of an emotion that a method adds: v_hat (Eq. 2), the target's own, or one
        of permuted labels."""
        point = point or self.points[method]
        if method == "self-align":
            return self.vectors.v(Vector(concept, self.target, self.target), point.block)
        if method in self.own_choices():
            own = self.own_choices()
            inputs = self.source(concept), self.target, point, self.methods()[-1]
            null = self.vectors.permuted(*inputs, len(own), self.seed(concept))
            return null[own.index(method)]
        if method == "gradient-descent":
            matrix, *_ = self.gradient_descent
            return self.vectors.v(self.source(concept), point.source_block) @ matrix
        return self.vectors.v_hat(self.source(concept), self.target, point, method)

    @cached_property
    def gradient_descent(self) -> tuple[torch.Tensor, float, float]:
        """The map by gradient descent at ConTrans's blocks, see fit_by_gradient_descent."""
        maps = self.vectors.maps(self.source(EMOTIONS[0]), self.target)
        source_block, block, _ = self.points["contrans"]
        return fit_by_gradient_descent(*maps.states(source_block, block), self.args.seed)

    def move(self, direction: torch.Tensor, method: str, alpha: float | None = None) -> Transplant:
        """A direction added at the point chosen for a method (Eq. 3)."""
        point = self.points[method]
        return Transplant.of(direction, point.block, alpha or point.alpha)

    def record(self, hits=None, **fields) -> dict:
        method = fields["method"]
        source = {"base": None, "self-align": self.target}.get(method, self.args.src)
        about = {"source": source, "target": self.target}
        if method in self.points:
            point = self.points[method]
            about |= {"source_block": point.source_block, "block": point.block}
        if method in self.own_choices():
            fields |= {"method": self.methods()[-1], "variant": method}
        return record(hits, **about | fields)

    # ------------------------------------------------------------ transplant, score: the steps

    def validate(self) -> list[dict]:
        """Mean Token Acc on the validation scenarios, of each method: records of the grid."""
        points = [Point(*blocks, alpha) for blocks in self.grid for alpha in self.args.alpha]
        tried = list(product([*self.methods(), *self.own_choices()], points))
        hits: dict[tuple, list] = {each: [] for each in tried}
        for emotion in EMOTIONS:
            moves = []
            for method, point in tried:
                direction = self.direction(emotion, method, point)
                moves.append(Transplant.of(direction, point.block, point.alpha))
            found = named(self.model, self.args, self.data, "validation", emotion, moves)
            for each, answers in zip(tried, found):
                hits[each] += answers["token_acc"]
        what = {"concept": "mean", "metric": "token_acc", "part": "validation"}
        records = []
        for (method, point), found in hits.items():
            records.append(self.record(found, method=method, **point._asdict(), **what))
        return records

    def score(self, emotion: str) -> list[dict]:
        """How often the target names an emotion, under the transplant and each control: records."""
        args = self.args
        arms = [("base", None, 0, BASE)]
        for method in self.methods():
            direction, best = self.direction(emotion, method), self.points[method].alpha
            for alpha in args.alpha:
                arms.append((method, None, alpha, self.move(direction, method, alpha)))
            if method == "self-align":
                continue
            controls = self.vectors.controls(
                self.source(emotion),
                self.target,
                self.points[method],
                [self.source(other) for other in EMOTIONS if other != emotion],
                method,
                n_permuted=args.permutations if method == self.methods()[-1] else 0,
                n_maps=args.maps,
                n_random=args.random,
                seed=self.seed(emotion),
            )
            for n_pairs in pair_counts(args, self.data):
                concept = f"{emotion} {n_pairs}"
                controls[f"pairs {n_pairs}"] = self.direction(concept, method)
            for variant, direction in controls.items():
                for alpha in args.alpha if variant in self.curves(method) else [best]:
                    arms.append((method, variant, alpha, self.move(direction, method, alpha)))
        for name in self.own_choices():
            move = self.move(self.direction(emotion, name), name)
            arms.append((name, None, self.points[name].alpha, move))
        if "gradient-descent" in self.points:
            method = "gradient-descent"
            direction, alpha = self.direction(emotion, method), self.points[method].alpha
            arms.append((method, None, alpha, self.move(direction, method)))
        moves = [move for *_, move in arms]
        found = named(self.model, args, self.data, "test", emotion, moves)
        item = ITEMS.get(PAPER_NAMES.get(self.target), "Figure 2a")
        records = []
        for (method, variant, alpha, _), hits in zip(arms, found):
            what = {"method": method, "variant": variant, "alpha": alpha, "concept": emotion}
            what["item"] = "Figure 5" if (variant or "").startswith("pairs") else item
            is_null = "permuted" in (variant or method)
            for metric in ["token_acc"] if is_null else hits:
                records.append(self.record(hits[metric], metric=metric, part="test", **what))
        return records

    def curves(self, method: str) -> list[str]:
        """Random directions that are tried at every alpha: one an emotion, of the last map."""
        is_last = method == self.methods()[-1]
        return ["random 0"] if is_last and self.args.random else []

    def measure_perplexity(self) -> list[dict]:
        """Perplexity of plain sentences under each emotion's vector and its random directions, and
        of other sentences, which limit alpha."""
        arms = [(self.record(method="base", alpha=0), BASE)]
        for method, emotion in product(self.methods(), EMOTIONS):
            direction = self.direction(emotion, method)
            names = self.curves(method)
            others = random_directions(direction, self.args.random, self.seed(emotion))
            for variant, each in [(None, direction), *zip(names, others)]:
                for alpha in self.args.alpha:
                    what = {"method": method, "variant": variant, "concept": emotion}
                    about = self.record(**what, alpha=alpha)
                    arms.append((about, self.move(each, method, alpha)))
        return perplexity_records(self.model, self.vectors.sentences, arms)

    def measure_maps(self) -> list[dict]:
        """How well the maps predict states, held-out and where v is read, and how long v_hat is."""
        records = []
        vectors = [self.source(emotion) for emotion in EMOTIONS]
        own = [Vector(emotion, self.target, self.target) for emotion in EMOTIONS]
        for method in map_methods(self.args):
            point = self.points[method]
            found = self.vectors.quality(vectors, self.target, point, method, self.args.maps, own)
            records += [self.record(method=method, **fields) for fields in found]
            if method == "contrans":
                maps = self.vectors.maps(vectors[0], self.target, method)
                _, r2, cosine = self.gradient_descent
                about = {"method": "gradient-descent", "concept": "map", "part": "held-out"}
                about["n"] = maps.between(point.source_block, point.block).n
                records.append(self.record(metric="r2", value=r2, **about))
                records.append(self.record(metric="cosine", value=cosine, **about))
        return records

    def save_vectors(self, folder: str) -> None:
        """Write v_hat of each emotion, by the local map if there is one."""
        method = map_methods(self.args)[-1]
        point = self.points[method]
        for emotion in EMOTIONS:
            path = Path(folder) / f"v_{emotion}_{Path(self.target).name}.safetensors"
            self.vectors.save(path, self.source(emotion), self.target, point, method)

    def pca(self) -> dict:
        """Figure 2b: the last block's states before and after one v_hat, in two dimensions.

        The last block, because at the steered block every point moves by the same vector."""
        from sklearn.decomposition import PCA

        labels, texts = own_scenarios(self.data, 20)
        asked = prompts(self.args, self.data, texts, shots=True)
        method = map_methods(self.args)[-1]
        emotion = "fear" if "fear" in EMOTIONS else EMOTIONS[0]
        move = self.move(self.direction(emotion, method), method)
        last = [self.model.n_layers - 1]
        before = hidden_states(self.model, asked, last)[:, 0].numpy()
        after = hidden_states(self.model, asked, last, move)[:, 0].numpy()
        fitted = PCA(2).fit(np.concatenate([before, after]))
        before, after = fitted.transform(before), fitted.transform(after)
        points = {"before": before.tolist(), "after": after.tolist()}
        return points | {"labels": labels, "emotion": emotion}

    def generations(self) -> list[list[str]]:
        """Table 5: emotion, method, scenario and continuation, without and with each vector."""
        rows = []
        for e, emotion in enumerate(EMOTIONS):
            test = self.data.emotions[emotion].test
            scenario = test[e % len(test)]
            asked = prompts(self.args, self.data, [scenario], shots=True)
            [length] = self.models.lengths(self.target, asked)
            new_tokens = min(24, context_length(self.model.config) - length)
            moves = {"base": BASE}
            for method in map_methods(self.args):
                moves[method] = self.move(self.direction(emotion, method), method)
            written = generate(self.model, asked, list(moves.values()), new_tokens)
            for method, [text] in zip(moves, written):
                rows.append([emotion, METHODS[method], scenario, " ".join(text.split())])
        return rows

    def token_changes(self) -> list[list[str]]:
        """Table 8: emotion, and the tokens among the ten that gain and lose most, with counts."""
        rows, method = [], map_methods(self.args)[-1]
        for emotion in EMOTIONS:
            test = self.data.emotions[emotion].test
            asked = prompts(self.args, self.data, test, shots=True)
            move = self.move(self.direction(emotion, method), method)
            changes = token_changes(self.model, asked, self.points[method].block, move)
            cells = []
            for tokens in changes:
                cells.append(", ".join(f"{token!r} {n}" for token, n in tokens[:6]))
            rows.append([emotion, *cells])
        return rows

    def tsne(self) -> dict:
        """Figure 7: the source's states of each emotion's own scenarios, in two dimensions."""
        labels, texts = own_scenarios(self.data, 60)
        asked = prompts(self.args, self.data, texts, shots=False)
        source = self.models.load(self.args.src)
        states = hidden_states(source, asked, [self.grid[0][0]])[:, 0]
        return {"labels": labels, "points": tsne(states.numpy(), self.args.seed)}


def pair_counts(args, data: Data) -> list[int]:
    """Numbers of pairs that Figure 5 compares; every emotion has as many."""
    most = min(len(pairs(args, data, emotion)[0]) for emotion in EMOTIONS)
    counts = [n for n in PAIRS_OF_FIGURE_5 if n <= most]
    return counts or [most]


def own_scenarios(data: Data, each: int) -> tuple[list[str], list[str]]:
    """(emotions, scenarios) of every emotion's own list, to look at, not to test on."""
    labels, texts = [], []
    for emotion, scenarios in data.emotions.items():
        own = scenarios.positive[-each:]
        labels += [emotion] * len(own)
        texts += own
    return labels, texts


def fit_by_gradient_descent(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple:
    """(F [d1, d2], R², cosine) of a linear layer, what App. A compares the closed form with.

    Trained as in the released code: Adam, 1e-4, 20 epochs, batches of 32."""
    n = len(x) - int(len(x) * HELD_OUT)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = torch.nn.Linear(x.shape[1], y.shape[1])
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
        for _ in range(20):
            for rows in torch.randperm(n).split(32):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(layer(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
    predicted = layer(x[n:]).detach()
    quality = fit_quality(predicted, y[n:], y[:n].double().mean(0))
    return layer.weight.detach().T, *quality


# ---------------------------------------------------------------- one target


def best_point(grid: list[dict]) -> Point:
    """The point with the highest Token Acc; of several, the one with the smallest alpha."""

    def rank(each):
        return each["value"], -abs(each["alpha"])

    best = max(grid, key=rank)
    return Point(best["source_block"], best["block"], best["alpha"])


def one_target(args, run: Run, lab: Lab) -> tuple[list[dict], list[str]]:
    """(records, report) of one target."""
    target = lab.target
    grid = run.step(f"{target} validation", lab.validate)
    for method in lab.methods():
        lab.points[method] = best_point(select(grid, method=method, variant=None))
    for name in lab.own_choices():
        lab.points[name] = best_point(select(grid, variant=name))
    if "contrans" in lab.points:  # App. A: the other way to fit the same map
        lab.points["gradient-descent"] = lab.points["contrans"]
    worth = run.step(f"{target} maps", lab.measure_maps)  # known before the test
    tested = []
    for emotion in EMOTIONS:
        tested += run.step(f"{target} {emotion}", lab.score, emotion)
    means = pool(tested, "concept", "mean")
    tested = [each for each in tested if not is_permuted(each)]
    records = grid + tested + means
    costs = run.step(f"{target} perplexity", lab.measure_perplexity)
    records += costs + fluent(means, costs)
    records += worth
    run.step(f"{target} vectors", lab.save_vectors, str(run.folder))
    add_paper_numbers(records, PAPER_NAMES)

    pca = run.step(f"{target} PCA", lab.pca)
    texts = run.step(f"{target} texts", lab.generations)
    tokens = run.step(f"{target} tokens", lab.token_changes)
    lab.vectors.forget_maps()  # the next target needs others
    report = [
        f"## {arrow(args.src, target)}",
        map_table(records),
        *(accuracy_table(lab, records, method) for method in map_methods(args)),
        control_table(lab, records),
        run.figure(draw_cost(lab, records), f"fluency_{Path(target).name}"),
        *(run.figure(*each) for each in draw_grids(lab, grid)),
        run.figure(draw_pca(lab, pca), f"pca_{Path(target).name}"),
        "Table 5: continuations without and with v_hat",
        markdown(["emotion", "method", "scenario", "continuation"], texts),
        "Table 8: tokens among the ten that change most, and on how many test scenarios",
        markdown(["emotion", "increased", "decreased"], tokens),
    ]
    return records, report


# ---------------------------------------------------------------- tables

ITEMS = {"LLaMA-13B": "Figure 2a", "LLaMA-65B": "Figure 6"}


def accuracy_table(lab: Lab, records: list[dict], method: str) -> str:
    """Figures 2a and 6 in numbers, the paper's in brackets."""
    curve = select(records, part="test", variant=None)
    curve = [each for each in curve if each["method"] in ("base", method)]
    shown = select(curve, metric="token_acc") + select(curve, metric="logit_acc", concept="mean")
    paper = PAPER_NAMES.get(lab.target)
    point = lab.points[method]
    text = (
        f"{METHODS[method]}: how often the target emotion is named on scenarios of the others, "
        f"in % [95 % interval]{f' ({paper} in the paper)' if paper else ''}; n = {shown[0]['n']} "
        f"each, block {point.source_block} -> {point.block}, protocol {lab.args.protocol}"
    )

    def row(each):
        return each["concept"] if each["metric"] == "token_acc" else "mean, Logit Acc"

    return text + "\n\n" + pivot(shown, row, strength)


def tested_means(lab: Lab, records: list[dict], metric: str) -> list[dict]:
    """The mean of all emotions of one target, but for the vectors of fewer pairs."""
    means = select(records, target=lab.target, concept="mean", metric=metric, part="test")
    return [each for each in means if each["item"] != "Figure 5"]


def control_table(lab: Lab, records: list[dict]) -> str:
    """The effect beside its controls, and its cost in perplexity, at the chosen strengths."""
    alphas = lab.alphas()
    shown = []
    for metric in ("token_acc", "logit_acc"):
        shown += beside_controls(tested_means(lab, records, metric), alphas)
    costs = select(records, metric="perplexity", part=PLAIN)
    costs = [each for each in costs if each["alpha"] == alphas.get(each["method"], 0)]
    for method, variant in product(("base", *lab.methods()), (None, "random")):
        same = select(costs, method=method)
        same = of_kind(same, variant) if variant else select(same, variant=None)
        if same:
            shown.append(spread(same, variant) | {"low": None})
    notes = effect_notes(tested_means(lab, records, "token_acc"), alphas)
    notes |= fluency_notes(shown, select(records, metric="perplexity"))
    for method, alpha in alphas.items():
        notes[METHODS[method]] += f", α = {alpha:g}"
    text = "Mean of all emotions at the α that validation chose; controls have v_hat's norm"
    return text + "\n\n" + pivot(shown, label, "metric", notes=notes)


# ---------------------------------------------------------------- figures


def draw_grids(lab: Lab, grid: list[dict]) -> list[tuple]:
    """(figure, name) of the validation grid of each method, if several blocks were tried."""
    figures = []
    for method in lab.methods() if len(lab.grid) > 1 else []:
        mine = select(grid, method=method, variant=None)
        names = f"{METHODS[method]}, {arrow(lab.args.src, lab.target)}"
        title = f"{names}: mean Token Acc [%] on validation (n = {mine[0]['n']})"
        figure = draw_grid(title, mine, [], lab.points[method])
        figures.append((figure, f"grid_{method}_{Path(lab.target).name}"))
    return figures


def values(records: list[dict], field: str = "value") -> np.ndarray:
    return np.array([each[field] for each in records])


def draw_accuracy(lab: Lab, records: list[dict]):
    """Figures 2a and 6: Token Acc bars with intervals, Logit Acc, the highest random direction."""
    figure, axis = new_figure(figsize=(PAGE, 3))
    strengths = [0, *lab.args.alpha]
    width = 0.8 / len(strengths)
    centres = np.arange(len(EMOTIONS))
    tested = [each for each in select(records, part="test") if each["concept"] != "mean"]
    shown = map_methods(lab.args)[-1]
    for s, (alpha, colour) in enumerate(zip(strengths, shades(len(strengths)))):
        method = shown if alpha else "base"
        mine = select(tested, variant=None, method=method, alpha=alpha)
        said, preferred = select(mine, metric="token_acc"), select(mine, metric="logit_acc")
        x = centres + (s - (len(strengths) - 1) / 2) * width
        height = values(said)
        error = [height - values(said, "low"), values(said, "high") - height]
        name = f"Token Acc, α = {alpha:g}" if alpha else "Token Acc, base"
        thin = {"lw": 0.6, "ecolor": "#777"}
        bars = {"color": colour, "yerr": np.clip(error, 0, 1), "error_kw": thin}
        axis.bar(x, height, width * 0.92, label=name, **bars)
        dots = {"color": "white", "mec": "black", "mew": 0.7, "ms": 3, "clip_on": False}
        axis.plot(x, values(preferred), "o", label=None if s else "Logit Acc", **dots)
    controls = select(tested, metric="token_acc", method=shown)
    controls = select(of_kind(controls, "random"), alpha=lab.points[shown].alpha)
    highest = [values(select(controls, concept=emotion)).max() for emotion in EMOTIONS]
    name = f"highest of {lab.args.random} random directions, α = {lab.points[shown].alpha:g}"
    dashes = {"color": "#b2182b", "lw": 1, "ls": "--"}
    axis.hlines(highest, centres - 0.42, centres + 0.42, label=name, **dashes)
    axis.set(xticks=centres, xticklabels=EMOTIONS, ylim=(0, 1.05))
    axis.set_ylabel("accuracy on negative scenarios")
    axis.set_title(f"{METHODS[shown]}, {arrow(lab.args.src, lab.target)} (95 % interval)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def draw_cost(lab: Lab, records: list[dict]):
    """Mean Token Acc against perplexity."""
    curve = tested_means(lab, records, "token_acc")
    costs = select(records, metric="perplexity")
    title = f"{arrow(lab.args.src, lab.target)}, mean of all emotions"
    return draw_fluency(curve, costs, ylabel="Token Acc", title=title)


def scatter(axis, points, labels: list[str], **style) -> dict:
    """Points in the colours of their emotions; returns the centre of each emotion."""
    points, labels = np.array(points), np.array(labels)
    centres = {}
    for emotion, colour in zip(EMOTIONS, shades(len(EMOTIONS))):
        mine = points[labels == emotion]
        axis.scatter(mine[:, 0], mine[:, 1], s=12, color=colour, lw=0, label=emotion, **style)
        centres[emotion] = mine.mean(0)
    return centres


def draw_pca(lab: Lab, pca: dict):
    """Figure 2b: states before (dots) and after (triangles) one vector; arrows join the centres."""
    figure, axis = new_figure(figsize=(COLUMN, 3.6))
    after = scatter(axis, pca["after"], pca["labels"], marker="^")
    figure.legend(loc="outside lower center", ncols=3)
    before = scatter(axis, pca["before"], pca["labels"], alpha=0.35)
    for emotion in EMOTIONS:
        arrow = {"arrowstyle": "->", "lw": 1}
        axis.annotate("", after[emotion], before[emotion], arrowprops=arrow)
    axis.set(xlabel="first principal component", ylabel="second principal component")
    alpha = lab.points[map_methods(lab.args)[-1]].alpha
    vector = f"{alpha:g} · v̂ of {pca['emotion']} from {Path(lab.args.src).name}"
    axis.set_title(f"{Path(lab.target).name} before (dots) and after (triangles)\n{vector}")
    return figure


def draw_pairs(args, records: list[dict]):
    """Figure 5: mean Token Acc against the number of example pairs."""
    lines = list(product(args.tgt, map_methods(args)))
    figure, axis = new_figure(figsize=(COLUMN, 2.4 + 0.15 * len(lines)))
    for (target, method), colour in zip(lines, shades(len(lines))):
        mine = select(records, target=target, item="Figure 5", concept="mean", method=method)
        mine = select(mine, metric="token_acc")
        counts = [int(each["variant"].split()[1]) for each in mine]
        name = f"{METHODS[method]}, {Path(target).name}, α = {mine[0]['alpha']:g}"
        draw_curve(axis, counts, mine, name, **LOOK[method] | {"color": colour})
    axis.set(xlabel="example pairs of one vector", ylabel="mean Token Acc", ylim=(0, 1.05))
    axis.set_title("Effect of the number of pairs (95 % interval)")
    figure.legend(loc="outside lower center")
    return figure


def draw_tsne(args, states: dict):
    """Figure 7: t-SNE of the source's states."""
    figure, axis = new_figure(figsize=(COLUMN, 3.2))
    scatter(axis, states["points"], states["labels"])
    axis.set(xticks=[], yticks=[], title=f"t-SNE of {Path(args.src).name}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# ---------------------------------------------------------------- main


def main(argv=None):
    args = options(argv)
    models = Models(**model_options(args))
    data = load_data(args)
    models.require_same_shape(args.src, args.src_base)
    for name in args.tgt:
        check_prompts(args, data, models, name)
    names = [args.src_base, *args.tgt]
    sentences = map_texts(args, models, names)
    vectors = make_vectors(args, data, sentences, models)
    labs = [Lab(args, data, models, vectors, target) for target in args.tgt]
    first_prompts = [texts[0] for texts in pairs(args, data, EMOTIONS[0])]
    models.require_fit(args.src, first_prompts)
    first_test = prompts(args, data, data.emotions[EMOTIONS[0]].test, shots=True)[:1]
    steps = len(labs) * (7 + len(EMOTIONS)) + 1
    run = Run(__file__, args, models, [data, sentences], first_prompts + first_test, steps=steps)

    records, figures, report, judged = [], [], [], {}
    for lab in labs:
        found, parts = one_target(args, run, lab)
        name = Path(lab.target).name
        records += found
        report += parts
        judged[name] = tested_means(lab, found, "token_acc"), lab.alphas()
        figures.append(run.figure(draw_accuracy(lab, found), f"accuracy_{name}"))
    states = run.step("t-SNE", labs[0].tsne)
    report.append(run.figure(draw_tsne(args, states), "tsne_source"))
    report.append(run.figure(draw_pairs(args, records), "pairs"))
    title = f"Token Acc in %, mean of all emotions, v of {Path(args.src).name}"
    headline = [verdict(judged), *figures, summary(title, judged), *map_warnings(records)]
    run.save(records, examples(data, records), headline, report)


def examples(data: Data, records: list[dict]) -> list[dict]:
    """Whether the emotion was named (Token Acc), for every test scenario and transplant."""
    rows = []
    for each in select(records, part="test", metric="token_acc"):
        if each["concept"] in EMOTIONS:
            names = ("target", "concept", "method", "variant", "alpha")
            about = {name: each[name] for name in names}
            for text, hit in zip(data.emotions[each["concept"]].test, each["hits"]):
                rows.append(about | {"scenario": text, "named": hit})
    return rows


if __name__ == "__main__":
    run_script(main)
