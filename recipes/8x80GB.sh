#!/bin/sh
# InstaFlow-0.9B on 8 GPUs of 80 GB: the paper's run, stage by stage; 25 days by its own A100-days.
#
#     sh recipes/8x80GB.sh sd14.safetensors captions.txt
#
# captions.txt: a prompt a line, best 1.6 million of them. Give the same line again after any stop.
set -eu
TEACHER=$1 PROMPTS=$2
RUN="${RUN:-torchrun --nproc_per_node=8}"

# Warm-up of 1,000 iterations and EMA 0.9999 (6,931 iterations) are the defaults at any batch.
$RUN reflow.py --teacher "$TEACHER" --prompts "$PROMPTS" --num-pairs 1600000 \
    --iterations 70000 --batch-size 64 --out runs/2rf-64.safetensors
$RUN reflow.py --teacher "$TEACHER" --prompts "$PROMPTS" --num-pairs 1600000 \
    --init runs/2rf-64.safetensors --iterations 25000 --batch-size 1024 \
    --out runs/2rf.safetensors
$RUN distill.py --teacher runs/2rf.safetensors --prompts "$PROMPTS" --num-pairs 1600000 \
    --teacher-guidance 1.5 --l2-iterations 21500 --lpips-iterations 18000 --batch-size 1024 \
    --lpips-net "${LPIPS:-vgg}" --out runs/instaflow.safetensors
