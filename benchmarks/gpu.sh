#!/bin/sh
# All GPU measurements in one call: nine minutes by the limits below; writes JSON.
#
#     sh benchmarks/gpu.sh                                    one CUDA GPU of 80 GB
#     DEVICE=cpu SLOWER=5 SIZE="--latent-size 8 --rounds 1" DTYPES="bf16 fp32" \
#         BATCHES="1 2" UPDATE_BATCH=1 REFLOW="--num-pairs 64 --iterations 4" \
#         DISTILL="--num-pairs 64 --l2-iterations 4 --lpips-iterations 2" \
#         EVALUATE="--num-samples 50" sh benchmarks/gpu.sh    a rehearsal, ten minutes on 2 cores
#
# Runs unattended on a bare machine with torch 2.11 or later. A step that fails is named at the end;
# the others still run. Results land in benchmarks/results/, those of the demo's four commands in
# runs/gpu/. NCCL is not tested: that takes several GPUs.
DEVICE="${DEVICE:-cuda}"
SIZE="${SIZE:---rounds 10}"
DTYPES="${DTYPES:-bf16 fp16}"  # CPUs have no fast fp16
BATCHES="${BATCHES:-1 16}"
UPDATE_BATCH="${UPDATE_BATCH:-8}"
SLOWER="${SLOWER:-1}"  # factor on the limits
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-runs/gpu}"
FAILED=""
mkdir -p "$OUT"

try() {  # seconds, name, command
    limit=$(($1 * SLOWER)) name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" || FAILED="$FAILED $name"
}

# One step at 512 px against diffusers in the same run; the paper: 0.09 s an image on an A100.
for dtype in $DTYPES; do
    for batch in $BATCHES; do
        try 50 "sampling-$dtype-$batch" $PYTHON benchmarks/sampling.py --device "$DEVICE" \
            --dtype $dtype --batch-size $batch $SIZE
    done
done
try 80 sampling-compiled $PYTHON benchmarks/sampling.py --device "$DEVICE" --dtype bf16 --compile \
    $SIZE

# Training iterations: time and peak memory, to compare with the derived table of the README.
for order in "" --contiguous; do
    try 50 "training-step$order" $PYTHON benchmarks/training_step.py --device "$DEVICE" \
        --dtype bf16 --stages reflow l2 lpips --batch-size "$UPDATE_BATCH" \
        --gradient-checkpointing $order $SIZE
done

# The demo's four commands.
try 45 reflow $PYTHON reflow.py --device "$DEVICE" --pairs "$OUT/pairs" \
    --out "$OUT/2rf.safetensors" $REFLOW
try 50 distill $PYTHON distill.py --device "$DEVICE" --teacher "$OUT/2rf.safetensors" \
    --pairs "$OUT/pairs-2rf" --out "$OUT/instaflow.safetensors" $DISTILL
try 15 sample $PYTHON sample.py --device "$DEVICE" --model "$OUT/instaflow.safetensors" \
    --out "$OUT/sample.png"
try 40 evaluate $PYTHON evaluate.py --device "$DEVICE" --steps 8,4,2,1 --out "$OUT/evaluate.json" \
    --model toy/tiny_sd.safetensors "$OUT/2rf.safetensors" "$OUT/instaflow.safetensors" $EVALUATE
echo "failed:${FAILED:- nothing}"
test -z "$FAILED"
