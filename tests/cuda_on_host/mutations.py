"""Break the CUDA kernels one line at a time, and see that the tests notice.

    python tests/cuda_on_host/mutations.py [WORDS OF A MUTATION'S NAME]

Prints what noticed each mutation, and exits 1 unless each was noticed that is not equivalent. Takes
from half a minute to a few minutes for each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutations"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "-s", "--tb=no", "-p", "no:cacheprovider")
# In every order of threads; what only the rest of the op tests see, in random order.
WORDS = "on-host and (test_kernels or several_at_once or ops_count_negative)"
QUICK_FILES = ("cuda_on_host", "dag_seed", "linf_prox", "linf_step", "pgd_step", "seed_ops")
QUICK = (*(f"tests/test_{name}.py" for name in QUICK_FILES), "-k", WORDS, "--every-order")
OPS = ("seed_ops", "dag_seed", "dag_seed_bilinear", "argmax_bilinear", "linf_step", "pgd_step")
OPS += ("levels", "linf_prox", "loss_seed", "loss_seed_bilinear")
THOROUGH = (*(f"tests/test_{name}.py" for name in OPS), "-k", "on-host")


class Mutation(NamedTuple):
    name: str
    file: str  # in csrc
    line: str  # what is there, once
    mutant: str  # what takes its place
    sanitize: bool = False  # only AddressSanitizer can see it
    equivalent: str = ""  # why nothing can see it


DAG, BILINEAR, STEP = "cuda/dag_seed.cu", "cuda/dag_seed_bilinear.cu", "cuda/linf_step.cu"
LOSS, LOSS_BILINEAR = "cuda/losses.cuh", "cuda/loss_seed_bilinear.cu"
PROX = "cuda/linf_prox.cu"
CELLS, TARGETS, STRIDED = "cuda/bilinear.cuh", "cuda/targets.cuh", "strided.h"
PGD, PIXELS, SUMS = "cuda/pgd_step.cu", "cuda/pixels.cuh", "cuda/sums.cuh"
BARRIER = "  __syncthreads();\n"
ROW_OF_SEED = "  for (int row = warp; row < rows; row += kRows / 32) {\n    const Verdict"

MUTATIONS = (
    Mutation(
        "nothing",
        DAG,
        "kRows = 128",
        "kRows = 128",
        sanitize=True,
        equivalent="the sanitizers have nothing to say of the kernels as they are",
    ),
    # barriers
    Mutation("no barrier after the rows' places", DAG, f"{BARRIER}\n  Top", "\n  Top"),
    Mutation("no barrier after a tile is read", DAG, f"  {BARRIER}    if (mine", "    if (mine"),
    Mutation(
        "no barrier before the next tile", DAG, f"  {BARRIER}  }}\n\n  Count", "  }\n\n  Count"
    ),
    Mutation("no barrier before the seed", DAG, BARRIER + ROW_OF_SEED, ROW_OF_SEED),
    Mutation(
        "no barrier before the next sum of a block",
        SUMS,
        "values[0];\n  __syncthreads();",
        "values[0];",
    ),
    Mutation(
        "no barrier before half a block is summed",
        SUMS,
        "[threadIdx.x] = value;\n  __syncthreads();",
        "[threadIdx.x] = value;",
    ),
    # boundaries
    Mutation(
        "a target too many", DAG, "(first < args.walk.count())", "(first <= args.walk.count())"
    ),
    Mutation(
        "classes beyond the last, unrolled", DAG, "kUnroll <= classes;", "kUnroll <= classes + 1;"
    ),
    Mutation("not the last class", DAG, "for (; c < classes; ++c)", "for (; c < classes - 1; ++c)"),
    Mutation("no seed of class 0", DAG, "for (c = 0; c < classes", "for (c = 1; c < classes"),
    Mutation(
        "first of the next image", PIXELS, "end(walk.count() / V)", "end(walk.count() / V + 1)"
    ),
    Mutation(
        "class beyond the last as a bar",
        CELLS,
        "c < grid.classes; c += 32",
        "c <= grid.classes; c += 32",
        True,
    ),
    Mutation("a pixel too many", CELLS, "if (p >= patch.pixels())", "if (p > patch.pixels())"),
    Mutation("a seed too many", BILINEAR, "if (i >= count)", "if (i > count)", True),
    Mutation(
        "corner beyond the last column", CELLS, "min(low_x + 1, grid.width - 1)", "low_x + 1", True
    ),
    Mutation(
        "unrolled loop ends early",
        DAG,
        "c + kUnroll <= classes",
        "c + kUnroll < classes",
        equivalent="the loop over what is left takes the classes one by one",
    ),
    Mutation(
        "not the last part of a sum",
        PGD,
        "i < parts.blocks.per_image",
        "i + 1 < parts.blocks.per_image",
    ),
    # guards
    Mutation(
        "rows beyond the last target",
        DAG,
        "min(static_cast<int64_t>(kRows), args.walk.count() - first)",
        "static_cast<int64_t>(kRows)",
    ),
    Mutation("tile's columns beyond the classes", DAG, "if (lane < columns) tile", "tile", True),
    Mutation(
        "verdicts beyond the last target",
        DAG,
        "if (mine < rows) {\n    const auto own",
        "{\n    const auto own",
    ),
    Mutation(
        "warps beyond the last patch",
        BILINEAR,
        "  if (warp >= args.grid.warps()) return;\n",
        "",
        True,
    ),
    Mutation(
        "norms of frozen images", STEP, "if (!args.is_active(share.n)) return;\n  Bits", "Bits"
    ),
    Mutation(
        "frozen images move",
        STEP,
        "!args.is_active(share.n) || scale == 0",
        "scale == 0",
        equivalent="their norm is 0, and so is then their scale",
    ),
    Mutation(
        "patches without pixels",
        BILINEAR,
        "  if (patch.pixels() == 0) return;\n",
        "",
        equivalent="a lane without a pixel has weights of 0 and adds nothing",
    ),
    Mutation(
        "images that have not moved are shown",
        PGD,
        "  if (!args.moved[share.n]) return;\n  const Real threshold",
        "  const Real threshold",
    ),
    # strides
    Mutation("parts of another sum", PGD, "(sum * images + n)", "n"),
    Mutation(
        "every tile is the first",
        DAG,
        "scores[scores_at[row] + begin + lane]",
        "scores[scores_at[row] + lane]",
    ),
    Mutation("31 lanes for 32 columns", DAG, "c < classes; c += 32", "c < classes; c += 31"),
    Mutation(
        "blocks step over one another",
        PIXELS,
        "step(static_cast<int64_t>(blocks.per_image) * kPixelThreads)",
        "step(kPixelThreads)",
    ),
    Mutation(
        "blocks of one image begin apart",
        PIXELS,
        "begin(blocks.index() * kPixelThreads",
        "begin(blockIdx.x * kPixelThreads",
    ),
    Mutation(
        "fewer patches than cells have",
        CELLS,
        "ceil_div(3 * to, 2 * (from - 1)) + 2",
        "ceil_div(to, from)",
    ),
    # collectives
    Mutation("count of half a warp", TARGETS, "offset = 16", "offset = 8"),
    Mutation("norm of half a warp", STEP, "offset = 16", "offset = 8"),
    Mutation("sum of half a warp", BILINEAR, "offset = 16", "offset = 8"),
    Mutation("count of the first warp", TARGETS, "threadIdx.x % 32 != 0", "threadIdx.x != 0"),
    Mutation("not the last corner", BILINEAR, "if (lane < 8 &&", "if (lane < 7 &&"),
    Mutation("sum of half a block", SUMS, "half = kThreads / 2", "half = kThreads / 4"),
    Mutation("squares of half a warp", PGD, "by = 16", "by = 8"),
    # atomics
    Mutation(
        "plain squares",
        PGD,
        "atomicAdd(squares + share.n * kThresholds + k, sums[k])",
        "squares[share.n * kThresholds + k] += sums[k]",
    ),
    Mutation("plain count", TARGETS, "atomicAdd(image, active)", "*image += active"),
    Mutation(
        "plain flag", TARGETS, "atomicOr(image, kOutOfRangeFlag)", "*image |= kOutOfRangeFlag"
    ),
    Mutation("plain norm", STEP, "atomicMax(to, bits)", "*to = *to > bits ? *to : bits"),
    Mutation(
        "plain sums",
        BILINEAR,
        "atomicAdd(reinterpret_cast<unsigned long long*>(args.sums + at),\n",
        "(args.sums[at] += own,\n",
    ),
    # packs where they do not fit
    Mutation("packs of scores that are not aligned", DAG, "aligned(args.scores) &&", ""),
    Mutation(
        "packs of classes that are not aligned",
        DAG,
        "args.scores_class % V == 0 &&\n         args.seed_class % V == 0 &&",
        "",
    ),
    Mutation("packs of targets that are apart", DAG, "args.walk.in_packs(V, kSeed + 1)", "true"),
    Mutation("packs across rows", STRIDED, "inner() % pack == 0", "true"),
    Mutation("packs of images that are not aligned", STRIDED, "&& batch[k] % pack == 0", ""),
    Mutation(
        "packs of pixels that are not aligned",
        STEP,
        "aligned(args.images) && aligned(args.shown)",
        "aligned(args.shown)",
    ),
    Mutation(
        "packs of gradients that are not aligned",
        STEP,
        "aligned(args.gradient) && args.walk",
        "args.walk",
    ),
    # dense losses
    Mutation(
        "dense: no barrier before losses are summed",
        SUMS,
        "values[threadIdx.x] = value;\n" + BARRIER,
        "values[threadIdx.x] = value;\n",
    ),
    Mutation("dense: odd columns of cells left out", LOSS_BILINEAR, "+ odd_x;", "+ (odd_x & 0);"),
    Mutation(
        "dense: two lanes at one low-resolution pixel",
        LOSS_BILINEAR,
        "lane < 4 && (below",
        "lane < 4 && (true",
    ),
    Mutation(
        "dense: a row of cells too few",
        LOSS_BILINEAR,
        "rows = (grid.height + 1 - odd_y) / 2;",
        "rows = (grid.height - odd_y) / 2;",
    ),
    Mutation("dense: losses of a lane alone", LOSS_BILINEAR, "  loss = warp_sum(loss);\n", ""),
    Mutation(
        "dense: warps beyond the last cell",
        LOSS_BILINEAR,
        "  if (warp >= grid.images * rows * columns) return;\n",
        "",
        True,
    ),
    Mutation(
        "dense: right corners of the last column lost",
        LOSS_BILINEAR,
        "if (!right) total[0] += total[1], total[2] += total[3];",
        "",
    ),
    Mutation(
        "packs of momentum that are not aligned",
        PGD,
        "aligned(args.momentum, V * sizeof(RealOf<T>)) &&",
        "",
    ),
    # the proximity operator
    Mutation("proximal: half a warp", PROX, "offset = 16", "offset = 8"),
    Mutation(
        "proximal: plain maximum", PROX, "  atomicMax(", "  *to = std::max(*to, bits); (void)("
    ),
    Mutation(
        "proximal: no barrier after a tile is read",
        PROX,
        f"    }}\n  {BARRIER}    for (int k = part",
        "    }\n    for (int k = part",
    ),
    Mutation(
        "proximal: no barrier before the next tile",
        PROX,
        f"    }}\n  {BARRIER}  }}\n  mass",
        "    }\n  }\n  mass",
    ),
    Mutation(
        "proximal: no barrier before parts are added",
        PROX,
        f"{BARRIER}  if (part > 0) return;",
        "  if (part > 0) return;",
    ),
    Mutation(
        "proximal: no barrier before t is narrowed",
        PROX,
        f"{BARRIER}  if (threadIdx.x > 0) return;",
        "  if (threadIdx.x > 0) return;",
    ),
    Mutation("proximal: not the last part", PROX, "k < kThreads; k +=", "k < kThreads - 64; k +="),
    Mutation("proximal: a pixel too many", PROX, "tile + thread < count", "tile + thread <= count"),
    Mutation("proximal: not the last block", PROX, "block < (n + 1) *", "block + 1 < (n + 1) *"),
    Mutation("proximal: frozen images move", PROX, "if (!args.moved[n]) return;", ""),
    # limits
    Mutation(
        "sums beyond 64 bits",
        BILINEAR,
        "std::ldexp(most, bits) >=",
        "false && std::ldexp(most, bits) >=",
    ),
)


def environment(sanitize: bool) -> dict[str, str]:
    module = WORK / ("sanitized" if sanitize else "plain")
    env = os.environ | {"DAGCORE_CUDA_ON_HOST": str(module), "COLUMNS": "250"}
    if not sanitize:
        return env
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return env | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def noticed(mutation: Mutation) -> str | None:
    """What noticed a mutation, None if nothing did."""
    file = WORK / "csrc" / mutation.file
    content = file.read_text()
    assert content.count(mutation.line) == 1, f"{mutation.name}: not once in {mutation.file}"
    file.write_text(content.replace(mutation.line, mutation.mutant))
    try:
        return noticed_by(mutation)
    finally:
        file.write_text(content)


def noticed_by(mutation: Mutation) -> str | None:
    env = environment(mutation.sanitize)
    build = [
        sys.executable,
        str(Path(__file__).with_name("build.py")),
        "--csrc",
        str(WORK / "csrc"),
    ]
    build += ["--out", env["DAGCORE_CUDA_ON_HOST"], *["--sanitize"] * mutation.sanitize]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    for tests in (QUICK,) if mutation.sanitize or mutation.equivalent else (QUICK, THOROUGH):
        done = subprocess.run((*PYTEST, *tests), cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            lines = [*done.stdout.split("\n"), *done.stderr.split("\n")]
            words = ("FAILED ", "ERROR: AddressSanitizer", "runtime error", "Fatal Python error")
            said = [line for line in lines if any(word in line for word in words)]
            what = said[0].rpartition(" - ")[2] if said else f"exit {done.returncode}"
            return f"{what.strip()} ({'small cases' if tests is QUICK else 'op tests'})"
    return None


def main() -> None:
    wanted = " ".join(sys.argv[1:])
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", WORK / "csrc")
    bad = 0
    for mutation in MUTATIONS:
        if wanted not in mutation.name:
            continue
        by = noticed(mutation)
        bad += (by is None) != bool(mutation.equivalent)
        why = f"equivalent: {mutation.equivalent}" if mutation.equivalent else "NOT NOTICED"
        print(f"{mutation.file:24} {mutation.name:40} {by or why}", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
