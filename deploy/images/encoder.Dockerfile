# Embedding and rerank services.
#   docker build -f deploy/images/encoder.Dockerfile -t infermesh-encoder:0.1.0 .
#
# On a host without GPUs --build-arg TORCH_BACKEND=cpu spares some GB.
#
# Today's torch wheels have no kernels for Pascal and Volta (sm_60, sm_70). For such cards name a torch that still has them
# and its CUDA build; OpenVINO, which is for CPUs, is left out then:
#   docker build -f deploy/images/encoder.Dockerfile -t infermesh-encoder:0.1.0-cu126 \
#     --build-arg TORCH=torch==2.8.0 --build-arg TORCH_BACKEND=cu126 .
# and `image: infermesh-encoder:0.1.0-cu126` in the fleet file, for the instances on those nodes.
ARG PYTHON=3.12
ARG BASE=python:${PYTHON}-slim-bookworm
FROM ${BASE} AS build
ARG TORCH=
# Empty: the build of torch that the index has. Else uv's name of another: cpu, cu126 …
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
    && cp constraints/main.txt /tmp/constraints.txt \
    && if [ -z "$TORCH" ]; then set -- --extra embedding --extra rerank; \
       else sed -i '/^torch==/d' /tmp/constraints.txt; set -- "$TORCH" sentence-transformers transformers; fi \
    && /build/bin/uv pip install --python /venv/bin/python --constraints /tmp/constraints.txt \
      --overrides constraints/overrides.txt --overrides /tmp/ours.txt ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} \
      --requirements pyproject.toml "$@"
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache \
    /build/bin/uv pip install --python /venv/bin/python --no-deps --build-constraints constraints/main.txt \
      . ./packages/infermesh-client

FROM ${BASE}
COPY --from=build /venv /venv
RUN groupadd --gid 10001 infermesh \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin infermesh \
    && install -d -o 10001 -g 10001 /state /models /cache
ENV PATH=/venv/bin:$PATH HOME=/cache HF_HOME=/models/huggingface PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
WORKDIR /state
USER 10001:10001
ENTRYPOINT ["infermesh"]
CMD ["embedding"]
