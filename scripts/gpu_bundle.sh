#!/usr/bin/env bash
# Builds what runs on a GPU machine without Rust, CUDA or this source tree: the binary, the tests that run on a device, the
# benchmarks of training and of kernels, and their data. Needs no GPU. Copy the folder there and run its run.sh (scripts/gpu_run.sh).
#
#   scripts/gpu_bundle.sh [FOLDER]          default bundle/gpu
#
# PROFILE=dev builds faster and runs slower. NIBBLE_CUDA_ARCHS=90a holds kernels for one architecture alone. NIBBLE_GOLDEN: a folder of
# full reference results, of which tests/data has a part. The curve of the real model is tested where its files are: the folder
# `curve` of the reference results below `data`, and the model in ~/.cache/nibble.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bundle/gpu} profile=${PROFILE:-release} limit_mib=64
target=${CARGO_TARGET_DIR:-target}/$([[ $profile == dev ]] && echo debug || echo "$profile")

examples=(train_shape plan_measured bench_load bench_gemv bench_lora bench_optim)
cargo build --profile "$profile" --locked -p nibble-cli -p nibble-train -p nibble-model -p nibble-tensor -p nibble-optim --bin nibble "${examples[@]/#/--example=}"
# Cargo says in JSON which executables it made: their names and paths, of the tests and benches.
made() {
  python3 -c '
import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("reason") == "compiler-artifact" and made.get("executable") and (made["profile"]["test"] or "bench" in made["target"]["kind"]):
        print(made["target"]["name"], made["executable"])'
}
messages=--message-format=json-render-diagnostics
tests=$(
  cargo test --no-run --locked $messages -p nibble-tensor --lib -p nibble-tests --tests | made
  cargo test --no-run --locked $messages -p nibble-optim --test paged | made
)
benches=$(cargo bench --no-run --profile "$profile" --locked $messages -p nibble-tensor --bench cuda_kernels | made)

rm -rf "$out"
mkdir -p "$out/bin" "$out/tests"
cp "$target/nibble" "${examples[@]/#/$target/examples/}" "$out/bin/"
while read -r name path; do
  # The architecture is the source tree's.
  [[ $name == architecture || $name == nibble_tests ]] || cp "$path" "$out/tests/$name"
done <<<"$tests"
while read -r name path; do cp "$path" "$out/bin/$name"; done <<<"$benches"
strip "$out"/bin/* "$out"/tests/*
cp -r tests/data "$out/data"
[[ -z ${NIBBLE_GOLDEN:-} ]] || cp -r "$NIBBLE_GOLDEN"/{models,adapters} "$out/data/"
cp scripts/gpu_run.sh "$out/run.sh"
git log -1 --format='commit %H %ci' >"$out/COMMIT"
[[ -z $(git status --porcelain) ]] || echo "with changes that are not committed" >>"$out/COMMIT"

du -h "$out"/bin/* "$out"/tests/*
du -sh "$out/data"
# Seen as a whole, since each has the kernels, programs pack to a seventh of their size (with 3 GB of memory). run.sh unpacks them.
tar -C "$out" --remove-files -cf - bin tests data | xz --lzma2=preset=6,dict=256MiB >"$out/packed.tar.xz"
size=$(du -sm "$out" | cut -f1)
echo "$out: $size MiB"
if ((size > limit_mib)); then
  echo "expected at most $limit_mib MiB" >&2
  exit 1
fi
