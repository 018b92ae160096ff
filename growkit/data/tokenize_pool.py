"""Tokenizing on all cores: batches of text go to worker processes, tokens come back in order.

Workers are given the tokenizer itself and import neither torch nor transformers (for the fast
tokenizers). What comes back does not depend on their number.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np

from growkit.core.process import available_cores as available_cores

Encode = Callable[[list[str]], list[list[int]]]
_encode: Encode | None = None


def encoder(tokenizer: Any) -> Encode:
    """Texts to token ids, without special tokens at the ends."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _fast(backend)
    return lambda texts: [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts
    ]


def _fast(backend: Any) -> Encode:
    # A length limit or padding in tokenizer.json is for inference: here it would lose text.
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [
        encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)
    ]


def _start(serialized: str | None, tokenizer: Any) -> None:
    """In a worker: take the tokenizer, and end when the parent does (it may be killed)."""
    global _encode
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True)
        watch.start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if serialized is not None:
        from tokenizers import Tokenizer

        _encode = _fast(Tokenizer.from_str(serialized))
    else:
        _encode = encoder(tokenizer)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _work(texts: list[str]) -> list[np.ndarray]:
    assert _encode is not None
    return [np.asarray(ids, np.uint32) for ids in _encode(texts)]


class TokenizerPool:
    """Encodes batches of texts, in this process or in several, in order.

    Args:
        workers: worker processes; 1 for none.
    """

    def __init__(self, tokenizer: Any, workers: int) -> None:
        self._tokenizer, self.workers = tokenizer, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> TokenizerPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def encode(self, batches: Iterable[list[str]], *, parallel: bool) -> Iterator[list[np.ndarray]]:
        """The ids of each batch, uint32 ``[tokens]`` each text; reads ahead by a few batches."""
        if not parallel or self.workers < 2:
            encode = encoder(self._tokenizer)
            for batch in batches:
                yield [np.asarray(ids, np.uint32) for ids in encode(batch)]
            return
        if self._pool is None:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            serialized = backend.to_str() if backend is not None else None
            self._pool = ProcessPoolExecutor(
                self.workers,
                # A fork would copy locks that torch's or the tokenizer's threads hold.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(serialized, None if serialized else self._tokenizer),
            )
        waiting: deque[Future[list[np.ndarray]]] = deque()
        for batch in batches:
            waiting.append(self._pool.submit(_work, batch))
            if len(waiting) > 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
