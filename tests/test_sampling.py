import json
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stages.sampling import main as stage
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from drank.model import text
from drank.model.text import (
    CONTEXT_WORDS,
    N_CHOICES,
    PASSAGE_WORDS,
    ROLLING_CHARACTERS,
    ROLLING_DOCUMENT,
    SamplingError,
    begin_token,
    clean,
    consecutive_windows,
    draw_consecutive_windows,
    draw_windows,
    last_word_items,
    next_sentence_items,
    rolling_items,
    short_last_window,
    split_documents,
    token_stream,
)

PARAMS = Path(__file__).parents[1] / "params.yaml"
SUBJECTS = ("harvest", "minister", "river", "orchestra", "engineer", "library", "garden", "captain", "market")
VERBS = ("follows", "measures", "describes", "remembers", "repairs", "visits", "paints", "counts")


def document(index: int, n_sentences: int = 6) -> str:
    pick = [(k, index * 7 + 3 * k, index + 5 * k) for k in range(n_sentences)]
    return " ".join(
        f"The {SUBJECTS[a % 9]} of town {index} {VERBS[b % 8]} the {SUBJECTS[(a + b) % 9]} in year {k} again."
        for k, a, b in pick
    )


DOCUMENTS = [document(index) for index in range(30)]
BEGINS = st.sampled_from([None, 777])


def byte_tokenizer(uses_begin: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that names a begin token, and puts it before every text or does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    if uses_begin:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        (["â€œyesâ€\x9d, Â£5"], ["“yes”, £5"]),
        (["cafÃ© Â· FiancÃ©e"], ["café · Fiancée"]),
        (["£5, café, Ã, 北京"], ["£5, café, Ã, 北京"]),
        (["Beyonc\ufffd\ufffd said"], ["Beyonc said"]),
        (["one\u00a0two Â\u00a0three"], ["one two  three"]),
        (["  def f():\r\n    pass\r"], ["def f():\n    pass"]),
        (["b", " ", "a", "b\u00a0", "", "\ufffd"], ["b", "a"]),  # no empty one, and of equal ones the first
    ],
)
def test_damaged_documents_are_repaired_and_given_once(damaged, repaired):
    assert list(clean(damaged)) == repaired


@given(st.text(alphabet=st.characters(min_codepoint=0xA1, max_codepoint=0x2FFF, exclude_categories=["Cs"]), min_size=1))
def test_text_read_once_with_the_wrong_encoding_is_read_back(text):
    wrong = "".join(
        bytes([byte]).decode("latin-1" if byte in b"\x81\x8d\x8f\x90\x9d" else "cp1252")
        for byte in text.encode("utf-8")
    )
    assert list(clean(["x" + wrong + "x"])) == ["x" + text + "x"]


@given(n=st.integers(2, 200), share=st.floats(0.05, 0.95), seed=st.integers(0, 2**32))
def test_a_split_is_a_partition_of_the_asked_size(n, share, seed):
    documents = [str(index) for index in range(n)]
    if not 0 < round(share * n) < n:
        with pytest.raises(SamplingError):
            split_documents(documents, share, seed)
        return
    calibrated, held_out = split_documents(documents, share, seed)
    assert sorted([*calibrated, *held_out]) == sorted(documents)
    assert len(held_out) == round(share * n)
    assert [*map(list, split_documents(documents, share, seed))] == [list(calibrated), list(held_out)]


@pytest.mark.parametrize("uses_begin", [False, True])
def test_the_token_stream_decodes_to_the_joined_documents_without_special_tokens(uses_begin):
    tokenizer = byte_tokenizer(uses_begin)
    stream = token_stream(DOCUMENTS[:3], tokenizer)
    assert stream.dtype == torch.int32
    assert tokenizer.decode(stream) == "\n\n".join(DOCUMENTS[:3])


@given(n_tokens=st.integers(8, 60), n_windows=st.integers(1, 9), seed=st.integers(0, 2**32), begin=BEGINS)
def test_drawn_windows_are_pieces_of_the_stream_and_exactly_as_many_as_asked(n_tokens, n_windows, seed, begin):
    windows = draw_windows(torch.arange(n_tokens), n_windows, 8, seed, begin)
    assert windows.shape == (n_windows, 8)
    body = windows if begin is None else windows[:, 1:]
    assert torch.equal(body, body[:, :1] + torch.arange(body.shape[1]))
    assert body.min() >= 0
    assert body.max() < n_tokens
    assert begin is None or (windows[:, 0] == begin).all()
    assert torch.equal(windows, draw_windows(torch.arange(n_tokens), n_windows, 8, seed, begin))


def test_windows_of_a_short_stream():
    stream = torch.arange(10)
    starts = draw_windows(stream, 200, 8, seed=0, begin_token=None)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}, "every offset can be drawn, the first and the last included"
    assert consecutive_windows(stream, 3, 3, None).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert consecutive_windows(stream, 2, 3, 99).tolist() == [[99, 0, 1], [99, 2, 3]]


@given(n_tokens=st.integers(3, 80), length=st.integers(3, 12), begin=BEGINS, share=st.floats(0, 1))
def test_whole_windows_and_the_short_one_are_the_stream_again(n_tokens, length, begin, share):
    stream, n_read = torch.arange(n_tokens), length - (begin is not None)
    if n_tokens < n_read:
        with pytest.raises(SamplingError):
            consecutive_windows(stream, None, length, begin)
        return
    whole, last = consecutive_windows(stream, None, length, begin), short_last_window(stream, length, begin)
    kept = [*whole, *([] if last is None else [last])]
    read = torch.cat([window if begin is None else window[1:] for window in kept])
    lost = n_tokens - len(read)
    assert torch.equal(read, stream[: len(read)])
    assert lost == 0 if last is not None else lost <= (begin is None), "one token alone predicts none"
    assert last is None or 2 <= len(last) < length
    n_drawn = max(1, round(share * len(whole)))
    drawn = draw_consecutive_windows(stream, n_drawn, length, 3, begin)
    rows = [tuple(row) for row in drawn.tolist()]
    assert len(set(rows)) == n_drawn
    assert set(rows) <= {tuple(row) for row in whole.tolist()}


def llama_tokenizer(kind):
    """Tokenizers that know no boundary of words (as Llama's and Gemma's), of subword merges or of a unigram model."""
    model, trainer = {
        "bpe": (models.BPE(byte_fallback=True), trainers.BpeTrainer(vocab_size=300, show_progress=False)),
        "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", show_progress=False)),
        "words": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=300, show_progress=False)),
    }[kind]
    tokenizer = Tokenizer(model)
    if kind == "words":
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer.special_tokens = ["<unk>"]
    tokenizer.train_from_iterator([word for text in DOCUMENTS for word in text.split()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@settings(max_examples=25)
@given(
    st.lists(st.one_of(st.sampled_from(DOCUMENTS), st.text(max_size=60), st.just("a" * 700), st.just(" \n" * 90))),
    st.sampled_from(["bytes", "bpe", "unigram", "words"]), st.integers(200, 3000),
)  # fmt: skip
def test_a_text_that_is_tokenised_in_chunks_has_the_tokens_of_the_whole(documents, kind, chunk):
    tokenizer = byte_tokenizer(uses_begin=True) if kind == "bytes" else llama_tokenizer(kind)
    whole = tokenizer.encode("\n\n".join(documents), add_special_tokens=False)
    with patch.multiple("drank.model.text", CHUNK=chunk, CONTEXT=96):
        assert token_stream(documents, tokenizer).tolist() == whole


def test_no_more_than_a_chunk_is_tokenised_at_once():
    tokenizer, seen = byte_tokenizer(uses_begin=False), []

    class Watched:
        is_fast, encode = True, tokenizer.encode

        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

    with patch.multiple("drank.model.text", CHUNK=2000, CONTEXT=100):
        stream = token_stream((text for _ in range(10) for text in DOCUMENTS), Watched())
    assert stream.tolist() == tokenizer.encode("\n\n".join(10 * DOCUMENTS), add_special_tokens=False)
    assert max(seen) < 2000 + max(map(len, DOCUMENTS)) + 200


def test_begin_tokens_go_where_they_are_asked_for_if_the_tokenizer_uses_one():
    used, named_only = byte_tokenizer(uses_begin=True), byte_tokenizer(uses_begin=False)
    assert named_only.bos_token_id == used.bos_token_id == 0
    assert (begin_token(named_only), begin_token(used)) == (None, 0)
    (b,) = used.encode("b", add_special_tokens=False)
    joined = used.encode("b\n\n\n\nb", add_special_tokens=False)
    expected = {"document": [0, b, 0, 0, b], "text": [0, *joined], "window": joined}
    for begin, ids in expected.items():
        assert token_stream(["b", "", "b"], used, begin).tolist() == ids
    assert token_stream(["b", "", "b"], named_only, "document").tolist() == [b, b]


def test_a_last_word_is_what_the_passage_ends_with():
    context = "Word " + " ".join(["word"] * 27) + " so he finally went"
    text = f"One two three. {context} home. He asked Gov."
    assert last_word_items([text], 1, seed=0) == [{"context": context, "target": "home"}]


SPANISH = "¿Adónde fue {} aquella mañana tan fría de enero? Él salió de su casa muy temprano sin decirle nada a nadie. "
HINDI = "{} सुबह बहुत जल्दी उठकर अपने खेत की ओर पैदल चला गया। शाम को वह थका हुआ अपने पुराने घर वापस आया। "
CHINESE = "{}昨天早上很早就离开了家去城里的市场买东西。晚上他带着许多水果和蔬菜高兴地回到了家里。"
THAI = "{}ออกจากบ้านตั้งแต่เช้าตรู่เพื่อไปตลาดในเมือง ตอนเย็นเขากลับบ้านพร้อมผลไม้มากมาย "


NAMES = ("AB", "CD", "EF", "GH", "IJ", "KL")


def told_of(sentence):
    """Six documents, each of someone else."""
    return [sentence.format(name) * 4 for name in NAMES]


@pytest.mark.parametrize(
    ("sentence", "targets"),
    [
        (SPANISH, {"enero", "nadie"}),
        (HINDI, {"गया", "आया"}),
    ],
)
def test_last_words_are_those_of_any_script_that_sets_words_apart(sentence, targets):
    assert {item["target"] for item in last_word_items(told_of(sentence), 20, seed=0)} == targets


@pytest.mark.parametrize("sentence", [SPANISH, HINDI, CHINESE])
def test_next_sentences_are_whole_in_any_script_that_ends_sentences(sentence):
    first, second = (part.strip() for part in re.findall(r"[^.?!।؟。]+[.?!।؟。]", sentence))
    for item in next_sentence_items(told_of(sentence), 6, seed=0):
        pair = {item["context"], item["choices"][item["label"]]}
        assert pair in [{first.format(name), second} for name in NAMES]


def test_a_quote_within_a_sentence_of_japanese_ends_with_its_bracket():
    said = "彼は「ただいま。」", "と言った。", "「はい！？」"
    assert text._sentences("".join(said)) == [*said]


@pytest.mark.parametrize("document", ["标题 " + "字" * 5000, "x" * 5000])
def test_a_rolling_document_without_spaces_is_cut_at_its_length(document):
    assert rolling_items([document]) == [{"text": document[:ROLLING_DOCUMENT]}]


def test_last_word_items_are_distinct_passages_of_the_documents_within_the_asked_length():
    items = last_word_items(DOCUMENTS, 40, seed=3)
    assert len({json.dumps(item) for item in items}) == len(items) == 40
    for item in items:
        assert any(f"{item['context']} {item['target']}." in text for text in DOCUMENTS)
        assert CONTEXT_WORDS <= len(item["context"].split()) < PASSAGE_WORDS
    assert items == last_word_items(DOCUMENTS, 40, seed=3)
    assert items != last_word_items(DOCUMENTS, 40, seed=4)


def test_the_next_sentence_follows_in_its_document_and_the_others_come_from_three_other_documents():
    items = next_sentence_items(DOCUMENTS, 50, seed=0)
    assert len(items) == 50
    for item in items:
        home = [text for text in DOCUMENTS if item["context"] in text]
        assert f"{item['context']} {item['choices'][item['label']]}" in home[0]
        sources = [next(text for text in DOCUMENTS if choice in text) for choice in item["choices"]]
        assert len(set(sources)) == len(item["choices"]) == N_CHOICES
    assert {item["label"] for item in items} == set(range(N_CHOICES))
    assert items == next_sentence_items(DOCUMENTS, 50, seed=0)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3 * ROLLING_DOCUMENT), min_size=1, max_size=40))
def test_rolling_documents_are_whole_words_and_stay_within_both_bounds(lengths):
    documents = [("lorem ipsum " * (length // 12 + 1))[:length].strip() or "x" for length in lengths]
    texts = [item["text"] for item in rolling_items(documents)]
    assert texts
    assert sum(map(len, texts)) <= ROLLING_CHARACTERS
    assert max(map(len, texts)) <= ROLLING_DOCUMENT
    assert all(f"{document} ".startswith(f"{text} ") for document, text in zip(documents, texts, strict=False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_documents(["a", "b"], 0.1, 0), r"held_out_share = 0.1 holds out 0 of 2 documents"),
        (lambda: draw_windows(torch.arange(7), 1, 8, 0, None), r"has 7 tokens and one window takes 8"),
        (lambda: draw_windows(torch.arange(6), 1, 8, 0, 1), r"has 6 tokens and one window takes 7"),
        (lambda: consecutive_windows(torch.arange(15), 2, 8, None), r"has 15 tokens and 2 windows take 16"),
        (lambda: consecutive_windows(torch.arange(7), None, 8, None), r"has 7 tokens and 1 windows take 8"),
        (lambda: draw_consecutive_windows(torch.arange(15), 3, 8, 0, 1), r"has 15 tokens and 3 windows side by side"),
        (lambda: last_word_items(["Too short."], 1, 0), r"have 0 passages .*, and 1 are needed"),
        (lambda: last_word_items(told_of(CHINESE), 2, 0), r"have 0 passages .* no spaces between words"),
        (lambda: next_sentence_items(told_of(THAI), 2, 0), r"have 0 documents .* sets no stops"),
        (lambda: next_sentence_items(DOCUMENTS[:3], 1, 0), r"have 3 documents .*, and 4 are needed"),
        (lambda: next_sentence_items(DOCUMENTS, 10_000, 0), r"pairs of consecutive sentences, and 10000 are needed"),
    ],
)
def test_too_little_text_is_refused_with_both_numbers(call, message):
    with pytest.raises(SamplingError, match=message):
        call()


def write_lines(root, name, documents):
    (root / f"data/raw/text/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def set_params(root, **sections):
    params = yaml.safe_load((root / "params.yaml").read_text())
    for section, changes in sections.items():
        params[section] |= changes
    (root / "params.yaml").write_text(yaml.safe_dump(params))


def sampled(root):
    """Content of all files that the stage writes, by name."""
    stage(root)
    folder = root / "data/sampling"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path):
    """A project folder with two small texts and a tokenizer, as the raw stage leaves them."""
    (tmp_path / "params.yaml").write_bytes(PARAMS.read_bytes())
    sizes = {"n_windows": 5, "window_length": 16, "held_out_share": 0.4, "n_test_windows": 3, "n_task_items": 6}
    set_params(tmp_path, sampling=sizes, covariance={"fisher_windows": 5})
    tokenizer = byte_tokenizer(uses_begin=True)
    tokenizer.save_pretrained(tmp_path / "data/raw/model")
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "data/raw/model")
    (tmp_path / "data/raw/text").mkdir()
    write_lines(tmp_path, "news", [*DOCUMENTS, DOCUMENTS[0]])
    write_lines(tmp_path, "commons", DOCUMENTS[::-1])
    return tmp_path


def test_the_stage_writes_windows_tasks_and_counts_and_another_draw_changes_no_test(root):
    files, folder = sampled(root), root / "data/sampling"
    assert sorted(files) == [
        "calibration/0.safetensors", "calibration_text.safetensors", "summary.json", "tasks/commons_rolling.jsonl",
        "tasks/last_word.jsonl", "tasks/news_rolling.jsonl", "tasks/next_sentence.jsonl", "test.safetensors",
    ]  # fmt: skip
    windows = load_file(folder / "calibration/0.safetensors")["windows"]
    assert windows.shape == (5, 16)
    assert (windows[:, 0] == 0).all()
    tests = {name: test.shape for name, test in load_file(folder / "test.safetensors").items()}
    assert tests == {"news": (3, 16), "commons": (3, 16)}
    summary = json.loads(files["summary.json"])
    assert summary["begin_token"] == 0
    assert summary["texts"]["news"]["empty_or_repeated"] == 1
    assert summary["texts"]["news"]["test_documents"] == 12
    calibrated, _ = split_documents(DOCUMENTS, 0.4, seed=0)
    for task in ("news_rolling", "last_word", "next_sentence"):
        items = files[f"tasks/{task}.jsonl"].decode()
        assert not any(text.split(". ")[0] in items for text in calibrated)
    set_params(root, sampling={"calibration_seeds": [0, 7]})
    again = sampled(root)
    assert again.pop("calibration/7.safetensors") != again["calibration/0.safetensors"]
    assert again | {"summary.json": files["summary.json"]} == files


def test_a_task_that_the_text_cannot_give_is_refused_only_where_it_is_evaluated(root, caplog):
    write_lines(root, "news", told_of(CHINESE))
    with pytest.raises(SamplingError, match=r"^text\.news: .*; or take last_word out of evaluation.tasks"):
        stage(root)
    set_params(root, evaluation={"tasks": ["next_sentence"]}, sampling={"n_task_items": 2, "held_out_share": 0.7})
    files = sampled(root)
    assert "text.news: no task last_word: " in caplog.text
    tasks = [name for name in sorted(files) if name.startswith("tasks/")]
    assert tasks == [f"tasks/{name}.jsonl" for name in ("commons_rolling", "news_rolling", "next_sentence")]


def test_windows_that_repeat_are_told(root, caplog):
    set_params(root, sampling={"n_windows": 5000})
    stage(root)
    assert "sampling.n_windows = 5000 windows of 16 tokens are drawn from" in caplog.text
