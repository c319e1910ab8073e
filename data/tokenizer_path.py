"""The file that tokenizer.path names: itself, one in a folder, or one of the Hugging Face hub. Standard library only at the top."""

import re
from pathlib import Path

from .checks import nearest_path
from .config import TokenizerConfig, TokenizerKind
from .hub_answer import ask_hub

MODEL_FILE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
FILES = {TokenizerKind.huggingface: TOKENIZER_JSON, TokenizerKind.sentencepiece: MODEL_FILE}
"""The file of each kind in a folder."""
COMPANIONS = (TOKENIZER_CONFIG, SPECIAL_TOKENS, "added_tokens.json", "chat_template.jinja", "chat_template.json")
"""Files beside a tokenizer.json that are kept with it. Nothing in them is run."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
SMALLEST_PIECES = 260


def check_tokenizer(config: TokenizerConfig) -> None:
    """Raises ValueError, one line, if `config` describes no tokenizer. Downloads one of the hub."""
    if config.path is not None:
        tokenizer_file(config)
    elif config.kind is TokenizerKind.huggingface:
        raise ValueError(
            "tokenizer.path=null must name a tokenizer.json, a folder with one or a model of the hub for tokenizer.kind=huggingface"
        )
    if config.pieces < SMALLEST_PIECES:
        raise ValueError(f"tokenizer.pieces={config.pieces} must be at least {SMALLEST_PIECES}: 256 bytes, 3 marks and one piece")
    if config.sample_bytes < 1:
        raise ValueError(f"tokenizer.sample_bytes={config.sample_bytes} must be at least 1; the default is 6000000")


def tokenizer_file(config: TokenizerConfig) -> Path:
    """Returns the file that tokenizer.path names. Raises ValueError, one line, if there is none of this kind."""
    assert config.path is not None
    given, path = f"tokenizer.path={config.path}", Path(config.path).expanduser()
    if config.kind is TokenizerKind.bytes:
        raise ValueError(f"{given} is read by tokenizer=sentencepiece and tokenizer=huggingface, and not by tokenizer.kind=bytes")
    if path.is_dir():
        return _file_in(path, config.kind, given)
    if path.exists():
        other = next((kind for kind, name in FILES.items() if kind is not config.kind and path.suffix == Path(name).suffix), None)
        if other is not None:
            raise ValueError(f"tokenizer.kind={config.kind.value} reads no {config.path}; the nearest is tokenizer={other.value}")
        return path
    if config.kind is TokenizerKind.huggingface and HUB_NAME.fullmatch(config.path) and path.suffix != ".json":
        return _hub_file(config.path)
    raise ValueError(f"{given} must exist; the nearest existing path is {nearest_path(path)}")


def _file_in(folder: Path, kind: TokenizerKind, given: str) -> Path:
    if (folder / FILES[kind]).is_file():
        return folder / FILES[kind]
    other = next((each for each, name in FILES.items() if (folder / name).is_file()), None)
    if other is not None:
        raise ValueError(f"{given} has no {FILES[kind]} but a {FILES[other]}; the nearest is tokenizer={other.value}")
    what = "a sentencepiece .model file" if kind is TokenizerKind.sentencepiece else "a tokenizer.json"
    raise ValueError(f"{given} must be {what} or a folder with a {FILES[kind]}; it is a folder without")


def _hub_file(name: str) -> Path:
    """Returns the tokenizer.json of the hub's model `name` in the hub's cache, downloaded with COMPANIONS if it is not there.

    Raises ValueError, one line, if the hub has none, or within about a second if it cannot be reached.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    cached = try_to_load_from_cache(name, TOKENIZER_JSON)
    if isinstance(cached, str):
        return Path(cached)
    if reason := ask_hub(hf_hub_url(name, TOKENIZER_JSON)).error:
        rule = f"is no path here, and the Hugging Face hub gives no {TOKENIZER_JSON} of that name ({reason})"
        raise ValueError(f"tokenizer.path={name} {rule}; the nearest existing path is {nearest_path(Path(name))}")
    found = Path(hf_hub_download(name, TOKENIZER_JSON))
    for companion in COMPANIONS:
        try:
            hf_hub_download(name, companion, revision=found.parent.name)
        except EntryNotFoundError:
            continue
    return found
