#!/bin/sh
# The same method on one GPU of 24 GB: fewer samples, and parts of a batch that fit.
#
#     sh recipes/1x24GB.sh sd14.safetensors captions.txt
#
# By benchmarks/README.md 4 samples at once take 19.1 GB in reflow and L2, and 1 takes 18.7 in LPIPS
# with the averaged weights in main memory. --init negated starts nearer to the flow than the paper.
set -eu
TEACHER=$1 PROMPTS=$2
RUN="${RUN:-python}"

$RUN reflow.py --teacher "$TEACHER" --prompts "$PROMPTS" --num-pairs 100000 \
    --teacher-batch-size 8 --init negated --iterations 20000 --batch-size 32 --accumulate 8 \
    --warmup-samples 32000 --ema-half-life 32000 --out runs/2rf.safetensors
$RUN distill.py --teacher runs/2rf.safetensors --prompts "$PROMPTS" --num-pairs 100000 \
    --teacher-batch-size 8 --l2-iterations 15000 --batch-size 32 --accumulate 8 \
    --lpips-iterations 4000 --lpips-batch-size 16 --lpips-accumulate 16 --ema-device cpu \
    --warmup-samples 32000 --ema-half-life 32000 --lpips-net "${LPIPS:-vgg}" \
    --out runs/instaflow.safetensors
