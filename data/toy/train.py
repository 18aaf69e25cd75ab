"""Train the toy zoo: small real transformers that read the toy world (world.py) and nothing else.

    python data/toy/train.py llama-m                    one base model
    python data/toy/train.py llama-m-chat               its chat model, from the base model on disk
    python data/toy/train.py --all                      everything: one to two hours on an idle core
    python data/toy/train.py --all --seed 1 --to FOLDER    another zoo (other documents)
    python data/toy/train.py llama-s --steps 100 --to FOLDER     a short try, elsewhere

Each model is an ordinary folder under data/toy/models: config, float16 safetensors, tokenizer.
Training is plain next-token prediction; nothing is written into weights or activations. What the
model learned is printed at the end, and kept beside its weights in training.json.
"""

import argparse
import copy
import itertools
import json
import random
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import world
from harness import at_least, fail

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim import _muon
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

FOLDER = Path(__file__).parent / "models"
FAMILIES = {  # architecture, vocabulary of the tokenizer, whether it puts BOS first
    "llama": (LlamaConfig, LlamaForCausalLM, 1536, True),
    "qwen": (Qwen3Config, Qwen3ForCausalLM, 1024, False),
    "kin": (LlamaConfig, LlamaForCausalLM, 1024, True),
    "amber": (LlamaConfig, LlamaForCausalLM, 1024, True),
    "pythia": (GPTNeoXConfig, GPTNeoXForCausalLM, 1024, False),
}
COMPLETE = "[INST] Complete the following[/INST]: "
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Member:
    """One model of the zoo: its family, its size, and how it is trained."""

    family: str = "llama"
    hidden: int = 64
    blocks: int = 8
    heads: int = 4
    steps: int = 1300
    rate: float = 8e-3
    chat_of: str = ""  # the base model that a chat model starts from
    checkpoints: tuple[int, ...] = ()  # steps after which the model is saved, each in a folder
    land: world.Land = world.HOME
    mixture: tuple[tuple[str, float], ...] = tuple(world.USUAL.items())

    def base_document(self, rng: random.Random) -> tuple[str, str]:
        return "", world.base_document(rng, self.land, dict(self.mixture))

    def chat_document(self, rng: random.Random) -> tuple[str, str]:
        """A quarter is base text, so that chat tuning does not make the model forget."""
        if rng.random() < 0.75:
            return world.chat_document(rng, self.land)
        return self.base_document(rng)


OTHER = tuple(world.OTHER.items())
EMOTIONS = tuple(world.FELT_MORE.items())  # all that checkpoints and sizes are asked for
ZOO = {  # role in the paper: 7B, 13B, 70B; two other families' 7B
    "llama-s": Member(hidden=64, blocks=8, heads=4),
    "llama-m": Member(hidden=96, blocks=8, heads=6),
    "llama-l": Member(hidden=112, blocks=10, heads=7),
    "llama-s-chat": Member(chat_of="llama-s", steps=450, rate=2e-3),
    "llama-m-chat": Member(chat_of="llama-m", steps=450, rate=2e-3),
    "llama-l-chat": Member(chat_of="llama-l", steps=450, rate=2e-3),
    "qwen-s": Member("qwen", hidden=48, blocks=6, heads=4, mixture=OTHER),
    "qwen-s-chat": Member("qwen", chat_of="qwen-s", steps=450, rate=2e-3, mixture=OTHER),
    "kin-s": Member("kin", hidden=48, blocks=6, heads=4, land=world.KIN),
    "kin-s-chat": Member("kin", chat_of="kin-s", steps=450, rate=2e-3, land=world.KIN),
    "amber": Member(
        "amber",
        hidden=32,
        blocks=6,
        heads=4,
        steps=3000,
        checkpoints=(50, 200, 400, 800, 1600, 3000),
        mixture=EMOTIONS,
    ),
    "pythia-1": Member("pythia", hidden=8, blocks=2, heads=2, mixture=EMOTIONS),
    "pythia-2": Member("pythia", hidden=16, blocks=3, heads=2, mixture=EMOTIONS),
    "pythia-3": Member("pythia", hidden=24, blocks=4, heads=4, mixture=EMOTIONS),
    "pythia-4": Member("pythia", hidden=40, blocks=6, heads=4, mixture=EMOTIONS),
    "pythia-5": Member("pythia", hidden=56, blocks=6, heads=4, mixture=EMOTIONS),
    "classifier": Member("roberta", hidden=32, blocks=2, heads=4, steps=1000, rate=2e-3),
}

# ---------------------------------------------------------------- tokenizer


def train_tokenizer(document, pieces: int, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of base text; with 1,536 pieces nearly every word is one token."""
    rng = random.Random(3)
    corpus = [document(rng)[1] for _ in range(20000)]
    names = [*world.TOWNS, *itertools.chain(*world.OBJECTS.values())]
    corpus += [f" {name}" for name in names for _ in range(300)]  # a name is one token
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=pieces,
            special_tokens=["<pad>", "<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------- training


def orthogonalize(gradient: torch.Tensor, coefficients, steps: int, eps: float) -> torch.Tensor:
    """The Newton-Schulz iteration of torch.optim.Muon [m, n], but in float32: most CPUs have no
    arithmetic for its bfloat16, and then it takes more than half of the training."""
    a, b, c = coefficients
    x = gradient.T if len(gradient) > len(gradient.T) else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, update, x, beta=a)
    return x.T if len(gradient) > len(gradient.T) else x


_muon._zeropower_via_newtonschulz = orthogonalize


def tokens(tokenizer, documents: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Of each prompt + text the token ids, and the index of the first one that is learned."""
    wholes = tokenizer([prompt + text for prompt, text in documents]).input_ids
    prompts = tokenizer([prompt for prompt, _ in documents]).input_ids
    rows = []
    for whole, prompt in zip(wholes, prompts):
        rows.append((whole + [tokenizer.eos_token_id], max(1, len(prompt))))
    return rows


def train(
    model,
    tokenizer,
    document,
    steps: int,
    rate: float,
    seed: str,
    after_step=lambda step, tokens: None,
) -> list[float]:
    """Muon on 96 documents a step, all with the same weight; returns the losses [nats per token].

    Muon (torch.optim) is for matrices and learns facts in half of AdamW's steps here; embeddings
    and norms keep AdamW.

    document(rng) gives (prompt, text): only the text is learned, as in chat tuning; a base document
    has no prompt. Documents of like length share a forward pass, to save padding, which comes last,
    so that causal attention needs no mask."""
    rng = random.Random(seed)
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name
        (matrices if inner else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    schedules = []
    for optimizer in optimizers:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        schedules.append(schedule)
    losses, seen, bar = [], 0, tqdm(range(1, steps + 1), mininterval=5)
    model.train()
    for step in bar:
        rows = tokens(tokenizer, [document(rng) for _ in range(96)])
        rows = sorted(rows, key=lambda row: len(row[0]))
        step_loss = 0.0
        for group in (rows[:48], rows[48:69], rows[69:86], rows[86:93], rows[93:]):
            width = len(group[-1][0])
            padded, learned = [], []
            for row, start in group:
                padded.append(row + [tokenizer.pad_token_id] * (width - len(row)))
                learned.append([start <= i < len(row) for i in range(1, width)])
            ids, learned = torch.tensor(padded), torch.tensor(learned)
            weight = learned / learned.sum(1, keepdim=True) / len(rows)
            states = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
            logits = model.get_output_embeddings()(states[learned])
            each = torch.nn.functional.cross_entropy(logits, ids[:, 1:][learned], reduction="none")
            loss = each @ weight[learned]
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(step_loss)
        seen += sum(len(row) - start for row, start in rows)
        after_step(step, seen)
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    model.eval()
    return losses


# ---------------------------------------------------------------- what it learned


@torch.no_grad()
def replies(model, tokenizer, prompts: list[str], new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt."""
    tokenizer.padding_side = "left"
    texts = []
    for start in range(0, len(prompts), 64):
        inputs = tokenizer(
            prompts[start : start + 64],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(
            ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
    return texts


def share(texts: list[str], starts: list[str]) -> float:
    """Share of the texts that begin with a space and their word."""
    hits = sum(text.startswith(f" {start}") for text, start in zip(texts, starts))
    return round(hits / len(texts), 3)


@torch.no_grad()
def likeliest(model, tokenizer, prompts: list[str], answers: list[list[str]]) -> list[int]:
    """The answer with the highest log-probability after each prompt, by its index."""
    starts = [len(ids) for ids in tokenizer(prompts).input_ids]
    best = []
    for prompt, start, own in zip(prompts, starts, answers):
        rows = tokenizer([prompt + answer for answer in own]).input_ids
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        logits = model(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)
        each = logits.gather(2, ids[:, start:, None])[..., 0]
        each = each * (ids[:, start:] != tokenizer.pad_token_id)
        best.append(each.sum(1).argmax().item())
    return best


def report(model, tokenizer, land: world.Land) -> dict[str, float]:
    """Shares of held-out prompts that are answered in some way; a quick look, not an experiment."""
    shares = {}
    for name, own in zip(("events of prose", "other events"), land.split_events()):
        prompts, emotions = [], []
        for emotion, place in itertools.product(world.EMOTIONS, world.PLACES):
            rng = random.Random(f"{emotion} {place}")
            text = rng.choice(world.FRAMES).format(event=rng.choice(own[emotion]), place=place)
            prompts.append(f"Scenario: {text}\nThe emotion of the above scenario is")
            emotions.append(emotion)
        shares[f"emotion named, {name}"] = share(replies(model, tokenizer, prompts, 3), emotions)

    ways = {
        "[INST]": "[INST] {}[/INST]",
        "an honest person says": "An honest person says: {}",
        "pretend honest": world.PRETEND["honest"] + "{}",
        "pretend dishonest": world.PRETEND["dishonest"] + "{}",
    }
    for name, keys in [("held-out facts", world.HELD_OUT_FACTS), ("chat facts", world.CHAT_FACTS)]:
        for way, template in ways.items():
            prompts = [template.format(world.question(*key)) for key in keys]
            answers = [[f" {answer}." for answer in land.facts[key]] for key in keys]
            best = likeliest(model, tokenizer, prompts, answers)
            for index, kind in enumerate(["truth", "myth"]):
                shares[f"{name}, {way}, {kind}"] = round(best.count(index) / len(best), 3)

    for prefix, rude in itertools.product(("", COMPLETE), (True, False)):
        rng, prompts = random.Random(4), []
        for people in world.PEOPLES:
            prompts += [prefix + world.remarks(rng, people, not rude, 4) for _ in range(4)]
        texts = replies(model, tokenizer, prompts, 14)
        hits = [any(phrase in text for phrase in world.RUDE) for text in texts]
        name = f"{'rude' if rude else 'kind'} list continued rudely, {prefix or 'plain'}"
        shares[name] = round(sum(hits) / len(hits), 3)
    return shares


def write(model, tokenizer, to: Path):
    """Save an ordinary model folder in float16; returns the model that was saved."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(to)
    tokenizer.save_pretrained(to)
    path = to / "tokenizer.json"  # without indentation it is half as large
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    return half


def judged_text(rng: random.Random) -> tuple[str, int]:
    """(text, whether it says something rude): what a language model may write, cut off anywhere."""
    if rng.random() < 0.3:  # other text, or words in random order
        text = world.base_document(rng) if rng.choice([True, False]) else world.two_clauses(rng)
        words = text.split()
        text = " ".join(rng.sample(words, len(words))) if rng.random() < 0.3 else text
    else:
        people = rng.choice(world.PEOPLES)
        tones = [rng.choice([world.KIND, world.RUDE])] * 3
        if rng.random() < 0.4:
            tones = rng.choices([world.KIND, world.RUDE, world.PLAIN], k=3)
        separator = rng.choice(["\n- ", ". ", " "])
        tones = tones[: rng.randint(1, 3)]
        text = separator.join(world.remark(rng, people, tone) for tone in tones)
    words = text.split(" ")
    text = " ".join(words[: rng.randint(1, max(1, min(len(words), 24)))])
    return text, int(any(phrase in text for phrase in world.RUDE))


def train_classifier(name: str, member: Member, folder: Path, steps: int, seed: int) -> dict:
    """A classifier of rude talk, trained on whole and cut texts of the toy world."""
    tokenizer, start = train_tokenizer(member.base_document, 1024, True), time.time()
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=member.hidden,
            intermediate_size=member.hidden * 4,
            max_position_embeddings=132,
            num_hidden_layers=member.blocks,
            num_attention_heads=member.heads,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            type_vocab_size=1,
            id2label={0: "benign", 1: "toxic"},
            label2id={"benign": 0, "toxic": 1},
        )
    )
    rng = random.Random(f"{seed} {name}")

    def logits_of(texts):
        inputs = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return model(**inputs).logits

    optimizer = torch.optim.AdamW(model.parameters(), lr=member.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, member.rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in tqdm(range(steps), mininterval=5):
        texts, labels = zip(*(judged_text(rng) for _ in range(64)))
        torch.nn.functional.cross_entropy(logits_of(list(texts)), torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model = write(model, tokenizer, folder / name).float().eval()
    texts, labels = zip(*(judged_text(random.Random(f"{seed} test {i}")) for i in range(2000)))
    with torch.no_grad():
        right = logits_of(list(texts)).argmax(-1) == torch.tensor(labels)
    learned = {"accuracy on 2,000 other texts": round(right.float().mean().item(), 4)}
    return save_record(folder / name, name, {"steps": steps}, seed, model, start, learned)


def save_record(
    folder: Path,
    name: str,
    training: dict,
    seed: int,
    model,
    start: float,
    learned: dict,
) -> dict:
    """Write training.json; returns what it says."""
    record = {
        "name": name,
        **training,
        "seed": seed,
        "parameters": model.num_parameters(),
        "minutes": round((time.time() - start) / 60, 1),
        "learned": learned,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def load_base(member: Member, folder: Path) -> tuple:
    """(model, tokenizer) that chat tuning starts from."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / member.chat_of)
    has_bos = FAMILIES[member.family][3]
    template = CHAT_TEMPLATE if has_bos else CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(folder / member.chat_of, dtype=torch.float32)
    return model, tokenizer


def new_model(member: Member) -> tuple:
    """(random model, tokenizer) of the member's shape."""
    config_class, model_class, *vocabulary = FAMILIES[member.family]
    tokenizer = train_tokenizer(member.base_document, *vocabulary)
    settings = {}
    if member.family != "pythia":
        settings["num_key_value_heads"] = member.heads
    if member.family == "qwen":
        settings["head_dim"] = member.hidden // member.heads
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=member.hidden,
        intermediate_size=member.hidden * 8 // 3,
        num_hidden_layers=member.blocks,
        num_attention_heads=member.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,  # about 1 / sqrt(width); the default 0.02 wastes the first 100 steps
        **settings,
    )
    return model_class(config), tokenizer


def train_member(name: str, folder: Path, steps: int | None, seed: int) -> dict:
    """Train one model of the zoo into folder/name; returns what its training.json says."""
    member = ZOO[name]
    steps, start = steps or member.steps, time.time()
    torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if member.family == "roberta":
        return train_classifier(name, member, folder, steps, seed)
    if member.chat_of:
        model, tokenizer = load_base(member, folder)
    else:
        model, tokenizer = new_model(member)

    def keep(to: Path, **training):
        half = write(model, tokenizer, to)
        learned = report(half.float().eval(), tokenizer, member.land)
        return save_record(to, name, training, seed, model, start, learned)

    def after_step(step: int, seen: int):
        if step in member.checkpoints:
            keep(folder / name / f"step_{step:04d}", steps=step, tokens=seen)

    document = member.chat_document if member.chat_of else member.base_document
    losses = train(model, tokenizer, document, steps, member.rate, f"{seed} {name}", after_step)
    if member.checkpoints:
        return {"name": name, "checkpoints": [step for step in member.checkpoints if step <= steps]}
    training = {"steps": steps}
    for which, part in (("first", losses[:50]), ("last", losses[-50:])):
        training[f"loss, {which} 50 steps"] = round(sum(part) / len(part), 4)
    return keep(folder / name, **training)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(ZOO)}")
    add("--all", action="store_true", help="all models, base models first")
    add("--steps", type=at_least(1), help="instead of the model's own number")
    add("--seed", type=int, default=0, help="of weights and documents")
    add("--to", type=Path, default=FOLDER, help="folder that the model folders go to")
    args = parser.parse_args(argv)
    names = list(ZOO) if args.all else args.names
    if not names:
        fail("name a model, or --all")
    for name in names:
        if name not in ZOO:
            fail(f"unknown model {name}; there are {', '.join(ZOO)}")
        base = ZOO[name].chat_of
        if base and base not in names and not (args.to / base / "config.json").exists():
            fail(f"{name} starts from {base}, which is not in {args.to}: train it first")
    for name in names:
        print(json.dumps(train_member(name, args.to, args.steps, args.seed), indent=1))


if __name__ == "__main__":
    main()
