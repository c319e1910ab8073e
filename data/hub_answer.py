"""Asks the Hugging Face hub for a file, once and for about a second."""

import threading
from typing import NamedTuple

HUB_SECONDS = 1.0
"""How long the hub may take to say whether it has a file."""


class HubAnswer(NamedTuple):
    """What came of a question to the hub."""

    error: str
    """Why it does not give the file, in a few words; empty if it does."""
    answered: bool
    """Whether there was an answer, be it a refusal."""


def ask_hub(url: str, seconds: float = HUB_SECONDS) -> HubAnswer:
    """Returns whether the hub gives the file at `url`, after `seconds` at the latest."""
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return HubAnswer("HF_HUB_OFFLINE is set", False)
    outcome: list[HubAnswer] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=seconds)
            outcome.append(HubAnswer("", True))
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            said = f"{type(error).__name__}: {' '.join(first.split())[:160]}"
            outcome.append(HubAnswer(said, isinstance(error, HfHubHTTPError)))

    # A thread, because looking up a name has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else HubAnswer(f"no answer in {seconds:g} s", False)
