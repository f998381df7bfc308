#!/usr/bin/env bash
# Installs what the tests need on Debian, then checks formatting, lints and documentation and runs every test.
# Under CI (CI=true) nothing may be skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

# With the minutes gone, so that what is slow can be seen.
step() { printf '\n== %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

# python3 and numpy run the artifact reader that was written from FORMAT.md alone; prometheus_client reads /metrics;
# chromium looks at the console; curl runs the documented examples; faketime turns the clock.
missing=()
{ command -v cc && command -v c++; } >/dev/null || missing+=(build-essential)
/usr/bin/python3 -c 'import numpy, prometheus_client' 2>/dev/null ||
    missing+=(python3 python3-numpy python3-prometheus-client)
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
command -v valgrind >/dev/null || missing+=(valgrind)
[ -e "/usr/lib/$(uname -m)-linux-gnu/faketime/libfaketimeMT.so.1" ] || missing+=(faketime)
command -v curl >/dev/null || missing+=(curl ca-certificates)
[ -x /usr/bin/chromedriver ] || missing+=(chromium chromium-driver fonts-dejavu-core)
if [ ${#missing[@]} -gt 0 ]; then
    step "installing ${missing[*]}"
    sudo=$([ "$(id -u)" -eq 0 ] || echo sudo)
    $sudo apt-get update -q
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

step "clients nobody here wrote"
[ -x target/venv/bin/python ] || /usr/bin/python3 -m venv target/venv
target/venv/bin/pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements.txt

step "formatting"
cargo fmt --all --check
step "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings
step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
step "the binaries the system tests drive"
cargo build --release --locked -p butterflyvit -p butterflyvit-trainer
step "tests"
# Instruction sets that this CPU has, so that none is skipped without anybody noticing.
case $(uname -m) in
    x86_64) isas=scalar,avx2$(grep -q avx512_vnni /proc/cpuinfo && echo ,avx512 || true) ;;
    *) isas=scalar ;;
esac
# A test that hangs should name itself here rather than use up the machine.
REQUIRE_ISA=$isas timeout --foreground 45m cargo test --workspace --locked

step "packing and kernels under valgrind, which emulates no AVX-512"
CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind -q --error-exitcode=9" PROPTEST_CASES=8 \
    cargo test --workspace --locked --lib -- --test-threads=1 kernels:: artifact::pack

step "fuzz targets, shortly"
export PATH=$PWD/target/tools/bin:$PATH
command -v cargo-fuzz >/dev/null || cargo install --quiet --locked --root target/tools cargo-fuzz@0.13.2
# Ten seconds of fuzzing are too few to pay for optimising what is fuzzed.
CARGO_PROFILE_RELEASE_OPT_LEVEL=1 fuzz/run 10

step "Kubernetes manifests against their schemas"
target/venv/bin/kubernetes-validate --strict deploy/k8s/{deployment,service,autoscaler}.yaml

step "two minutes of steady load"
/usr/bin/python3 loadtests/load.py soak --minutes 2 --rate 30

step "kernels, engine, golden vectors and a classification as the CPUs of a Raspberry Pi 4 and 5"
tests/arm

step "container images, run as an operator would, and what Prometheus makes of them"
as_root=$([ "$(id -u)" -eq 0 ] || echo "sudo env PATH=$PATH HOME=$HOME")
$as_root deploy/verify
