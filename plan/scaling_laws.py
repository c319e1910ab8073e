"""Published scaling laws: the size, tokens and experts of the lowest loss for a number of FLOPs, and how far each fit goes.

A budget is 6 x active parameters x tokens, as in the papers and in `tokenyard params`. N active parameters, D tokens, C FLOPs,
E expansion rate (expert parameters over those that a token uses), G granularity (how many times smaller an expert is than a
feed-forward layer of 4 x width). Each constant was read in the paper that the law names.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

Range = tuple[float, float]


@dataclass(frozen=True)
class Fitted:
    """The experiments that a law was fitted on; None where it does not depend on that."""

    active: Range | None = None
    tokens: Range | None = None
    flops: Range | None = None
    total: Range | None = None
    granularity: Range | None = None

    def beyond(self, point: "Point") -> dict[str, float]:
        """Returns the factors, above 1, by which a point is outside of the experiments."""
        factors = dict[str, float]()
        for name in ("active", "total", "tokens", "flops", "granularity"):
            span, value = getattr(self, name), getattr(point, name)
            if span is not None and value is not None:
                factors[name] = max(value / span[1], span[0] / value)
        return {name: factor for name, factor in factors.items() if factor > 1.005}


class Point(NamedTuple):
    """What a law says of a budget."""

    flops: float
    active: float
    tokens: float
    total: float | None = None
    """Parameters in all, of the shape that the paper trained."""
    granularity: int | None = None
    loss: float | None = None
    """Nats a token, on the law's own data with its own tokenizer. None: the law says where the optimum is and not how low."""


@dataclass(frozen=True)
class Law(ABC):
    name: str
    source: str
    experts: str
    """The architecture, in words."""
    fitted: Fitted
    embeddings: bool | None
    """Whether its active parameters count embedding and head; None if it counts FLOPs."""

    @abstractmethod
    def best(self, flops: float, active: float | None = None, tokens: float | None = None) -> Point | None:
        """Returns the point of lowest loss with this budget; with `active` or `tokens` given, what the other one then is.

        None if a given size leaves nothing to say for the law.
        """

    def budget_for(self, reached: Callable[[Point], float], target: float) -> float:
        """Returns the FLOPs whose optimum has reached(point) = target, which grows with the FLOPs."""
        low, high = math.log(1e9), math.log(1e36)
        for _ in range(100):
            middle = (low + high) / 2
            point = self.best(math.exp(middle))
            assert point is not None
            low, high = (middle, high) if reached(point) < target else (low, middle)
        return math.exp(low)


@final
@dataclass(frozen=True)
class SumOfPowers(Law):
    """L = c + m N^mu + n D^nu with mu, nu < 0 (Hoffmann et al. 2022, equation 2; their optimum is equation 4)."""

    c: float
    m: float
    mu: float
    n: float
    nu: float
    total: Callable[[float], float] = float
    """Of the active parameters, those in all."""

    def loss(self, active: float, tokens: float) -> float:
        return self.c + self.m * active**self.mu + self.n * tokens**self.nu

    def best(self, flops: float, active: float | None = None, tokens: float | None = None) -> Point:
        # m mu N^mu = n nu D^nu with D = C / (6 N)
        ratio = (self.n * self.nu) / (self.m * self.mu) * (flops / 6) ** self.nu
        size = flops / 6 / tokens if tokens is not None else active or ratio ** (1 / (self.mu + self.nu))
        trained = flops / 6 / size
        return Point(flops, size, trained, self.total(size), None, self.loss(size, trained))


@final
@dataclass(frozen=True)
class OptimalSize(Law):
    """The optimum alone, M = factor C^power training FLOPs a token (without embedding and head), D = C / M."""

    factor: float
    power: float

    def best(self, flops: float, active: float | None = None, tokens: float | None = None) -> Point | None:
        if active is not None or tokens is not None:
            return None
        each = self.factor * flops**self.power
        return Point(flops, each / 6, flops / each)


@final
@dataclass(frozen=True)
class FineGrained(Law):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta, with N all parameters but embedding and head (Krajewski et al. 2024,
    equation 9), for models of d wide blocks with 64 times fewer layers, whose routers cost FLOPs too (equation 10, appendix E).
    """

    expansion: int
    a: float
    alpha: float
    b: float
    beta: float
    g: float
    gamma: float
    c: float

    def loss(self, total: float, tokens: float, granularity: float) -> float:
        return self.c + (self.g / granularity**self.gamma + self.a) / total**self.alpha + self.b / tokens**self.beta

    def point(self, flops: float, layers: float, granularity: int) -> Point:
        """Returns the model of (a real number of) layers, trained for the whole budget."""
        active, total = 12 * 4096 * layers**3, (8 * self.expansion + 4) * 4096 * layers**3
        tokens = flops / self.flops_per_token(layers, granularity)
        return Point(flops, active, tokens, total, granularity, self.loss(total, tokens, granularity))

    def flops_per_token(self, layers: float, granularity: float) -> float:
        """6 FLOPs of each active parameter and 14 of each parameter of a router."""
        width = 64 * layers
        return (12 * width**2 * 6 + width * self.expansion * granularity * 14) * layers

    def best(self, flops: float, active: float | None = None, tokens: float | None = None) -> Point:
        points = list[Point]()
        for granularity in GRANULARITIES:
            if active is not None:
                layers = (active / 12 / 4096) ** (1 / 3)
            elif tokens is not None:
                layers = _root(lambda x, G=granularity, D=tokens: self.flops_per_token(x, G) * D, flops)
            else:
                layers = _lowest(lambda x, G=granularity: self.point(flops, x, G).loss or 0.0)
            points.append(self.point(flops, layers, granularity))
        return min(points, key=lambda each: each.loss or 0.0)


GRANULARITIES = tuple(2**power for power in range(9))
LAYERS = 1e-2, 1e6
"""Bounds of searches for a (real) number of layers."""


def _lowest(value: Callable[[float], float]) -> float:
    """Returns where `value` has its only minimum within LAYERS (golden-section search in the logarithm)."""
    low, high, share = math.log(LAYERS[0]), math.log(LAYERS[1]), (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        one, two = high - share * (high - low), low + share * (high - low)
        low, high = (low, two) if value(math.exp(one)) < value(math.exp(two)) else (one, high)
    return math.exp((low + high) / 2)


def _root(value: Callable[[float], float], target: float) -> float:
    """Returns where the growing `value` is `target` within LAYERS."""
    low, high = math.log(LAYERS[0]), math.log(LAYERS[1])
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if value(math.exp(middle)) < target else (low, middle)
    return math.exp(low)


# Joint MoE scaling laws (Ludziejewski et al. 2025), equations 4, 6, 9 and 10, table 3, for experts of a whole feed-forward layer.

A, ALPHA, DELTA, GAMMA, B, BETA, OMEGA, ZETA = 35.91, -0.1889, -0.2285, 0.0098, 35.98, -0.1775, 0.5529, -0.0259
START, MOST, FLOOR, VOCABULARY = 2.0732, 290.4521, 1.3637, 50257


def joint_law(experts: int) -> SumOfPowers:
    """Returns the law for this many experts. 1 to 32 were trained."""
    effective = 1 / (1 / (experts - 1 + 1 / (1 / START - 1 / MOST)) + 1 / MOST)
    log = math.log(effective)
    return SumOfPowers(
        "Ludziejewski 2025",
        "arXiv:2502.05172",
        f"1 of {experts}",
        Fitted(active=(79e6, 2.7e9), tokens=(0.5e9, 80e9)),
        True,
        FLOOR,
        A * effective**DELTA,
        ALPHA + GAMMA * log,
        B * effective**OMEGA,
        BETA + ZETA * log,
        lambda active: active + 9 * (experts - 1) * 4096 * _root(_joint_active, active) ** 3,
    )


def _joint_active(layers: float) -> float:
    return 2 * 64 * layers * VOCABULARY + 13 * 4096 * layers**3


_CHINCHILLA = Fitted(active=(70e6, 16e9), tokens=(5e9, 500e9))
"""The abstract of Hoffmann et al. 2022."""

LAWS: tuple[Law, ...] = (
    SumOfPowers("Hoffmann 2022", "arXiv:2203.15556, D.3", "dense", _CHINCHILLA, True, 1.69, 406.4, -0.34, 410.7, -0.28),
    SumOfPowers("Besiroglu 2024", "arXiv:2404.10102", "dense", _CHINCHILLA, True, 1.8172, 482.01, -0.3478, 2085.43, -0.3658),
    OptimalSize("DeepSeek LLM 2024", "arXiv:2401.02954", "dense", Fitted(flops=(1e17, 3e20)), None, 0.1715, 0.5243),
    FineGrained(
        *("Krajewski 2024", "arXiv:2402.07871, table 1", "E 64"),
        *(Fitted(active=(3e6, 85e6), tokens=(16e9, 130e9), granularity=(1, 16)), False),
        *(64, 18.1, 0.115, 30.8, 0.147, 2.1, 0.58, 0.47),
    ),
    FineGrained(
        *("Krajewski 2024", "arXiv:2402.07871, table 8", "E 16"),
        *(Fitted(active=(3e6, 49e6), tokens=(8e9, 66e9), granularity=(1, 16)), False),
        *(16, 19.64, 0.124, 57.07, 0.169, 1.18, 0.986, 0.472),
    ),
    joint_law(8),
    joint_law(32),
    OptimalSize("Tian 2025", "arXiv:2507.17702, table 1", "4 of 64, 1 shared", Fitted(flops=(3e17, 3e20)), None, 0.1915, 0.5095),
)
MIXTURES = LAWS[3:]
"""Those with experts."""


def leverage(activated: float, granularity: float, flops: float) -> float:
    """Returns the FLOPs of a dense model of equal loss over those of a mixture (Tian et al. 2025, equation 13, table 2).

    `activated`: experts that a token uses, shared ones too, over all. `granularity`: 2 x width / hidden columns of an expert.
    The paper does not say the bases of its logarithms: with 10 for FLOPs and 2 for granularity both results that it states come
    out, an optimal granularity of about 12, and more than 7 for 3.1 % and 12 at 1e22 FLOPs.
    """
    saturated = 1 / (1 / (activated + 1 / (1 / 1.63e-2 - 1 / 5.28e16)) + 1 / 5.28e16)
    fineness = math.log2(granularity)
    return saturated ** (1.23 - 7.61e-2 * math.log10(flops) + 1.67e-2 * fineness**2 - 1.17e-1 * fineness)


LEVERAGE_FITTED = Fitted(flops=(1e18, 3e20))
ACTIVATED = (0.25, 0.125, 0.0625, 0.031, 0.016, 0.008)
"""The least is the least that was trained."""
FINEST = 2 ** (1.17e-1 / 2 / 1.67e-2)
"""The granularity of the highest leverage, whatever the budget and the sparsity."""


class StepFit(NamedTuple):
    """Peak learning rate of AdamW, and tokens of a step."""

    name: str
    source: str
    experts: str
    fitted: Fitted
    lr: Callable[[Point], float]
    batch: Callable[[Point], float]


def _step_law(N: float, D: float) -> float:
    return 1.79 * N**-0.713 * D**0.307


STEP_FITS = (
    StepFit(
        *("Step Law 2025, N total", "arXiv:2503.04715", "dense and mixtures", Fitted(total=(59e6, 2.16e9), tokens=(2e9, 100e9))),
        lambda point: _step_law(point.total or point.active, point.tokens),
        lambda point: 0.58 * point.tokens**0.571,
    ),
    StepFit(
        *("Step Law 2025, N active", "arXiv:2503.04715", "dense", Fitted(active=(59e6, 1.08e9), tokens=(2e9, 100e9))),
        lambda point: _step_law(point.active, point.tokens),
        lambda point: 0.58 * point.tokens**0.571,
    ),
    StepFit(
        *("DeepSeek LLM 2024", "arXiv:2401.02954, equation 1", "dense", Fitted(flops=(1e17, 2e19))),
        lambda point: 0.3118 * point.flops**-0.1250,
        lambda point: 0.2920 * point.flops**0.3271,
    ),
    StepFit(
        *("Tian 2025", "arXiv:2507.17702, equation 3", "4.7 to 10.9 % activated", Fitted(flops=(3e17, 3e20))),
        lambda point: 1.1576 * point.flops**-0.1529,
        lambda point: 0.0694 * point.flops**0.3644,
    ),
)
"""The data of Step Law's authors name mixtures by all of their parameters (N) and list active ones apart."""
