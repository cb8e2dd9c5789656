"""A CLIP tokenizer of the words of some captions, as stock transformers loads it: byte pairs, merged to whole words."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

MOST_TOKENS, MOST_WORDS = 8192, 4000
"""Of a vocabulary, and the words that it is made by, at most: rarer ones stay in parts."""
LONGEST = 77
"""Tokens of a text at most, as of all published CLIPs."""
START, END = "<|startoftext|>", "<|endoftext|>"


def made_tokenizer(captions: Iterable[str]) -> Any:
    """A `CLIPTokenizer` by the words of captions, cut at the length of the longest (at most 77 tokens)."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    texts = sorted(set(captions))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    begun = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    bare = CLIPTokenizer(vocab={token: i for i, token in enumerate(begun)}, merges=[])
    merges = _merges(_words(bare, texts), MOST_TOKENS - len(begun))
    vocabulary = [*begun[:-2], *dict.fromkeys("".join(pair) for pair in merges), START, END]
    made = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges)
    made.model_max_length = min(LONGEST, max(len(ids) for ids in made(texts)["input_ids"]))
    return made


def _words(tokenizer: Any, texts: list[str]) -> dict[tuple[str, ...], int]:
    """How often each word is there, as letters, of which the last says that it ends the word."""
    counts: dict[tuple[str, ...], int] = {}
    backend = tokenizer.backend_tokenizer
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            letters = (*word[:-1], f"{word[-1]}</w>")
            counts[letters] = counts.get(letters, 0) + 1
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:MOST_WORDS])


def _merges(words: dict[tuple[str, ...], int], most: int) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first (Sennrich et al. 2016), among equals the first by letters."""
    merges: list[tuple[str, str]] = []
    parts = {word: word for word in words}
    while len(merges) < most:
        pairs: dict[tuple[str, str], int] = {}
        for word, split in parts.items():
            for pair in pairwise(split):
                pairs[pair] = pairs.get(pair, 0) + words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        parts = {word: _joined(split, best) for word, split in parts.items() if len(split) > 1}
    return merges


def _joined(split: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in split:
        return split
    joined: list[str] = []
    for part in split:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
