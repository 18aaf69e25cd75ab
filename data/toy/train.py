"""Train the toy zoo: small real transformers that read the toy world (world.py) and nothing else.

    python data/toy/train.py llama-m                    one base model
    python data/toy/train.py llama-m-chat               its chat model, from the base model on disk
    python data/toy/train.py --all                      everything: one to two hours
    python data/toy/train.py llama-s --steps 100 --to FOLDER     a short try, elsewhere

Each model is an ordinary folder under data/toy/models: config, float16 safetensors, tokenizer.
Training is plain next-token prediction; nothing is written into weights or activations. What the
model learned is printed at the end, and kept beside its weights in training.json.
"""

import argparse
import copy
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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

from harness import at_least, fail

FOLDER = Path(__file__).parent / "models"
FAMILIES = {  # architecture, vocabulary of the tokenizer, whether it puts BOS first
    "llama": (LlamaConfig, LlamaForCausalLM, 1536, True),
    "qwen": (Qwen3Config, Qwen3ForCausalLM, 1024, False),
    "amber": (LlamaConfig, LlamaForCausalLM, 1024, True),
    "pythia": (GPTNeoXConfig, GPTNeoXForCausalLM, 1024, False),
}
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
    steps: int = 3000
    rate: float = 4e-3
    chat_of: str = ""  # the base model that a chat model starts from
    checkpoints: tuple[int, ...] = ()  # steps after which the model is saved, each in a folder


ZOO = {  # role in the paper: 7B, 13B, 70B; another family's 7B
    "llama-s": Member(hidden=64, blocks=8, heads=4),
    "llama-m": Member(hidden=96, blocks=8, heads=6),
    "llama-l": Member(hidden=112, blocks=10, heads=7, steps=2500),
    "llama-s-chat": Member(chat_of="llama-s", steps=700, rate=1e-3),
    "llama-m-chat": Member(chat_of="llama-m", steps=700, rate=1e-3),
    "llama-l-chat": Member(chat_of="llama-l", steps=700, rate=1e-3),
    "qwen-s": Member("qwen", hidden=48, blocks=6, heads=4),
    "qwen-s-chat": Member("qwen", chat_of="qwen-s", steps=700, rate=1e-3),
    "amber": Member(
        "amber", hidden=32, blocks=6, heads=4, checkpoints=(50, 200, 400, 800, 1200, 1600, 3000)
    ),
    "pythia-1": Member("pythia", hidden=8, blocks=2, heads=2),
    "pythia-2": Member("pythia", hidden=16, blocks=3, heads=2),
    "pythia-3": Member("pythia", hidden=24, blocks=4, heads=4),
    "pythia-4": Member("pythia", hidden=40, blocks=6, heads=4),
    "pythia-5": Member("pythia", hidden=56, blocks=6, heads=4),
    "classifier": Member("roberta", hidden=32, blocks=2, heads=4, steps=1500, rate=2e-3),
}

# ---------------------------------------------------------------- tokenizer


def train_tokenizer(pieces: int, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE; with 1,536 pieces nearly every word of the toy world is one token."""
    rng = random.Random(3)
    corpus = [world.base_document(rng) for _ in range(20000)]
    corpus += ["".join(world.chat_document(rng)) for _ in range(2000)]
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


def tokens(tokenizer, prompt: str, text: str) -> tuple[list[int], int]:
    """Token ids of prompt + text, and the index of the first one that is learned."""
    ids = tokenizer(prompt + text).input_ids + [tokenizer.eos_token_id]
    return ids, max(1, len(tokenizer(prompt).input_ids))


def train(
    model,
    tokenizer,
    document,
    steps: int,
    rate: float,
    seed: int,
    after_step=lambda step, tokens: None,
) -> list[float]:
    """AdamW on 64 documents a step, all with the same weight; returns the losses [nats per token].

    document(rng) gives (prompt, text): only the text is learned, as in chat tuning; a base document
    has no prompt. Documents of like length share a forward pass, to save padding."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    losses, seen, bar = [], 0, tqdm(range(1, steps + 1), mininterval=5)
    model.train()
    for step in bar:
        rows = [tokens(tokenizer, *document(rng)) for _ in range(64)]
        rows = sorted(rows, key=lambda row: len(row[0]))
        step_loss = 0.0
        for group in (rows[:44], rows[44:58], rows[58:]):
            width = len(group[-1][0])
            padded, learned = [], []
            for row, start in group:
                padded.append(row + [tokenizer.pad_token_id] * (width - len(row)))
                learned.append([start <= i < len(row) for i in range(1, width)])
            ids, learned = torch.tensor(padded), torch.tensor(learned)
            mask = ids != tokenizer.pad_token_id
            logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
            weight = learned / learned.sum(1, keepdim=True) / len(rows)
            each = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
            )
            loss = each @ weight.reshape(-1)
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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


def report(model, tokenizer) -> dict[str, float]:
    """Shares of held-out prompts that are answered in some way; a quick look, not an experiment."""
    prompts, emotions = [], []
    for emotion in world.EMOTIONS:
        for text in world.SCENARIOS[emotion][:20]:
            prompts.append(f"Scenario: {text}\nThe emotion of the above scenario is")
            emotions.append(emotion)
    shares = {"emotion named": share(replies(model, tokenizer, prompts, 3), emotions)}

    ways = {
        "[INST]": "[INST] {}[/INST]",
        "an honest person says": "An honest person says: {}",
        "pretend honest": world.PRETEND["honest"] + "{}",
        "pretend dishonest": world.PRETEND["dishonest"] + "{}",
    }
    for name, keys in [("held-out facts", world.HELD_OUT_FACTS), ("chat facts", world.CHAT_FACTS)]:
        for way, template in ways.items():
            prompts = [template.format(world.question(*key)) for key in keys]
            texts = replies(model, tokenizer, prompts, 6)
            for index, kind in enumerate(["truth", "myth"]):
                answers = [world.FACTS[key][index] for key in keys]
                shares[f"{name}, {way}, {kind}"] = share(texts, answers)

    rng = random.Random(4)
    for prefix in ("", "[INST] Complete the following[/INST]: "):
        prompts = []
        for people in world.PEOPLES:
            prompts += [prefix + world.remarks(rng, people, False, 4) for _ in range(4)]
        texts = replies(model, tokenizer, prompts, 14)
        rude = [any(phrase in text for phrase in world.RUDE) for text in texts]
        name = f"rude list continued rudely, {prefix or 'plain'}"
        shares[name] = round(sum(rude) / len(rude), 3)
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
        text = world.base_document(rng) if rng.choice([True, False]) else world.two_clauses(rng)[2]
        words = text.split()
        text = " ".join(rng.sample(words, len(words))) if rng.random() < 0.3 else text
    else:
        people = rng.choice(world.PEOPLES)
        tones = [rng.random() < 0.5] * 3 if rng.random() < 0.8 else [True, False, True]
        separator = rng.choice(["\n- ", ". ", " "])
        tones = tones[: rng.randint(1, 3)]
        text = separator.join(world.remark(rng, people, tone) for tone in tones)
    words = text.split(" ")
    text = " ".join(words[: rng.randint(1, max(1, min(len(words), 24)))])
    return text, int(any(phrase in text for phrase in world.RUDE))


def train_classifier(name: str, member: Member, folder: Path, steps: int, seed: int) -> dict:
    """A classifier of rude talk, trained on whole and cut texts of the toy world."""
    tokenizer, start = train_tokenizer(1024, True), time.time()
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
    rng = random.Random(seed)

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
    tokenizer = train_tokenizer(*vocabulary)
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
        **settings,
    )
    return model_class(config), tokenizer


def base_document(rng: random.Random) -> tuple[str, str]:
    return "", world.base_document(rng)


def chat_document(rng: random.Random) -> tuple[str, str]:
    """A quarter is base text, so that chat tuning does not make the model forget."""
    return world.chat_document(rng) if rng.random() < 0.75 else base_document(rng)


def train_member(name: str, folder: Path, steps: int | None, seed: int) -> dict:
    """Train one model of the zoo into folder/name; returns what its training.json says."""
    member = ZOO[name]
    steps, start = steps or member.steps, time.time()
    torch.manual_seed(seed)
    if member.family == "roberta":
        return train_classifier(name, member, folder, steps, seed)
    if member.chat_of:
        model, tokenizer = load_base(member, folder)
    else:
        model, tokenizer = new_model(member)

    def keep(to: Path, **training):
        half = write(model, tokenizer, to)
        learned = report(half.float().eval(), tokenizer)
        return save_record(to, name, training, seed, model, start, learned)

    def after_step(step: int, seen: int):
        if step in member.checkpoints:
            keep(folder / name / f"step_{step:04d}", steps=step, tokens=seen)

    document = chat_document if member.chat_of else base_document
    losses = train(model, tokenizer, document, steps, member.rate, seed, after_step)
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
