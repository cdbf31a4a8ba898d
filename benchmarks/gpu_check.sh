#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within 10 minutes, on a machine that has torch and
# CUDA and nothing else: build, the compiler's resource report, all tests, compute-sanitizer, and
# the benchmarks.
#
#   benchmarks/gpu_check.sh [OUT]
#
# Tables go to benchmarks/results as *-gpu.json and *-gpu.md, logs to OUT (build/gpu). A step that
# fails does not keep the next from running. Ends with a summary; exits 1 if any step failed.
#
#   PYTHON=...    the environment that has torch. Default: .venv, else python3
#   WHEELS=DIR    wheels of what the tests need (pip download '.[test]' ninja pybind11 adv-lib),
#                 where no package index can be reached
#   DEVICE=cpu    a rehearsal of the same steps without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
PYTHON=$(command -v "$PYTHON")
DEVICE=${DEVICE:-cuda}
OUT=${1:-build/gpu}
NAME=gpu forced=1 patience=1
[ "$DEVICE" = cpu ] && NAME=rehearsal forced= patience=20
# The build finds ninja beside Python.
export PATH="$(dirname "$PYTHON"):$PATH"
mkdir -p "$OUT"
summary=()
failed=0

step() { # NAME SECONDS COMMAND...: runs it with a limit, its output to OUT/NAME.log
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    if timeout -k 5 "$((limit * patience))" "$@" >"$OUT/$name.log" 2>&1; then
        summary+=("ok      $name ($((SECONDS - begin)) s)")
    else
        summary+=("FAILED  $name (exit $?, $((SECONDS - begin)) s)")
        tail -n 30 "$OUT/$name.log"
        failed=1
    fi
}

if [ "$DEVICE" = cuda ]; then
    "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"' || exit 2
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$OUT/gpu.log"
fi
# Everything but torch, which stays as it is; then the native module, for the GPU that is there.
"$PYTHON" -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' \
    >"$OUT/constraints.txt"
install=("$PYTHON" -m pip install --quiet ${WHEELS:+--no-index --find-links "$WHEELS"}
    --constraint "$OUT/constraints.txt")
step requirements 20 "${install[@]}" "setuptools>=77" pybind11 ninja
step package 30 env DAGCORE_NATIVE=0 "${install[@]}" --no-build-isolation --editable ".[test]"
step adv-lib 10 "${install[@]}" --no-deps adv-lib
step build 100 env DAGCORE_CUDA="$forced" DAGCORE_PTXAS_VERBOSE=1 "$PYTHON" setup.py build_ext \
    --inplace --force
step info 10 "$PYTHON" -m dagcore.info ${forced:+--require-cuda-kernels}
step resources 10 bash -c "'$PYTHON' benchmarks/resources.py <'$OUT/build.log' >'$OUT/resources.md'"
# In processes of two cores each, as most of their time is the host's; training is torch's own.
step tests 140 "$PYTHON" -m pytest -q -p no:cacheprovider -n "$((($(nproc) + 1) / 2))" \
    --dist worksteal --ignore tests/test_zoo_training.py --ignore tests/test_paper.py
for tool in memcheck racecheck; do
    step "sanitizer-$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 86 "$PYTHON" \
        -m pytest -q -x -p no:cacheprovider -k test_kernels tests/test_cuda.py
done
step bench-copy 10 "$PYTHON" benchmarks/bench_copy.py --device "$DEVICE" --save "copy-$NAME"
step bench-ops 50 "$PYTHON" -m pytest -q benchmarks/bench_ops.py --device "$DEVICE" \
    --save "ops-$NAME"
step bench-iteration 35 "$PYTHON" benchmarks/bench_attack.py iteration --device "$DEVICE" \
    --networks deeplabv3_mobilenet_v3_large fcn_resnet50 --rounds 5 --save "iteration-$NAME"
step bench-convergence 50 "$PYTHON" benchmarks/bench_attack.py convergence --device "$DEVICE" \
    --networks deeplabv3_mobilenet_v3_large --tolerance 0.01 --rounds 1 --save "convergence-$NAME"
step bench-detection 30 "$PYTHON" benchmarks/bench_detection.py attack --device "$DEVICE" \
    --rounds 3 --save "detection-$NAME"
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.log"
exit $failed
