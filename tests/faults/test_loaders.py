"""No loader that we call runs code of what it reads: the syntax trees say so, and a folder that tries."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from drank.workflow.params import read_params
from drank.workflow.sources import SourceError, fetch_model
from tests.conftest import REPOSITORY
from tests.tiny import PARAMS, llama, tokenizer

FOLDERS = ("src", "stages", "benchmarks", "docs", "tests")
FILES = sorted(file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*.py"))

# Ends of dotted names that unpickle, run text as code or give a command to a shell.
UNSAFE_CALLS = {
    "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load",
    "marshal.loads", "pandas.read_pickle", "pd.read_pickle", "np.load", "numpy.load", "hub.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all",
    "os.system", "os.popen", "eval", "exec", "__import__", "extractall", "unpack_archive", "tempfile.mktemp",
}  # fmt: skip
SAFE_LOADERS = {"LOADER", "_Loader"}  # of lock.py and params.py; that they are safe is tested below


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.Module) -> list[str]:
    """What of a module could run code that it reads, as ``line: name``."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        options = {option.arg: option.value for option in call.keywords}
        loader = call.args[1] if len(call.args) > 1 else options.get("Loader")
        bad = (
            any(name == unsafe or (name.endswith(f".{unsafe}") and "." in unsafe) for unsafe in UNSAFE_CALLS)
            or name.rpartition(".")[2] in ("extractall", "unpack_archive")
            or (name == "yaml.load" and (loader is None or dotted(loader) not in SAFE_LOADERS))
            or any(
                not is_false(options[key]) for key in ("shell", "trust_remote_code", "allow_pickle") if key in options
            )
            or ("weights_only" in options and is_false(options["weights_only"]))
        )
        if bad:
            found.append(f"{call.lineno}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            rows = zip(node.keys, node.values, strict=True)
            trusting = [v for k, v in rows if isinstance(k, ast.Constant) and k.value == "trust_remote_code"]
            found += [f"{node.lineno}: trust_remote_code" for value in trusting if not is_false(value)]
    return found


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


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
        "numpy.load(f, allow_pickle=True)", "pandas.read_pickle(f)", "shutil.unpack_archive(f)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(code):
    assert len(unsafe(ast.parse(code))) == 1


@pytest.mark.parametrize("code", ["re.compile(text)", "model.eval()", "yaml.load(text, LOADER)", "json.load(f)"])
def test_the_search_leaves_the_rest_alone(code):
    assert unsafe(ast.parse(code)) == []


def test_both_loaders_of_yaml_are_safe_ones():
    from drank.workflow.lock import LOADER
    from drank.workflow.params import _Loader

    safe = (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert issubclass(LOADER, safe)
    assert issubclass(_Loader, safe)


CODE = "import pathlib; pathlib.Path({path!r}).touch()\n"


def test_code_in_a_folder_of_a_model_does_not_run(tmp_path):
    """``auto_map`` names a Python file of the folder, which transformers would import if it were told to trust it."""
    folder, witness = tmp_path / "model", tmp_path / "ran"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name in ("configuration_evil.py", "modeling_evil.py"):
        (folder / name).write_text(CODE.format(path=str(witness)))
    config = json.loads((folder / "config.json").read_text())
    remote = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": remote}))
    with pytest.raises(SourceError, match="cannot be loaded"):
        fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)
    assert not witness.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
def test_tags_of_yaml_make_no_objects(tmp_path, tag):
    from drank.workflow.params import ParamsError

    witness = tmp_path / "ran"
    path = Path(tmp_path / "params.yaml")
    path.write_text(PARAMS + f"evil: !!python/{tag} [{witness}]\n")
    with pytest.raises(ParamsError, match="could not determine a constructor"):
        read_params(path)
    assert not witness.exists()
