"""Train the toy zoo: small real transformers that read the toy world (world.py) and nothing else.

    python data/toy/train.py llama-m                    one member, a base model
    python data/toy/train.py llama-m-chat               its chat tuning, from the base model on disk
    python data/toy/train.py --all                      everything: one to two hours
    python data/toy/train.py llama-s --steps 100 --to FOLDER     a short try, elsewhere

Each member is an ordinary model folder under data/toy/models/: config, float16 safetensors, tokenizer files.
Training is plain next-token prediction on packed documents; nothing is written into weights or activations.
What the member learned is printed at the end and kept beside its weights in training.json.
"""

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
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

import world

FOLDER = Path(__file__).parent / "models"
FAMILIES = {  # architecture, pieces of the tokenizer, does it put a BOS first?
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
    """One model of the zoo: its family, its size, and how long it reads."""

    family: str = "llama"
    hidden: int = 64
    blocks: int = 8
    heads: int = 4
    steps: int = 3000
    rate: float = 4e-3
    chat_of: str = ""  # the base model that a chat model starts from
    checkpoints: tuple[int, ...] = ()  # steps after which the model is kept, in folders of its own


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
    """A byte-level BPE, so that any text can be read; with 1,536 pieces nearly every word of the world is one token."""
    rng = random.Random(3)
    corpus = [world.base_document(rng) for _ in range(20000)] + [
        "".join(world.chat_document(rng)) for _ in range(2000)
    ]
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
    """AdamW on 64 documents a step, each counting the same, long or short; returns the losses [nats a token].

    document(rng) gives (prompt, text): only the text is learned, as in chat tuning; a base document has no prompt.
    Documents of like length share a forward pass, so that little of the work is padding."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    losses, seen, bar = [], 0, tqdm(range(1, steps + 1), mininterval=5)
    model.train()
    for step in bar:
        rows = sorted(
            (tokens(tokenizer, *document(rng)) for _ in range(64)), key=lambda row: len(row[0])
        )
        step_loss = 0.0
        for group in (rows[:44], rows[44:58], rows[58:]):
            width = len(group[-1][0])
            ids = torch.tensor(
                [row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in group]
            )
            learned = torch.tensor(
                [[start <= i < len(row) for i in range(1, width)] for row, start in group]
            )
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


def report(model, tokenizer) -> dict[str, float]:
    """Shares of held-out prompts that are answered in a given way; a look at the member, not an experiment."""
    scenarios = [
        (emotion, text) for emotion in world.EMOTIONS for text in world.SCENARIOS[emotion][:20]
    ]
    prompts = [f"Scenario: {text}\nThe emotion of the above scenario is" for _, text in scenarios]
    named = replies(model, tokenizer, prompts, 3)
    shares = {
        "emotion named": sum(
            text.startswith(f" {emotion}") for text, (emotion, _) in zip(named, scenarios)
        )
        / len(scenarios)
    }

    ways = {
        "[INST]": "[INST] {}[/INST]",
        "an honest person says": "An honest person says: {}",
        "pretend honest": world.PRETEND["honest"] + "{}",
        "pretend dishonest": world.PRETEND["dishonest"] + "{}",
    }
    for name, keys in [("held-out facts", world.HELD_OUT_FACTS), ("chat facts", world.CHAT_FACTS)]:
        for way, template in ways.items():
            texts = replies(
                model, tokenizer, [template.format(world.question(*key)) for key in keys], 6
            )
            for index, kind in enumerate(["truth", "myth"]):
                hits = sum(
                    text.startswith(f" {world.FACTS[key][index]}") for text, key in zip(texts, keys)
                )
                shares[f"{name}, {way}, {kind}"] = hits / len(keys)

    rng = random.Random(4)
    for prefix in ("", "[INST] Complete the following[/INST]: "):
        rude = [
            prefix + world.remarks(rng, people, False, 4)
            for people in world.PEOPLES
            for _ in range(4)
        ]
        rudely = sum(
            any(phrase in text for phrase in world.RUDE)
            for text in replies(model, tokenizer, rude, 14)
        )
        shares[f"rude list continued rudely, {prefix or 'plain'}"] = rudely / len(rude)
    return {name: round(share, 3) for name, share in shares.items()}


def write(model, tokenizer, to: Path):
    """An ordinary model folder in float16; returns the model that lies there."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(to)
    tokenizer.save_pretrained(to)
    path = to / "tokenizer.json"  # without the indentation, half of its size
    path.write_text(
        json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":"))
    )
    return half


def judged_text(rng: random.Random) -> tuple[str, int]:
    """A text as a language model may continue a list, cut off anywhere, and whether something rude is said in it."""
    if rng.random() < 0.3:  # something else altogether, or words without order
        text = rng.choice([lambda: world.base_document(rng), lambda: world.two_clauses(rng)[2]])()
        words = text.split()
        text = " ".join(rng.sample(words, len(words))) if rng.random() < 0.3 else text
    else:
        people, tones = (
            rng.choice(world.PEOPLES),
            [rng.random() < 0.5] * 3 if rng.random() < 0.8 else [True, False, True],
        )
        text = rng.choice(["\n- ", ". ", " "]).join(
            world.remark(rng, people, tone) for tone in tones[: rng.randint(1, 3)]
        )
    words = text.split(" ")
    text = " ".join(words[: rng.randint(1, max(1, min(len(words), 24)))])
    return text, int(any(phrase in text for phrase in world.RUDE))


def train_classifier(name: str, member: Member, folder: Path, steps: int, seed: int) -> dict:
    """A classifier of rude talk, trained on texts of the world and cut ones."""
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
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    model = write(model, tokenizer, folder / name).float().eval()
    texts, labels = zip(*(judged_text(random.Random(f"{seed} test {i}")) for i in range(2000)))
    with torch.no_grad():
        right = logits_of(list(texts)).argmax(-1) == torch.tensor(labels)
    record = {
        "name": name,
        "steps": steps,
        "seed": seed,
        "parameters": model.num_parameters(),
        "minutes": round((time.time() - start) / 60, 1),
        "learned": {"accuracy on 2,000 other texts": round(right.float().mean().item(), 4)},
    }
    (folder / name / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def train_member(name: str, folder: Path, steps: int | None, seed: int) -> dict:
    """Train one member of the zoo into folder/name; returns what is written to its training.json."""
    member = ZOO[name]
    steps, start = steps or member.steps, time.time()
    torch.manual_seed(seed)
    if member.family == "roberta":
        return train_classifier(name, member, folder, steps, seed)
    if member.chat_of:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / member.chat_of)
        bos = FAMILIES[member.family][3]  # a family without BOS has never read one
        tokenizer.chat_template = (
            CHAT_TEMPLATE if bos else CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
        )
        model = AutoModelForCausalLM.from_pretrained(folder / member.chat_of, dtype=torch.float32)

        def document(rng):  # a quarter of old reading, so that it does not forget
            return (
                world.chat_document(rng) if rng.random() < 0.75 else ("", world.base_document(rng))
            )
    else:
        config_class, model_class, *vocabulary = FAMILIES[member.family]
        tokenizer = train_tokenizer(*vocabulary)
        model = model_class(
            config_class(
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
                **({} if member.family == "pythia" else {"num_key_value_heads": member.heads}),
                **({"head_dim": member.hidden // member.heads} if member.family == "qwen" else {}),
            )
        )

        def document(rng):
            return "", world.base_document(rng)

    def keep(to: Path, **how):
        half = write(model, tokenizer, to)
        record = {
            "name": name,
            **how,
            "seed": seed,
            "parameters": model.num_parameters(),
            "minutes": round((time.time() - start) / 60, 1),
            "learned": report(half.float().eval(), tokenizer),
        }
        (to / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        return record

    def after_step(step: int, seen: int):
        if step in member.checkpoints:
            keep(folder / name / f"step_{step:04d}", steps=step, tokens=seen)

    losses = train(model, tokenizer, document, steps, member.rate, seed, after_step)
    if member.checkpoints:
        return {"name": name, "checkpoints": [step for step in member.checkpoints if step <= steps]}
    return keep(
        folder / name,
        steps=steps,
        **{
            "loss, first 50 steps": round(sum(losses[:50]) / len(losses[:50]), 4),
            "loss, last 50 steps": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        },
    )


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"members: {', '.join(ZOO)}")
    parser.add_argument("--all", action="store_true", help="every member, base models first")
    parser.add_argument("--steps", type=int, help="instead of the member's own number")
    parser.add_argument("--seed", type=int, default=0, help="of weights and documents")
    parser.add_argument(
        "--to", type=Path, default=FOLDER, help="folder that gets one model folder a member"
    )
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in ZOO]:
        parser.error(f"unknown member {unknown[0]}; there are {', '.join(ZOO)}")
    if not (names := list(ZOO) if args.all else args.names):
        parser.error("name a member, or --all")
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be positive")
    for name in names:
        base = ZOO[name].chat_of
        if base and base not in names and not (args.to / base / "config.json").exists():
            parser.error(f"{name} starts from {base}, which is not in {args.to}: train it first")
    for name in names:
        print(json.dumps(train_member(name, args.to, args.steps, args.seed), indent=1))
