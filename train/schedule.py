"""The learning rate of each step."""

import math

from .config.config import ScheduleConfig, Shape


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate in optimizer step `step` (the first is 1) of `steps`.

    Linear warm-up; then a cosine to `final` (Loshchilov and Hutter 2017), or stable and a linear decay to `final` (MiniCPM's
    warm-up-stable-decay), or constant.
    """
    if step <= config.warmup:
        return step / config.warmup
    if config.shape is Shape.constant:
        return 1.0
    if config.shape is Shape.wsd:
        decay = config.decay if config.decay is not None else max(1, steps // 5)
        done = max(0.0, (step - (steps - decay)) / max(1, decay))
        return 1.0 - (1.0 - config.final) * done
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done))
