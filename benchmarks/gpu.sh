#!/bin/bash
# Everything that only a GPU can show, in few full calls on a bare machine without a network:
#
#     OUT=results bash benchmarks/gpu.sh bench check     # less than 9 minutes: speed and memory, then tests
#     OUT=results bash benchmarks/gpu.sh study           # about 6 minutes: students of notebook 03
#     OUT=results bash benchmarks/gpu.sh teachers        # about 9 minutes: the last stages of the embedded teachers
#
# Parts: check, bench, teachers, study. WHEELS is a folder of wheels to install beside torch and transformers: datasets, dill,
# multiprocess and adjustText are enough, but study needs all that notebooks and pages do. CORPUS is a built
# corpus (a tar of runs/pydocs-*) for teachers and study, as other package versions give other text. TINY=1 takes sizes that a CPU can do,
# to try the script. ONLY="kd_step tests" leaves the other steps of the parts out. A part that fails does not stop the next; one log
# and small result files lie in $OUT.
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

run() {  # run NAME SECONDS COMMAND...: with a limit, its time and its end on the screen
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]] && return 0
    local log=$OUT/log.txt
    [[ $name == pydocs-* ]] && log=$OUT/$name.log  # these run side by side
    echo "== $name" >> "$log"
    timeout -k 5 "$limit" "$@" >> "$log" 2>&1
    local code=$?
    echo "== $name: exit $code after $((SECONDS - began)) s"
    [ $code -ne 0 ] && tail -n 12 "$log"
    return $code
}

check() {
    run facts 40 $PYTHON -c "
import json, os, torch, transformers, datasets
from distill_utils import artifacts
from distill_utils.data import loading
from distill_utils.planning.plan import machine_ceilings
print(json.dumps({'ceilings': machine_ceilings(), 'corpus': loading.corpus_facts()['fingerprint'] if os.environ.get('DISTILL_CORPUS') else None, **artifacts.provenance()}))"
    tail -n 1 "$OUT/log.txt"
    run tests 90 $PYTHON -m pytest -q -p no:cacheprovider tests/test_gpu.py
    tail -n 2 "$OUT/log.txt"
}

bench() {
    cd benchmarks
    if [ -n "${TINY:-}" ]; then
        run kd_step 600 $PYTHON kd_step.py --shapes embedded --batch 4 --rounds 1 --output "$OUT/kd_step.json"
        run pseudo_labels 600 $PYTHON pseudo_labels.py --documents 8 --tokens 4 --rounds 1 --output "$OUT/pseudo_labels.json"
        run step_at_scale 600 $PYTHON step_at_scale.py --teachers t5-small --students t5-small:1 --lengths 32/8 \
            --batch-size 2 --paths both --rounds 1 --output "$OUT/step_at_scale.json"
        run relations 600 $PYTHON relations.py --lengths 32 --tokens 64 --rounds 2 --output "$OUT/relations.json"
        run loss_memory 600 $PYTHON loss_memory.py --documents 2 --target 9 --width 32 --output "$OUT/loss_memory.json"
    else
        run kd_step 125 $PYTHON kd_step.py --shapes bart-large t5-3b pegasus-large bart-base t5-base embedded --rounds 8 \
            --forms ours published expert trainer --output "$OUT/kd_step.json"
        run step_at_scale 95 $PYTHON step_at_scale.py --teachers t5-3b --students t5-base t5-small --batch-size 16 \
            --paths logits both --output "$OUT/step_at_scale.json"
        run relations 65 $PYTHON relations.py --shapes t5-base --lengths 128 512 1024 --tokens 8192 --rounds 8 \
            --output "$OUT/relations.json"
        run loss_memory 40 $PYTHON loss_memory.py --documents 64 --rounds 5 --output "$OUT/loss_memory.json"
        run pseudo_labels 80 $PYTHON pseudo_labels.py --shapes bart-large --rounds 1 --documents 128 \
            --output "$OUT/pseudo_labels.json"
    fi
    cd ..
}

teachers() {  # the last stages of the embedded teachers, side by side: none of them fills the GPU
    local seconds=${TEACHER_SECONDS:-240} tuning=${TUNING_SECONDS:-70} size=() name jobs=()
    [ -n "${TINY:-}" ] && seconds=2 tuning=2 size=(--batch-size 2)
    run prepare 100 $PYTHON -c "
from distill_utils.experiments import t5_teacher, teacher
for folder in (teacher.train_tokenizer(), t5_teacher.make_tokenizer()):
    for split in ('train', 'validation'):
        teacher.token_stream(split, teacher.load_tokenizer(folder), folder)"
    for name in pydocs-bart pydocs-t5 pydocs-t5-small pydocs-t5-tiny; do
        run "$name" $((seconds + tuning + 120)) $PYTHON benchmarks/timed_teachers.py $name --seconds "$seconds" \
            --tuning-seconds "$tuning" "${size[@]}" --output "$OUT/$name" &
        jobs+=($!)
    done
    wait "${jobs[@]}"
    for name in pydocs-bart pydocs-t5 pydocs-t5-small pydocs-t5-tiny; do
        grep -h "updates in" "$OUT/$name.log" | tail -n 1
        cp "$OUT/$name"/*.json "$OUT"/
    done
    # One cut short must not take the others with it.
    cp "$OUT/pydocs-bart/pydocs-bart-base/model.safetensors" "$OUT/base.safetensors"
    cp "$OUT/pydocs-bart/pydocs-bart/model.safetensors" "$OUT/bart.safetensors"
    cp "$OUT/pydocs-t5/pydocs-t5/model.safetensors" "$OUT/t5.safetensors"
    (cd "$OUT" && mkdir rest && for name in pydocs-bart pydocs-t5-small pydocs-t5-tiny; do
        mv $name rest/; done; rm -f rest/pydocs-bart/*/model.safetensors; tar -cf rest.tar rest)
    (cd "$OUT" && tar -czf logs.tar.gz ./*.log ./*.json && rm -rf ./*.log ./*.json rest pydocs-*)
}

study() {
    local changes=()
    [ -n "${TINY:-}" ] &&
        changes=(-p num_train=64 -p num_test=24 -p num_validation=16 -p max_steps=4 -p batch_size=8 -p warmup_steps=1)
    run report_03 ${REPORT_SECONDS:-350} $PYTHON -m distill_utils report 03 --profile h200 "${changes[@]}" --output "$OUT/reports"
    (cd "$DISTILL_RUNS" && tar -czf "$OUT/study_runs.tar.gz" */history.csv */results.json */scores.json)
    tar -czf "$OUT/study.tar.gz" -C "$OUT" reports
    rm -rf "$OUT/reports"
}

for part in "$@"; do
    case $part in check | bench | teachers | study) $part ;; *) echo "no part $part: use check, bench, teachers, study" >&2; exit 2 ;; esac
done
