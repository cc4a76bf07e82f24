#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# usage: benchmarks/gpu_check.sh OUT_DIR
#
# On a machine with a CUDA device: builds csrc/ with CUDA in place, runs the whole test-suite, then the benchmarks,
# then a test of the noise's law, and leaves a log of each phase, summary.txt and one CSV for each suite in OUT_DIR. A phase
# that fails or outlasts its limit does not stop the next; the exit status is the worst of them. 9 minutes in all at most.
#
# Needs torch, triton, nvcc, setuptools, pybind11, ninja and the test packages of pyproject.toml; no network. Packages
# that the machine lacks are taken from wheels in .whl/ at the repository's root. PYTHON names the interpreter.
set -u -o pipefail

fail() {
  echo "gpu_check: $2" >&2
  exit "$1"
}

[ $# -eq 1 ] || fail 2 "expected one argument, the folder for CSV and logs: benchmarks/gpu_check.sh OUT_DIR"
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

"$python" -c 'import torch' || fail 3 "$python has no torch"
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) ||
  fail 3 "needs a CUDA device, and torch sees none"

mkdir -p "$1" || fail 2 "cannot make the folder $1"
out=$(cd "$1" && pwd)
cd "$root" || exit 2

if compgen -G '.whl/*.whl' >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl ||
    fail 4 "the wheels in .whl/ do not install"
fi
export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

worst=0
summary=$(printf '%-6s %8s %8s  %s' phase seconds limit result)

# phase NAME LIMIT_SECONDS COMMAND...
phase() {
  local name=$1 limit=$2 began=$SECONDS status=0 result=passed
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) ;;
    124 | 137) result="stopped at its limit" ;;
    *) result="failed with status $status" ;;
  esac
  [ "$status" -le "$worst" ] || worst=$status
  summary+=$(printf '\n%-6s %8d %8d  %s' "$name" $((SECONDS - began)) "$limit" "$result")
  echo "== $name: $result"
  tail -n 15 "$out/$name.log"
}

# With pytest-xdist the files of the suite are shared out; every worker has a CUDA context of its own.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
  workers=(-n 8 --dist loadfile)
fi

phase build 120 env WAVEDP_BUILD_CUDA=1 WAVEDP_CUDA_ARCHS="${WAVEDP_CUDA_ARCHS:-$arch}" \
  "$python" setup.py build_ext --inplace
phase tests 240 "$python" -m pytest -ra --durations=10 ${workers[@]+"${workers[@]}"}
# What takes longer than this is left to `benchmarks/run.py --device cuda`: other level counts, gradients, training.
phase bench 90 "$python" benchmarks/run.py wavelet wavedec2-L3 waverec2-L3 coarse-L3 wavelet_tokens wavelet_untokens \
  small --device cuda --out "$out"
phase noise 40 "$python" benchmarks/run.py noise normals noisy_mean step-adamw --device cuda --out "$out"
phase law 20 "$python" -m wavedp noise-law --draws 1e8 --device cuda
phase dp 30 "$python" benchmarks/run.py dp ghost_norm clip_and_sum scaled_weight_grad --device cuda --out "$out"

{
  nvidia-smi -L
  nvcc --version | tail -n 1
  "$python" -c 'import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)'
  echo
  echo "$summary"
} 2>&1 | tee "$out/summary.txt"
exit "$worst"
