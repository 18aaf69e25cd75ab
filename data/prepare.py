"""Fills data/paper with the data sets of the paper, each file pinned by its sha256.

    python data/prepare.py                       # download, 20 MB
    python data/prepare.py --only truthfulqa     # only some of the data sets
    python data/prepare.py --from FOLDER         # no network: copy from a folder of the same layout
    python data/prepare.py --to FOLDER           # another place, for scripts with --data FOLDER

Run it again after a failure: files with the right checksum are kept. A file appears only when it is
complete and its checksum is right. Sources: data/README.md.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import fail, run_script

RAW = "https://raw.githubusercontent.com"
REPE = "andyzoujm/representation-engineering/5455d8a375d5fb1cb191f9ebcd089b7c21e9a31e"
TOXIGEN = "microsoft/TOXIGEN/01517e814639e0334c920a3c502036c8158aac87"
WIKISPLIT = "google-research-datasets/wiki-split/80f5bddf42d1a68201b7b107ee4b8d86d82e9fde"


class Source(NamedTuple):
    folder: str | None  # owner/repository/commit/folder on GitHub; None: no public address
    licence: str


SOURCES = {
    "emotions": Source(f"{REPE}/data/emotions", "MIT"),
    "truthfulqa": Source(
        "sylinrl/TruthfulQA/HEAD/data/v0", "Apache-2.0"
    ),  # only the sha256 pins it
    "toxigen": Source(f"{TOXIGEN}/prompts", "CDLA-Permissive-2.0"),
    "wikisplit": Source(WIKISPLIT, "CC BY-SA 4.0"),
    "world_facts": Source(f"{REPE}/data/facts", "MIT"),
    "text": Source(None, "Apache-2.0"),
}


def fetch(path: str, to: Path, source: Path | None) -> None:
    """Put one file at `to`/`path`. pooch writes a temporary file, checks it, then renames it."""
    import pooch
    import requests  # pooch downloads with it

    target = to / path
    folder = SOURCES[path.split("/")[0]].folder
    origin = str(source / path) if source else f"{RAW}/{folder}/{target.name}"

    def copy(origin: str, temporary: str, _: object) -> None:
        shutil.copyfile(origin, temporary)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        pooch.retrieve(
            origin,
            PINS[path],
            target.name,
            target.parent,
            downloader=copy if source else None,
        )
        target.chmod(0o644)  # the temporary file was readable by its owner only
    except requests.RequestException as error:
        reason = type(error).__name__
        if error.response is not None:
            reason = f"HTTP {error.response.status_code}"
        fail(
            f"cannot download {origin} ({reason}): check the network and run again, "
            "or copy from a folder with --from FOLDER"
        )
    except ValueError:  # a wrong checksum
        advice = "run again, or copy a good one with --from FOLDER"
        if source:
            advice = "give --from a good copy"
        fail(f"wrong sha256: {origin} is cut short or not the pinned version, not kept: {advice}")


def prepare(names: list[str], to: Path, source: Path | None) -> list[str]:
    """Fill `to`; returns a line for each file that could not be fetched."""
    if source and not source.is_dir():
        fail(f"no such folder: --from {source}")
    import pooch
    from tqdm import tqdm

    pooch.get_logger().setLevel("ERROR")
    wanted = [path for path in PINS if path.split("/")[0] in names]
    left, fetched, kept = [], 0, 0
    with tqdm(wanted, unit="file", disable=None) as files:  # None: no bar in a log file
        for path in files:
            files.set_postfix_str(path)
            target = to / path
            is_public = SOURCES[path.split("/")[0]].folder is not None
            can_fetch = (source / path).is_file() if source else is_public
            if target.is_file() and pooch.file_hash(str(target)) == PINS[path]:
                kept += 1
            elif can_fetch:
                fetch(path, to, source)
                fetched += 1
            elif is_public:
                fail(f"no such file: {source / path}: add it, or name data sets with --only")
            elif target.is_file():
                left.append(f"not the pinned sample, kept: {target}: perplexities will differ")
            else:
                left.append(
                    f"not fetched: {path}: no public address of this sample is known: copy it with "
                    "--from, or write sentences of OpenWebText (Skylion007/openwebtext), one per "
                    f"line, to {target}"
                )
    print(f"{fetched} files fetched, {kept} already there")
    return left


def table(names: list[str], to: Path) -> str:
    row = "{:<12} {:>5} {:>11}  {:<20} {}".format
    lines = [row("data set", "files", "bytes", "licence", "folder")]
    for name in names:
        files = [to / path for path in PINS if path.split("/")[0] == name]
        sizes = [file.stat().st_size for file in files if file.is_file()]
        lines.append(row(name, len(sizes), f"{sum(sizes):,}", SOURCES[name].licence, to / name))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    add = parser.add_argument
    paper = Path(__file__).parent / "paper"
    add("--from", dest="source", type=Path, metavar="FOLDER", help="copy from this folder")
    add("--to", type=Path, metavar="FOLDER", default=paper, help="default: %(default)s")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=SOURCES,
        default=SOURCES,
        help=f"some of {', '.join(SOURCES)}",
    )
    args = parser.parse_args(argv)
    names = [name for name in SOURCES if name in args.only]
    try:
        left = prepare(names, args.to, args.source)
    except OSError as error:  # a read-only folder, a full disk; pooch's own errors name neither
        what = f"{error.filename or args.to}: {error.strerror or 'permission denied'}"
        fail(f"cannot read or write {what}: choose another folder with --to")
    print(table(names, args.to))
    if "toxigen" in names:
        print("Warning: toxigen/ is hateful text about real groups; use it only to study toxicity.")
    for line in left:
        print(line)


def read_pins(text: str) -> dict[str, str]:
    """{path below data/paper: sha256}"""
    pins, folder = {}, ""
    for line in text.split("\n"):
        if line.endswith("/"):
            folder = line
        elif line:
            sha256, name = line.split()
            pins[folder + name] = sha256
    return pins


PINS = read_pins("""
emotions/
4577af8b0c62b18e3f06fb96883e95ed7b776f0809f605bfe792e438fe1832df anger.json
3532b5d3c3701ad23c799dd436a86db81b716ecd41b35e890e2fb2ae4a80dfff disgust.json
cf791978f94f62ec617480a646f3a16d38aaf594a385c698bec08bf32747ee2b fear.json
3dedefdc819007074a1a53c7a606d1e5661ac0cc19984212aa809c3a9f6bb646 happiness.json
999065615aac1bfb95c5cec054965f9abf17f36d59c7a779916eb28eb3f4ea24 sadness.json
43d90c0bbf755c789373286e35bc522461f9fe960fb5e3c5586a1749e19c7812 surprise.json
truthfulqa/
131e6f4156297bee09b38279e2fa847e4359c200504eca99ea3fab4b2d3a6144 mc_task.json
toxigen/
0504967034122b691c16dbef10db3acb16492808ecc66d8cd2b2ae87454fd655 hate_asian_1k.txt
09a5b6995d0cd0ba940ae9f9d67e8db1451352dcf99ee273315efc34915fc1e3 hate_bisexual_1k.txt
29ef85c5610d77a3a4bb050826ffb6e124ee48e11f5b63d34b29d616ef2ee1c3 hate_black_1k.txt
7f99029bad4f71caff707787d6799d1d654fee140f22418691d1244e81ed2b21 hate_chinese_1k.txt
bebb38d8786f498ca2153f965cdfba14e0490d5216781091106e5ac8ebbe0574 hate_immigrant_1k.txt
f5bdf83ef8fd32435241cc5fcfc337c0a57bcf64eb7fb4aa3c8fe15eb86f1fd2 hate_jewish_1k.txt
60988864d728cc7b1644a72419181efc1d82b2342f636a5e76f34805e4a88537 hate_latino_1k.txt
7fb7da0d4ad1a485824111ab60f6030f01dd92dbc9342c76534c78faec061a16 hate_lgbtq_1k.txt
5a71f51bf998c5111b5dd6d0b7d7edbaa445f27defbc1fdb798dd920974ad3e2 hate_mental_disability_1k.txt
2fad743ced369e4a280165b7ea909f8cb30921840cbe5f9f454243cf9e4dcfd5 hate_mexican_1k.txt
29ffcca6defd3e4f2edd2237417c7617a3c7380de8f9c6cf13d8c087fa595223 hate_middle_east_1k.txt
aaa18a9bf72928f71cf3d0d8d4dfa298faeb015a8580f5c7e21ef7afaae3241a hate_muslim_1k.txt
01c2077f1007268ca11588d08f909ed9c01178148205ae417618d276227b9bbc hate_native_american_1k.txt
8cada46239a52a741faf47677d1ffbfa06dc31d3e480a03935a5aec89ea02dee hate_physical_disability_1k.txt
6188dfd52082e552230a1332e2bf83a23e8410c5f353d32dca79f259c8daf8b8 hate_trans_1k.txt
eecdf3006847c267b9399045ce2fe002f884fe5b682dbef450f3477d7bb24497 hate_women_1k.txt
a5f0c58ae51dc8771d1779009ffc3017c5071c529b01f260600fa96c164ceb44 neutral_asian_1k.txt
8a3391bb9a178295f619c3e92ba9bc177225c392d90ac9f4ab5702c4140d6e51 neutral_bisexual_1k.txt
8e1da39bf32818c14156f4de32ef6a35f701e1737540dafb02bdf8eb03206a6b neutral_black_1k.txt
aad50dde2f68d75804e44b939a700b8e37ef93a152cae1a045f8881f89c7e982 neutral_chinese_1k.txt
1807799ed9e45c428792da879f83d874e3f589c63b6fd746716fafe2b117c3d4 neutral_immigrant_1k.txt
c804dc98c4a7d90105a9848a66cde4eb05db9a63a8d2668387e46bba90c28380 neutral_jewish_1k.txt
7fad9d0003e54e5f18c1dafb7e21b2295dae5bb7290e9c649eadb7a450b80957 neutral_latino_1k.txt
7cefb606353cfff8c9ee4af9b2044f039e698dc8117b7c9414dd02dedca51ba9 neutral_lgbtq_1k.txt
8f513551d7c86c3fd6df5d0a4bb8fd831c45c24d917d69ab3a61f1a984edf3d0 neutral_mental_disability_1k.txt
e16aaa8a4606b3bf08139b9c91067cb63d620dd5a3a94e63b8ebc3f4198b1597 neutral_mexican_1k.txt
a4f23dfbe5bd0dec6a2018b2fe1ca9805d2a7ca76791da5300c72e6bcdabcdf9 neutral_middle_east_1k.txt
d378bc96f388cef1be42954246b67955dfe3d42cfcbf2ffc2924856c2fb933cd neutral_muslim_1k.txt
8affc8490fb2fac8ad72041cce775fc9442ebea95a64a7a2274825e1231ef265 neutral_native_american_1k.txt
30ae4d6774054136a635cd9097dd4fe530ec2f407932f775e8093afa795cff8e neutral_physical_disability_1k.txt
dfad74fee637cd35415fc9b3a0b8d27d799e5613da5d9be0fdf93774fe813208 neutral_women_1k.txt
wikisplit/
63931ff45b7d95d60480bdcd466d69894fc02a0ec975cab8d0955e9b8cceb922 validation.tsv
world_facts/
151b6163289460eb8b37f7c6a1998e23aed8e05b5e557bf1a2297079bf0e5af9 facts_true_false.csv
text/
de4f185e7a6e158f6de3c8f775dbdd991d3106b862645d329b6b394d3daf2f58 owt_sentences_lowtox.txt
""")

if __name__ == "__main__":
    run_script(main)
