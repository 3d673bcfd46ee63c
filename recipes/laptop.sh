#!/bin/sh
# The tiny model on a laptop: what a healthy run looks like, in minutes. README.md has its figures.
#
#     sh recipes/laptop.sh
set -eu
RUN="${RUN:-python}"

$RUN reflow.py --save-every 100
$RUN distill.py --save-every 100
$RUN sample.py --out runs/sample.png
$RUN evaluate.py --steps 8,4,2,1
