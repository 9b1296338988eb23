#!/usr/bin/env bash
# The CPU tables of BENCHMARKS.md: training steps and 4-bit conversion, nibble beside the Python stack in one run.
#
#   scripts/bench_cpu.sh MODEL_DIR PYTHON PEER_SCRIPT
#
# MODEL_DIR: SmolLM2-135M (or another llama) as a Hugging Face folder. PYTHON: an interpreter with torch, transformers, peft,
# bitsandbytes and accelerate. PEER_SCRIPT: prints lines `... tokens/s ...` for `MODEL_DIR fp32|bf16|nf4 BATCH LENGTH STEPS`.
# THREADS limits both sides (default 2). Compute types without a fast path on the machine can take minutes in the peer.
set -euo pipefail
model=$1 python=$2 peer=$3
export RAYON_NUM_THREADS=${THREADS:-2} OMP_NUM_THREADS=${THREADS:-2} MKL_NUM_THREADS=${THREADS:-2}
cd "$(dirname "$0")/.."
cargo build --release -q -p nibble-train --example bench_step
bench=${CARGO_TARGET_DIR:-target}/release/examples/bench_step
grep -m1 'model name' /proc/cpuinfo || true
for mode in fp32 nf4 bf16; do
  echo "== Python stack, $mode"
  timeout 300 "$python" "$peer" "$model" "$mode" 1 512 4 2>&1 | grep -E 'tokens/s|peak' || echo "no result within 300 s"
done
for run in "f32 none" "f32 selective" "bf16 selective" "f32 full"; do
  read -r dtype checkpointing <<<"$run"
  echo "== nibble, NF4, $dtype, checkpointing $checkpointing"
  "$bench" "$model" "$dtype" 1 512 6 "$checkpointing"
done
echo "== 4-bit conversion, 14336 x 4096"
"$python" scripts/bench_nf4_peer.py
cargo bench -q -p nibble-nf4 --bench blocks -- 'memcpy|nf4_double' 2>/dev/null | grep -E 'time:|thrpt:|^[a-z0-9_/]+' || true
