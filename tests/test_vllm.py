"""vLLM itself serves compressed folders: every form gives the tokens that transformers gives, or is refused by name.
In an environment of its own: `make test-vllm`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import drank  # noqa: F401  registers the format
from tests import tiny
from tests.compressed import GPT2, spec, write

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")
pytestmark = pytest.mark.timeout(1200)

CHAMPION = Path(__file__).parents[1] / "data/models/kfac-80"
PROMPTS, NEW = [[5, 17, 101, 42, 7, 9], [201, 3, 3, 60], [250]], 10
# vLLM's attention on a CPU wants heads of 32 numbers at least.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 256}
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
         "HF_HUB_OFFLINE": "1"}  # fmt: skip


def layer(i, name):
    return f"model.layers.{i}.{name}"


def shared(name, form, sizes, *own, **more):
    """Specs of two layers' matrices that have one basis; `own` has the keys of each alone."""
    return {layer(i, name): spec(form, *sizes, basis=layer(0, name), **keys, **more) for i, keys in enumerate(own)}


ROWS = {"first": 0, "kept": 12}, {"first": 12, "kept": 8}
# Every form, MLPs of unequal widths, parts of one fused layer in different forms, and a part that stayed as it was.
FORMS = {
    **shared("self_attn.q_proj", "factors", (128, 128, 30), {}, {}),
    **shared("self_attn.k_proj", "pivot", (64, 128, 20), *ROWS),
    layer(0, "self_attn.o_proj"): spec("pivot", 128, 128, 40),
    layer(0, "mlp.gate_proj"): spec("pivot", 96, 128, 40, in_order=True),
    layer(0, "mlp.up_proj"): spec("pivot", 96, 128, 33),
    layer(0, "mlp.down_proj"): spec("dense", 128, 96),
    layer(1, "mlp.gate_proj"): spec("dense", 161, 128),
    layer(1, "mlp.up_proj"): spec("factors", 161, 128, 25),
    layer(1, "mlp.down_proj"): spec("factors", 128, 161, 25),
}
# The same in few bits, and the embedding, to which the head is tied.
FEW_BITS = {
    **shared("self_attn.q_proj", "factors", (128, 128, 30), {}, {}, bits=8, group=16),
    **shared("self_attn.k_proj", "pivot", (64, 128, 20), *ROWS, bits=4, group=10),
    layer(0, "self_attn.v_proj"): spec("dense", 64, 128, bits=3, group=32),
    layer(0, "self_attn.o_proj"): spec("pivot", 128, 128, 40, bits=8, group=8),
    layer(0, "mlp.gate_proj"): spec("pivot", 96, 128, 40, in_order=True, bits=4, group=8),
    layer(0, "mlp.up_proj"): spec("dense", 96, 128, bits=8, group=16),
    layer(0, "mlp.down_proj"): spec("dense", 128, 96, bits=4, group=16),
    "model.embed_tokens": spec("embedding", 320, 128, bits=8),
}  # fmt: skip


def llama():
    return tiny.llama(**SIZES), FORMS


def few_bits():
    return tiny.llama(**SIZES), FEW_BITS


def qwen():
    """Biases of queries, keys and values; an embedding and a head of its own in 8 bits."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    specs = {layer(i, "self_attn.q_proj"): spec("pivot", 128, 128, 24) for i in range(2)}
    specs |= {layer(i, "self_attn.v_proj"): spec("dense", 64, 128, bits=8, group=16) for i in range(2)}
    specs |= {name: spec("embedding", 320, 128, bits=8) for name in ("model.embed_tokens", "lm_head")}
    return model.eval(), specs


def biased():
    """Biases of MLPs, too, some of channels that are left."""
    model = tiny.llama(**SIZES, attention_bias=True, mlp_bias=True)
    specs = {layer(0, f"mlp.{name}_proj"): spec("factors", 96, 128, 30) for name in ("gate", "up")}
    return model, specs | {layer(0, "mlp.down_proj"): spec("pivot", 128, 96, 30)}


def phi():
    """Modules that are fused in the folder already."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(**SIZES, original_max_position_embeddings=256, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    specs = {layer(i, "self_attn.qkv_proj"): spec("factors", 256, 128, 40) for i in range(2)}
    specs |= {
        layer(0, "mlp.gate_up_proj"): spec("pivot", 2 * 160, 128, 50),
        layer(0, "mlp.down_proj"): spec("dense", 128, 160),
    }
    return Phi3ForCausalLM(config).eval(), specs


def gemma(generation="Gemma3Text", **more):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{generation}Config")(**SIZES, head_dim=32, **more)
    specs = {layer(i, "self_attn.q_proj"): spec("factors", 128, 128, 30) for i in range(2)}
    specs |= {layer(1, "mlp.up_proj"): spec("pivot", 192, 128, 60)}
    return getattr(transformers, f"{generation.removesuffix('Text')}ForCausalLM")(config).eval(), specs


def gemma2():
    return gemma("Gemma2", sliding_window=64, query_pre_attn_scalar=32)


SERVED = {
    "llama": llama,
    "few bits": few_bits,
    "qwen": qwen,
    "biases": biased,
    "phi": phi,
    "gemma 2": gemma2,
    "gemma 3": gemma,
}


def incomplete(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[f"{layer(0, 'mlp.up_proj')}.coefficients"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_rank(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"][layer(0, "self_attn.o_proj")]["rank"] = 39
    (folder / "config.json").write_text(json.dumps(config))


def damaged(folder):
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")


NGRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
REFUSED = {
    "incomplete": (llama, incomplete, {}, "mlp.up_proj.coefficients is in no weight file: the folder is incomplete"),
    "another rank": (llama, other_rank, {}, "coefficients is stored as torch.float32 of shape (88, 40), but config"),
    "damaged": (llama, damaged, {}, "model.safetensors: damaged, or changed since it was released"),
    "gpt2": (lambda: (tiny.gpt2(), GPT2), None, {}, "gpt2: vLLM transposes the matrices"),
    "adapters": (llama, None, {"enable_lora": True}, "enable_lora is on: a compressed folder is served on one"),
    "speculation": (llama, None, {"speculative_config": NGRAMS}, "speculative_config is given: a compressed"),
}  # fmt: skip

# One process after the other would spend most of its time on imports.
PROGRAM = f"""
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
asked = SamplingParams(temperature=0, max_tokens={NEW}, ignore_eos=True)
for folder, options in json.loads(sys.argv[1]).items():
    try:
        llm = LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, **options)
        prompts = [{{"prompt_token_ids": prompt}} for prompt in {PROMPTS}]
        found = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, asked, use_tqdm=False)]
        del llm
    except Exception as error:
        found = str(error)
    print("FOUND", json.dumps([folder, found]), flush=True)
    gc.collect()
    cleanup_dist_env_and_memory()
"""


def served(options):
    """Tokens by folder, or the message where there are none; and all that was printed. Given are options by folder."""
    program = [sys.executable, "-c", PROGRAM, json.dumps({str(folder): own for folder, own in options.items()})]
    environment = os.environ | QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return dict(map(json.loads, lines)), done.stdout + done.stderr


def expected(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # go on, as vLLM is told to
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    answers = [model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :] for ids in prompts]
    return [answer.tolist() for answer in answers]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, family in SERVED.items():
        write(*family(), root / name)
    for name, (family, harm, _, _) in REFUSED.items():
        write(*family(), root / name)
        if harm:
            harm(root / name)
    return root


@pytest.fixture(scope="module")
def answers(folders):
    champion = {CHAMPION: {}} if CHAMPION.is_dir() else {}
    tiny_ones = {folders / name: {} for name in SERVED}
    # Last: in the process in which these were refused, vLLM failed with the next model.
    refused = {folders / name: row[2] for name, row in REFUSED.items()}
    return served(champion | tiny_ones | refused)


@pytest.mark.parametrize("name", SERVED)
def test_every_form_gives_the_tokens_of_transformers(name, folders, answers):
    found, printed = answers
    assert found.get(str(folders / name)) == expected(folders / name), printed[-3000:]


@pytest.mark.skipif(not CHAMPION.is_dir(), reason="`make run` has not made data/models/kfac-80 here")
def test_the_default_model_gives_the_tokens_of_transformers(answers):
    found, printed = answers
    assert found.get(str(CHAMPION)) == expected(CHAMPION), printed[-3000:]


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_served_is_refused_by_name(name, folders, answers):
    found, printed = answers
    message = found.get(str(folders / name), printed[-3000:])
    assert REFUSED[name][3] in str(message)


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_several_devices_are_refused_by_name(option, folders):
    _, printed = served({folders / "llama": {option: 2}})
    assert f"{option} is 2: a compressed folder is served on one device" in printed


class Server:
    """vLLM's own server of a folder, on a free port of the loopback interface."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", log
        options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "64"]
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
        self.process = subprocess.Popen(
            [*program, "--served-model-name", "tiny"],
            env=os.environ | QUIET,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def __enter__(self):
        deadline = time.monotonic() + 600
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"{self.address}/health")
                return self
            except OSError:
                time.sleep(1)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def tokens(self, prompt):
        asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": NEW, "ignore_eos": True}
        body = json.dumps(asked | {"return_token_ids": True}).encode()
        request = urllib.request.Request(f"{self.address}/v1/completions", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["choices"][0]["token_ids"]


def test_a_server_answers_over_http_with_a_compiled_model(folders, tmp_path):
    with Server(folders / "few bits", tmp_path / "log") as server:
        assert [server.tokens(prompt) for prompt in PROMPTS] == expected(folders / "few bits")
