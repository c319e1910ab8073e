"""The command line: `tokenyard VERB ...`. Each verb imports what it needs when it is called."""

import sys
from collections.abc import Callable
from difflib import get_close_matches

from ..train.allocator import restart_with_kept_memory
from ..train.config.complain import BAD_USAGE, go_silent, printable
from ..train.config.redact import redact_tracebacks
from ..train.fault_tolerance.signals import SAVING, block_signals
from ..version import __version__
from .completion import FLAGS, completion_command
from .parser import OneLineParser, add_config_dir, add_json, not_negative, port, positive, share, with_config_dir


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; `argv` defaults to the arguments of the process. Returns the exit code."""
    try:
        code = _call(sys.argv[1:] if argv is None else argv, alone=argv is None)
        sys.stdout.flush()
    except BrokenPipeError:
        go_silent(sys.stdout)  # whoever read the output has ended, as `head` does
        return BROKEN_PIPE
    return code


def _call(words: list[str], alone: bool) -> int:
    """Calls the verb that the words begin with. `alone`: it is all that this process does."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else BAD_USAGE
    if words[0] == "--version":
        print(f"tokenyard {__version__}")
        return 0
    if words[0] in FLAGS:
        return completion_command(words[1:], VERBS)
    if words[0] not in VERBS:
        nearest = (get_close_matches(words[0], VERBS, 1, 0) or list(VERBS))[0]
        print(
            f"tokenyard: {printable(words[0])}: must be one of {', '.join(VERBS)}; nearest valid: tokenyard {nearest}",
            file=sys.stderr,
        )
        return BAD_USAGE
    if alone:
        redact_tracebacks()
    if alone and words[0] == "train":
        block_signals(SAVING)  # there is nothing to save yet, and by itself this signal would end the process
        restart_with_kept_memory()
    return VERBS[words[0]](words[1:])


BROKEN_PIPE = 141
"""The exit code of a process that SIGPIPE ends."""


def train(argv: list[str]) -> int:
    from .train import train_command

    return train_command(argv)


def parity(argv: list[str]) -> int:
    parser = OneLineParser(
        "tokenyard parity",
        usage="%(prog)s [-h] [--json] [group=option ...] [key=value ...] [parity.key=value ...]",
        description="Trains a model, made small, as one process and on many layouts, in fp64, and compares all numbers.",
        epilog="parity.layouts=auto|'[tensor=2 expert=2, shard=4 recompute]' parity.ranks=4 parity.steps=3 parity.shrink=true. "
        "Exit code 0: equal; 1: a layout differs; 2: a wrong configuration.",
    )
    parser.add_argument("words", nargs="*", help="overrides as for tokenyard train")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, the table on standard error")
    add_config_dir(parser)
    arguments, flags = parser.parse_known_intermixed_args(argv)
    from ..parity.command import parity_command

    return parity_command(with_config_dir([*arguments.words, *flags], arguments), arguments.json)


def generate(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard generate", description="Continues a prompt with the model of a checkpoint.")
    parser.add_argument("checkpoint", help="folder of a checkpoint, of a run or of Hugging Face, or a name in the hub's cache")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=positive, default=128, help="length of the continuation (%(default)s)")
    parser.add_argument("--temperature", type=not_negative, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument(
        "--top-p", type=share, default=0.95, help="sample from the likeliest tokens of this probability (%(default)s)"
    )
    parser.add_argument("--top-k", type=positive, help="sample from at most so many of the likeliest tokens")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (%(default)s)")
    add_json(parser)
    arguments = parser.parse_args(argv)
    if code := _unreadable(arguments.checkpoint):
        return code
    from .generate import generate_command

    return generate_command(arguments)


def evaluate(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard evaluate", description="Validation loss of a checkpoint, or its results in tasks of lm-eval.")
    parser.add_argument("checkpoint", help="folder of a checkpoint, of a run or of Hugging Face, or a name in the hub's cache")
    parser.add_argument("overrides", nargs="*", help="group=option and key=value, as for tokenyard train")
    parser.add_argument(
        "--tasks", metavar="A,B", help="YAML files, folders of them or names of lm-eval's, instead of the validation"
    )
    parser.add_argument("--limit", type=positive, help="questions of each task (all)")
    parser.add_argument("--batch", type=positive, default=16, help="rows that are scored at a time (%(default)s)")
    add_config_dir(parser)
    add_json(parser)
    arguments = parser.parse_intermixed_args(argv)
    if code := _unreadable(arguments.checkpoint):
        return code
    from .evaluate import evaluate_command

    return evaluate_command(arguments)


def _unreadable(path: str) -> int:
    """Checks a checkpoint before torch is imported. Returns 0, or the exit code if it cannot be opened."""
    from pathlib import Path

    from ..train.config.complain import complain
    from ..train.stored_config import check_readable
    from ..train.weight_source import refuse_absent

    try:
        refuse_absent(path)
        check_readable(Path(path))
    except (ValueError, OSError) as error:
        return complain(error)
    return 0


def params(argv: list[str]) -> int:
    parser = OneLineParser(
        "tokenyard params",
        usage="%(prog)s [-h] [--json] [--table] [HF_FOLDER] [group=option ...] [key=value ...]",
        description="Parameters, bytes and FLOPs of a model and of a rank's share of it. Nothing is built, no weights are needed.",
    )
    parser.add_argument("words", nargs="*", help="overrides as for tokenyard train; or a folder with a Hugging Face config.json")
    parser.add_argument("--json", action="store_true", help="one JSON object; parameters as numbers of elements")
    parser.add_argument("--table", action="store_true", help="all models of conf/model, as Markdown (docs/models.md)")
    add_config_dir(parser)
    arguments = parser.parse_intermixed_args(argv)
    arguments.words = with_config_dir(arguments.words, arguments)
    from .params import params_command

    return params_command(arguments)


def plan(argv: list[str]) -> int:
    if argv[:1] == ["serve"]:
        return serve(argv[1:])
    parser = OneLineParser(
        "tokenyard plan",
        usage="%(prog)s [-h] [--json] cluster=TYPExN [goal=GOAL] [key=value ...], or goal=loss flops=1e21, or calibrate=FILE, "
        "or --dry-run [rank=0] [world=N] [key=value ...]",
        description="What a run needs, before a GPU is rented: which layouts of a cluster fit, how fast they are, what they cost; "
        "or the real step of one rank of thousands, without its GPU; or which model a number of FLOPs should train.",
        epilog="cluster=h100x64; goal=fastest, cheapest or fits; tokens= of the run, batch.tokens= of a step (4.2M). "
        "hot=1.5: rows of a rank's experts over an even load; parallel.* and batch.micro that are given stay. "
        "calibrate=report.json of `make gpu`: times by what that GPU measured; alone, it shows these numbers. "
        "goal=loss: size, tokens, experts, learning rate and batch by published laws, for one or two of flops, active, tokens. "
        "Dry run: rank=0; world: ranks of the run (as launch.* says, or the fewest that the layout needs); "
        "layers=auto: few layers and micro-batches are run, the others follow; layers=all runs them.",
    )
    parser.add_argument("words", nargs="*", help="those words, and overrides as for tokenyard train")
    parser.add_argument("--dry-run", action="store_true", help="memory, collectives, operators and host waits of a step")
    parser.add_argument("--explain", type=positive, metavar="N", help="break down layout N of the table")
    parser.add_argument(
        "--write",
        metavar="experiment=NAME|coefficients",
        help="write layout N (the first) as an experiment of tokenyard train; coefficients, with calibrate=",
    )
    parser.add_argument("-cd", "--config-dir", help="folder of further groups, in which the experiment is written too")
    parser.add_argument("--json", action="store_true", help="one JSON object; bytes of one rank, seconds of a step")
    arguments = parser.parse_intermixed_args(argv)
    from .plan_command import plan_command

    return plan_command(arguments)


def serve(argv: list[str]) -> int:
    parser = OneLineParser(
        "tokenyard plan serve",
        usage="%(prog)s [-h] [--json] MODEL|HF_FOLDER [gpu=h100] [key=value ...]",
        description="What serving a model needs and gives: memory, GPUs, tokens/s, price of a million tokens.",
        epilog="gpu: a type of conf/cluster; gpus, tensor: 0 chooses the fewest and the fastest; "
        "weights, experts: bf16, fp8, int8, int4 or mxfp4; cache: bf16 or fp8; context=4096: tokens a sequence; "
        "sequences=32: at a time; link: GB/s to experts kept outside of the GPU, of which hit=0 to 1 are found inside.",
    )
    parser.add_argument("words", nargs="+", help="name of a model or a folder with a Hugging Face config.json; key=value")
    parser.add_argument("--json", action="store_true", help="one JSON object; bytes, seconds and tokens/s")
    add_config_dir(parser)
    arguments = parser.parse_intermixed_args(argv)
    arguments.words = with_config_dir(arguments.words, arguments)
    from .serve_command import serve_command

    return serve_command(arguments)


def audit(argv: list[str]) -> int:
    parser = OneLineParser(
        "tokenyard audit",
        usage='%(prog)s [-h] [--json] "CLAIM"|card.json MODEL|HF_FOLDER [model.key=value ...]',
        description="Holds a claim about a model against its configuration: both counts, routing, memory, cost, what is left out.",
        epilog="Exit code 0: nothing differs; 1: something claimed differs; 2: bad usage.",
    )
    parser.add_argument("claim", help="a sentence of an announcement, or a JSON file with such keys as total_parameters")
    parser.add_argument("model", nargs="+", help="name of a model or a folder with a Hugging Face config.json; model.key=value")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_config_dir(parser)
    arguments = parser.parse_intermixed_args(argv)
    arguments.model = with_config_dir(arguments.model, arguments)
    from .audit_command import audit_command

    return audit_command(arguments)


def import_(argv: list[str]) -> int:
    from .convert import import_command, split_upcycle

    words, upcycle = split_upcycle(argv)
    parser = OneLineParser("tokenyard import", description="Makes a checkpoint of a Hugging Face folder.")
    parser.add_argument("folder", help="Hugging Face folder with config.json and safetensors files, or a name in the hub's cache")
    parser.add_argument("out", help="new folder, for the checkpoint step_00000000")
    parser.add_argument(
        "--upcycle",
        action="store_true",
        help="followed by experts=8 top_k=2 [granularity=G] [seed=S]: make experts of a dense model's feed-forwards",
    )
    add_json(parser)
    arguments = parser.parse_args(words)
    arguments.upcycle = upcycle
    return import_command(arguments)


def export(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard export", description="Makes a Hugging Face folder of a checkpoint.")
    parser.add_argument("checkpoint", help="folder of a checkpoint or of a run")
    parser.add_argument("folder", help="new folder")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (as they are in the checkpoint)")
    parser.add_argument("--architecture", help="as MixtralForCausalLM (the first that can express the model)")
    add_json(parser)
    arguments = parser.parse_args(argv)
    from .convert import export_command

    return export_command(arguments)


def push(argv: list[str]) -> int:
    from .push import push_command

    return push_command(argv)


def checkpoint(argv: list[str]) -> int:
    from .checkpoint import checkpoint_command

    return checkpoint_command(argv)


def report(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard report", description="Makes a page of one or several runs, to open in a browser.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are laid over each other")
    parser.add_argument("--out", metavar="FOLDER", help="where the page goes (report/ in the first run folder)")
    arguments = parser.parse_args(argv)
    from ..report.command import report_command

    return report_command(arguments)


def watch(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard watch", description="Serves the page of a run that goes on, on 127.0.0.1 alone.")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--port", type=port, default=8808, help="0 takes a free one (%(default)s)")
    arguments = parser.parse_args(argv)
    from ..report.server import watch_command

    return watch_command(arguments)


def prepare(argv: list[str]) -> int:
    from .data_commands import prepare_command

    return prepare_command(argv)


def data(argv: list[str]) -> int:
    from .data_commands import data_command

    return data_command(argv)


def tokenizer(argv: list[str]) -> int:
    from .data_commands import tokenizer_command

    return tokenizer_command(argv)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "parity": parity,
    "checkpoint": checkpoint,
    "generate": generate,
    "evaluate": evaluate,
    "import": import_,
    "export": export,
    "push": push,
    "params": params,
    "plan": plan,
    "audit": audit,
    "report": report,
    "watch": watch,
    "prepare": prepare,
    "data": data,
    "tokenizer": tokenizer,
}

USAGE = """tokenyard: Mixture-of-Experts pretraining with expert, data and tensor parallelism

  tokenyard train [group=option ...] [key=value ...]     train; -m sweeps, --cfg job prints the settings, --from RUN takes a run's
  tokenyard parity [group=option ...] [key=value ...]    one model on many layouts: the same numbers, or where they differ
  tokenyard generate CHECKPOINT --prompt TEXT            continue a text with a trained model
  tokenyard evaluate CHECKPOINT [key=value ...]          validation loss of a trained model; --tasks: lm-eval's
  tokenyard checkpoint inspect|verify|diff PATH [PATH]   what a checkpoint holds, whether it is whole, how two differ
  tokenyard import HF_FOLDER OUT                         a checkpoint from a Hugging Face folder
  tokenyard export CHECKPOINT HF_FOLDER                  a Hugging Face folder from a checkpoint
  tokenyard push RUN|HF_FOLDER repo=OWNER/NAME           upload an export and its model card to the hub; --dry-run, --json
  tokenyard params model=NAME|HF_FOLDER [key=value ...]  parameters, bytes and FLOPs of a model; --json
  tokenyard plan cluster=h100x64 [key=value ...]         layouts that fit, their time and cost; --explain N, --write, --json
  tokenyard plan goal=loss flops=1e21                    compute-optimal size, tokens and experts by published scaling laws; --json
  tokenyard plan calibrate=FILE                          what a report of `make gpu` says of the step time; --write coefficients
  tokenyard plan --dry-run [rank=R] [world=N] [key=value ...]  memory and collectives of a rank's step, without a GPU; --json
  tokenyard plan serve MODEL|HF_FOLDER [gpu=TYPE] [...]  GPUs, memory, tokens/s and price of serving a model; --json
  tokenyard audit "CLAIM"|card.json MODEL|HF_FOLDER      what a claim about a model gets wrong or leaves out; --json
  tokenyard report RUN [RUN ...] [--out FOLDER]          a page about runs: loss, load of the experts, events
  tokenyard watch RUN [--port N]                         the same page of a run that goes on, on http://127.0.0.1:8808/
  tokenyard prepare FOLDER data=... [key=value ...]      tokenize data once into shards
  tokenyard data inspect [key=value ...]                 the first sequences, the mixture and digests of the batches
  tokenyard data verify FOLDER                           whether prepared shards are whole
  tokenyard tokenizer train FOLDER [key=value ...]       train a sentencepiece tokenizer
  tokenyard VERB --help                                  more about one of them
  tokenyard -sc install=bash|zsh|fish                    the script that completes verbs, flags, groups and settings
  tokenyard --version"""
