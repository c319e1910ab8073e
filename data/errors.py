"""Exceptions that end the data. All ranks raise the same one before the same step."""


class DataStop(Exception):
    """There is no further global batch. The weights trained so far are sound."""

    exit_code = 0


class EndOfData(DataStop):
    """All sources are used up, and none repeats."""


class BadData(DataStop):
    """More bad rows than data.max_bad_fraction, a file that failed, or rows that a rank cannot read."""

    exit_code = 65


class DataUnavailable(DataStop):
    """A source did not answer for data.patience_seconds."""

    exit_code = 75


def encode_stop(stop: BaseException, rank: int) -> bytes:
    """Serializes the error that stops this rank, for the other ranks. An error that is not a DataStop becomes BadData."""
    if isinstance(stop, DataUnavailable | BadData):
        return b"%d " % stop.exit_code + str(stop).encode(errors="replace")
    return b"65 " + f"rank {rank} cannot read its rows: {type(stop).__name__}: {stop}".encode(errors="replace")


def decode_stop(data: bytes) -> DataStop:
    """Returns the exception that `encode_stop` serialized, to be raised on all ranks."""
    code, _, text = data.partition(b" ")
    return (DataUnavailable if code == b"75" else BadData)(text.decode())
