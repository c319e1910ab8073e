"""The learning rate of each step. No torch here."""

import math

from .config.config import Config, DecayCurve, ScheduleUnit, Shape


def learning_rate_factor(config: Config, step: int) -> float:
    """Returns the share of the peak learning rate in optimizer step `step` (the first is 1).

    After a linear warm-up the rate follows a cosine to `final` (Loshchilov and Hutter 2017); or is stable and then decays to it
    (MiniCPM's warm-up-stable-decay), linearly or by 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392); or falls in two equal steps,
    after 80 % and 90 % of the run (DeepSeekMoE, section 5.1); or is constant. What counts are the steps, or their tokens, up to the
    end of this one.
    """
    schedule, sizes = config.schedule, config.batch.sizes(config.sequence_length)
    in_tokens = schedule.unit is ScheduleUnit.tokens
    now, end, decay_from = (
        sizes.before(each) * config.sequence_length if in_tokens else each
        for each in (step, config.steps, schedule.decay_from or 0)
    )
    if now <= schedule.warmup:
        return now / schedule.warmup
    if schedule.shape is Shape.constant:
        return 1.0
    if schedule.shape is Shape.multistep:
        return 1.0 if now <= 0.8 * end else schedule.final**0.5 if now <= 0.9 * end else schedule.final
    if schedule.shape is Shape.wsd:
        decay = end - decay_from if decay_from else schedule.decay or max(1, end // 5)
        done = min(1.0, max(0.0, (now - (end - decay)) / decay))
        return 1.0 - (1.0 - schedule.final) * (done**0.5 if schedule.decay_curve is DecayCurve.sqrt else done)
    done = (now - schedule.warmup) / max(1, end - schedule.warmup)
    return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * done))
