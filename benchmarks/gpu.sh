#!/bin/bash
# Everything that only a GPU can show, in few full calls on a bare machine without a network:
#
#     OUT=results bash benchmarks/gpu.sh check bench     # about 4 minutes: does it run at all, then speed and memory
#     OUT=results bash benchmarks/gpu.sh study           # about 8 minutes: a larger teacher and its students, notebook 03
#
# Parts: check, bench, study. WHEELS is a folder of wheels to install beside what is there; CORPUS a built corpus (a tar of
# runs/pydocs-*), as other package versions give other text. TINY=1 takes sizes that a CPU can do, to try the script.
# ONLY="kd_step tests" leaves the other steps of the parts out. A part that fails does not stop the next; logs and small result files lie in $OUT.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-results}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE=1
export DISTILL_RUNS=${DISTILL_RUNS:-/tmp/gpu-runs}
mkdir -p "$DISTILL_RUNS"

if [ -n "${WHEELS:-}" ] && [ ! -d /tmp/site ]; then
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site "$WHEELS"/*.whl || exit 1
fi
[ -d /tmp/site ] && export PYTHONPATH="$PYTHONPATH:/tmp/site"
if [ -n "${CORPUS:-}" ]; then
    mkdir -p /tmp/corpus
    tar -xf "$CORPUS" -C /tmp/corpus
    DISTILL_CORPUS=$(ls -d /tmp/corpus/*/ | head -n 1)
    export DISTILL_CORPUS
fi

run() {  # run NAME SECONDS COMMAND...: with a limit, a log of its own, its time and its end on the screen
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]] && return 0
    timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
    local code=$?
    echo "== $name: exit $code after $((SECONDS - began)) s"
    [ $code -ne 0 ] && tail -n 12 "$OUT/$name.log"
    return $code
}

check() {
    run facts 60 $PYTHON -c "
import json, torch, transformers, datasets
from distill_utils import artifacts
from distill_utils.data import loading
from distill_utils.planning.plan import machine_ceilings
print(json.dumps({'ceilings': machine_ceilings(), 'corpus': loading.corpus_facts()['fingerprint'], **artifacts.provenance()}))"
    tail -n 1 "$OUT/facts.log"
    run tests 150 $PYTHON -m pytest -q -p no:cacheprovider tests/test_gpu.py
    tail -n 2 "$OUT/tests.log"
}

bench() {
    cd benchmarks
    if [ -n "${TINY:-}" ]; then
        run kd_step 200 $PYTHON kd_step.py --shapes embedded --rounds 1 --steps 2 --output "$OUT/kd_step.json"
        run pseudo_labels 200 $PYTHON pseudo_labels.py --documents 8 --tokens 4 --rounds 1 --output "$OUT/pseudo_labels.json"
        run step_at_scale 200 $PYTHON step_at_scale.py --teachers t5-small --students t5-small:1 --lengths 32/8 \
            --batch-size 2 --paths both --repeats 1 --output "$OUT/step_at_scale.json"
        run miniend_step 200 $PYTHON miniend_step.py --shapes pydocs-t5 --paths miniend --repeats 2 --output "$OUT/miniend_step.json"
        run relation_loss 200 $PYTHON relation_loss.py --batch 1 --length 32 --repeats 2 --output "$OUT/relation_loss.json"
    else
        run kd_step 75 $PYTHON kd_step.py --shapes bart-large t5-3b pegasus-large bart-base t5-base embedded --rounds 1 \
            --steps 8 --output "$OUT/kd_step.json"
        run step_at_scale 45 $PYTHON step_at_scale.py --teachers t5-3b --students t5-base t5-small --batch-size 16 \
            --paths logits both --output "$OUT/step_at_scale.json"
        run pseudo_labels 40 $PYTHON pseudo_labels.py --shapes bart-large --rounds 1 --documents 256 --batch-size 64 \
            --output "$OUT/pseudo_labels.json"
        run miniend_step 40 $PYTHON miniend_step.py --shapes t5-base --paths miniend --repeats 8 --output "$OUT/miniend_step.json"
        run relation_loss 30 $PYTHON relation_loss.py --batch 8 --output "$OUT/relation_loss.json"
    fi
    cd ..
}

study() {
    local width=512 heads=8 batch=128 seconds=${STUDY_SECONDS:-140} changes=()
    if [ -n "${TINY:-}" ]; then
        width=64 heads=2 batch=8 seconds=8
        changes=(-p num_train=64 -p num_test=24 -p num_validation=16 -p max_steps=4 -p batch_size=8 -p warmup_steps=1)
    fi
    local teacher="$DISTILL_RUNS/teacher-w$width"
    run larger_teacher $((seconds * 2 + 60)) $PYTHON benchmarks/larger_teacher.py --width $width --heads $heads \
        --batch-size $batch --seconds "$seconds" --output "$teacher"
    grep -h "ms an update" "$OUT/larger_teacher.log"
    cp "$teacher/training.json" "$OUT/larger_teacher.json"
    run report_03 ${REPORT_SECONDS:-350} $PYTHON -m distill_utils report 03 --profile h200 -p teacher="$teacher" \
        "${changes[@]}" --output "$OUT/reports"
    (cd "$DISTILL_RUNS" && tar -cJf "$OUT/study_runs.tar.xz" */history.csv */results.json */scores.json)
    tar -cJf "$OUT/study.tar.xz" -C "$OUT" reports
    rm -rf "$OUT/reports"
}

for part in "$@"; do
    case $part in check | bench | study) $part ;; *) echo "no part $part: use check, bench, study" >&2; exit 2 ;; esac
done
