"""`tokenyard plan serve`: the words that describe a deployment, and the page about it."""

import json
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..plan.serving import BYTES, CACHE_BYTES, LARGEST, MEMORY_SHARE, Deployment, best_cut, cuts, smallest
from ..train.config.config import ConfigError
from ..train.config.gpus import gpus
from ..train.config.number_format import gigabytes, short
from ..train.rank_command import refuse
from .params import configured
from .words import named_models, one_of, split_words, whole_number

CHOICES = {"weights": BYTES, "experts": BYTES, "cache": CACHE_BYTES}
KEYS = ("gpu", "gpus", "tensor", *CHOICES, "context", "sequences", "link", "hit")


def serve_command(arguments: Namespace) -> int:
    """Prints the page, or one object (--json). Returns the exit code."""
    try:
        name, deployment = read_deployment(arguments.words)
    except ConfigError as error:
        return refuse(error)
    found = facts(name, deployment)
    print(json.dumps(found) if arguments.json else "\n".join(lines(found, deployment)))
    return 0


def read_deployment(words: list[str]) -> tuple[str, Deployment]:
    """Returns the model's name, and the deployment with its number of GPUs and its cut. Raises ConfigError."""
    own, others = split_words(words, KEYS)
    name, config = configured(named_models(others))
    types = gpus()
    weights = one_of("weights", own.get("weights", "bf16"), BYTES)
    asked = Deployment(
        config.model,
        types[one_of("gpu", own.get("gpu", "h100"), types)],
        weights=weights,
        experts=one_of("experts", own.get("experts", weights), BYTES),
        cache=one_of("cache", own.get("cache", "bf16"), CACHE_BYTES),
        context=whole_number("context", own.get("context", "4096"), 1),
        sequences=whole_number("sequences", own.get("sequences", "32"), 1),
        link=1e9 * number("link", own["link"], 0.001, 1e6) if "link" in own else None,
        hit=number("hit", own.get("hit", "0"), 0, 1),
    )
    if "hit" in own and asked.link is None:
        raise ConfigError.of("hit", own["hit"], "experts are inside of the GPU unless link says how to reach them", "link=55")
    return name, cut(asked, whole_number("gpus", own.get("gpus", "0"), 0), whole_number("tensor", own.get("tensor", "0"), 0))


def cut(asked: Deployment, number_of_gpus: int, tensor: int) -> Deployment:
    """Chooses the number of GPUs and the tensor degree where they are 0. Raises ConfigError if what is asked for does not fit."""
    if number_of_gpus == 0:
        found = smallest(asked, tensor)
        if found is None:
            rule = f"a sequence's cache and the weights do not fit on {LARGEST} x {asked.gpu.title}"
            raise ConfigError.of("gpu", asked.gpu.name, rule, "weights=fp8 sequences=1")
        return found
    asked = replace(asked, gpus=number_of_gpus)
    possible = sorted(one.tensor for one in cuts(asked))
    if tensor and tensor not in possible:
        nearest = min(possible, key=lambda one: abs(one - tensor))
        rule = f"must divide gpus={number_of_gpus} and the {asked.config.heads} heads, within a domain of {asked.gpu.domain}"
        raise ConfigError.of("tensor", tensor, rule, f"tensor={nearest}")
    found = best_cut(asked, tensor)
    if found is None:
        least = min(sum(one.memory.values()) for one in cuts(asked, tensor))
        enough = smallest(asked, tensor)
        rule = f"needs {gigabytes(least)} a GPU of {gigabytes(MEMORY_SHARE * asked.gpu.memory_bytes)} usable"
        raise ConfigError.of("gpus", number_of_gpus, rule, f"gpus={enough.gpus}" if enough else "weights=fp8 sequences=1")
    return found


def number(key: str, text: str, least: float, most: float) -> float:
    """Returns the number that `text` is. Raises ConfigError if it is none from `least` to `most`."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        nearest = most if value > most else least
        raise ConfigError.of(key, text, f"must be a number from {least:g} to {most:g}", f"{key}={nearest:g}")
    return value


def facts(name: str, plan: Deployment) -> dict[str, Any]:
    """Returns what the page says, in bytes, seconds and tokens/s over all GPUs; ranges are low, likely, high."""
    decode, prefill = plan.decode, plan.prefill(plan.context)
    parts = plan.parts
    return {
        "model": name,
        "total": parts.total,
        "active": parts.active,
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "tensor": plan.tensor,
        "weights": plan.weights,
        "experts": plan.experts,
        "cache": plan.cache,
        "context": plan.context,
        "sequences": plan.sequences,
        "bytes_per_gpu": plan.memory,
        "usable_bytes_per_gpu": MEMORY_SHARE * plan.gpu.memory_bytes,
        "touched_share_of_experts": plan.touched() if parts.experts else None,
        "decode_seconds_of_a_step": plan.decode_terms(),
        "decode_tokens_per_s": decode,
        "prefill_seconds_of_a_token": plan.prefill_terms(plan.context),
        "prefill_tokens_per_s": prefill,
        "usd_per_million_output_tokens": plan.price(decode),
        "usd_per_million_input_tokens": plan.price(prefill),
        "price": None if plan.gpu.price is None else {"date": plan.gpu.price.date, "source": plan.gpu.price.source},
        "unverified": plan.gpu.unverified,
    }


def lines(found: dict[str, Any], plan: Deployment) -> list[str]:
    """Returns the page for people."""
    memory, usable = found["bytes_per_gpu"], found["usable_bytes_per_gpu"]
    replicas = f", {plan.gpus // plan.tensor} groups for different sequences" if plan.gpus > plan.tensor else ""
    experts = (
        f"experts over all {plan.gpus}, the rest in tensor groups of {plan.tensor}{replicas}" if plan.gpus > 1 else "all on one"
    )
    step = found["decode_seconds_of_a_step"]
    rows = [
        ("model", f"{found['model']}: {short(found['total'])} total, {short(found['active'])} active per token"),
        ("formats", f"weights {plan.weights}, experts {plan.experts}, cache {plan.cache}"),
        ("GPUs", f"{plan.gpus} x {plan.gpu.title}: {experts}"),
        (
            "memory",
            f"{gigabytes(sum(memory.values()))} of {gigabytes(usable)} usable on the fullest GPU: {_parts(memory, gigabytes)}",
        ),
        ("sequences", f"{plan.sequences:,} at a time, each of {plan.context:,} tokens ({gigabytes(plan.cache_bytes)} of cache)"),
    ]
    if found["touched_share_of_experts"] is not None:
        rows.append(("experts", f"a step of decoding reads up to {found['touched_share_of_experts']:.1%} of those of a layer"))
    if plan.link is not None:
        rows.append(("offload", f"{1 - plan.hit:.0%} of the chosen experts come over {plan.link / 1e9:g} GB/s"))
    rows += [
        (
            "decode",
            f"{_range(found['decode_tokens_per_s'])} tokens/s; {_range(one / plan.sequences for one in plan.decode)} a sequence",
        ),
        ("", f"a step needs at least {_parts(step, milliseconds)}"),
        ("prefill", f"{_range(found['prefill_tokens_per_s'])} tokens/s, for prompts of {plan.context:,} tokens"),
        ("", f"a token needs at least {_parts(found['prefill_seconds_of_a_token'], milliseconds)}"),
    ]
    if found["price"]:
        rows += [("price", _dollars(found, "output")), ("", _dollars(found, "input"))]
        rows.append(("", f"an hour of a GPU: {found['price']['source']}, {found['price']['date']}"))
    if found["unverified"]:
        rows.append(("", f"not verified in conf/cluster/{plan.gpu.name}.yaml: {', '.join(found['unverified'])}"))
    return [f"{title:12}{text}".rstrip() for title, text in rows]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _parts(parts: dict[str, float], text: Any) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in parts.items() if value)


def _range(low_likely_high: Iterable[float]) -> str:
    low, likely, high = (f"{float(f'{rate:.3g}'):,.0f}" if rate >= 100 else f"{rate:.2g}" for rate in low_likely_high)
    return f"{low} to {high}, likely {likely}"


def _dollars(found: dict[str, Any], kind: str) -> str:
    price = found[f"usd_per_million_{kind}_tokens"]
    return f"US$ {_range(price)}, for a million tokens of {kind}"
