#!/usr/bin/env bash
# Trains on a standing cluster with the code of this folder, edits included:
#   kubectl -n tdiff port-forward service/tdiff-head-svc 8265 &
#   export RAY_ADDRESS=http://localhost:8265 RAY_AUTH_MODE=token
#   RAY_AUTH_TOKEN=$(kubectl -n tdiff get secret ray-token -o jsonpath='{.data.auth_token}' | base64 -d) \
#     jobs/submit.sh configs/digits.yaml name=digits runs=/runs tracking=http://mlflow:5000
set -euo pipefail
cd "$(dirname "$0")/.."
exec ray job submit --working-dir . -- python -m tdiff.train "$@"
