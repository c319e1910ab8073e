"""What serving a model needs and gives: memory, GPUs and how to cut it, bounds of prefill and decoding, the price of a token.

All are bounds from published peaks and an even routing; the rows of served.json say how far real systems stay below them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..moe.config import AttentionKind, ModelConfig
from ..moe.param_count import Count, count, flops_per_token, kv_cache_elements, moe_layers
from ..train.config.gpus import Gpu

BYTES = {"bf16": 2.0, "fp8": 1 + 4 / 128**2, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32, "mxfp4": 0.5 + 1 / 32}
"""Bytes of a weight with its share of the scales: fp8 has one of 4 bytes a block of 128 x 128 (DeepSeek-V3), int8 and int4 one of 2
bytes for 32 weights (Q8_0 and Q4_0 of llama.cpp), mxfp4 one of 1 byte for 32 (OCP microscaling formats)."""
CACHE_BYTES = {"bf16": 2, "fp8": 1}
SENT_BYTES, RETURNED_BYTES = 1, 2
"""Bytes of an element on its way to an expert (fp8) and back (bf16), as in DeepSeek-V3's serving."""

MEMORY_SHARE = 0.9
"""The share of a GPU's memory for weights and cache; the rest is for the runtime, workspaces and fragmentation (vLLM's default)."""
DECODE_SHARES = (0.25, 0.75, 1.0)
PREFILL_SHARES = (0.15, 0.35, 0.7)
"""Shares of the bound that real systems reach: low, likely, high. They describe the rows of served.json."""
ALIKE = 0.7
"""Sequences choose alike, so that N of them touch as few experts as N ** ALIKE that choose independently; for the high rate. The
random tokens of served.json's batches fit 0.7 to 0.9."""
LARGEST = 1024


@dataclass(frozen=True)
class Deployment:
    """A model on `gpus` GPUs: experts are spread over all, all else is cut by `tensor` and repeated for other sequences.

    `weights` is the format of attention, dense and shared feed-forwards, `experts` that of the experts; embedding, head, router and
    norms stay in bf16. `sequences` are decoded at a time, over all GPUs, each with `context` tokens in its cache. With `link`, in
    bytes/s, the experts are kept outside of the GPU, apart from a share `hit` of what tokens choose.
    """

    config: ModelConfig
    gpu: Gpu
    gpus: int = 1
    tensor: int = 1
    weights: str = "bf16"
    experts: str = "bf16"
    cache: str = "bf16"
    context: int = 4096
    sequences: int = 1
    link: float | None = None
    hit: float = 0.0

    @property
    def parts(self) -> Count:
        """The parameters of the model."""
        return count(self.config)

    # Memory, in bytes.

    @property
    def expert_bytes(self) -> float:
        """All experts."""
        return self.parts.experts * BYTES[self.experts]

    @property
    def other_bytes(self) -> float:
        """All weights but the experts."""
        parts = self.parts
        matrices = parts.attention + parts.shared + parts.dense
        return matrices * BYTES[self.weights] + (parts.embedding + parts.head + parts.router + parts.norms) * BYTES["bf16"]

    @property
    def cache_bytes(self) -> float:
        """The cache of a sequence."""
        return kv_cache_elements(self.config, self.context) * CACHE_BYTES[self.cache]

    @property
    def experts_of_gpu(self) -> float:
        """The share of the experts that the fullest GPU works for."""
        experts = self.config.moe.experts
        return math.ceil(experts / self.gpus) / experts if experts else 0.0

    @property
    def cache_on_gpu(self) -> float:
        """The cache on a GPU. Ranks of a tensor group share the heads of keys and values; a latent is whole on each."""
        parts = 1 if self.config.attention.kind is AttentionKind.mla else min(self.tensor, self.config.kv_heads)
        return math.ceil(self.sequences * self.tensor / self.gpus) * self.cache_bytes / parts

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on the fullest GPU, by part."""
        return {
            "experts": self.expert_bytes * self.experts_of_gpu * (1 if self.link is None else self.hit),
            "other weights": self.other_bytes / self.tensor,
            "cache": self.cache_on_gpu,
        }

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= MEMORY_SHARE * self.gpu.memory_bytes

    # Time, in seconds.

    def touched(self, independent: float = 1.0) -> float:
        """The share of the experts of a layer that a step of decoding reads: 1 - (1 - K / E)^(sequences^independent)."""
        moe = self.config.moe
        return 1 - (1 - moe.top_k / moe.experts) ** (self.sequences**independent) if moe.experts else 0.0

    def decode_terms(self, independent: float = 1.0) -> dict[str, float]:
        """Returns the seconds of a step of decoding that each resource needs at its peak; the step takes at least the largest."""
        read = self.other_bytes - (0 if self.config.tie_embeddings else self.parts.embedding * BYTES["bf16"])
        experts = self.expert_bytes * self.experts_of_gpu * self.touched(independent)
        on_gpu = experts if self.link is None else experts * self.hit
        terms = {
            "memory": (read / self.tensor + on_gpu + self.cache_on_gpu) / self.gpu.memory_bytes_per_second,
            "compute": self.sequences * self._decode_flops() / self.gpus / self._peak(),
            "exchange": self._exchange(self.sequences / self.gpus, once_a_domain=False) + self._all_reduce(self.sequences),
        }
        if self.link is not None:
            terms["experts from outside"] = experts * (1 - self.hit) / self.link
        return terms

    def prefill_terms(self, prompt: int) -> dict[str, float]:
        """Returns the seconds of a token of a prompt, on all GPUs together; weights are read for many tokens at once."""
        return {
            "compute": flops_per_token(self.config, prompt) / self.gpus / self._peak(),
            "exchange": self._exchange(1 / self.gpus, once_a_domain=True) + self._all_reduce(1),
        }

    def _peak(self) -> float:
        """FLOP/s of products; weights in other formats than fp8 are converted to bf16 on the way."""
        return self.gpu.flops.get("fp8" if self.weights == self.experts == "fp8" else "bf16", self.gpu.flops["bf16"])

    def _decode_flops(self) -> float:
        """FLOPs of one token with `context` tokens before it. Latent attention works on the latent itself (DeepSeek-V2)."""
        attention = self.config.attention
        if attention.kind is not AttentionKind.mla:
            return flops_per_token(self.config, 2 * self.context - 1)  # its mean over a sequence is that of its middle
        latent = 2 * self.config.heads * (2 * attention.mla.kv_rank + attention.mla.rope_width)
        return flops_per_token(self.config, 1) + self.config.layers * latent * self.context

    def _exchange(self, tokens: float, once_a_domain: bool) -> float:
        """Seconds in which the rows of `tokens` tokens of each GPU reach their experts and return.

        Tensor ranks hold the same rows and split what they send; a lone tensor group sends nothing. `once_a_domain`: a token
        goes to a domain at most once, as DeepSeek-V3 does for prompts, and on from there.
        """
        moe, domain = self.config.moe, min(self.gpu.domain, self.gpus)
        if self.tensor == self.gpus or not moe_layers(self.config):
            return 0.0
        row = tokens * self.config.width * (SENT_BYTES + RETURNED_BYTES) * moe_layers(self.config)
        domains = self.gpus / domain
        outside = moe.top_k * (1 - 1 / domains)
        if once_a_domain:
            chosen = domains * (1 - (1 - 1 / domains) ** moe.top_k)
            outside = min(chosen, moe.router.top_groups if moe.router.groups > 1 else chosen) * (1 - 1 / domains)
        inside = moe.top_k * (1 - 1 / domain)
        return max(row * outside / self.gpu.network_bytes_per_second, row * inside / self.gpu.nvlink_bytes_per_second)

    def _all_reduce(self, tokens: float) -> float:
        """Seconds of the two all-reduces a layer of the tensor group, for `tokens` tokens over all GPUs."""
        if self.tensor == 1:
            return 0.0
        sent = tokens * self.tensor / self.gpus * self.config.width * BYTES["bf16"] * 2 * (self.tensor - 1) / self.tensor
        return 2 * self.config.layers * sent / self.gpu.nvlink_bytes_per_second

    # Rates, in tokens/s over all GPUs.

    @property
    def decode(self) -> tuple[float, float, float]:
        """Low, likely, high."""
        low, likely, _ = _shares(self.sequences / max(self.decode_terms().values()), DECODE_SHARES)
        return low, likely, DECODE_SHARES[2] * self.sequences / max(self.decode_terms(ALIKE).values())

    def prefill(self, prompt: int) -> tuple[float, float, float]:
        """Low, likely, high, for prompts of `prompt` tokens."""
        return _shares(1 / max(self.prefill_terms(prompt).values()), PREFILL_SHARES)

    def price(self, rates: tuple[float, float, float]) -> tuple[float, float, float] | None:
        """Returns US dollars for a million tokens: low, likely, high; None if the catalogue has no price."""
        price = self.gpu.price
        if price is None:
            return None
        low, likely, high = (self.gpus / 3600 * 1e6 / rate for rate in reversed(rates))
        return price.low * low, price.likely * likely, price.high * high


def _shares(bound: float, shares: tuple[float, float, float]) -> tuple[float, float, float]:
    low, likely, high = (share * bound for share in shares)
    return low, likely, high


def smallest(asked: Deployment, tensor: int = 0) -> Deployment | None:
    """Returns the deployment with the fewest GPUs that fits, in its best cut; None beyond LARGEST."""
    sizes = (1, 2, 3, *range(4, LARGEST + 1, 4))
    return next((found for gpus in sizes if (found := best_cut(replace(asked, gpus=gpus), tensor))), None)


def best_cut(asked: Deployment, tensor: int = 0) -> Deployment | None:
    """Returns the deployment cut by the tensor degree with the shortest step of decoding; None if none fits."""
    fitting = [cut for cut in cuts(asked, tensor) if cut.fits]
    return min(fitting, key=lambda cut: max(cut.decode_terms().values()), default=None)


def cuts(asked: Deployment, tensor: int = 0) -> Iterator[Deployment]:
    """Yields a deployment for each tensor degree (or for `tensor` alone) that divides the heads and stays in a domain."""
    for degree in [tensor] if tensor else range(1, min(asked.gpus, asked.gpu.domain) + 1):
        if asked.gpus % degree == 0 and asked.config.heads % degree == 0 and degree <= asked.gpu.domain:
            yield replace(asked, tensor=degree)
