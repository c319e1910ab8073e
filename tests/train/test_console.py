"""The console's text, character by character, with and without a terminal."""

import io
import math

import pytest
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.param_count import count
from tokenyard.parallel.config import ParallelConfig
from tokenyard.train.config.config import BatchConfig, Config, Precision
from tokenyard.train.logging.console.startup import StartupFacts, startup_lines
from tokenyard.train.logging.console.step_line import Eta, fitting_spans, step_spans
from tokenyard.train.logging.console.summary import EndFacts, end_lines
from tokenyard.train.logging.console.text import ASCII_BARS, BLOCKS, COMMAND, Line, Printer, Span, folded, plain

RECORD = {
    "step": 7,
    "tokens": 28672,
    "loss": 6.54321,
    "grad_norm": 0.98765,
    "tokens_per_second": 12345.6,
    "mfu": 0.3417,
    "lr": 0.005,
    "system/memory_peak_gb": 61.234,
    "system/memory_share": 0.766,
    "dropped_fraction": 0.0123,
    "moe/load_max_over_mean": 1.416,
    "moe/load_max_over_mean_layer": 2,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step_line(record: dict, total_steps: int, eta_seconds: float | None = None) -> str:
    return plain(step_spans(record, total_steps, eta_seconds))


def text(lines: list[Line]) -> str:
    return "\n".join(map(plain, lines))


def test_step_line():
    assert step_line(RECORD, 600, 192.4) == (
        "step   7/600  loss  6.5432   12,346 tok/s  MFU  34.2%  lr 5.0e-3  grad   0.988  mem  77% 61.23 GB  load  1.42x L2   "
        "drop  1.23%  ETA  3m12s"
    )


def test_step_line_of_a_dense_model():
    dense = {key: value for key, value in RECORD.items() if not key.startswith(("moe/", "system/"))} | {"dropped_fraction": 0.0}
    assert step_line(dense, 99) == "step  7/99  loss  6.5432   12,346 tok/s  MFU  34.2%  lr 5.0e-3  grad   0.988  ETA      -"


@pytest.mark.parametrize(
    "change",
    [
        {"step": 600, "loss": math.nan, "grad_norm": math.inf},
        {"loss": 12.3456789, "grad_norm": 123456.7, "tokens_per_second": 0.4, "mfu": 0.00012, "lr": 0.0},
        {"system/memory_peak_gb": 0.0031, "system/memory_share": 1.0},
        {"tokens_per_second": 9.876e8, "mfu": 1.234, "moe/load_max_over_mean": 64.0, "moe/load_max_over_mean_layer": 31},
        {"moe/load_max_over_mean": 512.0, "dropped_fraction": 1.0, "grad_norm": 1e-9, "loss": 1.2e30},
    ],
)
def test_columns_stand_under_each_other(change: dict):
    """Each label begins where it does in the usual line."""
    usual, line = step_line(RECORD, 600, 9.0), step_line(RECORD | change, 600, 90_000.0)
    labels = ("loss", "tok/s", "MFU", "lr", "grad", "mem", "GB", "load", "drop", "ETA")
    assert [line.index(label) for label in labels] == [usual.index(label) for label in labels]
    assert len(line) == len(usual)


def test_a_narrow_terminal_has_fewer_columns():
    whole, wide, eighty, long = (
        plain(fitting_spans(RECORD, *of)) for of in ((600, 192.4, None), (600, 192.4, 160), (600, 192.4, 80), (10**6, 9.0, 80))
    )
    assert whole == wide == step_line(RECORD, 600, 192.4) and len(whole) > 80
    assert eighty == "step   7/600  loss  6.5432   12,346 tok/s  lr 5.0e-3  mem  77%  load  1.42x L2"
    assert "".join(span.text for span in fitting_spans(RECORD, 600, 192.4, 80)) == eighty, "blanks at the end would wrap"
    assert len(long) <= 80 and "mem" in long and "load" in long and "lr" not in long


def test_eta_is_the_pace_of_the_last_steps():
    eta = Eta(total_steps=100, window=2)
    assert eta.after(10, now=50.0) is None  # what came before may have been a compiler
    assert eta.after(11, now=52.0) == 89 * 2.0
    assert eta.after(12, now=56.0) == 88 * 3.0
    assert eta.after(14, now=58.0) == 86 * (58.0 - 52.0) / 3  # every step need not be told; step 10 is out of the window
    assert eta.after(100, now=60.0) == 0.0


def test_no_colour_and_no_carriage_return_without_a_terminal():
    stream = io.StringIO()
    Printer(stream).lines([step_spans(RECORD | {"moe/load_max_over_mean": 3.0}, 600), []])
    assert stream.getvalue() == step_line(RECORD | {"moe/load_max_over_mean": 3.0}, 600) + "\n\n"
    assert not set("\r\x1b") & set(stream.getvalue())


def test_colour_of_an_uneven_load_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    even, uneven = Terminal(), Terminal()
    Printer(even).line(step_spans(RECORD, 600))
    Printer(uneven).line(step_spans(RECORD | {"moe/load_max_over_mean": 2.01}, 600))
    assert " 1.42x L2" in even.getvalue() and "\x1b[1;33m 1.42x L2" not in even.getvalue()
    assert "\x1b[1;33m 2.01x L2 \x1b[0m" in uneven.getvalue()
    assert uneven.getvalue().count("\n") == 1  # longer than rich's 80 columns, and not broken


def test_a_stream_that_cannot_write_blocks_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    printer = Printer(stream)
    printer.say("caf\xe9 \u4f60")
    assert stream.buffer.getvalue() == b"caf\\xe9 \\u4f60\n"  # pyright: ignore
    assert printer.bars == ASCII_BARS
    assert Printer(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")).bars == BLOCKS


CONFIG = Config(
    batch=BatchConfig(sequences=16),
    steps=600,
    sequence_length=256,
    precision=Precision.fp32,
    model=ModelConfig(layers=4, width=256, hidden=1024, dense_first=1, moe=MoEConfig(experts=8, hidden=512, shared_hidden=64)),
    parallel=ParallelConfig(tensor=2, shard=2, expert=4),
)
FACTS = StartupFacts(
    run_dir="runs/a",
    resume="new run",
    device="cpu (2 cores)",
    ranks=8,
    threads=1,
    documents=1432,
    tokens=2_000_000,
    pieces=8192,
    bytes_per_token=4.123,
    peak_flops=198.3e9,
    peak_source="measured",
    precision_from="the default on a CPU",
)
STARTUP = """\
tokenyard 0.2.0
  model       4 layers, 256 wide, 8 heads; 8 experts, top-2, in 3 of them
  parameters  15.4M total, 8.28M active per token
              embedding 2.10M, attention 786,432, router 6,144, experts 9.44M, shared 147,456, dense 786,432, norms 2,304, head 2.10M
  compute     12.9 MFLOP per token forward, 38.7 MFLOP with backward
  batch       16 sequences x 256 = 4,096 tokens a step
  length      600 steps; 2.46M tokens, 1.23 passes over the data
  data        stdlib: 1,432 documents, 2.00M tokens
  tokenizer   sentencepiece, 8,192 pieces in 8,192 rows of the embedding, 4.12 bytes a token
  layout      8 ranks: replicate 2 x shard 2 x tensor 2; expert 4
  device      cpu (2 cores), 1 thread a rank; peak 198 GFLOP/s, measured
  precision   fp32, the default on a CPU
  run folder  runs/a
  start       new run
"""  # noqa: E501


def test_startup_table():
    assert text(startup_lines(CONFIG, count(CONFIG.model), FACTS)) == STARTUP


def test_startup_of_a_resumed_dense_run_on_one_rank():
    config = Config(
        steps=600,
        precision=Precision.fp32,
        model=ModelConfig(layers=4, width=256, hidden=1024, moe=MoEConfig(experts=0)),
        compile=True,
    )
    facts = StartupFacts(**vars(FACTS) | {"ranks": 1, "first_step": 200, "threads": 2})
    table = text(startup_lines(config, count(config.model), facts))
    assert "  model       4 layers, 256 wide, 8 heads; dense\n" in table
    assert "  length      600 steps, 400 to go; " in table
    assert "  layout      1 rank\n" in table
    assert ", 2 threads a rank; " in table
    assert "  precision   fp32, the default on a CPU, compiled\n" in table
    assert "experts" not in table


def test_rows_that_were_rounded_up_are_said():
    for pieces, rows, said in ((259, 384, " (rounded up to a multiple of 128)"), (259, 512, ""), (384, 384, "")):
        config = Config(precision=Precision.fp32, model=ModelConfig(vocabulary=rows))
        table = text(startup_lines(config, count(config.model), StartupFacts(**vars(FACTS) | {"pieces": pieces})))
        assert f"{pieces} pieces in {rows} rows of the embedding{said}, 4.12 bytes a token\n" in table


END = EndFacts(
    steps=600,
    tokens=2_457_600,
    seconds=268.2,
    validation_loss=3.9,
    bits_per_byte=1.35,
    unigram_entropy=6.5,
    counts_LE=[[10, 10, 10, 10], [0, 5, 25, 10]],
    layers=[1, 3],
    checkpoint="runs/a/checkpoints/step_00000600",
    sample=("def ", "f(x):\n    return x\x1b[31m\n"),
    commands=[("write more", "tokenyard generate runs/a")],
)
SUMMARY = """\

Done: 600 steps, 2.46M tokens, 4m28s
  validation  loss 3.9000 nats a token, perplexity 49.4, 1.3500 bits a byte
  unigram     entropy 6.5000 nats a token; the loss is 40.0% below it

Expert load
  layer  max/mean  min/mean   each expert: _ none, = even, @ twice or more
      1      1.00      1.00   = = = =
      3      2.50      0.00   _ : @ =

Sample
  | def f(x):
  |     return x\\x1b[31m
  |

  checkpoint  runs/a/checkpoints/step_00000600

Try next
  write more
    tokenyard generate runs/a"""


def test_end_summary():
    assert text(end_lines(END)) == SUMMARY


def test_end_summary_of_a_dense_run_that_was_stopped():
    facts = EndFacts(
        **vars(END) | {"counts_LE": [], "layers": [], "sample": None, "checkpoint": None, "commands": [], "outcome": "Stopped"}
    )
    summary = text(end_lines(EndFacts(**vars(facts) | {"validation_loss": 7.8})))
    assert summary.startswith("\nStopped: 600 steps")
    assert "the loss is 20.0% above it" in summary
    assert summary.endswith("none was written")
    assert not {"Expert load", "Sample", "Try next"} & set(summary.split("\n"))


def test_many_experts_share_columns_and_the_busiest_shows():
    counts = [100] * 512
    counts[300] = 1000
    facts = EndFacts(**vars(END) | {"counts_LE": [counts], "layers": [0]})
    row = text(end_lines(facts)).split("\n")[7]
    assert row == f"      0      9.83      0.98   {'=' * 37}@{'=' * 26}"


def test_the_same_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")  # a terminal without colours, of 80 columns for rich
    stream = Terminal()
    Printer(stream).lines([*startup_lines(CONFIG, count(CONFIG.model), FACTS), *end_lines(END)])
    shown, whole = [line.rstrip() for line in stream.getvalue().split("\n")], (STARTUP + "\n" + SUMMARY + "\n").split("\n")
    assert " ".join(shown).split() == " ".join(whole).split()
    assert all(len(line) <= 80 or line.startswith("    tokenyard") for line in shown) and max(map(len, whole)) > 100


def test_a_wide_line_is_parted_under_its_last_column():
    line = [Span("  tokenizer   "), Span("bytes, 259 pieces in 384 rows of the embedding")]
    assert text(folded(line, 40)).split("\n") == [
        "  tokenizer   bytes, 259 pieces in 384",
        "              rows of the embedding",
    ]
    assert text(folded([Span("step 40: a spike")], 12)).split("\n") == ["step 40: a", "  spike"]
    command = [Span("    "), Span("tokenyard train --from runs/first", COMMAND)]
    assert folded(command, 20) == [command] and folded([], 20) == [[]]
    assert text(folded([Span("  | "), Span(" " * 30)], 20)).strip() == "|"
