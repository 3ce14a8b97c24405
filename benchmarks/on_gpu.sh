#!/usr/bin/env bash
# Everything that only a GPU can say, in one run of under 8 minutes: writes on_gpu.json and says what it found.
#
#   benchmarks/on_gpu.sh [--data FOLDER_OF_CIFAR10] [--json FILE]     # on a GPU
#   benchmarks/on_gpu.sh --toy [--data digits] [--json FILE]          # the same at toy size, on any machine
#
# PYTHON names the interpreter (default: python). See benchmarks/on_gpu.py for the parts.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/on_gpu.py" "$@"
