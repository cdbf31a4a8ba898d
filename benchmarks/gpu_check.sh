#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within 10 minutes: build with CUDA forced, the
# compiler's resource report, all tests, compute-sanitizer, benchmark tables.
#
#   benchmarks/gpu_check.sh [OUT]      PYTHON=... to choose the environment (torch, pybind11, pytest)
#
# Tables go to benchmarks/results, or to OUT; logs beside them. Ends with a summary; exits 1 if any
# step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${1:-benchmarks/results}
mkdir -p "$OUT"
summary=()
failed=0

step() { # NAME SECONDS COMMAND...: runs it with a limit, its output to OUT/NAME.log
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
        summary+=("ok      $name ($((SECONDS - begin)) s)")
    else
        summary+=("FAILED  $name (exit $?, $((SECONDS - begin)) s)")
        tail -n 30 "$OUT/$name.log"
        failed=1
    fi
}

sanitize() { # TOOL: the op tests on CUDA under one of compute-sanitizer's tools
    step "sanitizer-$1" 45 compute-sanitizer --tool "$1" --error-exitcode 86 "$PYTHON" -m pytest -q \
        -x -k test_kernels tests/test_cuda.py
}

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"' || exit 2
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$OUT/gpu.log"
rm -rf build
step build 120 env DAGCORE_CUDA=1 DAGCORE_PTXAS_VERBOSE=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-}" "$PYTHON" setup.py \
    build_ext --inplace --force
step info 20 "$PYTHON" -m dagcore.info --require-cuda-kernels
step resources 20 bash -c "'$PYTHON' benchmarks/resources.py <'$OUT/build.log' >'$OUT/resources.md'"
# Networks, data sets and metrics are torch's own code on any device.
step tests 140 "$PYTHON" -m pytest -q --ignore-glob='tests/test_zoo*' --ignore=tests/test_scenes.py \
    --ignore=tests/test_voc.py --ignore=tests/test_metrics.py --ignore=tests/test_paper.py \
    --ignore=tests/test_fuzz.py --ignore-glob='tests/test_run*'
step run 60 "$PYTHON" -m dagcore run --data scenes --model FCN-VGG --images 100 --device cuda \
    --out "$(mktemp -d)/run"
for tool in memcheck racecheck synccheck initcheck; do sanitize "$tool"; done
step bench-ops 60 "$PYTHON" -m pytest -q benchmarks/bench_ops.py --device cuda --save ops-cuda
step bench-iteration 60 "$PYTHON" benchmarks/bench_attack.py iteration --device cuda \
    --networks deeplabv3_mobilenet_v3_large fcn_resnet50 --save iteration-cuda
step bench-detection 90 "$PYTHON" benchmarks/bench_detection.py attack --device cuda --rounds 3 \
    --save detection-cuda
[ "$OUT" = benchmarks/results ] || cp benchmarks/results/*-cuda.* "$OUT"/ 2>/dev/null
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.log"
exit $failed
