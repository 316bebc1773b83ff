"""No loader that we call runs code of what it reads: the syntax trees say so, and a folder that tries."""

import ast
import contextlib
import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from jinja2.exceptions import SecurityError, UndefinedError
from transformers import AutoTokenizer

from drank.project.dvc import LOADER, LockError, parse_lock
from drank.project.files import FileError, JsonLinesFolder, read_json, read_tensors
from drank.project.params import ParamsError, read_params
from drank.project.sources import SourceError
from drank.steps.evaluation import load_tasks, run_tasks
from tests.conftest import REPOSITORY
from tests.test_sources import fetch_model, fetch_text
from tests.tiny import PARAMS, llama, tokenizer

FOLDERS = ("src", "stages", "benchmarks", "docs", "tests")
FILES = sorted(file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*.py"))

# Calls that unpickle, run text as code or give a command to a shell.
UNSAFE = re.compile(
    r"(^|\.)(torch\.load|(pickle|dill|marshal|joblib)\.loads?|pickle\.Unpickler|(pandas|pd)\.read_pickle|(np|numpy|hub)\.load"
    r"|yaml\.(unsafe_load|full_load|load_all|unsafe_load_all)|(pyfunc|pytorch|transformers)\.load_model"
    r"|PeftModel\.from_pretrained|load_adapter|os\.(system|popen)|tempfile\.mktemp|extractall|unpack_archive)$"
    r"|^(eval|exec|__import__)$"
)
NEVER = ("shell", "trust_remote_code", "allow_pickle")  # options that are False wherever they are given


def unsafe(tree: ast.Module) -> list[str]:
    """Calls of a module that could run code that it reads, as ``line: name``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, more = ast.unparse(node.func), [ast.unparse(argument) for argument in node.args[1:]]
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            bad = (
                UNSAFE.search(name)
                or any(options.get(key, "False") != "False" for key in NEVER)
                or options.get("weights_only") == "False"
                or (name == "YAML" and options.get("typ") != "'safe'")
                or (name == "yaml.load" and more != ["LOADER"])  # of project/dvc.py; that it is safe is tested below
            )
            found += [f"{node.lineno}: {name}"] * bool(bad)
        elif isinstance(node, ast.Dict):
            rows = [(ast.unparse(k), ast.unparse(v)) for k, v in zip(node.keys, node.values, strict=True) if k]
            found += [f"{node.lineno}: {k}" for k, v in rows if k == "'trust_remote_code'" and v != "False"]
    return found


def test_no_module_unpickles_runs_text_or_calls_a_shell():
    shipped = [file for file in FILES if "tests" not in file.relative_to(REPOSITORY).parts]
    assert len(shipped) > 50
    assert {str(file): found for file in shipped if (found := unsafe(ast.parse(file.read_text())))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)", "import torch as t; x = torch.load(f, weights_only=True)", "yaml.load(text)",
        "yaml.load(text, yaml.Loader)", "yaml.load(text, Loader=yaml.UnsafeLoader)", "eval(text)", "exec(text)",
        "subprocess.run(line, shell=True)", "subprocess.run(line, shell=asked)", "archive.extractall(folder)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)", "options = {'trust_remote_code': asked}",
        "numpy.load(f, allow_pickle=True)", "pandas.read_pickle(f)", "YAML(typ='unsafe')", "YAML()",
        "shutil.unpack_archive(f)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for_and_leaves_the_rest_alone(code):
    assert len(unsafe(ast.parse(code))) == 1
    safe = "re.compile(text); model.eval(); yaml.load(text, LOADER); json.load(f)"
    assert unsafe(ast.parse(safe)) == []


def test_the_loader_of_locks_is_a_safe_one():
    assert issubclass(LOADER, (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


CODE = "import pathlib; pathlib.Path({path!r}).touch()\n"


@pytest.fixture
def witness(tmp_path):
    """A file that code of what is read would make."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(tmp_path):
    """A plain model, to which something is added."""
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fetch(folder):
    """The output of the stage raw."""
    root = folder.parent
    try:
        fetch_model("local:model", root / "out", root, root=root)
    except SourceError:
        assert not (root / "out").exists()
        raise
    return root / "out"


def declare(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def test_code_in_a_folder_of_a_model_does_not_run(folder, witness):
    """``auto_map`` names a Python file of the folder, which transformers would import if it were told to trust it."""
    for name in ("configuration_evil.py", "modeling_evil.py"):
        (folder / name).write_text(CODE.format(path=str(witness)))
    remote = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    declare(folder / "config.json", model_type="evil", auto_map=remote)
    with pytest.raises(SourceError, match="cannot be loaded"):
        fetch(folder)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
def test_tags_of_yaml_make_no_objects(tmp_path, witness, tag):
    evil = f"evil: !!python/{tag} [{witness}]\n"
    (tmp_path / "params.yaml").write_text(PARAMS + evil)
    with pytest.raises(ParamsError, match="could not determine a constructor"):
        read_params(tmp_path / "params.yaml")
    with pytest.raises(LockError, match="could not determine a constructor"):
        parse_lock(evil, "dvc.lock")


def payload(witness):
    """A pickle that leaves a file behind when it is loaded, as is seen here."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (witness,)

    pickle.loads(pickle.dumps(Evil()))
    witness.unlink()
    return pickle.dumps(Evil())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "model.ckpt"])
def test_pickled_weights_are_not_loaded_whatever_their_name(folder, witness, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(payload(witness))
    with pytest.raises(SourceError, match=r"has no \*\.safetensors; weights in pickles|cannot be loaded"):
        fetch(folder)


def test_a_pickle_beside_good_weights_is_neither_loaded_nor_copied(folder, witness):
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(payload(witness))
    assert not {".bin", ".pt"} & {file.suffix for file in fetch(folder).iterdir()}


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".gguf", ".parquet", ".jsonl", ".csv.gz", ".zip"])
def test_a_pickle_under_the_name_of_anything_else_is_refused(tmp_path, witness, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(payload(witness))
    model = partial(fetch_model, f"local:{file.name}", tmp_path / "out", tmp_path, root=tmp_path)
    text = partial(fetch_text, f"local:{file.name}", tmp_path / "out.jsonl", tmp_path, root=tmp_path)
    readers = {".safetensors": partial(read_tensors, file), ".json": partial(read_json, file), ".gguf": model}
    with pytest.raises((FileError, SourceError)):
        readers.get(suffix, text)()


@pytest.mark.parametrize("declared", [{"tokenizer_class": "Evil"}, {"tokenizer_class": "os.system"}, {}])
def test_code_of_a_tokenizer_does_not_run(folder, witness, declared):
    (folder / "evil.py").write_text(CODE.format(path=str(witness)))
    declare(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, **declared)
    with contextlib.suppress(SourceError):  # some versions of transformers take the tokenizer that they know
        fetch(folder)


def test_a_chat_template_reaches_nothing_of_python(folder, witness):
    """Transformers' sandbox of Jinja runs it, where a text asks for that."""
    evil, escape = tokenizer(), "''.__class__.__mro__[1].__subclasses__()"
    evil.chat_template = f"{{{{ cycler.__init__.__globals__.os.system('touch {witness}') }}}}{{{{ {escape} }}}}"
    evil.save_pretrained(folder)
    fetched = AutoTokenizer.from_pretrained(fetch(folder))
    with pytest.raises((SecurityError, UndefinedError)):
        fetched.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_script_in_a_dataset_is_refused(tmp_path, witness):
    from datasets import load_dataset_builder

    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.py").write_text(CODE.format(path=str(witness)))
    with pytest.raises(Exception, match="(?i)script|no .*data files"):
        load_dataset_builder(str(tmp_path / "data"))


def test_a_task_of_lm_eval_beside_ours_is_not_read(tmp_path, witness):
    """lm-eval's own YAML may name functions (``!function``); no folder of ours is among those that it searches."""
    (tmp_path / "evil.py").write_text(CODE.format(path=str(witness)))
    (tmp_path / "evil.yaml").write_text("task: evil\nprocess_docs: !function evil.run\n")
    (tmp_path / "last_word.jsonl").write_text('{"context": "a b", "target": "c"}\n' * 2)
    tasks = load_tasks(JsonLinesFolder(tmp_path), ["last_word"], tokenizer())
    figures = run_tasks(llama().bfloat16(), tokenizer(), tasks, 2)
    assert "acc/last_word" in figures
    assert not any("include_path" in file.read_text() for file in FILES if "tests" not in file.parts)
