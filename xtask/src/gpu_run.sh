#!/bin/sh
# Checks and times EdgeLLM on this machine's GPU, from a pack made by `cargo xtask gpu`.
#
#   ./run.sh                    everything: kernels, golden tests, times; exit 1 if anything failed
#   ./run.sh check              kernels and golden tests only
#   ./run.sh bench              times only
#   ./run.sh ncu [KERNEL] [--shape NxK] [--tier SM] …
#                               hardware counters of these kernels, by Nsight Compute: a table, and
#                               all of them in $OUT/counters.csv
#   ./run.sh COMMAND …          any other command of edgellm-bench, as in `kernels int4 --shape 8960x1536`
#
# A pack made with --no-model has no golden tests and no decode times: it says so.
#
# TIERS  tiers to run, as in "75 90"         [all that the programs have]
# OUT    folder for the results              [./out]
# WORK   folder for unpacked files           [./work]
# PARTS  folder that holds the model parts   [./model]
# NCU    Nsight Compute                      [ncu, or where NVIDIA's packages put it]
set -u
cd "$(dirname "$0")" || exit 1
what=${1:-all}
[ $# -gt 0 ] && shift
here=$(pwd)
OUT=${OUT:-$here/out}
WORK=${WORK:-$here/work}
PARTS=${PARTS:-$here/model}
mkdir -p "$OUT" "$WORK/bin" || exit 1
summary=$OUT/summary.txt
: >"$summary"
: >"$OUT/log.txt"
failed=0

# Programs are packed one by one: unpacked once, into $WORK.
for program in bin/*; do
    case $program in
    *.xz)
        unpacked=$WORK/bin/$(basename "$program" .xz)
        if command -v xz >/dev/null; then
            xz -dc "$program" >"$unpacked"
        else
            python3 -c 'import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$program" "$unpacked"
        fi || exit 1
        ;;
    *) cp "$program" "$WORK/bin/" || exit 1 ;;
    esac
done
chmod +x "$WORK"/bin/*
bin=$WORK/bin

# step NAME COMMAND...: runs a step, shows its output and notes how it ended.
step() {
    name=$1
    shift
    echo "== $name"
    if "$@" >"$WORK/step.log" 2>&1; then
        result=pass
        grep -q '^skipped: no GPU' "$WORK/step.log" && result=skip
    else
        result="FAIL (exit $?)"
        failed=1
    fi
    cat "$WORK/step.log"
    { echo "== $name: $result"; cat "$WORK/step.log"; } >>"$OUT/log.txt"
    echo "$result  $name" >>"$summary"
}

join_model() {
    (cd "$PARTS" && sha256sum -c SHA256SUMS) || return 1
    cat "$PARTS"/part-* >"$model" || return 1
    (cd "$WORK" && sha256sum -c "$PARTS/model.sha256")
}

# The golden tests run every tier themselves. Random weights have no golden text: only the tests
# that bring their own models apply then.
golden() {
    only=
    [ -e model/random ] && only=tiny
    EDGELLM_GOLDEN_DIR=$here/data EDGELLM_MODEL=$model "$1" --nocapture --test-threads 1 $only
}

decode() {
    "$bin/edgellm" run -m "$model" --backend cuda --tier "sm_$1" --greedy -n 256 --json \
        -i "Explain quantum computing:" >"$WORK/decode.txt" || return 1
    cat "$WORK/decode.txt"
    tail -n 1 "$WORK/decode.txt" >>"$OUT/decode.jsonl"
}

counters() {
    ncu=${NCU:-$(command -v ncu)}
    for place in /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu; do
        [ -z "$ncu" ] && [ -x "$place" ] && ncu=$place
    done
    if [ -z "$ncu" ]; then
        echo "no Nsight Compute: ncu is not on the PATH; NCU names it" >&2
        return 1
    fi
    "$bin/edgellm-bench" counters --ncu "$ncu" --csv "$OUT/counters.csv" "$@"
}

{ nvidia-smi 2>&1 || echo "no nvidia-smi"; } >"$OUT/machine.txt"
case $what in
all | check | bench) ;;
ncu)
    step "counters" counters "$@"
    exit "$failed"
    ;;
*)
    step "$what" "$bin/edgellm-bench" "$what" "$@"
    exit "$failed"
    ;;
esac

cat "$OUT/machine.txt"
tiers=${TIERS:-$("$bin/edgellm-bench" tiers)}
model=
if [ -e "$PARTS/model.sha256" ]; then
    model=$WORK/$(sed 's/^[0-9a-f]*  //' "$PARTS/model.sha256")
    step "model parts" join_model
else
    echo "not run: golden tests and decode times, as this pack has no model" | tee -a "$summary"
fi

if [ "$what" != bench ]; then
    for tier in $tiers; do
        step "kernels sm_$tier" "$bin/edgellm-bench" check --tier "$tier"
    done
    for test in "$bin"/golden*; do
        [ -n "$model" ] && step "$(basename "$test")" golden "$test"
    done
fi
if [ "$what" != check ]; then
    for tier in $tiers; do
        [ -n "$model" ] && step "decode sm_$tier" decode "$tier"
        step "times sm_$tier" "$bin/edgellm-bench" kernels --tier "$tier" --results "$OUT" \
            --revision "$(cat revision)"
    done
fi

echo "== summary"
cat "$summary"
exit "$failed"
