#!/usr/bin/env bash
# Trains on a standing cluster with the code of this folder, edits included:
#   kubectl -n tdiff port-forward service/tdiff-head-svc 8265 &
#   export RAY_ADDRESS=http://localhost:8265 RAY_AUTH_MODE=token
#   export RAY_AUTH_TOKEN=$(kubectl -n tdiff get secret ray-token -o jsonpath='{.data.auth_token}' | base64 -d)
#   jobs/submit.sh configs/digits.yaml name=digits runs=/runs tracking=http://mlflow:5000
# With --per-phase every phase of the tree is a Ray job of its own, and so are then the diffusion model, the samples and
# the report. Their names end in a number and the phase, that of the first job in 0-first. Either way the same command
# started again (without --fresh) goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."

per_phase="" until="" fresh="" name="" config="" arguments=()
for argument in "$@"; do
  case $argument in
    --per-phase) per_phase=yes && continue ;;
    --fresh) fresh=--fresh && continue ;; # deletes what the run has, so only the first job gets it
    --until | --until=*) until=yes ;;
    name=*) name=${argument#name=} ;;
    *.yaml | *.yml) config=$(basename "${argument%.*}") ;;
  esac
  arguments+=("$argument")
done

# What the run's record says of its code: in the cluster it lies in no repository. Empty where it does not here either,
# since an image's own TDIFF_COMMIT is not of this code.
commit=""
if git ls-files --error-unmatch tdiff/__init__.py >/dev/null 2>&1; then
  commit=$(git rev-parse HEAD)$([[ ! $(git status --porcelain -- tdiff) ]] || echo +)
fi
environment="{\"env_vars\": {\"TDIFF_COMMIT\": \"$commit\"}}"

submit=(ray job submit --working-dir . --runtime-env-json "$environment")
[[ $per_phase ]] || exec "${submit[@]}" -- python -m tdiff.train "$@"
if [[ $until ]]; then
  echo "submit: --per-phase goes on to the end of the run: leave --until out." >&2
  exit 2
fi

# What became of a job; fails while it runs, and while the cluster does not answer.
outcome_of() { ray job status "$1" 2>/dev/null | grep -Eo "' (succeeded|failed|was stopped)" | cut -c 3- | head -n 1; }

name=${name:-${config:-run}}
submission="${name//[^A-Za-z0-9._-]/-}-$(date -u +%Y%m%dT%H%M%S)-$$" number=0 upcoming=first
while [[ $upcoming != nothing ]]; do
  job="$submission-$number-$upcoming"
  "${submit[@]}" --no-wait --submission-id "$job" -- \
    python -m tdiff.train ${arguments[@]+"${arguments[@]}"} --until next $fresh
  fresh=""
  # A phase may take hours, in which the connection can break: then its log is followed anew, from its beginning.
  failures=0 since=$SECONDS
  until ray job logs --follow "$job" && outcome=$(outcome_of "$job"); do
    ((SECONDS - since < 60)) || failures=0
    if ((++failures >= ${SUBMIT_TRIES:-120})); then
      echo "submit: the cluster no longer answers, and $job may still run there: ask it with ray job status." >&2
      exit 1
    fi
    sleep 5
    since=$SECONDS
  done
  if [[ $outcome != succeeded ]]; then
    echo "submit: $job $outcome; the same command goes on from there." >&2
    exit 1
  fi
  upcoming=$(ray job logs "$job" | sed -n 's/^next: //p' | tail -n 1)
  if [[ ! $upcoming ]]; then
    echo "submit: $job does not say what is next." >&2
    exit 1
  fi
  number=$((number + 1))
done
