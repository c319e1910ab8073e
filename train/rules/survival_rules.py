"""The rules of numerics.* and debug.*."""

INTERVALS = {
    "numerics.max_skips": "[0, inf)",
    "numerics.spike_sigma": "(0, inf)",
    "numerics.spike_window": "[8, inf)",
    "debug.replicas_every": "[0, inf)",
    "debug.stragglers_every": "[0, inf)",
}
