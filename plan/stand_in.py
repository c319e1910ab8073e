"""A device that stands in for a GPU: its tensors have shapes and no numbers, and are distinct from host tensors.

It is torch's private-use device, with guards, streams and events that do nothing. Only fake tensors can be on it. A process that
registers it has it as its accelerator, and can no longer train.
"""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # pyright: ignore[reportPrivateUsage]

NAME = "standin"


@functools.cache
def stand_in() -> torch.device:
    """Returns the device; the first call registers it."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    return torch.device(NAME, 0)


class _Event:
    """An event that has always completed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> "_Event":
        return self

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """A stream whose work completes at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


class _Module:
    """The counterpart of `torch.cuda`, as far as FSDP2, recomputation and fake tensors need it."""

    Stream, Event = _Stream, _Event

    def __init__(self) -> None:
        self._stream = _Stream()

    def is_available(self) -> bool:
        """False, so that fake tensors copy nothing to it."""
        return False

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def current_stream(self, *_: Any) -> _Stream:
        return self._stream

    def stream(self, *_: Any) -> Any:
        return nullcontext()
