#!/usr/bin/env bash
# Everything that takes a GPU, unattended: its tests, tuning, all benchmarks, the papers' tables, a report; one folder.
#
#   make gpu                      on a machine with a GPU, from a clean checkout
#   make gpu DRY=1                only prints the steps
#   make gpu QUICK=1              small shapes, and the papers' tables at scale tiny
#   make gpu STEPS="env bench"    some of: install env tests tune bench papers report
#
# MODEL (7B by default), SCALE of the papers, BENCHES, PAPERS (tables) and OUT (the folder) may be set as well. A step
# that fails is logged and the next one runs; one that is done is not done again in the same folder, so that the same
# command goes on after an interruption. Exit code 1 if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
MAKE=${MAKE:-make}
TRISPARSE=${TRISPARSE:-$BIN/trisparse}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-NousResearch/Llama-2-7b-hf}
STEPS=${STEPS:-install env tests tune bench papers report}
BENCHES=${BENCHES:-select linear tokens prune}
quick=${QUICK:+--quick}
SCALE=${SCALE:-$([ -n "$quick" ] && echo tiny || echo paper)}
model=$([ -n "$quick" ] || echo "--model $MODEL")

# The newest folder that is not finished, else a new one.
newest() {
    local folder
    for folder in $(ls -d gpu-results-*/ 2>/dev/null | sort -r); do
        [ -e "$folder/finished" ] || { echo "${folder%/}"; return; }
    done
    date +gpu-results-%Y-%m-%d-%H%M%S
}
OUT=${OUT:-$(newest)}
rows=$OUT/rows
failed=()
done_steps=0

say() { echo "$(date +%H:%M:%S) $*"; }

# step NAME COMMAND...: run it unless it is done, with its output in NAME.log.
step() {
    local name=$1 log
    shift
    log=$OUT/logs/${name//\//-}.log
    if [ -n "${DRY:-}" ]; then
        echo "$name: $*"
        return
    fi
    if [ -e "$OUT/done/${name//\//-}" ]; then
        say "$name: done before"
        return
    fi
    say "$name: $*"
    local began=$SECONDS
    if bash -o pipefail -c "$*" >>"$log" 2>&1; then
        touch "$OUT/done/${name//\//-}"
        done_steps=$((done_steps + 1))
        say "$name: done in $((SECONDS - began)) s"
    else
        failed+=("$name")
        say "$name: FAILED after $((SECONDS - began)) s, see $log"
    fi
}

chosen() { [[ " $STEPS " == *" $1 "* ]]; }

for word in $STEPS; do
    case $word in
    install | env | tests | tune | bench | papers | report) ;;
    *)
        echo "error: unknown step $word; STEPS are install env tests tune bench papers report" >&2
        exit 2
        ;;
    esac
done

cat <<TEXT
Folder: $OUT
Expected duration on one A100, an estimate that nothing has measured: installing, tests and tuning 1 h, benchmarks 2 to
3 h, the papers' tables at 7B 2 to 4 days (leave "papers" out of STEPS for the rest alone). QUICK=1: an hour in all.
TEXT
[ -n "${DRY:-}" ] || mkdir -p "$OUT/logs" "$OUT/done" "$rows"

if chosen install; then step install "$MAKE .venv/.demo"; fi
if chosen env; then
    step env "$TRISPARSE env --json | tee $OUT/env.json && { ! command -v nvidia-smi || nvidia-smi -q >$OUT/nvidia-smi.txt; }"
fi
if chosen tests; then step tests "$BIN/python -m pytest -m gpu"; fi
if chosen tune; then step tune "$TRISPARSE bench tune --device $DEVICE --json >$OUT/tune.json"; fi
if chosen bench; then
    for name in $BENCHES; do
        own=$([ "$name" = prune ] && echo "$model")
        step "bench-$name" "$TRISPARSE bench run $name $quick $own --device $DEVICE --out $rows"
    done
fi
if chosen papers; then
    # The names come from the program. Cells that are measured stay in bench/results/papers: both commands share them.
    names=${PAPERS:-$("$TRISPARSE" bench list 2>/dev/null | awk '$1 ~ "^papers/" { sub("^papers/", "", $1); print $1 }')}
    how="$model --scale $SCALE --device $DEVICE"
    for name in $names; do
        step "papers-$name" "$TRISPARSE bench papers $name $how && $TRISPARSE bench run papers/$name $how --out $rows"
    done
    if [ -z "$names" ]; then
        failed+=("papers")
        say "papers: FAILED, $TRISPARSE bench list names no tables (it does after the step install)"
    fi
fi
if chosen report; then
    [ -n "${DRY:-}" ] || rm -f "$OUT/done/report" # rows may have come
    step report "$TRISPARSE bench report $rows --out $OUT/report"
fi
[ -n "${DRY:-}" ] && exit 0

[ ! -d bench/results/papers ] || cp -r bench/results/papers "$OUT/"
{
    echo "trisparse $(git rev-parse HEAD 2>/dev/null || echo 'outside a checkout'), $(date -u +%Y-%m-%dT%H:%MZ)"
    echo "steps now: $done_steps done, ${#failed[@]} failed; in all $(ls "$OUT/done" | wc -l) done"
    [ ${#failed[@]} -eq 0 ] || printf 'failed: %s\n' "${failed[@]}"
} | tee "$OUT/summary.txt"
tar czf "$OUT.tar.gz" "$OUT"
say "wrote $OUT and $OUT.tar.gz"
[ ${#failed[@]} -eq 0 ] || exit 1
touch "$OUT/finished"
