"""Documents that nobody should write, and the readers that must refuse them in one message.

``python -m tests.faults.documents --n 1000`` tries so many of each kind and prints what came of them: ``read``,
``refused`` by an error class of drank, or ``traceback``, of which there should be none.
"""

import copy
import gzip
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import pandas
import yaml
from experiments.tools.published import read_published
from transformers import AutoModelForCausalLM

from drank.audit import audit
from drank.model.quantizer import DrankConfig, DrankQuantizer
from drank.project.damage import find_damage
from drank.project.files import file_sha256, read_json, read_rows, read_tensors
from drank.project.params import read_params
from drank.project.state import read_state
from drank.steps.release import CHECKSUMS, STATEMENT, checksums
from drank.views.compared import compare_targets
from tests import compressed
from tests.conftest import REPOSITORY
from tests.faults.campaign import campaign
from tests.faults.damage import MODEL, VARIANT
from tests.test_sources import fetch_model, fetch_text, tiny_llama, write_gguf
from tests.tiny import PARAMS, llama

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, -(10**40), 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), -float("inf"), "", " ", "..", "../../etc/passwd", "/etc/passwd", "a/b", "a\0b",
    "\u202e", "\U0001f600", "é" * 300, "x" * 5000, "yes", "010", "1e-4", "null", "~", "re:(", "re:.*",
    "re:" + "(a*)*" * 8 + "$",
    "local:", "local:..", "local:\0", "pypi:x==1; rm -rf /", "pypi:-r/etc/passwd==1", "hub:../..@main", "hub:a/b@../..",
    "{{7*7}}", "${HOME}", "!!python/object", [], {}, [[]], [None], {"a": None}, {"": ""}, ["Linear"] * 500,
]  # fmt: skip

FRAGMENTS = [
    "a: &a [*a]", "b: &b {c: *b}", "? [1, 2]\n: 3", "<<: *nothing", "2020-13-45: x", "2020-01-01: x", "x: 2020-13-45",
    "x: !!python/object/apply:os.system ['true']", "x: !!timestamp no", "x: !!bool maybe", "x: !!int abc",
    "x: !!float abc", "x: !!binary '='", "!!binary aGk=: x", "x: 0b_", "x: " + "9" * 5000, "x: 0x" + "f" * 5000,
    "x: " + "[" * 2000, "x: " + "{a: " * 200 + "1" + "}" * 200, "x: " + "[" * 2000 + "]" * 2000, "x: !!set {a, b}",
    "x: !!omap [a: 1, b: 2]", "model: {source: 'local:other'}", "---", "...", "%YAML 9.9", "\t- x", "x: 'open",
    "x: |\n  text", "\ufeff", "x: \x07", "x: 1:30", "no: 010", "@", "`", "- - - -", "&a", "*a", "!!merge x: y",
    "\n".join(
        ["z0: &z0 [x,x,x,x,x,x,x,x,x,x]"] + [f"z{i}: &z{i} [{','.join([f'*z{i - 1}'] * 10)}]" for i in range(1, 9)]
    ),
    "\n".join(["m0: &m0 {a: 1}"] + [f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 9)]),
]  # fmt: skip


# Every form, a shared basis of each kind among them.
BASIS = "model.layers.0.self_attn.o_proj"
FORMS = {
    **compressed.LLAMA,
    BASIS: compressed.spec("pivot", 32, 32, 9, basis=BASIS, first=0, kept=4),
    BASIS.replace("0", "1"): compressed.spec("pivot", 32, 32, 9, basis=BASIS, first=4, kept=5),
}


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a document."""
    inner: Any = (
        document.items() if isinstance(document, dict) else enumerate(document if isinstance(document, list) else ())
    )
    return [path] * bool(path) + [place for key, value in inner for place in places(value, (*path, key))]


def at(document: Any, path: Iterable[Any]) -> Any:
    """The thing at a path."""
    return reduce(lambda parent, step: parent[step], path, document)


def mutated(document: Any, draw: random.Random) -> Any:
    """A copy with one to three things replaced, removed, renamed or put where others were."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        all_places = places(document)
        if not all_places:
            break
        *path, key = draw.choice(all_places)
        parent = at(document, path)
        action = draw.choice(["replace", "replace", "replace", "remove", "rename", "swap"])
        if action == "replace":
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        elif action == "remove":
            del parent[key]
        elif action == "rename" and isinstance(parent, dict):
            parent[draw.choice([value for value in VALUES if isinstance(value, str)])] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(at(document, draw.choice(all_places)))
    return document


def garbled(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some changed, cut out, or repeated."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, n = draw.randrange(len(content) + 1), draw.randint(1, 8)
        action = draw.randrange(4)
        if action == 0:
            content[at : at + n] = draw.randbytes(n)
        elif action == 1:
            del content[at : at + draw.choice([1, n, 10 * n])]
        elif action == 2:
            content[at:at] = content[at : at + n] * draw.randint(1, 50)
        elif content:
            content[at % len(content)] ^= 1 << draw.randrange(8)
    return bytes(content)


def spoilt(content: bytes, draw: random.Random) -> bytes:
    """A YAML document with other bytes or other values."""
    if draw.random() < 0.5:
        return garbled(content, draw)
    return yaml.safe_dump(mutated(yaml.load(content, yaml.CSafeLoader), draw), allow_unicode=True).encode()


class Tries:
    """Kinds of documents: each writes one into the scratch folder and has the reader that users meet read it."""

    def __init__(self, scratch: Path, project: Path) -> None:
        self.scratch, self.project = scratch, project
        self.folder = scratch / "model"
        shutil.copytree(project / MODEL, self.folder)
        self.files = {file: file.read_bytes() for file in self.folder.iterdir()}
        self.documents = {file.name: read_json(file) for file in self.folder.glob("*.json")}
        self.forms = compressed.write(llama(), FORMS, scratch / "forms")
        self.written = read_json(self.forms / "config.json")
        self.model = b""
        self.copy = scratch / "copy"
        self.weights = (self.folder / "model.safetensors").read_bytes()

    def params(self, draw: random.Random) -> None:
        """params.yaml: a valid one with other values, with fragments of YAML in it, or with other bytes."""
        text = PARAMS
        action = draw.randrange(4)
        if action < 2:
            text = yaml.safe_dump(mutated(yaml.safe_load(PARAMS), draw), allow_unicode=True)
        elif action == 2:
            lines = PARAMS.splitlines()
            at = draw.randrange(len(lines) + 1)
            indent = " " * draw.choice([0, 0, 2, 4])
            lines[at:at] = [indent + line for line in draw.choice(FRAGMENTS).splitlines()]
            text = "\n".join(lines)
        path = self.scratch / "params.yaml"
        path.write_bytes(garbled(PARAMS.encode(), draw) if action == 3 else text.encode(errors="surrogatepass"))
        params = read_params(path)
        for name in params.variants:
            assert Path(name).name == name, name  # a plain name of a file
            params.parameters_of(name)

    def folder_documents(self, draw: random.Random) -> None:
        """allocation.json, config.json and provenance.json of a model folder, sealed again with right checksums: only
        an audit that reads them can tell."""
        name = draw.choice(["allocation.json", "config.json", STATEMENT])
        self._spoil(self.folder / name, json.dumps(mutated(self.documents[name], draw)).encode(), seal=True)

    def folder_bytes(self, draw: random.Random) -> None:
        """Any file of a model folder with other bytes."""
        file = draw.choice(sorted(self.files))
        self._spoil(file, garbled(self.files[file], draw), seal=False)

    def _spoil(self, file: Path, content: bytes, seal: bool) -> None:
        for path, whole in self.files.items():
            path.write_bytes(content if path == file else whole)
        if seal:
            reseal(self.folder)
        audit(self.folder, None)
        compare_targets(self.project, str(self.folder), VARIANT)

    def tensors(self, draw: random.Random) -> None:
        """A safetensors file of one tensor, whose header or length is another."""
        size = struct.unpack("<Q", self.weights[:8])[0]
        header = json.loads(self.weights[8 : 8 + size])
        name = draw.choice([name for name in header if name != "__metadata__"])
        begin, end = header[name]["data_offsets"]
        alone = {name: {**header[name], "data_offsets": [0, end - begin]}}
        changed = json.dumps(mutated(alone, draw) if draw.random() < 0.9 else alone).encode()
        if draw.random() < 0.3:
            changed = garbled(changed, draw)
        length = len(changed) if draw.random() < 0.8 else draw.choice([0, 1, 2**31, 2**62, 2**64 - 1])
        path = self.scratch / "x.safetensors"
        data = self.weights[8 + size :][begin : draw.choice([end, end, end, begin, begin + 64, None])]
        path.write_bytes(struct.pack("<Q", length) + changed + data)
        read_tensors(path)
        read_rows(path, 1)

    def config(self, draw: random.Random) -> None:
        """``quantization_config`` with every form, and its modules put into a model."""
        written = self.written["quantization_config"]
        DrankQuantizer(DrankConfig(**mutated(written, draw)))._process_model_before_weight_loading(llama())

    def config_file(self, draw: random.Random) -> None:
        """The section in config.json of a folder, which is then loaded."""
        section = mutated(self.written["quantization_config"], draw)
        (self.forms / "config.json").write_text(json.dumps(self.written | {"quantization_config": section}))
        AutoModelForCausalLM.from_pretrained(self.forms)

    def gguf(self, draw: random.Random) -> None:
        """A GGUF file with other bytes in its metadata."""
        file = self.scratch / "m.gguf"
        if not self.model:
            write_gguf(file, tiny_llama())
            self.model = file.read_bytes()
        size = 4096
        file.write_bytes(garbled(self.model[:size], draw) + self.model[size:])
        fetch_model("local:m.gguf", self.scratch / "out", self.scratch / "downloads", root=self.scratch)

    def texts(self, draw: random.Random) -> None:
        """A local text of any kind, packed or not."""
        name, content = draw.choice(text_files())
        (self.scratch / name).write_bytes(garbled(content, draw) if draw.random() < 0.9 else content)
        fetch_text(f"local:{name}", self.scratch / "out.jsonl", self.scratch / "downloads", root=self.scratch)

    def lock(self, draw: random.Random) -> None:
        """dvc.lock with other values or bytes, beside files that are as they were; `drank check` and `drank track`."""
        if not self.copy.exists():
            shutil.copytree(self.project, self.copy, symlinks=True)
        (self.copy / "dvc.lock").write_bytes(spoilt((self.project / "dvc.lock").read_bytes(), draw))
        for damage in find_damage(self.copy).damages:  # what --mend takes away
            assert damage.path.resolve().is_relative_to(self.copy.resolve()), damage
        read_state(self.copy)

    def published(self, draw: random.Random) -> None:
        """The figures of a paper, experiments/published/*.yaml."""
        path = self.scratch / "experiments/published/llama-7b.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "experiments/llama-7b.yaml", path.parent.parent)
        path.write_bytes(spoilt((REPOSITORY / "experiments/published/llama-7b.yaml").read_bytes(), draw))
        read_published(self.scratch, "llama-7b")

    def all(self) -> dict[str, Callable[[random.Random], None]]:
        kinds = (
            self.params, self.folder_documents, self.folder_bytes, self.tensors, self.texts, self.gguf, self.config,
            self.config_file, self.lock, self.published,
        )  # fmt: skip
        return {kind.__name__.replace("_", " "): kind for kind in kinds}


def reseal(folder: Path) -> None:
    """Checksums that fit the files as they are, in the statement and in the list, where those can be written."""
    statement = json.loads((folder / STATEMENT).read_text())
    subjects = statement.get("subject") if isinstance(statement, dict) else None
    for subject in subjects if isinstance(subjects, list) else ():
        name = subject.get("name") if isinstance(subject, dict) else None
        if name in [file.name for file in folder.iterdir()] and isinstance(subject.get("digest"), dict):
            subject["digest"]["sha256"] = file_sha256(folder / name)
    (folder / STATEMENT).write_text(json.dumps(statement))
    listed = {file.name: file_sha256(file) for file in folder.iterdir() if file.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(checksums(listed))


def text_files() -> list[tuple[str, bytes]]:
    """A small text in every format, of which archives are packed the same each time."""
    table = pandas.DataFrame({"text": ["one, two", 'with "quotes"', "line\nbreak", "é"], "n": [1, 2, 3, 4]})
    csv, packed, parquet = table.to_csv(index=False).encode(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("../../t.csv"), csv)
    table.to_parquet(parquet)
    return [
        ("t.csv", csv), ("t.jsonl", table.to_json(orient="records", lines=True).encode()),
        ("t.txt", b"one\n\ntwo\n"), ("t.parquet", parquet.getvalue()),
        ("t.zip", packed.getvalue()), ("t.csv.gz", gzip.compress(csv, mtime=0)),
    ]  # fmt: skip


def outcome(read: Callable[[random.Random], None], seed: int) -> tuple[str, Exception | None]:
    try:
        read(random.Random(seed))
    except Exception as error:
        told = isinstance(error, ValueError) and type(error).__module__.startswith("drank.")
        return ("refused" if told else "traceback"), error
    return "read", None


def main() -> None:
    kind = {"help": "one kind only"}
    with campaign(__doc__, 1000, ("read", "refused", "traceback"), kind=kind) as work:
        (work.scratch / "tries").mkdir()
        for name, read in Tries(work.scratch / "tries", work.project()).all().items():
            for seed in range(work.asked.n if work.asked.kind in (None, name) else 0):
                came, error = outcome(read, seed)
                work.counts.rows[name][came] += 1
                if came == "traceback":
                    work.counts.lost(f"{name}, {type(error).__name__}", f"seed {seed}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
