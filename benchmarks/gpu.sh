#!/bin/sh
# What a GPU has to measure, in at most eight minutes: sh benchmarks/gpu.sh [FOLDER]
# Each part writes its result by itself, under benchmarks/results/gpu_*.json and into FOLDER, so that a part
# that fails or is cut off takes no other with it. PYTHON names the interpreter that has the packages.
out=${1:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
part() {  # NAME SECONDS COMMAND...
    name=$1; limit=$2; shift 2
    echo "== $name: $*"
    begun=$(date +%s)
    timeout "$limit" "$python" "$@" >"$out/$name.log" 2>&1 || tail -n 25 "$out/$name.log"
    echo "$name took $(($(date +%s) - begun)) s"
    cp benchmarks/results/gpu_*.json "$out" 2>/dev/null
}
part full_size 150 -m benchmarks.full_size --device cuda
part lora_engine 150 -m benchmarks.lora_engine --device cuda --rounds 3
part lora_steps 80 -m benchmarks.lora_steps --device cuda --rounds 3
part frames 50 -m benchmarks.frames --device cuda
part compiled 120 -m benchmarks.compiled --device cuda
