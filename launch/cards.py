"""What the makers of published models say about their size, with the source; docs/models.md sets it beside our counts."""

from typing import NamedTuple

from ..train.params import Count


class Card(NamedTuple):
    """Published figures as they are written, in B (1e9); None where there is none."""

    total: str
    active: str | None
    source: str
    embedding_in_total: bool = True
    """Whether the total counts the embedding's weights."""
    embedding_in_active: bool = True
    """Whether the active ones count the input embedding: it is looked up, not multiplied. The head counts always."""

    def counted_total(self, count: Count) -> int:
        """Our total, counted as the card counts."""
        return count.total if self.embedding_in_total else count.total - count.embedding

    def counted_active(self, count: Count) -> int:
        """Our active parameters, counted as the card counts."""
        return count.active if self.embedding_in_active else count.active - count.embedding


def unit(figure: str) -> float:
    """What the last written digit of a figure stands for, in B: 0.1 in 46.7, 1 in 141, 100 in 600."""
    if "." in figure:
        return 10.0 ** -len(figure.partition(".")[2])
    return 10.0 ** (len(figure) - len(figure.rstrip("0")))


CARDS = {
    "switch_c_2048": Card("1571", None, "arXiv:2101.03961, table 9"),
    "gshard_600b": Card("600", None, "arXiv:2006.16668, abstract"),
    "mixtral_8x7b": Card("46.7", "12.9", "mistral.ai/news/mixtral-of-experts"),
    "mixtral_8x22b": Card("141", "39", "mistral.ai/news/mixtral-8x22b"),
    "deepseek_moe_16b": Card("16.4", "2.8", "arXiv:2401.06066, section 5"),
    "deepseek_v2_lite": Card("15.7", "2.4", "arXiv:2405.04434, appendix B", embedding_in_active=False),
    "deepseek_v2": Card("236", "21", "arXiv:2405.04434, abstract"),
    "deepseek_v3": Card("671", "37", "arXiv:2412.19437, abstract"),
    "qwen1_5_moe_a2_7b": Card("14.3", "2.7", "huggingface.co/Qwen/Qwen1.5-MoE-A2.7B"),
    "qwen2_57b_a14b": Card("57.41", "14", "qwenlm.github.io/blog/qwen2"),
    "qwen3_30b_a3b": Card("30.5", "3.3", "huggingface.co/Qwen/Qwen3-30B-A3B"),
    "qwen3_235b_a22b": Card("235", "22", "huggingface.co/Qwen/Qwen3-235B-A22B"),
    "gpt_oss_20b": Card("20.91", "3.61", "arXiv:2508.10925, table 1", embedding_in_active=False),
    "gpt_oss_120b": Card("116.83", "5.13", "arXiv:2508.10925, table 1", embedding_in_active=False),
    "olmoe_1b_7b": Card("6.9", "1.3", "arXiv:2409.02060, abstract"),
    "grok_1": Card("314", None, "github.com/xai-org/grok-1", embedding_in_total=False),
}
"""By preset. Grok-1's active parameters are published as 25% of the weights, which holds of its experts."""
