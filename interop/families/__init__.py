"""The supported Hugging Face architectures: the keys of config.json and the names of the tensors of each."""

from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .dots import DOTS1
from .ernie import ERNIE4_5_MOE
from .family import Family
from .glm import GLM4_MOE, GLM4_MOE_LITE
from .gpt_oss import GPT_OSS
from .granite import GRANITE_MOE
from .llama import LLAMA
from .longcat import LONGCAT_FLASH
from .minimax import MINIMAX_M2
from .mistral import MISTRAL, MIXTRAL
from .olmoe import FLEX_OLMO, OLMOE
from .qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from .qwen_next import QWEN3_5_MOE, QWEN3_NEXT
from .solar import SOLAR_OPEN

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        LLAMA,
        QWEN3,
        MISTRAL,
        QWEN2,
        MIXTRAL,
        QWEN3_MOE,
        OLMOE,
        QWEN2_MOE,
        GPT_OSS,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GLM4_MOE,
        DOTS1,
        ERNIE4_5_MOE,
        MINIMAX_M2,
        GLM4_MOE_LITE,
        SOLAR_OPEN,
        GRANITE_MOE,
        FLEX_OLMO,
        QWEN3_NEXT,
        QWEN3_5_MOE,
        LONGCAT_FLASH,
    )
}
"""Families by architecture, in the order in which an export tries them."""
