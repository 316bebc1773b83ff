"""vLLM itself serves compressed folders: every form gives the tokens that transformers gives. In an environment of its own:
`make test-vllm`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM

import drank  # noqa: F401  registers the format
from tests import tiny
from tests.compressed import spec, write

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` has it")
pytestmark = pytest.mark.timeout(900)

PROMPT, NEW = [5, 17, 101, 42, 7, 9], 10
# vLLM's attention on a CPU wants heads of 32 numbers at least.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
         "HF_HUB_OFFLINE": "1"}  # fmt: skip


def layer(i, name):
    return f"model.layers.{i}.{name}"


def sharing(name, n_out, n_in, rank, **more):
    """Two layers' matrices with one basis: in factors, and where `first` and `kept` are given in pivot form."""
    return {"basis": layer(0, name), **spec("factors", n_out, n_in, rank), **more}


# Every form, MLPs of unequal widths, parts of one fused layer in different forms, and a part that stayed as it was.
LLAMA = {
    layer(0, "self_attn.q_proj"): spec("factors", 128, 128, 30),
    layer(1, "self_attn.q_proj"): spec("factors", 128, 128, 30, basis=layer(0, "self_attn.q_proj")),
    layer(0, "self_attn.k_proj"): spec("pivot", 64, 128, 20, basis=layer(0, "self_attn.k_proj"), first=0, kept=12),
    layer(1, "self_attn.k_proj"): spec("pivot", 64, 128, 20, basis=layer(0, "self_attn.k_proj"), first=12, kept=8),
    layer(0, "self_attn.o_proj"): spec("pivot", 128, 128, 40),
    layer(0, "mlp.gate_proj"): spec("pivot", 96, 128, 40, in_order=True),
    layer(0, "mlp.up_proj"): spec("pivot", 96, 128, 33),
    layer(0, "mlp.down_proj"): spec("dense", 128, 96),
    layer(1, "mlp.gate_proj"): spec("dense", 160, 128),
    layer(1, "mlp.up_proj"): spec("factors", 160, 128, 25),
    layer(1, "mlp.down_proj"): spec("factors", 128, 160, 25),
}


def llama():
    return tiny.llama(**SIZES), LLAMA


def qwen():
    """Biases of queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=320, num_hidden_layers=2, max_position_embeddings=256, **SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    own = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj")
    sizes = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (64, 128), "mlp.gate_proj": (192, 128)}
    return model.eval(), {layer(i, name): spec("pivot", *sizes[name], 24) for i in range(2) for name in own}


def phi():
    """Modules that are fused in the folder already."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(vocab_size=320, num_hidden_layers=2, max_position_embeddings=256,
                        original_max_position_embeddings=256, pad_token_id=0, **SIZES)  # fmt: skip
    specs = {layer(i, "self_attn.qkv_proj"): spec("factors", 256, 128, 40) for i in range(2)}
    specs |= {layer(0, "mlp.gate_up_proj"): spec("pivot", 2 * 160, 128, 50), layer(0, "mlp.down_proj"): spec("dense", 128, 160)}
    return Phi3ForCausalLM(config).eval(), specs


def gemma():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=320, num_hidden_layers=2, max_position_embeddings=256, head_dim=32, sliding_window=64,
                          query_pre_attn_scalar=32, **SIZES)  # fmt: skip
    specs = {layer(i, "self_attn.q_proj"): spec("factors", 128, 128, 30) for i in range(2)}
    specs |= {layer(1, "mlp.up_proj"): spec("pivot", 192, 128, 60)}
    return Gemma2ForCausalLM(config).eval(), specs


def expected(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return found[0, len(PROMPT) :].tolist()


PROGRAM = f"""
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, **json.loads(sys.argv[2]))
asked = SamplingParams(temperature=0, max_tokens={NEW}, ignore_eos=True)
print("TOKENS", json.dumps(llm.generate([{{"prompt_token_ids": {PROMPT}}}], asked)[0].outputs[0].token_ids))
"""


def served(folder, **options):
    program = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(options)]
    done = subprocess.run(program, env=os.environ | QUIET, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    return json.loads(lines[0].removeprefix("TOKENS ")) if lines else done.stdout + done.stderr


@pytest.mark.parametrize("family", [llama, qwen, phi, gemma])
def test_every_form_gives_the_tokens_of_transformers(family, tmp_path):
    folder = write(*family(), tmp_path / "model")
    assert served(folder) == expected(folder)


def test_tensor_parallelism_is_refused_by_name(tmp_path):
    folder = write(*llama(), tmp_path / "model")
    assert "tensor_parallel_size is 2: factors are not cut among devices" in served(folder, tensor_parallel_size=2)


def test_a_server_answers_over_http(tmp_path):
    folder = write(*llama(), tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
               "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "64", "--served-model-name", "tiny"]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(program, env=os.environ | QUIET, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(1)
        asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": NEW, "ignore_eos": True,
                 "return_token_ids": True}  # fmt: skip
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request))
        assert answer["choices"][0]["token_ids"] == expected(folder)
    finally:
        server.terminate()
        server.wait(60)
