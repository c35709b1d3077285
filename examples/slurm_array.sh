#!/bin/bash
# A comparison on a cluster: the base first, then every cell as a job of its own, then the report.
#   bash examples/slurm_array.sh sd35-geneval /shared/compare-sd35-geneval default
set -eu
preset=$1 output=$2 size=${3:-default}
compare="dgpo-bench compare $preset --size $size --output $output"
cells=(dgpo:0 flow-grpo:0 flow-grpo-fast:0 dgpo:1 flow-grpo:1 flow-grpo-fast:1 dgpo:2 flow-grpo:2 flow-grpo-fast:2)

base=$(sbatch --parsable --gpus=1 --wrap "$compare --only base")
array=$(sbatch --parsable --gpus=1 --dependency="afterok:$base" --array="0-$((${#cells[@]} - 1))" \
    --wrap "cells=(${cells[*]}); $compare --only \${cells[\$SLURM_ARRAY_TASK_ID]}")
sbatch --dependency="afterany:$array" --wrap "dgpo-bench report $output"
