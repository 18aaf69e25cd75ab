"""Every family of data/models.csv through every script, on stand-ins.

A stand-in is a tiny random model of the same architecture, under the id that the family has on the
hub, whose tokenizer has the habits of the real one: BOS or none, EOS after every text, a chat
template with a system message, a date, thinking. A hub on loopback serves them.
"""

import os
import subprocess
import sys

from harness import MODELS, TOY, read_families, read_json, read_table

import pytest
import transformers
from conftest import ROOT, same_records
from hub import Hub
from ndif_server import serve
from test_architectures import make_model
from test_ndif import HOST, KEY
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROWS = read_table(MODELS, "family", "base", "chat", "tokens")

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}<|im_start|>assistant\n"
SMOLLM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind<|im_end|>\n{% endif %}"
)
QWEN = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
GEMMA = """{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}<start_of_turn>model
"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '<|eot_id|>' }}
{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{{- m.content + '<|eot_id|>' }}{% endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"""
OLMO = """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}
{% endfor %}<|assistant|>
"""
# Of each family: architectures from small to large, BOS token, whether it is put first, template,
# and how a prompt begins and ends
FAMILIES = {
    "simplestories": (["llama"], None, False, None, "", ""),
    "smollm2": (
        ["llama"],
        "<|im_start|>",
        False,
        SMOLLM + LOOP,
        "<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "pythia-small": (["gpt_neox"], None, False, None, "", ""),
    "qwen3": (
        ["qwen3"],
        None,
        False,
        LOOP + QWEN,
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "gemma3": (
        ["gemma3_text", "gemma3", "gemma3", "gemma3"],
        "<bos>",
        True,
        GEMMA,
        "<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
    ),
    "llama3": (
        ["llama"],
        "<|begin_of_text|>",
        True,
        LLAMA,
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "olmo2": (
        ["olmo2"],
        "<|endoftext|>",
        False,
        OLMO,
        "<|endoftext|><|user|>\n",
        "\n<|assistant|>\n",
    ),
    "llama": (["llama"], "<s>", True, None, "USER: ", " ASSISTANT:"),
    "llama2": (["llama"], "<s>", True, None, "[INST] ", "[/INST]"),
    "codellama": (["llama"], "<s>", True, None, "[INST] ", "[/INST]"),
    "pythia": (["gpt_neox"], None, False, None, "", ""),
    "amber": (["llama"], "<s>", True, None, "", ""),
}


def make_tokenizer(family, template=None):
    """A tokenizer with the habits of a family's."""
    _, bos, puts_bos, *_ = FAMILIES[family]
    texts = (TOY / "wikisplit" / "validation.tsv").read_text().splitlines()[:300]
    for path in sorted(TOY.glob("emotions/*.json")):
        texts += read_json(path)[:40]
    special = ["<unk>", "</s>", "<pad>", *([bos] if bos else [])]
    if family == "simplestories":  # lower case, word pieces, EOS after every text
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        letters = [chr(code) for code in range(33, 127)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        ends = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        ends = processors.TemplateProcessing(f"{bos} $A", None, [(bos, 3)]) if puts_bos else None
    tokenizer.train_from_iterator(texts, trainer)
    if ends:
        tokenizer.post_processor = ends
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", "bos_token": bos}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """stand_ins(family) -> {repo: {revision: folder}}"""
    home = tmp_path_factory.mktemp("stand-ins")

    def get(family):
        types, _, _, template, *_ = FAMILIES[family]
        rows = [row for row in ROWS if row["family"] == family]
        repos: dict = {}
        for number, row in enumerate(rows):
            model_type = types[min(number, len(types) - 1)]
            for role in ("base", "chat"):
                repo, _, revision = row[role].partition("@")
                if not repo:
                    continue
                folder = home / row[role].replace("/", "_")
                tokenizer = make_tokenizer(family, template if role == "chat" else None)
                settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
                if not folder.exists():
                    seed = 2 * number + (role == "chat")
                    make_model(model_type, folder, tokenizer, seed, **settings)
                repos.setdefault(repo, {})[revision or "main"] = folder
        return repos

    return get


# Of fewer sentences a map between these models is nearly singular, and magnifies rounding.
SMALL = "--sentences 120 --alpha 2 --random 2 --permutations 5 --limit 3 --layer 0.5 --map paper"
EMOTIONS = f"{SMALL} --shots 0 --pairs 10"
SCRIPTS = {  # which models it takes, and the options of a small run
    "exp_emotion": ("base", f"{EMOTIONS} --maps 1"),
    "exp_truthfulqa": ("chat", f"{SMALL} --maps 1"),
    "exp_toxigen": (
        "chat",
        f"{SMALL} --maps 1 --pairs 5 --validation 1 --limit 1 --max-new-tokens 4"
        f" --classifier {(TOY / 'models' / 'classifier').resolve()}",
    ),
    "exp_pretraining": ("checkpoints", f"{EMOTIONS} --maps 1"),
    "exp_pythia": ("sizes", f"{EMOTIONS} --maps 1"),
    "exp_template": ("base", f"{SMALL} --maps 1 --sentences 30"),
}
RUN = """
import importlib, sys
for line in sys.stdin.read().splitlines():
    name, *argv = line.split()
    importlib.import_module(name).main(argv)
"""


def run_scripts(family, env, data, out, *more, scripts=()):
    """{script: its args.json} of every script that has the family (or of `scripts`), in one
    process.

    A script with a source takes the largest of the family's targets alone, to save time."""
    lines = []
    for name in scripts or SCRIPTS:
        kind, options = SCRIPTS[name]
        settings = read_families(kind, {}).get(family)
        if settings:
            words = [f"{name} --family {family} {options}", *more]
            words.append(f"--texts {data}/wikisplit/validation.tsv --data {data} --out {out}")
            if kind in ("base", "chat"):
                words.append(f"--tgt {settings['tgt'][-1]}")
            if kind == "chat":
                words.append(f"--tgt-chat {settings['tgt_chat'][-1]}")
            lines.append(" ".join(words))
    ran = subprocess.run(
        [sys.executable, "-c", RUN],
        input="\n".join(lines),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = {}
    for line in lines:
        name = line.split()[0]
        [path] = out.glob(f"{name}/*/args.json")
        assert (path.parent / "records.csv").exists()
        found[name] = read_json(path)
    return found


def check_prompts(family, script, about):
    """The first prompts of a run have the family's tags, one BOS or none, and no open thought."""
    _, bos, puts_bos, template, begins, ends = FAMILIES[family]
    tokenizer = make_tokenizer(family, template)
    prompts = about["inputs"]["first prompts"]
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        if puts_bos or (bos and prompt.startswith("<|endoftext|>")):
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert prompt.count("<think>") == prompt.count("</think>")
    if script in ("exp_truthfulqa", "exp_toxigen"):
        tagged = [prompt for prompt in prompts if prompt.startswith(begins)]
        assert len(tagged) >= 2
        assert all(ends.strip() in prompt for prompt in tagged)


def check_family(family, found, loaded, repos):
    """Every script of a family has run, on its models and no others."""
    bases = {row["base"].partition("@")[0] for row in ROWS if row["family"] == family}
    assert bases <= loaded <= set(repos)
    for script, about in found.items():
        check_prompts(family, script, about)
    scripts = {"pythia-small": 4, "olmo2": 6, "simplestories": 3}
    assert len(found) == scripts.get(family, 5)


ON_NDIF = {  # a model that is not up: the first job that asks for it deploys it; and scripts
    "llama3": ("meta-llama/Llama-3.1-405B-Instruct", ["exp_truthfulqa", "exp_toxigen"]),
    "pythia-small": ("EleutherAI/pythia-160m@step4000", ["exp_pretraining"]),
}  # tests/test_ndif.py has every script
# llama, codellama, pythia and amber differ from others in nothing but names: left out to save time.
# Those of ON_NDIF run here in the test below.
HERE = [family for family in [*list(FAMILIES)[:7], "llama2"] if family not in ON_NDIF]


@pytest.mark.slow
@pytest.mark.parametrize("family", HERE)
def test_every_script_runs_a_family(family, stand_ins, data, tmp_path):
    repos = stand_ins(family)
    with Hub(repos) as hub:
        env = hub.surroundings(tmp_path)
        found = run_scripts(family, env, data, tmp_path / "out")
        loaded = {repo for repo, *_ in hub.loaded}
    check_family(family, found, loaded, repos)


def test_every_family_has_stand_ins():
    families = {row["family"] for row in ROWS} - {"toy", "table 3"}
    assert families == set(FAMILIES)


# A real server has no model up, and another hub: see docs/ndif.md.
@pytest.mark.slow
@pytest.mark.parametrize("family", ON_NDIF)
def test_a_family_on_ndif_writes_the_records_of_a_local_run(family, stand_ins, data, tmp_path):
    late, scripts = ON_NDIF[family]
    repos = stand_ins(family)
    folders = {
        repo if revision == "main" else f"{repo}@{revision}": folder
        for repo, revisions in repos.items()
        for revision, folder in revisions.items()
    }
    here, there = tmp_path / "here", tmp_path / "there"
    with Hub(repos) as hub, serve({} if HOST else folders, needs_key=KEY) as server:
        server.set(running=sorted(set(folders) - {late}), deploys=[late])
        more = {"HF_ENDPOINT": os.environ["HF_ENDPOINT"]} if HOST else {"NDIF_API_KEY": KEY}
        found = run_scripts(family, hub.surroundings(here) | more, data, here)
        if not HOST:
            check_family(family, found, {repo for repo, *_ in hub.loaded}, repos)
        hub.loaded.clear()
        options = ("--remote", "both", "--ndif-host", HOST or server.url)
        env = hub.surroundings(there) | more
        found = run_scripts(family, env, data, there, *options, scripts=scripts)
        assert not hub.loaded  # no weights of the family came here
        failed = [job for job in server.log() if job["status"] != "COMPLETED"]
        assert not failed
    for script, about in found.items():
        check_prompts(family, script, about)
        paths = [next(folder.glob(f"{script}/*/records.csv")) for folder in (here, there)]
        same_records(*(read_table(path, "run") for path in paths))
