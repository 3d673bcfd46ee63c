#!/bin/sh
# InstaFlow-1.7B's student, two U-Nets in series, from the 2-RF of 8x80GB.sh: the paper's study.
#
#     sh recipes/stacked.sh captions.txt
set -eu
PROMPTS=$1
RUN="${RUN:-torchrun --nproc_per_node=8}"

$RUN distill.py --student stacked --teacher runs/2rf.safetensors --prompts "$PROMPTS" \
    --num-pairs 1600000 --teacher-guidance 1.5 --l2-iterations 110000 --batch-size 64 \
    --lpips-iterations 2500 --lpips-batch-size 320 --lpips-net "${LPIPS:-vgg}" \
    --out runs/instaflow-stacked.safetensors
