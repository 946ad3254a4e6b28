#!/bin/sh
# Checks and times EdgeLLM on this machine's GPU, from a pack made by `cargo xtask gpu`.
#
#   ./run.sh            everything: kernels, golden tests, times; exit 1 if anything failed
#   ./run.sh check      kernels and golden tests only
#   ./run.sh bench      times only
#
# TIERS  tiers to run, as in "75 90"         [all that the programs have]
# OUT    folder for the results              [./out]
# WORK   folder for the joined model         [./work]
# PARTS  folder that holds the model parts   [./model]
set -u
cd "$(dirname "$0")" || exit 1
what=${1:-all}
here=$(pwd)
OUT=${OUT:-$here/out}
WORK=${WORK:-$here/work}
PARTS=${PARTS:-$here/model}
mkdir -p "$OUT" "$WORK" || exit 1
chmod +x bin/* 2>/dev/null
summary=$OUT/summary.txt
: >"$summary"
failed=0

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
    bin/edgellm run -m "$model" --backend cuda --tier "sm_$1" --greedy -n 256 --json \
        -i "Explain quantum computing:" >"$WORK/decode.txt" || return 1
    cat "$WORK/decode.txt"
    tail -n 1 "$WORK/decode.txt" >>"$OUT/decode.jsonl"
}

: >"$OUT/log.txt"
{ nvidia-smi 2>&1 || echo "no nvidia-smi"; } | tee "$OUT/machine.txt"
model=$WORK/$(sed 's/^[0-9a-f]*  //' "$PARTS/model.sha256")
step "model parts" join_model
tiers=${TIERS:-$(bin/edgellm-bench tiers)}

if [ "$what" != bench ]; then
    for tier in $tiers; do
        step "kernels sm_$tier" bin/edgellm-bench check --tier "$tier"
    done
    for test in bin/golden*; do
        step "$(basename "$test")" golden "$test"
    done
fi
if [ "$what" != check ]; then
    for tier in $tiers; do
        step "decode sm_$tier" decode "$tier"
        step "times sm_$tier" bin/edgellm-bench kernels --tier "$tier" --results "$OUT" \
            --revision "$(cat revision)"
    done
fi

echo "== summary"
cat "$summary"
exit "$failed"
