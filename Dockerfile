# syntax=docker/dockerfile:1
# slime_spec with the releases that constraints.txt pins.
#   docker build -t slime_spec .                                             for CPUs
#   docker build -t slime_spec --build-arg TORCH=cu130 --build-arg SGLANG=0.5.21 .   for NVIDIA GPUs, with SGLang
# docs/clusters.md has commands that run it.
ARG PYTHON=3.11

FROM python:${PYTHON}-bookworm AS wheel
WORKDIR /sources
COPY setup.py pyproject.toml README.md LICENSE ./
COPY conf conf
COPY slime_spec slime_spec
COPY rollout rollout
COPY trainer_bridge trainer_bridge
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

# This image, not the slim one, has the C compiler of the embedded engine's kernels.
FROM python:${PYTHON}-bookworm
RUN useradd --create-home --uid 1000 slime
# A part of PyTorch's index: cpu, or a release of CUDA.
ARG TORCH=cpu
COPY constraints.txt /opt/slime_spec/
# torch first and by exact pin: every other order lets a dependency choose another build of it.
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" \
    "$(grep '^torch==' /opt/slime_spec/constraints.txt)"
# SGLang's pins contradict ours, and its servers are processes of their own: --sglang-python /opt/sglang/bin/python.
ARG SGLANG=""
RUN if [ -n "${SGLANG}" ]; then \
      python -m venv /opt/sglang && /opt/sglang/bin/pip install --no-cache-dir "sglang==${SGLANG}"; \
    fi
# Of docs/install.md; the recipes' reward needs math.
ARG EXTRAS=math,datasets,tensorboard
COPY --from=wheel /dist /opt/slime_spec/dist
RUN pip install --no-cache-dir --constraint /opt/slime_spec/constraints.txt \
    "$(echo /opt/slime_spec/dist/*.whl)[${EXTRAS}]"

USER 1000
WORKDIR /home/slime
# Of the host's driver: CUDA, and nvidia-smi, which says what GPUs there are.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["slime-spec"]
CMD ["--help"]
