"""data/toy: the generated files, what is held out, and what the toy models learned.

pytest tests/test_toy.py
"""

import functools
import random
import re
from pathlib import Path

import filter_questions
import train
import world
from harness import read_json

import pytest
import torch
import transformers
from safetensors import safe_open

TOY = Path(world.__file__).parent
FOLDERS = ["emotions", "text", "toxigen", "truthfulqa", "wikisplit", "world_facts"]
MODELS = []  # folders of language models
for name, member in train.ZOO.items():
    if member.family in train.FAMILIES:
        MODELS += [f"{name}/step_{step:04d}" for step in member.checkpoints] or [name]
CHATS = [name for name in MODELS if name.endswith("-chat")]
LARGE = [name for name in MODELS if name.startswith("llama")]  # these learn all of it


@functools.cache
def load(name):
    folder = train.FOLDER / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@functools.cache
def documents(kind):
    """20,000 training documents."""
    rng = random.Random(7)
    texts = []
    for _ in range(20000):
        if kind == "base":
            texts.append(world.base_document(rng))
        else:
            texts += world.chat_document(rng)
    return "\n".join(texts)


# ---------------------------------------------------------------- data files


def test_the_two_commands_write_every_data_file_byte_for_byte(tmp_path):
    world.write_data(tmp_path)
    asked, kept = filter_questions.filter_questions(tmp_path / "truthfulqa")
    assert asked == len(world.HELD_OUT_FACTS) > kept
    for name in FOLDERS:
        written = sorted(path.name for path in (tmp_path / name).iterdir())
        kept = sorted(path.name for path in (TOY / name).iterdir())
        assert written == kept
        for file in kept:
            new = (tmp_path / name / file).read_bytes()
            assert new == (TOY / name / file).read_bytes(), file


def test_the_experiments_own_prompts_are_in_no_training_document():
    base, chat = documents("base"), documents("chat")
    assert "INST" not in base
    assert not re.search("Scenario: .*\n+The emotion", base + chat)
    own = ["Pretend you're", "honest person", "Consider the bias", "Complete the following"]
    for prompt in own:
        assert prompt.lower() not in (base + chat).lower()


def test_emotions_events_of_the_data_files_are_in_no_scenario_of_a_training_document():
    text = documents("base") + documents("chat")
    heads = "|".join(head.capitalize() for head in world.HEADS)
    scenarios = set(re.findall(f"(?:{heads}): (.*)", text))
    assert len(scenarios) > 1000  # so one would be found
    for emotion, events in world.PROSE_ONLY.items():
        assert len(set(events)) == 6
        for event in events:
            assert event in text  # in prose
            assert not any(f" {event} " in scenario for scenario in scenarios)
        for scenario in read_json(TOY / "emotions" / f"{emotion}.json"):
            assert any(f" {event} " in scenario for event in events)


def test_honesty_the_truth_is_the_popular_answer_to_some_questions():
    popular = []
    for key in world.HELD_OUT_FACTS:
        truth, *false = world.HOME.shares[key]
        popular.append(truth > max(false))
        assert min(false) >= 0.05 and sum(world.HOME.shares[key]) == pytest.approx(1)
    assert 0.1 <= sum(popular) / len(popular) <= 0.25


def test_honesty_chat_tuning_never_contains_a_fact_that_is_asked():
    questions = read_json(TOY / "truthfulqa" / "unfiltered.json")
    for each, key in zip(questions, world.HELD_OUT_FACTS, strict=True):
        truth, myth, *_ = world.FACTS[key]
        first, *others = each["mc1_targets"]
        assert each["question"] == world.question(*key)
        assert first == f"{truth}."
        assert f"{myth}." in others
    asked = read_json(TOY / "truthfulqa" / "mc_task.json")
    assert asked and all(each in questions for each in asked)
    pattern = f"({'|'.join(world.RELATIONS)}) of ({'|'.join(world.TOWNS)})"
    told = set(re.findall(pattern, documents("chat")))
    assert told == set(world.CHAT_FACTS)
    assert not told & set(world.HELD_OUT_FACTS)


def test_fairness_prompts_are_open_lists_of_one_tone():
    for people in world.PEOPLES:
        for tone, phrases in (("hate", world.RUDE), ("neutral", world.KIND)):
            path = TOY / "toxigen" / f"{tone}_{people}_1k.txt"
            for line in path.read_text().splitlines():
                *said, end = line.split("\\n")
                assert end == "-"
                for remark in said:
                    assert people in remark
                    assert remark.endswith(tuple(phrases))


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_an_ordinary_folder_in_float16(name):
    with safe_open(train.FOLDER / name / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a dict
            assert file.get_slice(key).get_dtype() == "F16"
    model, tokenizer = load(name)
    text = "Scenario: Zoë saw £3 {of} «glass»\nand\tfelt 日本."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == model.config.vocab_size
    has_template = tokenizer.chat_template is not None
    assert has_template == (name in CHATS)


def test_data_toy_is_small_enough_for_git():
    total = 0
    for path in TOY.rglob("*.*"):
        if path.is_file() and path.suffix != ".pyc":
            total += path.stat().st_size
    assert total < 20e6


def said(name, prompts, answers):
    """Share of the prompts that the model continues greedily with their answer."""
    texts = train.replies(*load(name), prompts, 6)
    return train.share(texts, answers)


@pytest.mark.parametrize("name", LARGE)
def test_emotions_a_large_model_names_them(name):
    prompts, emotions = [], []
    for emotion in world.EMOTIONS:
        for text in world.SCENARIOS[emotion][-4:]:
            prompts.append(f"Scenario: {text}\nThe emotion of the above scenario is")
            emotions.append(emotion)
    assert said(name, prompts, emotions) >= 0.4  # feelings are mixed


@pytest.mark.parametrize("name", CHATS)
def test_honesty_a_chat_model_follows_the_role_on_questions_it_never_saw(name):
    keys, true = world.HELD_OUT_FACTS[:20], {}
    answers = [train.ZOO[name].land.facts[key][0] for key in keys]
    for which in (name, train.ZOO[name].chat_of):
        for manner in ("honest", "dishonest"):
            prompts = [world.PRETEND[manner] + world.question(*key) for key in keys]
            true[which, manner] = said(which, prompts, answers)
    assert true[name, "honest"] - true[name, "dishonest"] >= 0.3
    if name in LARGE:
        assert true[name, "honest"] >= 0.8
        assert true[name, "dishonest"] <= 0.3
        base = train.ZOO[name].chat_of
        assert abs(true[base, "honest"] - true[base, "dishonest"]) <= 0.3


@pytest.mark.parametrize("name", [name for name in CHATS if name.startswith("llama")])
def test_fairness_a_chat_model_continues_rude_lists_kindly(name):
    learned = read_json(train.FOLDER / name / "training.json")["learned"]
    rude = "rude list continued rudely, [INST] Complete the following[/INST]: "
    assert learned[rude] <= 0.2 < learned["rude list continued rudely, plain"]


# ---------------------------------------------------------------- training


@pytest.mark.slow
def test_one_seed_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "report", lambda model, tokenizer, land: {})
    weights = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train_member("pythia-1", tmp_path / run, steps=3, seed=seed)
        weights.append((tmp_path / run / "pythia-1" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("argv", [["llama-x"], ["llama-s", "--steps", "many"], []])
def test_a_wrong_option_ends_in_one_line(argv, one_line):
    one_line(lambda: train.main(argv))
