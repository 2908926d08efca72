# The one image of head, workers and MLflow: docker build --build-arg TDIFF_COMMIT=$(git rev-parse HEAD) -t tdiff:0.1.0 .
# Its digest is known only where it is pulled from: FROM python:…@sha256:… in a registry of your own.
FROM python:3.11.14-slim-bookworm

# HOME is the one folder that is writable when the root file system is not.
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app

RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tdiff \
    && pip install --no-cache-dir uv==0.13.9

# The same versions in every build, those of `make lock`: for x86-64.
COPY requirements.lock /src/

# Layers from the largest and stillest to the smallest. Into the system's Python, so that `ray` is on every shell's PATH;
# bytecode compiled, since every Ray worker imports thousands of modules. torch brings CUDA's libraries: gigabytes in a
# layer of their own.
RUN uv pip install --system --no-cache --compile-bytecode -c /src/requirements.lock \
    "torch>=2.14,<3" "torchvision>=0.29,<1"

# What every manifest says in rayVersion: head, workers and whoever submits must run the same. (Another than the lock's
# does not install.)
ARG RAY_VERSION=2.60.0

# No compiler and no nvcc: what DeepSpeed would compile when it is first used (its own Adam, offloading, quantising) is
# never used. tdiff/engine.py gives it torch's Adam, refuses settings for the rest, and on CPUs keeps it from building its
# shared-memory op. The lock has the extra `cluster`, which MLflow needs for PostgreSQL; boto3, for S3, is there anyway.
RUN uv pip install --system --no-cache --compile-bytecode -r /src/requirements.lock "ray==${RAY_VERSION}"

# Kilobytes, rebuilt with the code. One copy of it: where Python looks first, in the working directory, lie the configs.
COPY configs configs
COPY LICENSE README* pyproject.toml /src/
COPY tdiff /src/tdiff
RUN uv pip install --system --no-cache --no-deps --compile-bytecode /src && rm -r /src

# What the records of runs say of the code, since the image has no repository.
ARG TDIFF_COMMIT=""
ENV TDIFF_COMMIT=$TDIFF_COMMIT

USER 10001:10001

# KubeRay brings its own probes; a batch command has no other health than its exit code.
HEALTHCHECK NONE

CMD ["python", "-m", "tdiff.train", "--help"]
