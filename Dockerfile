# All commands, on the CPU: docker build --tag longclip . && docker run --rm --volume "$PWD:/work" longclip longclip-stretch --help
# For CUDA, build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 and run with --gpus all.
FROM python:3.11-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /source
COPY . .
# Releases are pinned: by the argument and by the constraints.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH" \
    && python -m pip install --no-cache-dir --constraint constraints/tf5.txt ".[train,evaluate,diffusion,export]" \
    && rm -rf /source/*

# Files that are written belong to whoever runs it with --user; models are cached below /work.
ENV HF_HOME=/work/.cache/huggingface
WORKDIR /work
RUN chmod 777 /work
USER 1000
CMD ["longclip-stretch", "--help"]
