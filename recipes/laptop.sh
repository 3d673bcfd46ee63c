#!/bin/sh
# The whole method on the tiny model, on a laptop: what `make demo` runs. README.md beside this file
# says what a healthy run looks like.
#
#     sh recipes/laptop.sh
set -eu
RUN="${RUN:-python}"

echo "1/5  images now, by the one-step model of emoji that is shipped: runs/shipped.png"
$RUN sample.py --model toy/tiny_emoji_instaflow.safetensors --num-images 4 --out runs/shipped.png \
    --prompt "red apple" --prompt cat --prompt rocket --prompt castle --prompt tulip --prompt frog
# From here on shapes: a network can tell whether an image shows all that its caption says.
echo "2/5  pairs of the teacher, and reflow: the paths become straight"
$RUN reflow.py --save-every 100
echo "3/5  pairs of the flow, and distillation: one step lands where the flow ends"
$RUN distill.py --save-every 100
echo "4/5  an image by the one-step model that was just made: runs/sample.png"
$RUN sample.py --out runs/sample.png
echo "5/5  teacher, flow and one step side by side"
# evaluate-curves.png is what evaluate.py writes last; another evaluation may have been there.
if test runs/evaluate-curves.png -nt runs/instaflow.safetensors &&
    grep -q '"instaflow.safetensors"' runs/evaluate.json
then cat runs/evaluate.md
else $RUN evaluate.py --steps 8,4,2,1
fi
echo "Look at runs/evaluate.png, runs/sample.png and the images of its training in"
echo "runs/2rf.safetensors.state/samples/. Go on with"
echo "    $RUN sample.py --prompt \"a red circle above a blue square\" --num-images 8"
echo "    $RUN toy/demo.py      the same in the plane, with its paths"
