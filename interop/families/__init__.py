"""One table per architecture of Hugging Face: its keys of config.json and the names of its tensors."""

from .base import Family
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .gpt_oss import GPT_OSS
from .llama import LLAMA
from .mixtral import MIXTRAL
from .olmoe import OLMOE
from .qwen import QWEN2_MOE, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (LLAMA, QWEN3, MIXTRAL, QWEN3_MOE, OLMOE, QWEN2_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)
}
"""By architecture, in the order in which an export tries them."""
