"""`tokenyard data verify`: whether prepared shards are what was written."""

import sys
from pathlib import Path
from time import perf_counter


def verify(folder: str) -> int:
    """Prints each damaged shard, and a line about all. Returns the exit code: 0, 1 if one is damaged, 2 for other folders."""
    from ..data.pretokenized import verify as verify_shards

    path, started, damaged, shards, tokens = Path(folder).expanduser(), perf_counter(), 0, 0, 0
    try:
        for record, fault in verify_shards(path):
            shards, tokens = shards + 1, tokens + record.tokens
            if fault:
                damaged += 1
                print(f"{record.file}: DAMAGED, {' '.join(fault.split())}")
    except ValueError as error:
        print(f"tokenyard: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    what = f"{damaged} of {shards} shards are DAMAGED" if damaged else f"whole; {shards} shards, {tokens:,} tokens"
    print(f"{folder}: {what}, in {perf_counter() - started:.1f} s")
    return 1 if damaged else 0
