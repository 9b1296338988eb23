#!/usr/bin/env bash
# Runs on a GPU machine what scripts/gpu_bundle.sh packed, as its run.sh: first the tests, on the GPU, then each kernel by the
# device's clock, then training steps of models of several sizes. Needs NVIDIA's driver (525 or newer) and cuBLASLt (a CUDA toolkit, PyTorch, or
# `pip install nvidia-cublas-cu12`).
#
#   ./run.sh [RESULTS]          default results, beside this file
#
# Writes RESULTS/tests.md, RESULTS/kernels.md and RESULTS/steps.md, and each run's log beside them. LIMIT: seconds for each run (default 300).
# FLOPS: the machine's bf16 rate in a plain matrix product, of which steps are a share (default 790e12, an H200).
# LOAD: a folder for 16 GB, where an 8B checkpoint is made and loaded (its pages must fit the host's memory; without one it is not).
# SHAPES: lines of arguments of train_shape, instead of those below. SANITIZE=1: the tests of the ops under compute-sanitizer too, into
# RESULTS/sanitizer.md (memcheck and racecheck; a CUDA toolkit has it). Ends with 1 if a test or a step failed.
set -uo pipefail
cd "$(dirname "$0")"
results=${1:-results} limit=${LIMIT:-300} flops=${FLOPS:-790e12}
mkdir -p "$results"
[[ -d bin ]] || tar -xJf packed.tar.xz

# NVIDIA's Python packages, where there are any: tests and benchmarks look at LD_LIBRARY_PATH and the system's folders.
packages=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null)
[[ -n $packages ]] && LD_LIBRARY_PATH=$(printf '%s:' "$packages"/*/lib)${LD_LIBRARY_PATH:-}
export LD_LIBRARY_PATH REQUIRE_CUDA=1 NIBBLE_TEST_DEVICE=cuda

# The folder whose `data` the tests read.
export CARGO_MANIFEST_DIR=$PWD
machine=$(nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader 2>/dev/null | head -1)
about="$(head -1 COMMIT), ${machine:-no nvidia-smi}, $(date -u +%F)"
bin/nibble doctor >"$results/doctor.txt" 2>&1 || true
cat "$results/doctor.txt"

{
  printf '%s\n\n| test | result | seconds |\n|---|---|---|\n' "$about"
  for test in tests/*; do
    name=$(basename "$test") start=$SECONDS
    # One after the other: each takes the device's memory for itself.
    timeout "$limit" "$test" --test-threads 1 >"$results/$name.log" 2>&1
    code=$?
    line=$(grep -h '^test result:' "$results/$name.log" | tail -1)
    line=${line#test result: }
    ((code == 0)) || line="FAILED (exit code $code): ${line:-see $name.log}"
    echo "| $name | ${line%%; finished*} | $((SECONDS - start)) |"
  done
} | tee "$results/tests.md"

# What compute-sanitizer's tool $1 says of the tests of module $2.
sanitize() {
  local log=$results/$1-${2#ops::}.log
  PROPTEST_CASES=4 timeout "$limit" "$sanitizer" --tool "$1" --error-exitcode 9 "${others[@]}" \
    tests/nibble_tensor "$2::" --test-threads 1 >"$log" 2>&1
  local code=$?
  if ((code == 0)); then echo clean
  elif grep -q 'before first instrumented' "$log"; then echo "not on the device"
  elif grep -q 'Internal Sanitizer Error' "$log" && ! grep -q 'Race reported\|Invalid' "$log"; then echo "the tool's own error"
  else echo "FAILED ($code)"; fi
}
if [[ -n ${SANITIZE:-} ]]; then
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  # cuBLASLt's kernels are not ours to check.
  others=()
  for name in cutlass xmma cublas gemm splitK nvjet; do others+=(--kernel-name-exclude "kns=$name"); done
  {
    printf '%s, %s\n\n| tests | memcheck | racecheck |\n|---|---|---|\n' "$about" "$("$sanitizer" --version | grep -o 'Version [0-9.]*')"
    # By modules: where the tool itself fails, the others keep their results.
    for module in $(tests/nibble_tensor --list 2>/dev/null | sed -n 's/^\(ops::[a-z0-9_]*\)::.*: test$/\1/p' | sort -u); do
      echo "| $module | $(sanitize memcheck "$module") | $(sanitize racecheck "$module") |"
    done
  } | tee "$results/sanitizer.md"
fi

{
  printf '%s\n\n' "$about"
  timeout "$limit" bin/cuda_kernels --bench >"$results/kernels.log" 2>&1 || echo "FAILED: $(tail -1 "$results/kernels.log")"
  grep '^|' "$results/kernels.log"
} | tee "$results/kernels.md"

# Products of a few rows, adapters, optimizers: each beside a plain copy in the same run.
for bench in bench_gemv bench_lora bench_optim; do
  printf '\n%s\n\n```\n' "$bench"
  timeout "$limit" bin/"$bench" >"$results/$bench.log" 2>&1 || echo "FAILED: $(tail -1 "$results/$bench.log")"
  cat "$results/$bench.log"
  printf '```\n'
done | tee -a "$results/kernels.md"

if [[ -n ${LOAD:-} ]]; then
  timeout "$limit" bin/bench_load "$LOAD" --make llama3-8b >"$results/load.log" 2>&1 || echo "RESULT FAILED" >>"$results/load.log"
  grep RESULT "$results/load.log"
fi

shapes=${SHAPES:-"llama3-8b --batch 4 --length 2048 --checkpointing none --optim adamw_8bit --steps 20
llama3-8b --batch 4 --length 2048 --checkpointing auto --memory 38 --optim adamw_8bit
llama3-8b --batch 4 --length 2048 --checkpointing auto --memory 8.3 --optim adamw_8bit
llama3-8b --batch 1 --length 16384 --checkpointing auto --memory 10.5 --optim adamw_8bit
llama3-8b --batch 2 --length 512 --checkpointing offload --blocks-on-host 5 --optim adamw_8bit
qwen2.5-1.5b --batch 8 --length 1024 --checkpointing auto --memory 15 --optim adamw_8bit
qwen2.5-1.5b --batch 2 --length 1024 --checkpointing auto --memory 1.7 --optim adamw_8bit
qwen2.5-1.5b --batch 1 --length 512 --checkpointing auto --memory 1.6 --optim adamw_8bit
smollm2-135m --batch 8 --length 512 --checkpointing none
smollm2-135m --batch 8 --length 512 --checkpointing auto --memory 2 --optim adamw_8bit"}
{
  printf '%s; speed of light at %s flop/s\n\n| training step | result |\n|---|---|\n' "$about" "$flops"
  while read -r shape; do
    log=$results/steps-$(tr -cs 'a-z0-9.\n' '-' <<<"$shape").log
    # shellcheck disable=SC2086 # a shape is a list of arguments
    timeout "$limit" bin/train_shape $shape --flops "$flops" >"$log" 2>&1 </dev/null
    line=$(grep '^RESULT' "$log" | tail -1)
    if [[ -n $line ]]; then line=${line#*: }; else line="FAILED: $(tail -1 "$log")"; fi
    echo "| ${shape//--/} | $line |"
  done <<<"$shapes"
} | tee "$results/steps.md"
! grep -qs FAILED "$results"/{tests.md,sanitizer.md,kernels.md,steps.md,load.log}
