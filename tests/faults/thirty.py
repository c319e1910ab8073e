"""The thirty faults and what is expected of a run, and the measures of a trustworthy one with the faults that show them."""

FAULTS = {
    1: ("SIGKILL at each phase of a save", "restart from the newest complete step; debris removed"),
    2: ("SIGKILL at random instants", "every restart goes on; at most one interval lost"),
    3: ("flipped bit, truncated, missing, swapped or foreign shard", "refused by name before a tensor changes; falls back"),
    4: ("disk full in a save", "failed on all ranks; the previous checkpoint intact; policy followed"),
    5: ("training changes weights while a save is under way", "the file is step k, byte for byte the synchronous one"),
    6: ("the writer of a save dies", "known on every rank within one step; no hang at exit"),
    7: ("retention removes the wrong one", "the newest verified checkpoint is never removed"),
    8: ("two jobs in one run folder; another configuration", "second job refused; changed model refused, changed lr shown"),
    9: ("a checkpoint of the release before", "loads; the next losses are bit for bit the same"),
    10: ("stop, resume, stop, resume", "losses, norms, weights and random state bitwise those of the straight run"),
    11: ("resume on another layout", "weights and moments bit-equal by global name; next loss equal"),
    12: ("an expert's identity", "hash of weights and moments of each expert unchanged; all there"),
    13: ("wrong factor in a gradient", "every parameter's gradient equals one process, fp64, relative <= 1e-9"),
    14: ("a parameter that is not trained", "each is in exactly one optimizer group and changes"),
    15: ("nothing, or something else, to resume from", "refused in seconds, before any process group"),
    16: ("two resumes in the middle of a shard", "0 rows lost, 0 repeated"),
    17: ("other data ranks in the middle of an epoch", "the same global batches"),
    18: ("bad rows", "skipped and counted with file and row; stop above the limit"),
    19: (
        "a source that fails, stalls, is gone",
        "goes on at the same row; after the limit a checkpoint and its exit code",
    ),
    20: ("kill -9 of one rank", "all started again; the curve bitwise; <= 15 s from the kill to the next step"),
    21: ("SIGTERM, SIGINT, SIGUSR1, SIGUSR2, twice, in a save; files", "one step on all ranks, durable, exit 0"),
    22: ("a rank hangs or leaves out a collective", "ends within the timeout + 10 s; right rank, step, phase, layer, collective"),
    23: ("an exception on one rank", "the job ends within 10 s, the first error first, no rank left"),
    24: ("a rank 50 ms slower a step", "named within 20 steps with its share of lost time"),
    25: (
        "bit flip in a replica; wrong gradient once, always",
        "rank and tensor named; transient: the right value; else stop",
    ),
    26: ("NaN in one expert's gradient on one rank", "agreed before the update; state bitwise; 3 policies; no poisoned checkpoint"),
    27: ("loss spike; collapsed router; idle experts", "spike skipped and counted; no hang, no NaN; every choice counted"),
    28: ("40 bad configurations", "each refused in one line with the nearest valid value, <= 3 s"),
    29: ("a tracker that is unreachable, raises or is slow", "training goes on; metrics.jsonl complete, no step twice"),
    30: ("hostile inputs, secrets", "refused by name; no code runs; no secret in the run folder"),
}
"""By number: the fault, and what is expected."""

MEASURES = [
    ("Crash in a save, random SIGKILL", "all usable, seeds published", [1, 2]),
    ("Bit flips and truncation found", "100 % of 100, on by default, automatic fallback", [3]),
    ("Resume, same layout", "bitwise, two resumes, random state included", [10]),
    ("Layout changes", ">= 12 pairs, no conversion, weights and AdamW bit-equal", [11, 12]),
    ("Gradient parity", "every parameter, fp64, relative <= 1e-9", [13]),
    ("Rows lost / repeated", "0 / 0, data ranks may change", [16, 17]),
    ("SIGTERM to durable", "<= 1 step + save; all ranks at one step, 20/20", [21]),
    ("Hang named", "<= timeout + 10 s, right rank 20/20, on gloo too", [22]),
    ("NaN step", "before the update, 3 policies, 0 poisoned checkpoints", [26]),
    ("Replica divergence", "every N steps, <= 1 % time, names tensor and rank", [25]),
    ("Asynchronous save", "blocks <= 10 % of a synchronous one", [5]),
    ("Restart", "<= 15 s, toy run on a CPU", [20]),
    ("Bad configurations", "40/40 in <= 3 s, before the process group", [28]),
    ("Unsafe loads, secrets", "0 pickle, hostile fixtures refused, 0 hits", [30]),
]
"""Measure, target, and the faults whose figures show it."""
