"""Why the data can come to an end. All ranks raise the same one before the same step."""


class DataStop(Exception):
    """No further global batch; what is trained so far is sound."""

    exit_code = 0


class EndOfData(DataStop):
    """Every source that does not repeat is used up, and none repeats."""


class BadData(DataStop):
    """More bad rows than data.max_bad_fraction, a file that failed, or rows that a rank cannot read; the message says which."""

    exit_code = 65


class DataUnavailable(DataStop):
    """A source did not answer for data.patience_seconds."""

    exit_code = 75


def encode_stop(stop: BaseException, rank: int) -> bytes:
    """Why a rank cannot go on, for the others. An error that is none of these becomes BadData."""
    if isinstance(stop, DataUnavailable | BadData):
        return b"%d " % stop.exit_code + str(stop).encode(errors="replace")
    return b"65 " + f"rank {rank} cannot read its rows: {type(stop).__name__}: {stop}".encode(errors="replace")


def decode_stop(data: bytes) -> DataStop:
    """What a rank has told, to be raised on all."""
    code, _, text = data.partition(b" ")
    return (DataUnavailable if code == b"75" else BadData)(text.decode())
