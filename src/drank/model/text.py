"""Documents to token windows and task items: what is calibrated on, and what is tested on and never was.

Takes strings, a tokenizer and seeds; returns tensors and plain records. Knows no file and no model.
Every draw comes from ``numpy.random.default_rng(seed)``, so equal arguments give equal results.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

SEPARATOR = "\n\n"  # between documents in a token stream, as the literature joins WikiText-2

ROLLING_CHARACTERS = 32_768  # a text's rolling documents together: about 8,000 tokens of English
ROLLING_DOCUMENT = 2_048  # longest rolling document in characters: about one window of 512 tokens
CONTEXT_WORDS = 30  # a last word is predicted from at least as many words
PASSAGE_WORDS = 60  # and its whole passage is no longer than this
SENTENCE_WORDS = range(8, 21)  # length of both sentences of a next-sentence item
N_CHOICES = 4

Item = TypeVar("Item")
Tokenizer = Any  # of transformers
Begin = Literal["window", "document", "text"]  # what begin tokens are put in front of
Stream = Int64[Tensor, "n_tokens"]
Windows = Int64[Tensor, "n_windows window_length"]


class SamplingError(ValueError):
    """The text is too small for what is asked of it; the message has both numbers."""


# --- documents ------------------------------------------------------------------------------------------------


def clean(documents: Iterable[str]) -> list[str]:
    """Documents repaired and trimmed, without empty ones and without repetitions (the first is kept).

    Repairs only what can be undone or carries nothing:

    * non-ASCII characters in a row that are UTF-8 once read as Windows-1252 ("Â£", "â€œ") are read back;
    * U+FFFD, the mark of a character that was lost earlier, is dropped;
    * line ends become "\\n" and no-break spaces become spaces. Other white space may mean something (code).

    Comes before the split: a repeated document on both sides of it would be calibrated on and tested on.
    """
    return [document for document in dict.fromkeys(map(_repair, documents)) if document]


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in a seeded random order."""
    return [items[index] for index in np.random.default_rng(seed).permutation(len(items))]


def split_documents(documents: Sequence[str], held_out_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Documents to calibrate on and documents held out, both in a seeded random order; none is in both.

    ``held_out_share`` in (0, 1) of the documents, rounded to the nearest whole number, is held out.

    Raises:
        SamplingError: one of the two parts would be empty.
    """
    n_held_out = round(held_out_share * len(documents))
    if not 0 < n_held_out < len(documents):
        raise SamplingError(
            f"sampling.held_out_share = {held_out_share} holds out {n_held_out} of {len(documents)} documents, "
            f"and both parts need at least one: give more documents or another share"
        )
    order = shuffled(documents, seed)
    return order[n_held_out:], order[:n_held_out]


def _repair(document: str) -> str:
    text = re.sub(r"[^\x00-\x7f]+", _read_back, document)
    text = text.replace("\ufffd", "").replace("\u00a0", " ")
    return re.sub(r"\r\n?", "\n", text).strip()


def _read_back(run: re.Match) -> str:
    # Five bytes have no character in Windows-1252 and pass through its decoders as C1 controls ("â€\x9d").
    encodings = (("latin-1" if "\x80" <= character <= "\x9f" else "cp1252", character) for character in run[0])
    try:
        return b"".join(character.encode(encoding) for encoding, character in encodings).decode("utf-8")
    except UnicodeError:
        return run[0]


# --- token windows --------------------------------------------------------------------------------------------


def begin_token(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, or None if it puts none there.

    A tokenizer can name a begin-of-sequence token and still not use it (SmolLM2): only an encoded probe tells.
    """
    plain, special = (tokenizer.encode("a", add_special_tokens=flag) for flag in (False, True))
    return special[0] if special[0] != plain[0] else None


def token_stream(documents: Sequence[str], tokenizer: Tokenizer, begin: Begin = "window") -> Stream:
    """All documents as one sequence of token ids.

    ``begin`` says where special tokens go, of a tokenizer that has any: nowhere yet, each ``window`` will get its begin
    token when it is cut; to the one ``text`` that the documents are, joined by an empty line (the literature's test
    texts); to every ``document``, which are then tokenised one by one and laid end to end (calibration in the released
    code of D-Rank and Basis Sharing, whose documents are lines).
    """
    pieces = documents if begin == "document" else [SEPARATOR.join(documents)]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=begin != "window")]
    return torch.tensor(ids, dtype=torch.int64)


def draw_windows(stream: Stream, n_windows: int, window_length: int, seed: int, begin_token: int | None) -> Windows:
    """Exactly ``n_windows`` windows at uniformly random offsets in the token stream; they may overlap.

    With a begin token, that is the first of a window's ``window_length`` tokens.

    Raises:
        SamplingError: the stream is shorter than one window.
    """
    n_read = window_length - (begin_token is not None)
    n_offsets = len(stream) - n_read + 1
    _check_length(n_offsets > 0, stream, f"one window takes {n_read} of them", "sampling.window_length")
    offsets = np.random.default_rng(seed).integers(n_offsets, size=n_windows)
    return _with_begin(stream.unfold(0, n_read, 1)[torch.from_numpy(offsets)], begin_token)


def draw_consecutive_windows(
    stream: Stream, n_windows: int, window_length: int, seed: int, begin_token: int | None
) -> Windows:
    """Exactly ``n_windows`` of the windows that lie side by side in the token stream; none twice.

    The draw of D-Rank's and Basis Sharing's released code: the first of ``torch.randperm`` with that seed.

    Raises:
        SamplingError: the stream has fewer windows.
    """
    whole = consecutive_windows(stream, None, window_length, begin_token)
    lower = "sampling.n_windows or sampling.window_length"
    _check_length(len(whole) >= n_windows, stream, f"{n_windows} windows side by side are asked for", lower)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return whole[order[:n_windows]]


def consecutive_windows(stream: Stream, n_windows: int | None, window_length: int, begin_token: int | None) -> Windows:
    """The first ``n_windows`` windows of the token stream, side by side: the literature's test protocol.

    None asks for all that are whole.

    Raises:
        SamplingError: the stream is shorter than that, or than one window.
    """
    n_read = window_length - (begin_token is not None)
    n_windows = n_windows or max(1, len(stream) // n_read)
    n_tokens, lower = n_windows * n_read, "sampling.n_test_windows or sampling.window_length"
    _check_length(len(stream) >= n_tokens, stream, f"{n_windows} windows take {n_tokens} of them", lower)
    return _with_begin(stream[:n_tokens].view(n_windows, n_read), begin_token)


def short_last_window(
    stream: Stream, window_length: int, begin_token: int | None
) -> Int64[Tensor, "last_length"] | None:
    """The rest after the whole windows of ``consecutive_windows``; None where that leaves no token to predict."""
    n_read = window_length - (begin_token is not None)
    last = _with_begin(stream[len(stream) // n_read * n_read :][None], begin_token)[0]
    return last if len(last) > 1 else None


def _check_length(enough: bool, stream: Stream, needs: str, knob: str) -> None:
    if not enough:
        raise SamplingError(f"the text has {len(stream)} tokens and {needs}: give more text, or lower {knob}")


def _with_begin(windows: Int64[Tensor, "n_windows n_read"], begin_token: int | None) -> Windows:
    if begin_token is None:
        return windows.contiguous()
    return torch.cat([windows.new_full((len(windows), 1), begin_token), windows], dim=1)


# --- task items for lm-eval -----------------------------------------------------------------------------------


def rolling_items(documents: Iterable[str]) -> list[dict[str, str]]:
    """Documents for rolling perplexity, ``{text}``: the first ones, up to ``ROLLING_CHARACTERS`` together.

    Each is cut to at most ``ROLLING_DOCUMENT`` characters, at the end of a word.
    """
    items, total = [], 0
    for document in documents:
        text = _cut(document, ROLLING_DOCUMENT)
        total += len(text)
        if total > ROLLING_CHARACTERS:
            break
        items.append({"text": text})
    return items


def last_word_items(documents: Iterable[str], n_items: int, seed: int) -> list[dict[str, str]]:
    """Passages of whole sentences, ``{context, target}``: the target is the last word, without its full stop.

    In the manner of LAMBADA (arXiv:1606.06031), but nobody has chosen the words that a reader can guess.

    Raises:
        SamplingError: the documents have fewer than ``n_items`` such passages.
    """
    passages = [item for document in documents for item in _last_words(_sentences(document))]
    return _choose(passages, n_items, seed, "passages that end with a sentence")


def next_sentence_items(documents: Iterable[str], n_items: int, seed: int) -> list[dict[str, Any]]:
    """A sentence and four candidates for the next one, ``{context, choices, label}``: chance is 1/4.

    The true one is ``choices[label]``; the others are sentences of three other documents. In the manner of
    HellaSwag (arXiv:1905.07830), without its adversarial filter.

    Raises:
        SamplingError: there are fewer than ``n_items`` pairs of sentences, or fewer than 4 documents with one.
    """
    found = {
        sentence: (index, context, sentence)
        for index, document in enumerate(documents)
        for context, sentence in pairwise(_sentences(document))
        if _is_plain(context) and _is_plain(sentence)
    }
    pairs = list(found.values())
    n_documents = len({index for index, _, _ in pairs})
    if n_documents < N_CHOICES:
        raise SamplingError(
            f"{n_documents} held-out documents have two sentences of {SENTENCE_WORDS.start} to "
            f"{SENTENCE_WORDS.stop - 1} words in a row, and {N_CHOICES} are needed: give more text, or raise "
            f"sampling.held_out_share"
        )
    rng = np.random.default_rng([seed, 1])  # not the stream that has chosen the pairs
    items = []
    for document, context, true in _choose(pairs, n_items, seed, "pairs of consecutive sentences"):
        others: dict[int, str] = {}  # one sentence per document
        for index, _, sentence in (pairs[drawn] for drawn in rng.permutation(len(pairs))):
            if index != document:
                others.setdefault(index, sentence)
            if len(others) == N_CHOICES - 1:
                break
        choices, label = [true, *others.values()], int(rng.integers(N_CHOICES))
        choices[0], choices[label] = choices[label], choices[0]
        items.append({"context": context, "choices": choices, "label": label})
    return items


def _cut(text: str, n_characters: int) -> str:
    if len(text) <= n_characters:
        return text
    words = text[: n_characters + 1].rsplit(maxsplit=1)
    return words[0] if len(words) == 2 else text[:n_characters]


def _choose(pool: list[Item], n_items: int, seed: int, what: str) -> list[Item]:
    if len(pool) < n_items:
        raise SamplingError(
            f"the held-out documents have {len(pool)} {what} and {n_items} are asked for: "
            f"give more text, raise sampling.held_out_share, or lower sampling.n_task_items"
        )
    return shuffled(pool, seed)[:n_items]


def _sentences(document: str) -> list[str]:
    """The document cut at line ends, and after [.!?] where white space and a capital letter follow."""
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])|\s*\n\s*", document) if s]


def _last_words(sentences: list[str]) -> Iterator[dict[str, str]]:
    for end in range(1, len(sentences) + 1):
        passage = ""  # the fewest last sentences that hold CONTEXT_WORDS words and one more
        for sentence in reversed(sentences[:end]):
            passage = f"{sentence} {passage}".rstrip()
            if len(passage.split()) > CONTEXT_WORDS:
                break
        # Lower case only: what an abbreviation's stop ("Sen.", "Mr.") cuts off is no sentence.
        ending = re.fullmatch(r"(.+) ([a-z]{3,})[.!?]", passage)
        if ending and CONTEXT_WORDS <= len(passage.split()) - 1 < PASSAGE_WORDS:
            yield {"context": ending[1], "target": ending[2]}


def _is_plain(sentence: str) -> bool:
    return len(sentence.split()) in SENTENCE_WORDS and re.search(r"[a-z]{3,}[.!?]$", sentence) is not None
