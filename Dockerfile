# The one image of head, workers and MLflow: docker build -t tdiff:0.1.0 .
FROM python:3.11-slim

# What every manifest says in rayVersion: head, workers and whoever submits must run the same.
ARG RAY_VERSION=2.60.0

# HOME is the one folder that is writable when the root file system is not.
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app

# Gigabytes, rebuilt only when pyproject.toml changes. Into the system's Python, so that `ray` is on every shell's
# PATH; bytecode compiled, since every Ray worker imports thousands of modules.
COPY pyproject.toml ./
RUN pip install --no-cache-dir "uv>=0.8,<1" \
    && uv pip install --system --no-cache --compile-bytecode -r pyproject.toml "ray==${RAY_VERSION}"

# Kilobytes, rebuilt with the code.
COPY LICENSE README* ./
COPY configs configs
COPY tdiff tdiff
RUN uv pip install --system --no-cache --no-deps --compile-bytecode . \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tdiff

USER 10001:10001

# KubeRay brings its own probes; a batch command has no other health than its exit code.
HEALTHCHECK NONE

CMD ["python", "-m", "tdiff.train", "--help"]
