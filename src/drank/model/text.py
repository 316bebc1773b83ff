"""Documents to token windows and task items: what is calibrated on, and what is tested on and never was.

Takes strings, a tokenizer and seeds; returns tensors and plain records. Knows no file and no model.
Every draw comes from ``numpy.random.default_rng(seed)``, so equal arguments give equal results.
Documents are read one by one, so memory holds their tokens and not their characters.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import regex
import torch
from jaxtyping import Int, Int64
from torch import Tensor

SEPARATOR = "\n\n"  # between documents in a token stream, as the literature joins WikiText-2

ROLLING_CHARACTERS = 32_768  # a text's rolling documents together: about 8,000 tokens of English
ROLLING_DOCUMENT = 2_048  # longest rolling document in characters: about one window of 512 tokens
CONTEXT_WORDS = 30  # a last word is predicted from at least as many words
PASSAGE_WORDS = 60  # and its whole passage is no longer than this
SENTENCE_WORDS = range(8, 21)  # length of both sentences of a next-sentence item
N_CHOICES = 4
CHUNK = 2**20  # characters that are tokenised at once
CONTEXT = 2**11  # characters beside a cut between chunks, on which the tokens there are found not to depend

# Scripts that set no spaces between words: two of their letters count as one word.
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
# A stop of [.!?] ends a sentence before white space and a capital, or a letter of a script without capitals; the stops
# of other scripts always do, with the quotes and brackets that they close.
STOP = r"\p{Sentence_Terminal}"
SENTENCE_END = regex.compile(rf"(?V1)[.!?](?=\s+[¿¡]?[\p{{Lu}}\p{{Lo}}])|[{STOP}--[.!?]]+[{STOP}\p{{Pe}}\p{{Pf}}]*|\n")
# Lower case, or a script that has no cases: what an abbreviation's stop ("Sen.", "Mr.") cuts off is no sentence.
LAST_WORD = regex.compile(rf"([\p{{Ll}}\p{{Lo}}\p{{Lm}}\p{{M}}\u200c\u200d]{{3,}})(?: ?[!?]|{STOP})$")

Tokenizer = Any  # of transformers
Begin = Literal["window", "document", "text"]  # what begin tokens are put in front of
Stream = Int[Tensor, "n_tokens"]
Windows = Int64[Tensor, "n_windows window_length"]


class SamplingError(ValueError):
    """The text is too small for what is asked of it; the message has both numbers."""


@dataclass(eq=False)
class Picked(Sequence[str]):
    """Documents in an order of their own, each read, and changed, when it is asked for."""

    documents: Sequence[str]
    order: Sequence[int] | np.ndarray
    change: Callable[[str], str] = str

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Picked(self.documents, self.order[index], self.change)
        return self.change(self.documents[self.order[index]])


def clean(documents: Sequence[str]) -> Picked:
    """Documents repaired and trimmed, without empty ones and without repetitions (the first is kept).

    Repairs only what can be undone or carries nothing:

    * non-ASCII characters in a row that are UTF-8 once read as Windows-1252 ("Â£", "â€œ") are read back;
    * U+FFFD, the mark of a character that was lost earlier, is dropped;
    * line ends become "\\n" and no-break spaces become spaces. Other white space may mean something (code).

    Comes before the split: a repeated document on both sides of it would be calibrated on and tested on.
    """
    digests = bytearray(_digest(""))
    for document in documents:
        digests += _digest(_repair(document))
    _, first = np.unique(np.frombuffer(digests, "V16"), return_index=True)
    return Picked(documents, np.sort(first)[1:] - 1, _repair)


def shuffled(documents: Sequence[str], seed: int) -> Picked:
    """The documents in a seeded random order."""
    return Picked(documents, np.random.default_rng(seed).permutation(len(documents)))


def split_documents(documents: Sequence[str], held_out_share: float, seed: int) -> tuple[Picked, Picked]:
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


def _digest(document: str) -> bytes:
    return blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16).digest()


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


def begin_token(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, or None if it puts none there.

    A tokenizer can name a begin-of-sequence token and still not use it (SmolLM2): only an encoded probe tells.
    """
    return next(iter(_special_ids(tokenizer)[0]), None)


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after every text."""
    plain, special = (tokenizer.encode("a", add_special_tokens=flag) for flag in (False, True))
    start = next((start for start in range(len(special)) if special[start : start + len(plain)] == plain), 0)
    return special[:start], special[start + len(plain) :]


def token_stream(documents: Iterable[str], tokenizer: Tokenizer, begin: Begin = "window") -> Stream:
    """All documents as one sequence of token ids (int32).

    ``begin`` says where special tokens go, of a tokenizer that has any: nowhere yet, each ``window`` will get its begin
    token when it is cut; to the one ``text`` that the documents are, joined by an empty line (the literature's test
    texts); to every ``document``, which are then tokenised one by one and laid end to end (calibration in the released
    code of D-Rank and Basis Sharing, whose documents are lines).
    """
    front, back = ([], []) if begin == "window" else _special_ids(tokenizer)
    joined = (SEPARATOR * (number > 0) + document for number, document in enumerate(documents))
    stream = array("i")
    for text in ([document] for document in documents) if begin == "document" else [joined]:
        stream.extend(front)
        for ids in _encoded(text, tokenizer):
            stream.extend(ids)
        stream.extend(back)
    return torch.from_numpy(np.asarray(stream))


def _encoded(text: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of a text in pieces, as if it were encoded at once, with about ``CHUNK`` characters in memory.

    A text is cut where the tokens nearer than ``CONTEXT`` / 4 characters come out the same from the ``CONTEXT``
    characters before the cut and ``CONTEXT`` / 2 behind it alone; where they do not, a longer text is tried. The
    characters before the cut are encoded once more, with the next chunk.
    """
    held, known, enough = "", 0, CHUNK  # the tokens of the first `known` characters held are given already
    for piece in (document[at : at + CHUNK] for document in text for at in range(0, len(document), CHUNK)):
        held += piece
        if len(held) < enough or not tokenizer.is_fast:  # the others do not say where their tokens are
            continue
        tokens, cut = _located(held, tokenizer), len(held) - CONTEXT
        alone = _located(held[cut - CONTEXT : cut + CONTEXT // 2], tokenizer)
        alone[:, 0] += cut - CONTEXT
        near, near_alone = (some[abs(some[:, 0] - cut) < CONTEXT // 4] for some in (tokens, alone))
        if len(near) and np.array_equal(near, near_alone):
            yield tokens[(tokens[:, 0] >= known) & (tokens[:, 0] < cut), 1].tolist()
            held, known, enough = held[cut - CONTEXT :], CONTEXT, CHUNK
        else:
            enough = 2 * len(held)
    if known:
        tokens = _located(held, tokenizer)
        yield tokens[tokens[:, 0] >= known, 1].tolist()
    else:
        yield tokenizer.encode(held, add_special_tokens=False)


def _located(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The character that each token starts at, and the token's id (tokens, 2)."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    return np.stack([starts, np.array(found["input_ids"], dtype=np.int64)], 1)


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


def short_last_window(stream: Stream, window_length: int, begin_token: int | None) -> Int64[Tensor, "n"] | None:
    """The rest after the whole windows of ``consecutive_windows``; None where that leaves no token to predict."""
    n_read = window_length - (begin_token is not None)
    last = _with_begin(stream[len(stream) // n_read * n_read :][None], begin_token)[0]
    return last if len(last) > 1 else None


def _check_length(enough: bool, stream: Stream, needs: str, knob: str) -> None:
    if not enough:
        raise SamplingError(f"the text has {len(stream)} tokens and {needs}: give more text, or lower {knob}")


def _with_begin(windows: Int[Tensor, "n_windows n_read"], begin_token: int | None) -> Windows:
    windows = windows.long().contiguous()
    if begin_token is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), begin_token), windows], dim=1)


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


def last_word_items(documents: Sequence[str], n_items: int, seed: int) -> list[dict[str, str]]:
    """Passages of whole sentences, ``{context, target}``: the target is the last word, without its full stop.

    In the manner of LAMBADA (arXiv:1606.06031), but nobody has chosen the words that a reader can guess. Words are what
    spaces set apart, so that a text of a script without spaces has none.

    Raises:
        SamplingError: the documents have fewer than ``n_items`` such passages.
    """
    ends = np.cumsum([sum(1 for _ in _last_words(document)) for document in documents])
    items = []
    for number in _choose(int(ends[-1]), n_items, seed, "passages that end with a sentence"):
        index = int(np.searchsorted(ends, number, side="right"))
        items.append(list(_last_words(documents[index]))[number - ends[index]])
    return items


def next_sentence_items(documents: Sequence[str], n_items: int, seed: int) -> list[dict[str, Any]]:
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
    _check_number(len({index for index, *_ in pairs}), N_CHOICES, "documents with two plain sentences in a row")
    rng = np.random.default_rng([seed, 1])  # not the stream that has chosen the pairs
    items = []
    for number in _choose(len(pairs), n_items, seed, "pairs of consecutive sentences"):
        document, context, true = pairs[number]
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
    """At the end of a word if one ends in the last tenth."""
    if len(text) <= n_characters:
        return text
    words = text[: n_characters + 1].rsplit(maxsplit=1)
    return words[0] if len(words) == 2 and len(words[0]) > 0.9 * n_characters else text[:n_characters]


def _choose(n_found: int, n_items: int, seed: int, what: str) -> list[int]:
    _check_number(n_found, n_items, what)
    return np.random.default_rng(seed).permutation(n_found)[:n_items].tolist()


def _check_number(n_found: int, n_needed: int, what: str) -> None:
    if n_found < n_needed:
        raise SamplingError(
            f"the held-out documents have {n_found} {what}, and {n_needed} are needed (none where a script sets no "
            f"stops, or no spaces between words): give more text, raise sampling.held_out_share, or lower "
            f"sampling.n_task_items"
        )


def _sentences(document: str) -> list[str]:
    """The document cut at line ends, and where sentences end."""
    cuts = [0, *(end.end() for end in SENTENCE_END.finditer(document)), len(document)]
    return [sentence for start, stop in pairwise(cuts) if (sentence := document[start:stop].strip())]


def _n_words(text: str) -> int:
    return len(text.split()) + len(UNSPACED.findall(text)) // 2


def _last_words(document: str) -> Iterator[dict[str, str]]:
    sentences = _sentences(document)
    for end in range(1, len(sentences) + 1):
        passage = ""  # the fewest last sentences that hold CONTEXT_WORDS words and one more
        for sentence in reversed(sentences[:end]):
            passage = f"{sentence} {passage}".rstrip()
            if _n_words(passage) > CONTEXT_WORDS:
                break
        last = LAST_WORD.search(passage)
        spaced = last and passage[last.start() - 1 : last.start()] == " " and not UNSPACED.search(last[1])
        if spaced and CONTEXT_WORDS <= _n_words(passage) - 1 < PASSAGE_WORDS:
            yield {"context": passage[: last.start() - 1], "target": last[1]}


def _is_plain(sentence: str) -> bool:
    return _n_words(sentence) in SENTENCE_WORDS and LAST_WORD.search(sentence) is not None
