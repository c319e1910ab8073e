"""The language model of a folder with one for images too: its config.json inside the other, its tensors without their prefix."""

from typing import TYPE_CHECKING, Any

from .config_reader import ConfigReader
from .families.harmless import IRRELEVANT

if TYPE_CHECKING:
    from .hf_folder import HFFolder

LANGUAGE = {"Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM"}
"""By architecture, that of its language model."""
OUTSIDE = frozenset(
    ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "quantization_config")
)
"""Keys beside text_config that decide nothing about it, or are read elsewhere."""
PREFIX = "model.language_model."


def language_config(config: dict[str, Any], place: str = "config.json: ") -> dict[str, Any]:
    """Returns the config.json of the language model; `config` itself if it is of nothing else.

    Raises ValueError, one line, for a key beside text_config that is not known.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(LANGUAGE):
        return config
    reader = ConfigReader(config, {}, place)
    text = reader.mapping("text_config") | {"architectures": [LANGUAGE[names[0]]], "tie_word_embeddings": False}
    if reader.given("tie_word_embeddings"):  # transformers looks at no other
        text["tie_word_embeddings"] = reader.flag("tie_word_embeddings")
    reader.finish(IRRELEVANT | OUTSIDE, {})
    return text | {key: config[key] for key in ("quantization_config",) if key in config}


def language_model(folder: "HFFolder") -> "HFFolder":
    """Returns the folder of the language model alone, with tensors that have no place in it by their own names."""
    config = language_config(folder.config)
    if config is folder.config:
        return folder
    tensors = {
        f"model.{name.removeprefix(PREFIX)}" if name.startswith(PREFIX) else name: header._replace(key=name)
        for name, header in folder.tensors.items()
    }
    return folder._replace(config=config, tensors=tensors)
