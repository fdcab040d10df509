# syntax=docker/dockerfile:1.7
# `docker build .` bakes the base weights in; `docker build --target slim .` leaves them out, for an endpoint with
# a cached model or with the weights on its volume (docs/deployment.md).
ARG WORKER_MODEL=stabilityai/stable-diffusion-xl-base-1.0
ARG WORKER_REFINER=auto
ARG WORKER_VAE=auto

FROM python:3.11-slim AS packages

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/models/huggingface \
    RUNPOD_DEBUG_LEVEL=INFO

WORKDIR /app

# torch brings CUDA's libraries with it; the driver comes from the host.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
COPY requirements.txt requirements-dev.txt ./
# bitsandbytes is for QUANTIZATION alone.
RUN pip install --index-url ${TORCH_INDEX} "$(grep '^torch==' requirements.txt)" \
    && pip install -r requirements.txt "$(grep '^bitsandbytes==' requirements-dev.txt)"

FROM packages AS weights
# Only what download_weights.py imports, so that a change of other code does not fetch 14 GB again.
COPY download_weights.py settings.py ./
COPY pipelines/__init__.py pipelines/baking.py pipelines/weights.py pipelines/
COPY lora/__init__.py lora/
COPY lora/fetch/__init__.py lora/fetch/snapshots.py lora/fetch/
ARG WORKER_MODEL WORKER_REFINER WORKER_VAE
ENV WORKER_MODEL=${WORKER_MODEL} WORKER_REFINER=${WORKER_REFINER} WORKER_VAE=${WORKER_VAE}
# For gated models: docker build --secret id=HF_TOKEN,env=HF_TOKEN .
RUN --mount=type=secret,id=HF_TOKEN \
    if [ -s /run/secrets/HF_TOKEN ]; then export HF_TOKEN="$(cat /run/secrets/HF_TOKEN)"; fi; \
    mkdir -p ${HF_HOME} && python download_weights.py && HF_HUB_OFFLINE=1 python download_weights.py --check

FROM packages AS slim
COPY handler.py download_weights.py schemas.py entries.py validation.py settings.py text_settings.py ./
COPY pyproject.toml ./
COPY live/ live/
COPY lora/ lora/
COPY pipelines/ pipelines/
COPY text/ text/
COPY worker/ worker/
COPY demo/model/ demo/model/
COPY demo/loras/ demo/loras/
COPY demo/tiny_vae/ demo/tiny_vae/
COPY demo/text/ demo/text/

# RunPod mounts the network volume as root's, so root is the default; RUN_AS=worker where it may be written.
ARG RUN_AS=root
RUN useradd --create-home worker && mkdir -p /models/loras && chown worker /models/loras
USER ${RUN_AS}

CMD ["python", "handler.py"]

FROM slim
ARG WORKER_MODEL WORKER_REFINER WORKER_VAE
ENV WORKER_MODEL=${WORKER_MODEL} WORKER_REFINER=${WORKER_REFINER} WORKER_VAE=${WORKER_VAE}
# A layer of its own, which stays as it is when the code changes.
COPY --link --from=weights /models/huggingface /models/huggingface
