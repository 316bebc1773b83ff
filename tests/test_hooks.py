"""Canaries: each hook that drank has in the insides of another library, alone, without the rest of drank.

Where one fails, a new version of the library has moved something that it never promised: the message says what drank
needs of it and where. The other tests then say what this breaks.
"""

import functools
import inspect
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from dvc.repo import Repo
from mlflow.utils import mlflow_tags
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig, modeling_utils
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from drank.model.offload import disk_map
from drank.model.quantizer import DrankConfig, DrankQuantizer
from drank.project.dvc import dvc_md5, entry
from drank.tracking import projection, registry, view
from tests import compressed, versions
from tests.test_sources import tiny_llama, write_gguf
from tests.tiny import decoder, llama


def canary(library, used):
    """A test of one hook, whose docstring says "hook: what drank needs of it"; any error names both and the version."""

    def decorate(test):
        @functools.wraps(test)
        def told(*args, **kwargs):
            try:
                test(*args, **kwargs)
            except Exception as error:
                hook, _, need = " ".join(test.__doc__.split()).partition(": ")
                raise AssertionError(
                    f"{hook}, of {library} {version(library)} (allowed: {versions.ranges()[library]}): drank needs "
                    f"that {need} It is used in {used}. {type(error).__name__}: {error}"
                ) from error

        return told

    return decorate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compressed.write(llama(), compressed.LLAMA, tmp_path_factory.mktemp("hooks") / "model")


PLUGIN = "model/quantizer.py"


@canary("transformers", "drank/__init__.py")
def test_the_loader_comes_from_the_module_that_drank_waits_for():
    """the module transformers.quantizers.auto: the loader is imported from there, after which drank registers."""
    assert modeling_utils.get_hf_quantizer is auto.get_hf_quantizer
    assert auto.get_hf_quantizer.__module__ == "transformers.quantizers.auto"


@canary("transformers", PLUGIN)
def test_a_registered_method_is_dispatched_to_its_class_and_a_config_saved_as_its_attributes():
    """register_quantizer, QuantizationConfigMixin: a section with our quant_method becomes our quantizer, and what is
    saved is the instance's __dict__."""
    section = {"quant_method": "drank", "format_version": 2, "modules": {}, "note": 1}
    assert type(auto.AutoHfQuantizer.from_config(section, pre_quantized=True)) is DrankQuantizer
    config = DrankConfig(modules={}, provenance={"a": 1}, note=2)
    own = {"quant_method": "drank", "format_version": 2, "modules": {}, "provenance": {"a": 1}, "note": 2}
    assert config.to_dict() == dict(config) == own
    assert not hasattr(DrankConfig, "quant_method")


@canary("transformers", PLUGIN)
def test_the_quantizer_overrides_what_is_there():
    """HfQuantizer: it has the methods and properties that ours overrides, and says that no model is compileable."""
    own = {name for name in vars(DrankQuantizer) if not name.startswith("__")}
    assert own - {"_abc_impl"} <= set(dir(HfQuantizer))
    assert inspect.getattr_static(HfQuantizer, "is_compileable").fget(None) is False


@canary("peft", "model/adapters.py")
def test_peft_adapts_registered_classes():
    """LoraConfig._register_custom_module, LoraLayer._get_in_out_features and resolve_lora_variant: a class registered
    for a config adapts its modules and parameters, and asks these methods for sizes and variants."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    seen = []

    def adapt(target, adapter_name, **options):
        seen.append((type(target), adapter_name, options["parameter_name"]))
        return torch.nn.Identity()

    for asked in ({"target_modules": ["odd"]}, {"target_modules": [], "target_parameters": ["odd.weight"]}):
        config = LoraConfig(**asked)
        config._register_custom_module({Odd: adapt})
        inject_adapter_in_model(config, torch.nn.ModuleDict({"odd": Odd()}))
    assert seen == [(Odd, "default", None), (Odd, "default", "weight")]
    assert {"_get_in_out_features", "resolve_lora_variant", "update_layer"} <= vars(LoraLayer).keys()


@canary("transformers", f"{PLUGIN} (attach, _dequantize)")
def test_names_of_tensors_are_those_of_modules_where_there_are_no_conversions(folder, tmp_path):
    """model._weight_conversions: from_pretrained sets it from update_weight_conversions, and save_pretrained
    renames nothing where it is empty."""
    assert AutoModelForCausalLM.from_pretrained(folder)._weight_conversions == []
    mixtral = decoder("mixtral")  # transformers writes its experts under the names of older checkpoints
    names = set(mixtral.state_dict())
    mixtral.save_pretrained(tmp_path / "renamed")
    mixtral._weight_conversions = []
    mixtral.save_pretrained(tmp_path / "as it is")
    renamed, kept = (set(load_file(tmp_path / w / "model.safetensors")) for w in ("renamed", "as it is"))
    assert kept == names - mixtral.all_tied_weights_keys.keys()
    assert renamed != kept


@canary("transformers", f"{PLUGIN} (_share_bases)")
def test_a_shared_tensor_is_stored_once_and_tied_again(folder, tmp_path):
    """all_tied_weights_keys, _tied_weights_keys: from_pretrained ties what the first lists, and save_pretrained leaves
    out what matches the second."""
    q = "model.layers.{}.self_attn.q_proj.basis"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.all_tied_weights_keys[q.format(1)] == q.format(0)
    assert model.get_parameter(q.format(1)) is model.get_parameter(q.format(0))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {q.format(0), q.format(1)} & names == {q.format(0)}


@canary("transformers", "project/models.py")
def test_a_gguf_file_is_loaded_as_a_plain_model(tmp_path):
    """GgufConfig(dequantize=True): a GGUF file is loaded as a plain model with it."""
    stored = write_gguf(tmp_path / "m.gguf", tiny_llama())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), stored[name])


@canary("transformers", "model/offload.py, stages/covariance.py")
def test_blocks_on_disk_come_when_they_run(tmp_path):
    """device_map with 'disk': blocks stay in the offload folder as meta tensors, and their weights come by hooks
    of accelerate while they run."""
    llama().save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    places = disk_map(plain, "model.layers")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    )
    assert {parameter.device.type for parameter in model.model.layers.parameters()} == {"meta"}
    assert hasattr(model.model.layers[0].mlp.down_proj, "_hf_hook")
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


@canary("transformers", "benchmark.py (prefill)")
def test_a_model_says_whether_it_can_give_the_last_logits_alone():
    """model._supports_logits_to_keep: it says whether forward takes logits_to_keep."""
    model = llama()
    assert model._supports_logits_to_keep()
    assert model(torch.arange(8)[None], logits_to_keep=1).logits.shape[1] == 1


@canary("mlflow", "tracking/")
def test_tags_of_mlflow_have_their_names():
    """names of tags: a tag has the name that drank writes."""
    tags = {
        "MLFLOW_PARENT_RUN_ID": "mlflow.parentRunId", "MLFLOW_RUN_NOTE": "mlflow.note.content",
        "MLFLOW_SOURCE_NAME": "mlflow.source.name", "MLFLOW_GIT_COMMIT": "mlflow.source.git.commit",
    }  # fmt: skip
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (projection, registry, view)]
    for name, tag in tags.items():
        assert getattr(mlflow_tags, name) == tag
        assert any(f'"{tag}"' in source for source in sources), tag


@canary("mlflow", "tracking/view.py")
def test_the_pages_know_saved_views():
    """saved views: its pages read them from the tag mlflow.sharedViewState.<key>, by viewStateShareKey in the
    address."""
    pages = Path(mlflow.__file__).parent / "server/js/build/static/js"
    code = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in sorted(pages.glob("*.js")))
    for word in ("mlflow.sharedViewState", "viewStateShareKey", "compareRunCharts"):
        assert word in code, word


@pytest.fixture(scope="module")
def dvc(tmp_path_factory):
    """A repository of DVC with one stage, which has run, and writes a folder of two files."""
    root = tmp_path_factory.mktemp("dvc")
    (root / "params.yaml").write_text("a: {b: 1, c: 2}\n")
    (root / "write.py").write_text(
        "import os, pathlib\n"
        "folder = pathlib.Path('out/é')\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'one').write_text('1')\n"
        "(folder.parent / 'two').write_text(str(sorted(k for k in os.environ if k in ('DVC_ROOT', 'DVC_STAGE'))))\n"
    )
    stage = {"cmd": "python write.py", "deps": ["write.py"], "params": ["a.b"], "outs": ["out"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"write": stage}}))
    Repo.init(str(root), no_scm=True).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        repo = Repo(str(root))
        repo.reproduce()
        repo.close()
    return root


@canary("dvc", "project/state.py, project/dvc.py")
def test_the_lock_has_paths_and_hashes_of_every_stage(dvc):
    """the schema of dvc.lock: a stage has deps and outs with path and md5, that of a folder being the md5 of a sorted
    JSON list of md5 and relpath, and its params by file."""
    lock = yaml.safe_load((dvc / "dvc.lock").read_text())
    stage = lock["stages"]["write"]
    assert lock["schema"] == "2.0"
    assert stage["params"] == {"params.yaml": {"a.b": 1}}
    assert [(dep["path"], dep["md5"]) for dep in stage["deps"]] == [("write.py", dvc_md5(dvc / "write.py"))]
    assert [(out["path"], out["hash"], out["md5"]) for out in stage["outs"]] == [("out", "md5", dvc_md5(dvc / "out"))]


@canary("dvc", "project/dvc.py (cache_folder, entry, members)")
def test_the_cache_has_an_entry_for_every_hash(dvc):
    """the layout of the cache: an entry lies under files/md5, two letters of its hash and the rest; of a folder,
    its list."""
    cache = dvc / ".dvc/cache/files/md5"
    for path in ("out", "out/two", "out/é/one"):
        assert entry(cache, dvc_md5(dvc / path)).is_file(), path
    assert entry(cache, dvc_md5(dvc / "out/two")).read_bytes() == (dvc / "out/two").read_bytes()


@canary("dvc", "project/command.py, tracking/store.py")
def test_a_command_is_told_its_repository_and_stage(dvc):
    """DVC_ROOT and DVC_STAGE: DVC sets both for the commands that it runs."""
    assert (dvc / "out/two").read_text() == "['DVC_ROOT', 'DVC_STAGE']"


@pytest.fixture(scope="module")
def lm():
    from lm_eval.models.huggingface import HFLM

    from tests.tiny import tokenizer

    return HFLM(pretrained=llama(), tokenizer=tokenizer(), batch_size=1, max_length=64, logits_cache=False)


@canary("lm-eval", "evaluation.py (run_tasks)")
def test_a_loaded_model_is_taken_and_its_share_can_be_set(lm):
    """HFLM: it takes a model that is loaded, can do without its logits cache, and reads its share of the requests
    from _rank and _world_size, and gathers with its accelerator."""
    assert (lm.rank, lm.world_size) == (0, 1)
    assert lm.device.type == "cpu"
    lm._rank, lm._world_size = 1, 2
    assert (lm.rank, lm.world_size) == (1, 2)
    lm._rank, lm._world_size = 0, 1
    assert "logits_cache" in inspect.signature(type(lm)).parameters
    assert "self.accelerator" in inspect.getsource(type(lm))


@canary("lm-eval", "evaluation.py (_task, _flat)")
def test_a_task_in_memory_gives_figures_by_metric_and_filter(lm):
    """simple_evaluate: a task may be a dictionary whose items custom_dataset gives; results are 'metric,filter',
    counts in n-samples."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    from drank.steps.evaluation import LAST_WORD

    items = Dataset.from_list([{"context": "ka lo", "target": "mi"}] * 2)
    task = {"task": "in_memory", "test_split": "test", "custom_dataset": lambda **_: {"test": items}, **LAST_WORD}
    manager = TaskManager(include_defaults=False)
    assert not manager.all_tasks
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert {"acc,none", "perplexity,none"} <= results["results"]["in_memory"].keys()
    assert results["n-samples"]["in_memory"]["effective"] == 2
