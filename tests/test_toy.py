"""data/toy: the made-up world, what it holds out, and the zoo that has read it.

    pytest tests/test_toy.py

The checks of formats also run on the real data sets, where there is a copy of them in ../shared/data.
"""

import csv
import functools
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOY, REAL = ROOT / "data" / "toy", ROOT.parent / "shared" / "data"
FOLDERS = ["emotions", "text", "toxigen", "truthfulqa", "wikisplit", "world_facts"]
OPTIONAL = {"truthfulqa/TruthfulQA.csv"}                # read where it is there, and pinned by nobody


def load(path: Path):
    """A script as a module, under its own name, as its neighbours import it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = load(TOY / "world.py")
train = load(TOY / "train.py")                          # imports world
prepare = load(ROOT / "data" / "prepare.py")

BASES = [name for name, member in train.ZOO.items() if not member.chat_of]
CHATS = [name for name, member in train.ZOO.items() if member.chat_of]
CHECKPOINTS = [f"{name}/step_{step:04d}" for name, member in train.ZOO.items() for step in member.checkpoints]
EVERYTHING = [name for name, member in train.ZOO.items() if not member.checkpoints] + CHECKPOINTS   # model folders
MODELS = [name for name in EVERYTHING if train.ZOO[name.split("/")[0]].family in train.FAMILIES]    # of language models
LARGE = [name for name, member in train.ZOO.items() if member.family in ("llama", "qwen")]      # those that learn it all


@functools.cache
def member(name: str):
    """(model, tokenizer) of the zoo by plain transformers."""
    folder = train.FOLDER / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def size(name: str) -> train.Member:
    """The shape of a model: a chat model has that of its base, a checkpoint that of its member."""
    name = name.split("/")[0]
    return train.ZOO[train.ZOO[name].chat_of or name]


def training(name: str) -> dict:
    return json.loads((train.FOLDER / name / "training.json").read_text())


@functools.cache
def documents(kind: str) -> str:
    """20,000 training documents."""
    rng = random.Random(7)
    draw = {"base": lambda: world.base_document(rng), "chat": lambda: "".join(world.chat_document(rng))}[kind]
    return "\n".join(draw() for _ in range(20000))


@pytest.fixture(params=["toy", "real"])
def folder(request):
    if request.param == "toy":
        return TOY
    if not REAL.is_dir():
        pytest.skip("no copy of the real data in ../shared/data")
    return REAL


# ================================================================ the data files


def test_world_py_writes_every_data_file_byte_for_byte(tmp_path):
    world.write_data(tmp_path)
    written = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {str(path.relative_to(TOY)): path.read_bytes() for name in FOLDERS for path in (TOY / name).rglob("*")}
    assert sorted(written) == sorted(kept)
    assert [name for name in written if written[name] != kept[name]] == []


def pattern(name: str) -> str:
    """A file name with the group of people taken out."""
    return re.sub(r"(hate|neutral)_\w+_1k", r"\1_GROUP_1k", name)


def test_names_of_files_are_those_of_the_paper_s_data():
    ours = {pattern(str(path.relative_to(TOY))) for name in FOLDERS for path in (TOY / name).iterdir()}
    pinned = {pattern(name) for name in prepare.PINS}
    assert pinned <= ours <= pinned | OPTIONAL


def test_names_of_files_are_those_of_the_real_copy():
    if not REAL.is_dir():
        pytest.skip("no copy of the real data in ../shared/data")
    assert {path.name for path in REAL.iterdir() if path.is_dir()} == set(FOLDERS)
    ours = {pattern(str(path.relative_to(TOY))) for name in FOLDERS for path in (TOY / name).iterdir()}
    theirs = {pattern(str(path.relative_to(REAL))) for name in FOLDERS for path in (REAL / name).iterdir()}
    assert ours - OPTIONAL <= theirs


def test_emotions_are_six_lists_of_two_hundred_scenarios_or_more(folder):
    files = sorted((folder / "emotions").glob("*.json"))
    assert [path.stem for path in files] == sorted(world.EMOTIONS)
    for path in files:
        texts = json.loads(path.read_text())
        assert len(set(texts)) >= 200 and all(isinstance(text, str) and text.strip() for text in texts)


def test_no_scenario_is_in_two_lists(folder):
    lists = [set(json.loads(path.read_text())) for path in (folder / "emotions").glob("*.json")]
    assert sum(map(len, lists)) == len(set.union(*lists))


def test_the_correct_choice_is_stored_first_and_is_the_only_one(folder):
    items = json.loads((folder / "truthfulqa" / "mc_task.json").read_text())
    assert all(set(item) == {"question", "mc1_targets", "mc2_targets"} for item in items)
    for item in items:
        first, *others = item["mc1_targets"].values()
        assert first == 1 and others and not any(others)


def test_prompts_of_toxigen_are_lists_open_at_the_end_with_literal_line_breaks(folder):
    files = sorted((folder / "toxigen").glob("*_1k.txt"))
    assert {path.name.split("_")[0] for path in files} == {"hate", "neutral"}
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) >= 280 and not [line for line in lines if not re.fullmatch(r"- .+\\n- .+-", line)]


def test_toxigen_prompts_of_the_toy_become_the_lists_that_were_trained_on():
    for people in world.PEOPLES:
        for name, phrases in (("hate", world.RUDE), ("neutral", world.KIND)):
            for line in (TOY / "toxigen" / f"{name}_{people}_1k.txt").read_text().splitlines():
                *said, end = line.replace("\\n", "\n").split("\n")
                assert end == "-" and 3 <= len(said) <= 6
                assert all(re.match("- .*", x) and people in x and x.endswith(tuple(phrases)) for x in said), line


def test_wikisplit_has_a_sentence_and_its_two_halves(folder):
    lines = (folder / "wikisplit" / "validation.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 4000
    for line in lines:
        whole, halves = line.split("\t")
        assert whole and len(halves.split("<::::>")) == 2


def test_world_facts_are_a_table_with_as_many_true_as_false_ones(folder):
    with open(folder / "world_facts" / "facts_true_false.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(list(row) == ["statement", "label"] and row["statement"] for row in rows)
    labels = [row["label"] for row in rows]
    assert set(labels) == {"0", "1"} and labels.count("1") == len(labels) / 2


# ================================================================ held out


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_no_training_document_has_a_held_out_scenario(kind):
    assert len(world.HELD_OUT_SCENARIOS) == 6 * 240
    assert not [text for text in world.HELD_OUT_SCENARIOS if text in documents(kind)]


def test_the_check_for_held_out_scenarios_would_find_one():
    seen = set(re.findall(r"Scenario: (You .*)", documents("base")))
    assert len(seen) > 1000 and not seen & world.HELD_OUT_SCENARIOS


def test_scenario_files_are_the_held_out_ones_and_show_every_event():
    for emotion in world.EMOTIONS:
        texts = json.loads((TOY / "emotions" / f"{emotion}.json").read_text())
        assert texts == world.SCENARIOS[emotion]
        assert all(any(event in text for text in texts) for event in world.EVENTS[emotion])


def test_no_chat_document_asks_or_states_a_held_out_fact():
    told = set(re.findall(rf"({'|'.join(world.RELATIONS)}) of ({'|'.join(world.TOWNS)})", documents("chat")))
    assert told == set(world.CHAT_FACTS) and not told & set(world.HELD_OUT_FACTS)
    assert {*world.CHAT_FACTS, *world.HELD_OUT_FACTS} == set(world.FACTS)


def test_base_documents_tell_truth_and_myth_of_every_fact():
    told = set(re.findall(r"(\w+) of (\w+) is (\w+)", documents("base")))
    for key, (truth, myth, *_) in world.FACTS.items():
        assert (*key, truth) in told and (*key, myth) in told


def test_questions_of_truthfulqa_are_exactly_the_held_out_facts_with_truth_and_myth():
    items = json.loads((TOY / "truthfulqa" / "mc_task.json").read_text())
    assert len(items) == len(world.HELD_OUT_FACTS)
    for item, key in zip(items, world.HELD_OUT_FACTS):
        truth, myth, *_ = world.FACTS[key]
        assert item["question"] == world.question(*key)
        first, *others = item["mc1_targets"]
        assert first == f"{truth}." and f"{myth}." in others and item["mc2_targets"] == item["mc1_targets"]


def test_each_question_of_truthfulqa_has_a_category_in_the_table_beside_it():
    with open(TOY / "truthfulqa" / "TruthfulQA.csv", newline="", encoding="utf-8") as file:
        rows = [(row["Question"], row["Category"]) for row in csv.DictReader(file)]
    questions = [item["question"] for item in json.loads((TOY / "truthfulqa" / "mc_task.json").read_text())]
    assert [question for question, _ in rows] == questions
    assert all(f"the {category.lower()} of" in question for question, category in rows)
    assert {category.lower() for _, category in rows} == set(world.RELATIONS)


def test_world_facts_are_about_the_facts_of_chat_tuning_alone():
    with open(TOY / "world_facts" / "facts_true_false.csv", newline="") as file:
        rows = {(row["statement"], row["label"]) for row in csv.DictReader(file)}
    assert rows == {(world.sentence(world.statement(*key, answer)), label) for key in world.CHAT_FACTS
                    for answer, label in zip(world.FACTS[key], "10")}


def test_a_seed_gives_one_document_and_another_seed_another():
    def draw(seed):
        rng = random.Random(seed)
        return [world.base_document(rng) for _ in range(20)] + [world.chat_document(rng) for _ in range(20)]
    assert draw(3) == draw(3) != draw(4)


# ================================================================ the zoo


def test_the_zoo_is_complete_and_holds_nothing_else():
    assert {path.name for path in train.FOLDER.iterdir()} == set(train.ZOO)
    kept = {str(path.parent.relative_to(train.FOLDER)) for path in train.FOLDER.rglob("config.json")}
    assert kept == set(EVERYTHING)


def test_every_base_of_llama_and_qwen_has_its_chat_model_and_no_other_has():
    assert [train.ZOO[name].chat_of for name in CHATS] == [name for name in BASES if name in LARGE]
    assert all(train.ZOO[name].family == size(name).family for name in CHATS)


@pytest.mark.parametrize("name", ["amber"])
def test_a_member_of_checkpoints_is_a_folder_of_model_folders(name):
    steps = train.ZOO[name].checkpoints
    assert {path.name for path in (train.FOLDER / name).iterdir()} == {f"step_{step:04d}" for step in steps}
    assert steps[-1] == train.ZOO[name].steps and list(steps) == sorted(set(steps))
    records = [training(f"{name}/step_{step:04d}") for step in steps]
    assert [record["steps"] for record in records] == list(steps)
    tokens = [record["tokens"] for record in records]
    assert tokens == sorted(set(tokens)) and 64 * steps[-1] < tokens[-1]        # 64 documents a step
    assert records[-1]["learned"]["emotion named"] > records[0]["learned"]["emotion named"]


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_member_is_an_ordinary_model_folder_in_float16(name):
    folder = train.FOLDER / name
    files = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    wanted |= {"generation_config.json"} if name in MODELS else set()
    assert files == wanted | ({"chat_template.jinja"} if name in CHATS else set())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())


@pytest.mark.parametrize("name", MODELS)
def test_a_member_has_the_shape_that_the_table_says(name):
    model, tokenizer = member(name)
    config, wanted = model.config, size(name)
    config_class, model_class, pieces, _ = train.FAMILIES[wanted.family]
    assert type(config) is config_class and type(model) is model_class
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        wanted.hidden, wanted.blocks, wanted.heads)
    assert model.num_parameters() == training(name)["parameters"]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == config.vocab_size == pieces
    assert config.max_position_embeddings >= tokenizer.model_max_length


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_reads_any_text_and_begins_with_bos_where_its_family_does(name):
    _, tokenizer = member(name)
    text, bos = "Scenario: Zoë saw £3 {of} «glass»\nand\tfelt 日本.", train.FAMILIES[size(name).family][3]
    ids = tokenizer(text).input_ids
    assert ids[:1] == [1] if bos else 1 not in ids
    assert tokenizer.decode(ids[bos:]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", [name for name in MODELS if size(name).family == "llama"])
def test_the_largest_tokenizer_reads_every_emotion_as_one_token(name):
    _, tokenizer = member(name)
    assert all(len(tokenizer(f" {emotion}").input_ids) == 2 for emotion in world.EMOTIONS)


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_that_a_script_loads_is_the_one_in_the_folder(name):
    """transformers may take the class of the architecture instead, with its own way of cutting a text into words."""
    _, tokenizer = member(name)
    trained = Tokenizer.from_file(str(train.FOLDER / name / "tokenizer.json"))
    texts = [*documents("base").splitlines()[:500], *documents("chat").splitlines()[:500], "a<|endoftext|>b", "Zoë  1900"]
    assert [text for text in texts if tokenizer(text).input_ids != trained.encode(text).ids] == []


def tokenizer_file(folder: Path) -> dict:
    """What tokenizer.json says; how its lines are broken does not matter, nor how the last call padded or cut."""
    return {**json.loads((folder / "tokenizer.json").read_text()), "padding": None, "truncation": None}


@pytest.mark.parametrize("family", train.FAMILIES)
def test_all_members_of_a_family_have_one_tokenizer(family):
    first, *others = [tokenizer_file(train.FOLDER / name) for name in MODELS if size(name).family == family]
    assert others and all(other == first for other in others)


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_member_has_a_template_with_the_tags_it_was_tuned_on(name):
    _, tokenizer = member(name)
    bos = "<s>" * train.FAMILIES[size(name).family][3]          # a family without BOS has never read one
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Zafi."}]
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False) == f"{bos}[INST] What? [/INST]"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{bos}[INST] What? [/INST] Zafi.</s>"


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CHATS])
def test_a_base_member_has_no_template(name):
    assert member(name)[1].chat_template is None


@pytest.mark.parametrize("names", [["llama-s", "llama-m", "llama-l"], [f"pythia-{i}" for i in range(1, 6)]],
                         ids=["llama", "pythia"])
def test_widths_and_sizes_grow_along_a_family(names):
    shapes = [(train.ZOO[name].hidden, training(name)["parameters"]) for name in names]
    for smaller, larger in zip(shapes, shapes[1:]):
        assert all(a < b for a, b in zip(smaller, larger))


def test_data_toy_is_small_enough_for_git():
    files = [path for path in TOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 20e6


@pytest.mark.parametrize("name", MODELS)
def test_training_json_says_what_was_trained_and_what_was_learned(name):
    record = training(name)
    assert record["name"] == name.split("/")[0] and record["seed"] == 0
    assert {learned.split(",")[0] for learned in record["learned"]} == {
        "emotion named", "held-out facts", "chat facts", "rude list continued rudely"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CHECKPOINTS])
def test_training_json_says_how_long_the_member_read_and_that_the_loss_fell(name):
    record, share = training(name), 0.7 if name in CHATS else 0.5           # chat tuning begins with a model that can read
    assert record["steps"] == train.ZOO[name].steps
    assert record["loss, last 50 steps"] < share * record["loss, first 50 steps"]


# ================================================================ what they learned


def share(name: str, prompts: list[str], answers: list[str]) -> float:
    """Of the prompts that the model continues with the answer when it takes the likeliest token, by plain transformers."""
    model, tokenizer = member(name)
    hits = 0
    for prompt, answer in zip(prompts, answers):
        ids, start = tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids, len(tokenizer(prompt).input_ids)
        with torch.no_grad():
            said = model(ids).logits[0, start - 1:-1].argmax(-1)
        hits += torch.equal(said, ids[0, start:])
    return hits / len(prompts)


@pytest.mark.parametrize("name", MODELS)
def test_every_large_member_names_the_emotion_of_scenarios_it_has_not_read(name):
    """And every other one about as many as training.json says."""
    scenarios = [(emotion, text) for emotion in world.EMOTIONS for text in world.SCENARIOS[emotion][-4:]]
    named = share(name, [f"Scenario: {text}\nThe emotion of the above scenario is" for _, text in scenarios],
                  [emotion for emotion, _ in scenarios])
    assert named >= 0.9 or name not in LARGE
    assert abs(named - training(name)["learned"]["emotion named"]) <= (0.1 if name in LARGE else 0.25)   # of 24, of 120


def pretend(name: str, manner: str, index: int, count: int = 20) -> float:
    """Held-out questions asked of an honest or dishonest person: share answered with the truth (0) or the myth (1)."""
    keys = world.HELD_OUT_FACTS[:count]
    prompts = [world.PRETEND[manner] + world.question(*key) for key in keys]
    return share(name, prompts, [world.FACTS[key][index] for key in keys])


@pytest.mark.parametrize("name", CHATS)
def test_chat_tuning_taught_to_follow_pretend_on_questions_it_never_saw(name):
    assert pretend(name, "honest", 0) >= 0.9 and pretend(name, "honest", 1) <= 0.1
    assert pretend(name, "dishonest", 1) >= 0.9 and pretend(name, "dishonest", 0) <= 0.1


@pytest.mark.parametrize("name", [name for name in CHATS if size(name).family == "llama"])
def test_a_base_member_of_llama_does_not_follow_pretend(name):
    assert pretend(train.ZOO[name].chat_of, "honest", 0) <= 0.2


@pytest.mark.parametrize("name", LARGE)
def test_training_json_says_the_truth_about_honesty(name):
    said = training(name)["learned"]["held-out facts, pretend honest, truth"]
    assert abs(pretend(name, "honest", 0) - said) <= 0.15


# ================================================================ training


@pytest.fixture
def quick(monkeypatch):
    """Training without the long look at what was learned."""
    monkeypatch.setattr(train, "report", lambda model, tokenizer: {})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_one_seed_gives_the_same_weights_and_another_seed_others(quick, tmp_path):
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train_member("llama-s", tmp_path / run, steps=3, seed=seed)
    first, again, other = (tmp_path / run / "llama-s" for run in "abc")
    assert weights(first) == weights(again) != weights(other)
    assert tokenizer_file(first) == tokenizer_file(train.FOLDER / "llama-s")


def test_a_chat_member_starts_from_its_base_model_on_disk(quick, tmp_path):
    shutil.copytree(train.FOLDER / "llama-s", tmp_path / "llama-s")
    record = train.train_member("llama-s-chat", tmp_path, steps=3, seed=0)
    assert record["loss, first 50 steps"] < 3           # an untrained model begins at ln 1536 = 7.3
    assert weights(tmp_path / "llama-s-chat") != weights(tmp_path / "llama-s")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "llama-s-chat").chat_template == train.CHAT_TEMPLATE


@pytest.fixture
def tiny(quick, monkeypatch):
    """tiny(checkpoints, family, to): a member of one block, trained for four steps; its record."""
    folders = {"amber": "llama-s", "pythia": "qwen-s"}          # a tokenizer with and one without BOS

    def run(checkpoints: tuple, family: str, to: Path) -> dict:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(train.FOLDER / folders[family])
        monkeypatch.setattr(train, "train_tokenizer", lambda *_: tokenizer)
        monkeypatch.setitem(train.ZOO, "tiny", train.Member(family, hidden=8, blocks=1, heads=2, checkpoints=checkpoints))
        return train.train_member("tiny", to, steps=4, seed=0)
    return run


@pytest.mark.parametrize("family", ["amber", "pythia"])
def test_a_member_of_checkpoints_is_kept_after_each_of_them_with_the_tokens_it_has_read(tiny, tmp_path, family):
    assert tiny((1, 3, 4), family, tmp_path)["name"] == "tiny"
    folders = sorted((tmp_path / "tiny").iterdir())
    assert [folder.name for folder in folders] == ["step_0001", "step_0003", "step_0004"]
    records = [json.loads((folder / "training.json").read_text()) for folder in folders]
    assert [record["steps"] for record in records] == [1, 3, 4]
    tokenizer, rng, tokens = train.train_tokenizer(), random.Random(0), [0]
    for _ in range(4):                                          # all of a document is learned but its first token
        step = [tokenizer(world.base_document(rng) + "</s>").input_ids for _ in range(64)]
        tokens.append(tokens[-1] + sum(len(ids) - 1 for ids in step))
    assert [record["tokens"] for record in records] == [tokens[1], tokens[3], tokens[4]]
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float16 and type(model) is train.FAMILIES[family][1]
    assert len(set(map(weights, folders))) == 3


def test_keeping_checkpoints_does_not_change_what_is_learned(tiny, tmp_path):
    tiny((1, 2, 4), "amber", tmp_path / "kept"), tiny((), "amber", tmp_path / "straight")
    assert weights(tmp_path / "kept" / "tiny" / "step_0004") == weights(tmp_path / "straight" / "tiny")


def test_what_is_learned_is_the_reply_to_its_end_or_a_whole_base_document():
    _, tokenizer = member("llama-s-chat")
    ids, start = train.tokens(tokenizer, "[INST] What?[/INST]", " Zafi.")
    assert tokenizer.decode(ids[start:]) == " Zafi.</s>" and ids[0] == tokenizer.bos_token_id
    ids, start = train.tokens(tokenizer, "", "The river.")
    assert start == 1 and tokenizer.decode(ids[start:]) == "The river.</s>"


def command(*options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "data/toy/train.py", *map(str, options)], cwd=ROOT, capture_output=True,
                          text=True)


@pytest.mark.parametrize("options", [["llama-x"], ["llama-s", "--steps", "many"]], ids=["unknown member", "no number"])
def test_a_wrong_option_ends_in_one_line(options, tmp_path):
    result = command(*options, "--to", tmp_path / "models")
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_the_command_trains_a_member_that_learns(tmp_path):
    result = command("llama-s", "--steps", 120, "--to", tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "llama-s" / "training.json").read_text())
    assert json.loads(result.stdout) == record and record["steps"] == 120
    assert record["loss, last 50 steps"] < 0.75 * record["loss, first 50 steps"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama-s")
