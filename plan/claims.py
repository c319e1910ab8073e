"""Holds a claim about a model, as found in announcements and model cards, against what its configuration says.

The questions are those of a reader of the field: dense or MoE, both counts of parameters, routing, memory, cost, evidence,
what deployment needs, and what the claim leaves out.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..moe.config import ModelConfig
from ..moe.param_count import count, describe_routing, flops_per_token, kv_cache_elements, moe_layers
from ..train.config.gpus import Gpu, gpus
from ..train.config.number_format import flops, gigabytes, short
from .serving import BYTES, MEMORY_SHARE, Deployment, smallest

TOLERANCE = 0.03
"""Counts that differ by less agree: published ones are rounded."""
CONTEXT = 4096
FORMATS = ("bf16", "fp8", "int4")

NUMBER = r"(\d[\d,]*(?:\.\d+)?)"
SIZE = NUMBER + r"\s?-?(B|bn|billion|T|trillion|M|million)\b"
UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}
EVIDENCE = r"arxiv|doi\.org|https?://|paper|technical report|MMLU|GSM8K|HumanEval|ablation|loss curve|wandb"


@dataclass(frozen=True)
class Answer:
    """What is known of one question: what the model is, what the claim says of it, and the judgement."""

    question: str
    model: str
    """Empty if a configuration cannot tell."""
    claim: str
    """Empty if the claim says nothing."""
    verdict: str
    """agrees, differs with the reason, not stated, or not to be judged."""


def audit(text: str, config: ModelConfig) -> list[Answer]:
    """Returns an answer for each question."""
    text = " ".join(text.split())
    return [
        _kind(text, config),
        _total(text, config),
        _active(text, config),
        _routing(text, config),
        _memory(text, config),
        _compute(text, config),
        _tokens(text, config),
        _evidence(text),
        _deployment(text, config),
    ]


def left_out(answers: list[Answer]) -> list[str]:
    """Returns the questions of which the claim says nothing."""
    return [answer.question for answer in answers if not answer.claim]


def _kind(text: str, config: ModelConfig) -> Answer:
    layers = moe_layers(config)
    model = f"MoE in {layers} of {config.layers} layers" if layers else "dense"
    said = re.search(
        r"(?<!than )(?<!than a )(?:mixture[- ]of[- ]experts|\bMoE\b|\bexperts?\b|\bdense\b|\d+x\d+(?:\.\d+)?B)", text, re.IGNORECASE
    )
    if said is None:
        return Answer("dense or MoE", model, "", "not stated")
    dense = said[0].lower() == "dense"
    return Answer("dense or MoE", model, said[0], "agrees" if dense == (not layers) else f"differs: the model is {model}")


def _total(text: str, config: ModelConfig) -> Answer:
    total, active = count(config).total, count(config).active
    product = re.search(rf"\b(\d+)x{SIZE}", text, re.IGNORECASE)
    stated = [size for size in _sizes(text) if size.kind == "total"] or [size for size in _sizes(text) if not size.kind]
    stated = [size for size in stated if product is None or size.text not in product[0]]
    if not stated and product is None:
        return Answer("total parameters", short(total), "", "not stated")
    if not stated:
        assert product is not None
        value = int(product[1]) * _value(product[2], product[3])
        verdict = "agrees" if _close(value, total) else f"differs: {short(value)} if multiplied; attention and embedding exist once"
        return Answer("total parameters", short(total), product[0], verdict)
    claimed = stated[0]
    if _close(claimed.value, total):
        return Answer("total parameters", short(total), claimed.text, "agrees")
    near_active = math.isclose(claimed.value, active, rel_tol=0.15)
    only_active = ": near to what a token uses, not to what is held" if near_active else ""
    return Answer("total parameters", short(total), claimed.text, _differs(claimed.value, total) + only_active)


def _active(text: str, config: ModelConfig) -> Answer:
    parts = count(config)
    model = f"{short(parts.active)} of {short(parts.total)} ({parts.active / parts.total:.1%})"
    stated = next((size for size in _sizes(text) if size.kind == "active"), None)
    if stated is None:
        return Answer("active per token", model, "", "not stated" if moe_layers(config) else "all, as in every dense model")
    without = parts.active - parts.embedding - parts.head
    if _close(stated.value, parts.active):
        return Answer("active per token", model, stated.text, "agrees")
    if _close(stated.value, without) or _close(stated.value, parts.active - parts.embedding):
        return Answer("active per token", model, stated.text, "agrees, without embedding or head")
    return Answer("active per token", model, stated.text, _differs(stated.value, parts.active))


def _routing(text: str, config: ModelConfig) -> Answer:
    moe, model = config.moe, describe_routing(config)
    experts = re.search(rf"{NUMBER}\s+(?:routed\s+|total\s+)?experts\b", text, re.IGNORECASE)
    chosen = re.search(rf"top[- ]?(\d+)\b|{NUMBER}\s+(?:active|activated|experts? per token|of \d+ experts)", text, re.IGNORECASE)
    said = ", ".join(match[0] for match in (chosen, experts) if match)
    if not said:
        return Answer("routing", model, "", "not stated" if moe_layers(config) else "none")
    wrong: list[str] = []
    if experts and int(experts[1].replace(",", "")) not in (moe.experts, moe.top_k, moe.experts + 1):
        wrong.append(f"{moe.experts} experts")
    if chosen and int((chosen[1] or chosen[2]).replace(",", "")) not in (moe.top_k, moe.top_k + 1):
        wrong.append(f"top-{moe.top_k}")
    return Answer("routing", model, said, f"differs: {', '.join(wrong)}" if wrong else "agrees")


def _memory(text: str, config: ModelConfig) -> Answer:
    needed = {kind: Deployment(config, gpus()["h100"], weights=kind, experts=kind) for kind in FORMATS}
    sizes = {kind: one.expert_bytes + one.other_bytes for kind, one in needed.items()}
    model = "weights " + ", ".join(f"{kind} {gigabytes(size)}" for kind, size in sizes.items())
    said = re.search(rf"{NUMBER}\s?(GB|GiB|TB)\b(?! ?/s)", text, re.IGNORECASE)
    if said is None:
        return Answer(
            "memory",
            model,
            "",
            "not stated; all experts are held, though few work for a token" if moe_layers(config) else "not stated",
        )
    has = _plain(said[1]) * {"gb": 1e9, "gib": 2**30, "tb": 1e12}[said[2].lower()]
    holds = [kind for kind, size in sizes.items() if size <= has]
    if holds:
        return Answer("memory", model, said[0], f"holds the weights in {holds[0]}, cache and runtime not counted")
    return Answer("memory", model, said[0], f"differs: not even {FORMATS[-1]} weights fit, without keeping experts elsewhere")


def _compute(text: str, config: ModelConfig) -> Answer:
    parts = count(config)
    dense = parts.total / parts.active
    model = (
        f"{flops(flops_per_token(config, CONTEXT))} per token forward; a dense model of this size takes about {dense:.1f} x that"
    )
    said = re.search(rf"{NUMBER}\s?(?:[KMGTPE]?FLOPs?)\b|{NUMBER}\s?x (?:faster|cheaper)", text, re.IGNORECASE)
    if said is None:
        return Answer("compute", model if moe_layers(config) else model.partition(";")[0], "", "not stated")
    faster = said[2]
    verdict = "not to be judged from a configuration"
    if faster and _plain(faster) > dense:
        verdict = f"differs: FLOPs alone allow at most {dense:.1f} x over a dense model of equal size"
    return Answer("compute", model, said[0], verdict)


def _tokens(text: str, config: ModelConfig) -> Answer:
    said = re.search(SIZE + r"\s+(?:of\s+)?(?:training\s+)?tokens", text, re.IGNORECASE)
    active = count(config).active
    if said is None:
        return Answer("training tokens", "", "", "not stated")
    ratio = _value(said[1], said[2]) / active
    return Answer(
        "training tokens", "-", said[0], f"{ratio:,.0f} per active parameter (20 is compute-optimal for dense models, Chinchilla)"
    )


def _evidence(text: str) -> Answer:
    found = re.findall(EVIDENCE, text, re.IGNORECASE)
    if not found:
        return Answer("evidence", "", "", "no source, benchmark or log is named")
    return Answer("evidence", "", ", ".join(dict.fromkeys(found)), "named; read it")


def _deployment(text: str, config: ModelConfig) -> Answer:
    h100 = gpus()["h100"]
    found = [
        (kind, smallest(Deployment(config, h100, weights=kind, experts=kind, sequences=1, context=CONTEXT))) for kind in FORMATS
    ]
    least = ", ".join(f"{plan.gpus} ({kind})" for kind, plan in found if plan)
    cache = kv_cache_elements(config, CONTEXT) * 2
    model = f"fewest H100 for one sequence: {least}; {gigabytes(cache)} of cache for {CONTEXT:,} tokens in bf16"
    said = next(_named_gpus(text), None)
    if said is None:
        return Answer("deployment", model, "", "not stated")
    words, gpu, number = said
    holds = number * MEMORY_SHARE * gpu.memory_bytes
    fitting = [
        kind for kind in BYTES if kind in FORMATS and Deployment(config, gpu, weights=kind, experts=kind).expert_bytes <= holds
    ]
    enough = next((kind for kind in fitting if _fits(config, gpu, number, kind)), None)
    return Answer("deployment", model, words, f"fits in {enough}" if enough else "differs: does not fit in " + ", ".join(FORMATS))


def _fits(config: ModelConfig, gpu: Gpu, number: int, kind: str) -> bool:
    plan = smallest(Deployment(config, gpu, weights=kind, experts=kind, sequences=1, context=CONTEXT))
    return plan is not None and plan.gpus <= number


def _named_gpus(text: str) -> Iterator[tuple[str, Gpu, int]]:
    """Yields each type of the catalogue that the text names, longest names first, and the number before it, 1 if there is none."""
    types = sorted(gpus().values(), key=lambda gpu: -sum(map(len, gpu.device_words)))
    for gpu in types:
        if said := re.search(
            rf"(?:(\d+)\s?[x×]?\s?)?(?:\w+\s)?\b{r'.{0,8}?'.join(map(re.escape, gpu.device_words))}\b", text, re.IGNORECASE
        ):
            yield said[0].strip(), gpu, int(said[1] or 1)


@dataclass(frozen=True)
class _Size:
    text: str
    value: float
    kind: str
    """total, active, or empty."""


def _sizes(text: str) -> list[_Size]:
    """Returns the numbers of parameters in the text. Numbers of tokens are left out."""
    found: list[_Size] = []
    for match in re.finditer(SIZE, text, re.IGNORECASE):
        after, before = text[match.end() : match.end() + 28].lower(), text[max(0, match.start() - 24) : match.start()].lower()
        if re.match(r"\s+(?:of\s+)?(?:\w+\s+)?tokens", after) or before.endswith("$"):
            continue
        clause = re.split(r"[,;.()]|\band\b|\bwith\b", after)[0]
        lead = re.split(r"[,;.()]|\band\b|\bwith\b", before)[-1]
        kind = (
            "active"
            if re.search(r"activ|per token|used", clause + lead)
            else "total"
            if re.search(r"total|overall", clause + lead)
            else ""
        )
        found.append(_Size(match[0], _value(match[1], match[2]), kind))
    return found


def _value(number: str, unit: str) -> float:
    return _plain(number) * UNITS[unit[0].lower()]


def _plain(number: str) -> float:
    return float(number.replace(",", ""))


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE)


def _differs(claimed: float, true: float) -> str:
    return f"differs by {(claimed - true) / true:+.0%}"
