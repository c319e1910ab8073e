#!/usr/bin/env bash
# The first hour of a user, in an empty folder: each step's output is checked, and the first that is wrong ends it with its text.
#
#     tests/first_hour.sh [FOLDER]      STEPS=60 makes the first run short; PYTHON names an interpreter; TOKENYARD one that is installed
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder" && cd "$folder"
output=$folder/output.txt
small=(model=tiny tokenizer=bytes steps=20 batch.sequences=4 sequence_length=64 evaluate.sequences=8 tracker=none log.every=5)

# step TITLE CODE PATTERN COMMAND...: runs the command, which must end with the code and print the pattern ('': anything or nothing).
step() {
    local title=$1 code=$2 pattern=$3 found=0 begin=$SECONDS
    shift 3
    "$@" >"$output" 2>&1 || found=$?
    if [ "$found" != "$code" ] || { [ -n "$pattern" ] && ! grep -qE -- "$pattern" "$output"; }; then
        echo "first_hour: $title: exit code $found (wanted $code), or no line with: $pattern" >&2
        tail -n 30 "$output" >&2
        exit 1
    fi
    printf '%-46s %4d s  %s\n' "$title" "$((SECONDS - begin))" "$([ -z "$pattern" ] || grep -m 1 -E -- "$pattern" "$output" | cut -c 1-110)"
}

if [ -z "${TOKENYARD:-}" ]; then
    step "a virtual environment" 0 '' "${PYTHON:-python3}" -m venv "$folder/venv"
    grep '^torch==' "$repository/constraints.txt" >"$folder/torch.txt"
    step "torch" 0 '' "$folder/venv/bin/pip" install --quiet --disable-pip-version-check -r "$folder/torch.txt"
    step "tokenyard and its extras" 0 '' "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        -c "$repository/constraints.txt" "$repository[report,hf]"
    PATH=$folder/venv/bin:$PATH
else
    PATH=$(dirname "$TOKENYARD"):$PATH
fi
step "the commands" 0 'tokenyard train \[group=option' tokenyard --help
step "five minutes of training" 0 'checkpoint +.*step_' tokenyard train run.dir=first ${STEPS:+steps=$STEPS}
step "it goes on to no further step" 0 'resumed after step' tokenyard train --from first
step "a typing error" 2 'nearest valid: .*optimizer.lr' tokenyard train optimizer.lrr=1e-3

python - <<'PYTHON'
import pyarrow as pa
import pyarrow.parquet as pq

texts = [f"The {i}th of many short texts about nothing but the number {i}, and some words more so that it is not too short." for i in range(400)]
pq.write_table(pa.table({"content": texts, "number": list(range(400))}), "own.parquet")
PYTHON
step "a wrong column of own data" 2 'has no column text, it has content, number; nearest valid: data.column=content' \
    tokenyard train data=parquet data.path=own.parquet "${small[@]}" run.dir=wrong
step "three rows and their tokens" 0 'The 0th of many|of many short texts' \
    tokenyard data inspect data=parquet data.path=own.parquet data.column=content tokenizer=bytes
step "the right column" 0 'checkpoint +.*step_' \
    tokenyard train data=parquet data.path=own.parquet data.column=content "${small[@]}" run.dir=own

mkdir -p groups/experiment
cat >groups/experiment/mine.yaml <<'YAML'
# @package _global_
defaults:
  - override /model: tiny
  - override /tokenizer: bytes
steps: 12
model:
  moe:
    top_k: 1
YAML
step "an experiment of one's own" 0 'checkpoint +.*step_' \
    tokenyard train --config-dir groups experiment=mine batch.sequences=4 evaluate.sequences=8 tracker=none run.dir=mine
step "a sweep of four" 0 '^ *top_k +lr|^top_k' \
    tokenyard train -m model.moe.top_k=1,2 optimizer.lr=1e-3,3e-3 "${small[@]}" run.dir=sweep
[ "$(grep -cE ' finished$' "$output")" = 4 ] || { echo "first_hour: the table of the sweep has not four points" >&2; exit 1; }
step "a page of the sweep" 0 'report.html' tokenyard report sweep

python - <<'PYTHON'
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LlamaForCausalLM(config).save_pretrained("llama")
PYTHON
step "a Llama becomes a mixture of experts" 0 'checkpoint +.*step_' \
    tokenyard train checkpoint.init=llama checkpoint.upcycle.experts=4 tokenizer=bytes "${small[@]:2}" run.dir=upcycled
step "its parameters" 0 '"active"' tokenyard params model=tiny --json
step "its loss" 0 '"bits_per_byte"' tokenyard evaluate first --json evaluate.sequences=16
step "its text" 0 'def ' tokenyard generate first --prompt "def "
step "its page" 0 'report.html' tokenyard report first
step "what would go to the hub" 0 'model-00001-of-00001\.safetensors +[0-9.]+ MB' tokenyard push first repo=me/first --dry-run
step "its card" 0 '^\| loss, nats per token \| [0-9]' cat first/exports/*/README.md
step "the same numbers on other layouts" 0 '[0-9]+ layouts' tokenyard parity model=tiny
echo "first_hour: all steps hold, in $SECONDS s; $folder"
