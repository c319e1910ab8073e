"""Why the data can come to an end. All ranks raise the same one before the same step."""


class DataStop(Exception):
    """No further global batch; what is trained so far is sound."""

    exit_code = 0


class EndOfData(DataStop):
    """Every source that does not repeat is used up, and none repeats."""


class BadData(DataStop):
    """More bad rows than data.max_bad_fraction; the message lists them."""

    exit_code = 65


class DataUnavailable(DataStop):
    """A source did not answer for data.patience_seconds."""

    exit_code = 75
