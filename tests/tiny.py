"""Small real things to test with: random models, a tokenizer trained on the spot, made-up texts, a whole project."""

import hashlib
import json
import random
from pathlib import Path

import torch

from drank.model.perplexity import perplexity, window_nats

WORDS = [
    a + b for a in ("ka", "lo", "mi", "tu", "re", "so", "ve", "na") for b in ("", "n", "r", "s", "l", "mo", "ti", "dra")
]


def documents(n: int, seed: int) -> list[str]:
    """Documents of made-up words whose neighbours depend on each other, so that there is something to learn."""
    draw = random.Random(seed)
    return [" ".join(sentence(draw) for _ in range(draw.randint(4, 9))) for _ in range(n)]


def sentence(draw: random.Random) -> str:
    words, index = [], draw.randrange(len(WORDS))
    for _ in range(draw.randint(5, 12)):
        words.append(WORDS[index])
        index = (index * 5 + draw.randrange(3)) % len(WORDS)
    return " ".join(words).capitalize() + "."


def tokenizer():
    """A byte-level BPE of 320 tokens, trained on the documents above, without a begin-of-sequence token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents(200, 0), vocab_size=320, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")


def byte_tokenizer():
    """A BPE of 320 tokens that falls back to bytes, as Llama 2 has one: llama.cpp's converter knows it by its form."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(documents(200, 0), trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def llama(**changes):
    """A random two-layer Llama with grouped key/value heads, 4 over 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def gpt2():
    """A random two-layer GPT-2: fused queries, keys and values, Conv1D in the place of Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256)).eval()


def token_perplexity(model, windows, batch_windows, last=None):
    """Token perplexity over windows and, if there is one, a shorter last window; and the nats of each."""
    nats = window_nats(model, windows, batch_windows)
    if last is not None:
        nats += window_nats(model, last[None], 1)
    return perplexity(nats, windows.shape[1], None if last is None else len(last)), nats


def folder_sha256(folder: Path) -> str:
    """Hexadecimal SHA-256 of a folder's files by their paths; times and modes do not count."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(repr([(str(f.relative_to(folder)), f.read_bytes()) for f in files]).encode()).hexdigest()


SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "num_local_experts": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "ffn_dim": 64, "word_embed_proj_dim": 32,
    "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
UNGROUPED = {"deepseek_v2": {"num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4}}


def decoder(architecture, **changes):
    """A random two-layer decoder of that model type of transformers, with those of the sizes above that it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(architecture)
    own = {
        name for name in SIZES if hasattr(known, name) and not isinstance(getattr(type(known), name, None), property)
    }
    sizes = {name: size for name, size in SIZES.items() if name in own} | UNGROUPED.get(architecture, {})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes | changes)).eval()


def project(root: Path, model=None) -> None:
    """A model folder and two texts under root/source, and a params.yaml that names them by local:."""
    source = root / "source"
    source.mkdir(parents=True)
    (model or llama()).to(torch.bfloat16).save_pretrained(source / "model")
    tokenizer().save_pretrained(source / "model")
    for name, seed in (("news", 1), ("commons", 2)):
        lines = [json.dumps({"text": text}) for text in documents(120, seed)]
        (source / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (root / "params.yaml").write_text(PARAMS)


PARAMS = """\
model:
  source: local:source/model
text:
  news:
    source: local:source/news.jsonl
  commons:
    source: local:source/commons.jsonl
sampling:
  seed: 0
  calibration_text: news
  calibration_seeds: [0]
  n_windows: 8
  window_length: 64
  held_out_share: 0.3
  n_test_windows: 4
  n_task_items: 8
covariance:
  batch_windows: 4
  threads: 1
  fisher: empirical
  targets:
    - re:.*
  ignore: []
compute:
  dtype: auto
spectrum:
  input:
    calibration_seed: 0
    metric: input
    units: matrix
  kfac:
    calibration_seed: 0
    metric: kfac
    units: block
    damping: 1.0e-4
    cuts: [0.0, 0.25, 0.5]
presets:
  dense:
    spectrum: input
    allocation: dense
    storage: factors
  svd-llm:
    spectrum: input
    allocation: uniform
    storage: factors
  d-rank:
    spectrum: input
    allocation: effective_rank
    storage: factors
    beta: 0.3
  kfac:
    spectrum: kfac
    allocation: least_loss
    storage: pivot
variants:
  dense:
    preset: dense
    spectrum: input
    size_ratio: 1.0
  svd-llm-80:
    preset: svd-llm
    spectrum: input
    size_ratio: 0.8
  d-rank-80:
    preset: d-rank
    spectrum: input
    size_ratio: 0.8
  kfac-80:
    preset: kfac
    spectrum: kfac
    size_ratio: 0.8
evaluation:
  batch_windows: 4
  threads: 1
  tasks:
    - news_rolling
    - last_word
    - next_sentence
"""
