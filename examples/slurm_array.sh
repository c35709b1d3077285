#!/bin/bash
# A comparison on a cluster: the base first, then every cell as a job of its own with so many GPUs, then the report.
#   bash examples/slurm_array.sh sd35-geneval /shared/compare-sd35-geneval default 4
set -eu
preset=$1 output=$2 size=${3:-default} processes=${4:-1}
list=$(dgpo-bench plan "$preset" --size "$size" --processes "$processes" --cells)
read -ra cells <<<"$list"
compare="dgpo-bench compare $preset --size $size --processes $processes --output $output"
gpus="--nodes=1 --gpus-per-node=$processes"

base=$(sbatch --parsable $gpus --wrap "$compare --only base")
array=$(sbatch --parsable $gpus --dependency="afterok:$base" --array="0-$((${#cells[@]} - 1))" \
    --wrap "cells=(${cells[*]}); $compare --only \${cells[\$SLURM_ARRAY_TASK_ID]}")
sbatch --dependency="afterany:$array" --wrap "dgpo-bench report $output"
