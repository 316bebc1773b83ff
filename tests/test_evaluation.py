"""Token perplexity and lm-eval's figures, each against a direct computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drank.model.perplexity import NotFiniteLossError
from drank.steps.evaluation import count_parameters, load_tasks, origin, run_tasks
from tests.tiny import token_perplexity

LAST_WORD = [
    {"context": "the cat sat on the", "target": "mat"},
    {"context": "a dog ran to its", "target": "door"},
    {"context": "we eat bread with", "target": "butter"},
]
NEXT_SENTENCE = [
    {"context": "It rained.", "choices": ["We got wet.", "Two is even.", "Cows moo.", "No."], "label": 0},
    {"context": "He sang.", "choices": ["A tax rose by a tenth.", "They clapped.", "Red.", "Ice melts."], "label": 1},
    {"context": "I fell.", "choices": ["Bees fly.", "The sum is nine.", "It hurt.", "Paint dries slowly."], "label": 2},
    {"context": "She won.", "choices": ["Salt.", "Rocks sink in water.", "Up.", "The crowd cheered."], "label": 3},
]


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per byte, and two more that may be special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(bos_token="<s>", eos_token="</s>")


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Weights large enough that every token of the context matters to every prediction."""
    config = {
        "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
        "initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


class Unigram(torch.nn.Module):
    """The same distribution over the vocabulary after every context."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids, use_cache):
        return type("Output", (), {"logits": self.logits.expand(*ids.shape, -1)})


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary():
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert token_perplexity(model, torch.randint(258, (3, 9)), 2)[0] == pytest.approx(258)


def test_perplexity_by_hand_where_a_short_last_window_counts_as_much_as_a_long_one():
    model, windows, last = Unigram(3 / 4, 1 / 4), torch.tensor([[0, 0, 1], [1, 0, 0]]), torch.tensor([0, 1])
    assert token_perplexity(model, windows, 2)[0] == pytest.approx((256 / 27) ** 0.25)
    perplexity, nats = token_perplexity(model, windows, 2, last=last)
    means = [(math.log(4 / 3) + math.log(4)) / 2, math.log(4 / 3), math.log(4)]
    assert perplexity == pytest.approx(math.exp(sum(means) / 3))
    assert nats == pytest.approx([2 * means[0], 2 * means[1], means[2]])


@pytest.mark.parametrize("batch_windows", [1, 2, 5, 8])
def test_perplexity_is_the_exponential_of_the_mean_loss_whatever_the_batching(batch_windows):
    model, windows = tiny_llama(), torch.randint(258, (5, 12))
    with torch.inference_mode():
        losses = [model(window[None], labels=window[None]).loss for window in windows]
    perplexity, nats = token_perplexity(model, windows, batch_windows)
    assert nats == pytest.approx([11 * float(loss) for loss in losses], rel=1e-5)
    assert perplexity == pytest.approx(math.exp(sum(nats) / 55), rel=1e-12)


def test_a_model_in_bfloat16_is_summed_in_float32():
    model, windows = tiny_llama().bfloat16(), torch.randint(258, (2, 12))
    with torch.inference_mode():
        scores = model(windows).logits[:, :-1].double().log_softmax(-1)
    expected = -scores.gather(-1, windows[:, 1:, None]).sum().item()
    assert sum(token_perplexity(model, windows, 2)[1]) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite_is_refused_with_its_window():
    model, windows = tiny_llama(), torch.arange(4).repeat_interleave(6).view(4, 6)
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = math.nan
    with pytest.raises(NotFiniteLossError, match=r"^window 2: the loss is nan"):
        token_perplexity(model, windows, 3)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_count_once_and_buffers_of_floating_point_where_they_are_stored(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    model.register_buffer("correction", torch.zeros(5))
    model.register_buffer("positions", torch.zeros(7, dtype=torch.int32))
    model.register_buffer("made_anew", torch.zeros(11), persistent=False)
    attention, mlp, norms = 16 * 16 * 2 + 16 * 8 * 2, 3 * 16 * 24, 2 * 16
    assert count_parameters(model) == 2 * (attention + mlp + norms) + 16 + 258 * 16 * (1 if tied else 2) + 5


def rolling_nats(model, tokenizer, text: str) -> float:
    """Windows of the model's length side by side, the last one filled up to the left with context."""
    ids, length = tokenizer.encode(text, add_special_tokens=False), model.config.max_position_embeddings
    inputs, nats = [tokenizer.bos_token_id, *ids], 0.0
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        logits = model(torch.tensor([inputs[max(0, end - length) : end]])).logits[0, start - end :]
        nats += F.cross_entropy(logits, torch.tensor(ids[start:end]), reduction="sum").item()
    return nats


REPETITIVE = ["ab" * 90, "the end " * 30]  # the last window of each begins like an earlier one
NATURAL = ["Once upon a time, there was a village by the sea.", "Short."]


@pytest.mark.parametrize(("texts", "batch_size"), [(REPETITIVE, 1), (REPETITIVE, 4), (NATURAL, 8)])
def test_rolling_perplexity_is_that_of_a_direct_computation(tokenizer, texts, batch_size):
    model, items = tiny_llama(), {"tale_rolling": [{"text": text} for text in texts]}
    with torch.inference_mode():
        nats = sum(rolling_nats(model, tokenizer, text) for text in texts)
    rows, shown = [], []
    model.register_forward_hook(lambda _model, _args, output: rows.extend(output.logits))
    figures = run_tasks(model, tokenizer, load_tasks(items, ["tale_rolling"], tokenizer), batch_size, counting(shown))
    assert shown == list(range(len(rows)))
    assert set(figures) == {"bits_per_byte/tale", "word_perplexity/tale"}
    n_bytes, n_words = sum(map(len, texts)), sum(len(text.split(" ")) for text in texts)
    assert figures["bits_per_byte/tale"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
    assert figures["word_perplexity/tale"] == pytest.approx(math.exp(nats / n_words), rel=1e-4)


def counting(shown):
    """A progress that notes what it has counted."""
    return lambda items: (shown.append(item) or item for item in items)


def continuation_nats(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    logits, targets = model(torch.tensor([ids])).logits[0, start - 1 : -1], torch.tensor(ids[start:])
    return F.cross_entropy(logits, targets, reduction="sum").item(), bool((logits.argmax(-1) == targets).all())


def test_choices_and_last_words_are_scored_as_by_hand(tokenizer):
    model, items = tiny_llama(max_position_embeddings=64), {"last_word": LAST_WORD, "next_sentence": NEXT_SENTENCE}
    with torch.inference_mode():
        words = [continuation_nats(model, tokenizer, row["context"], f" {row['target']}") for row in LAST_WORD]
        right, right_by_length = [], []
        for row in NEXT_SENTENCE:
            nats = [continuation_nats(model, tokenizer, row["context"], f" {c}")[0] for c in row["choices"]]
            per_letter = [n / len(c) for n, c in zip(nats, row["choices"], strict=True)]
            right.append(nats.index(min(nats)) == row["label"])
            right_by_length.append(per_letter.index(min(per_letter)) == row["label"])
    shown = []
    figures = run_tasks(model, tokenizer, load_tasks(items, list(items), tokenizer), 2, counting(shown))
    assert shown == list(range(len(LAST_WORD) + 4 * len(NEXT_SENTENCE)))
    p, q, greedy = sum(right) / 4, sum(right_by_length) / 4, sum(hit for _, hit in words) / 3
    assert figures == pytest.approx(
        {
            "acc/last_word": greedy,
            "acc/next_sentence": p,
            "acc_norm/next_sentence": q,
            "acc_norm_stderr/next_sentence": math.sqrt(q * (1 - q) / 4),
            "acc_stderr/last_word": math.sqrt(greedy * (1 - greedy) / 3),
            "acc_stderr/next_sentence": math.sqrt(p * (1 - p) / 4),
            "perplexity/last_word": math.exp(sum(n for n, _ in words) / 3),
        },
        rel=1e-5,
    )
    assert list(figures) == sorted(figures)
    assert all(type(value) is float for value in figures.values())


@pytest.mark.parametrize(
    ("bits", "found"), [([], {}), ([4, 4], {"bits": 4}), ([4, 8], {"bits": "mixed"}), ([4, 16], {"bits": "mixed"})]
)
def test_results_tell_what_was_measured_and_bits_below_16(bits, found):
    named = {"variant": "v", "preset": "p", "bytes_ratio": 0.3, "kept_ratio": 0.7, "targeted_parameters": 9}
    units = [{"bits": number} for number in bits] or [{}]
    assert origin(named | {"units": units, "price": 5}) == named | found
