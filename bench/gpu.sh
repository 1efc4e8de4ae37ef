#!/usr/bin/env bash
# Everything that takes a GPU, unattended: its tests, tuning, all benchmarks, the papers' tables, a report; one folder.
#
#   make gpu                      on a machine with a GPU, from a clean checkout
#   make gpu DRY=1                only prints the steps
#   make gpu QUICK=1              small shapes, and the papers' tables at scale tiny
#   make gpu STEPS="env bench"    some of: install env tests tune bench papers report
#
# MODEL (7B by default), SCALE of the papers, BENCHES, PAPERS (tables) and OUT (the folder) may be set as well. A table
# runs on MODEL where the paper has it, else on the paper's own models up to its size. A step that fails is logged and
# the next one runs; one that is done is not done again in the same folder, so that the same command goes on after an
# interruption, on the same commit. Exit code 1 if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
MAKE=${MAKE:-make}
TRISPARSE=${TRISPARSE:-$BIN/trisparse}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-NousResearch/Llama-2-7b-hf}
STEPS=${STEPS:-install env tests tune bench papers report}
BENCHES=${BENCHES:-select linear tokens prune roofline}
quick=${QUICK:+--quick}
SCALE=${SCALE:-$([ -n "$quick" ] && echo tiny || echo paper)}
head=$(git rev-parse HEAD 2>/dev/null || echo "outside a checkout")

# The newest folder of this commit that is not finished, else a new one.
newest() {
    local folder
    for folder in $(ls -d gpu-results-*/ 2>/dev/null | sort -r); do
        [ -e "$folder/finished" ] || [ "$(commit_of "$folder")" != "$head" ] || { echo "${folder%/}"; return; }
    done
    date +gpu-results-%Y-%m-%d-%H%M%S
}
commit_of() { cat "$1/commit" 2>/dev/null; }
OUT=${OUT:-$(newest)}
rows=$OUT/rows
if [ -d "$OUT/done" ] && [ "$(commit_of "$OUT")" != "$head" ]; then
    echo "error: $OUT has results of another commit than $head: set OUT to another folder" >&2
    exit 2
fi
# As words of a command line, which a shell reads once more.
quoted() { printf '%q ' "$@"; }
program=$(quoted "$TRISPARSE")bench
device=$(quoted --device "$DEVICE")
own_model=$([ -n "$quick" ] || quoted --model "$MODEL")
failed=()
done_steps=0

say() { echo "$(date +%H:%M:%S) $*"; }

# step NAME COMMAND: run the command line unless it is done, with its output in NAME.log.
step() {
    local name=$1 command log
    command=$(tr -s ' ' <<<"$2")
    command=${command% }
    log=$OUT/logs/${name//\//-}.log
    if [ -n "${DRY:-}" ]; then
        echo "$name: $command"
        return
    fi
    if [ -e "$OUT/done/${name//\//-}" ]; then
        say "$name: done before"
        return
    fi
    say "$name: $command"
    local began=$SECONDS
    if bash -o pipefail -c "$command" >>"$log" 2>&1; then
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
[ -n "${DRY:-}" ] || { mkdir -p "$OUT/logs" "$OUT/done" "$rows" && echo "$head" >"$OUT/commit"; }

if chosen install; then step install "$MAKE .venv/.demo"; fi
if chosen env; then
    step env "$(quoted "$TRISPARSE")env --json | tee $(quoted "$OUT/env.json")&& { ! command -v nvidia-smi || nvidia-smi -q >$(quoted "$OUT/nvidia-smi.txt"); }"
fi
if chosen tests; then step tests "$(quoted "$BIN/python")-m pytest -m gpu"; fi
if chosen tune; then step tune "$program tune $device --json >$(quoted "$OUT/tune.json")"; fi
if chosen bench; then
    for name in $BENCHES; do
        where=$device
        own=
        case $name in
        prune) own=$own_model ;;
        roofline) where= ;; # counted, on the CPU
        esac
        step "bench-$name" "$program run $(quoted "$name")$quick $own $where --out $(quoted "$rows")"
    done
fi
if chosen papers; then
    # The program says which tables there are, and of which models; cells that are measured lie in $rows/papers, for
    # both commands. PAPERS is split into words.
    if [ -n "$quick" ]; then
        list() { "$TRISPARSE" bench list | awk '$1 ~ "^papers/" { sub("^papers/", "", $1); print $1 }'; }
        planned=${PAPERS:+$(printf '%s\n' $PAPERS)}
        planned=${planned:-$(list 2>/dev/null)}
    else
        plan_log=$OUT/logs/plan.log # says what is left out
        [ -z "${DRY:-}" ] || plan_log=/dev/null
        planned=$("$TRISPARSE" bench papers ${PAPERS:-} --plan "$MODEL" 2>"$plan_log")
    fi
    while read -r name model; do
        [ -n "$name" ] || continue
        how="${model:+$(quoted --model "$model")}--scale $(quoted "$SCALE")$device"
        folder=$(quoted "$rows")
        step "papers-$name${model:+-${model##*/}}" "$program papers $name $how --out ${folder% }/papers && $program run papers/$name $how --out $folder"
    done <<<"$planned"
    if [ -z "$planned" ] && [ -n "${DRY:-}" ]; then
        echo "papers-NAME: ... for each table of trisparse bench list, which the step install brings"
    elif [ -z "$planned" ]; then
        failed+=("papers")
        say "papers: FAILED, $TRISPARSE names no tables: it is not installed, or all of PAPERS are of larger models"
    fi
fi
if chosen report; then
    [ -n "${DRY:-}" ] || rm -f "$OUT/done/report" # rows may have come
    step report "$program report $(quoted "$rows")--out $(quoted "$OUT/report")"
fi
[ -n "${DRY:-}" ] && exit 0

{
    echo "trisparse $head, $(date -u +%Y-%m-%dT%H:%MZ)"
    echo "steps now: $done_steps done, ${#failed[@]} failed; in all $(ls "$OUT/done" | wc -l) done"
    [ ${#failed[@]} -eq 0 ] || printf 'failed: %s\n' "${failed[@]}"
} | tee "$OUT/summary.txt"
tar czf "$OUT.tar.gz" "$OUT"
say "wrote $OUT and $OUT.tar.gz"
[ ${#failed[@]} -eq 0 ] || exit 1
touch "$OUT/finished"
