"""Measures how fast text becomes batches: `python -m tokenyard.bench.data` prints a JSON object. All sides take turns on one
core."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from ..data.build import open_data, open_tokenizer
from ..data.config import Corpus, DataConfig, TokenizerConfig
from ..data.pretokenize import prepare_shards
from ..data.stream.mixture import StreamBatches
from ..data.tokenizer_types import SentencePieceTokenizer

LENGTH, SEQUENCES = 256, 8
MOST_GROWTH_MIB = 16.0
"""Limit of the growth of memory between the first and the last quarter of a streaming run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", help="a text file; the standard library without")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-seconds", type=float, default=0, help="stream for so long, and say whether memory grows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments.text, arguments.repeats, arguments.memory_seconds), indent=1))


def measure(folder: Path, text: str | None, repeats: int, memory_seconds: float) -> dict[str, float]:
    """Rates are tokens per second of processor time (all threads together); times are in ms."""
    documents = read_documents(text)
    config = write_rows(folder, documents)
    tokenizer_config = TokenizerConfig(pieces=8192 if text is None else 2048)
    tokenizer = open_tokenizer(config, tokenizer_config, folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    tokenizer.save(folder / "tokenizer")
    tokenizer_config = TokenizerConfig(path=str(folder / "tokenizer" / "tokenizer.model"))
    prepare_shards(config, tokenizer_config, folder / "shards", 1, lambda *_: None)
    shards = DataConfig(corpus=Corpus.prepared, path=str(folder / "shards"), cache=config.cache)
    steps = max(4, int(0.8 * sum(map(len, documents)) / 5) // (LENGTH * SEQUENCES))
    plain, streamed, mapped = [], [], []
    for _ in range(repeats):
        plain.append(rate(lambda: sum(map(len, tokenizer.encode_batch(documents, threads=1)))))
        streamed.append(batches(config, tokenizer_config, steps))
        mapped.append(batches(shards, tokenizer_config, steps))
    return {
        "sentencepiece_tokens_per_second": median(plain),
        "text_to_batches_tokens_per_second": median(streamed),
        "text_to_batches_over_sentencepiece": median(s / p for s, p in zip(streamed, plain, strict=True)),
        "prepared_tokens_per_second": median(mapped),
        **state_cost(config, tokenizer_config),
        **memory(config, tokenizer_config, memory_seconds),
    }


def read_documents(text: str | None) -> list[str]:
    """Reads about 10 MB."""
    if text is not None:
        content = Path(text).read_text()
        return [content[start : start + 4000] for start in range(0, len(content), 4000)]
    from ..data.checks import stdlib_files, stdlib_root

    found, size = [], 0
    for name in sorted(stdlib_files(stdlib_root())):
        found.append((stdlib_root() / name).read_text(errors="ignore"))
        size += len(found[-1])
        if size > 10_000_000:
            break
    return [document for document in found if document.strip()]


def write_rows(folder: Path, documents: list[str]) -> DataConfig:
    (folder / "rows").mkdir()
    for shard in range(8):
        lines = [json.dumps({"text": document}) for document in documents[shard::8]]
        (folder / "rows" / f"{shard}.jsonl").write_text("\n".join(lines))
    return DataConfig(corpus=Corpus.jsonl, path=str(folder / "rows"), cache=str(folder), window=64)


def rate(work: Callable[[], int]) -> float:
    """Tokens per second of processor time."""
    begin = process_time()
    tokens = work()
    return tokens / (process_time() - begin)


def batches(config: DataConfig, tokenizer: TokenizerConfig, steps: int) -> float:
    """Tokens per second from opened data to batches, without threads, so that all tokenized tokens are counted."""
    data = open_data(replace(config, workers=0), tokenizer, LENGTH, 1, SEQUENCES, None, 8).train

    def work() -> int:
        for step in range(steps):
            data.batch(step)
        return int(data.metrics().get("data/jsonl/document_tokens", steps * LENGTH * SEQUENCES))

    return rate(work)


def state_cost(config: DataConfig, tokenizer: TokenizerConfig) -> dict[str, float]:
    data = open_data(config, tokenizer, LENGTH, 1, SEQUENCES, None, 8).train
    times, size = [], 0
    for step in range(50):
        data.batch(step)
        begin = perf_counter()
        size = len(json.dumps(data.state()))
        times.append(perf_counter() - begin)
    data.close()
    return {"state_milliseconds": 1000 * median(times), "state_bytes": size}


def memory(config: DataConfig, tokenizer: TokenizerConfig, seconds: float) -> dict[str, float]:
    """Returns the memory while streaming: medians of the first and last quarter. Prints a verdict on standard error."""
    if not seconds:
        return {}
    data = open_data(config, tokenizer, LENGTH, 1, SEQUENCES, None, 8).train
    assert isinstance(data, StreamBatches)
    begin, step = perf_counter(), 0
    seen: list[tuple[float, float]] = []
    while (now := perf_counter() - begin) < seconds:
        data.batch(step)
        step += 1
        if not seen or now - seen[-1][0] >= seconds / 400:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            seen.append((now, resident / 2**20))
    data.close()
    early = median(size for now, size in seen if now < seconds / 4)
    late = median(size for now, size in seen if now >= seconds * 3 / 4)
    growth = late - early
    verdict = "flat" if growth <= MOST_GROWTH_MIB else "GROWS"
    print(
        f"memory: {verdict}: {growth:+.1f} MiB between the first and the last quarter of {seconds:g} s, limit {MOST_GROWTH_MIB:g}",
        file=sys.stderr,
    )
    return {"streamed_tokens": step * LENGTH * SEQUENCES, "memory_mib": late, "memory_growth_mib": growth}


if __name__ == "__main__":
    main()
