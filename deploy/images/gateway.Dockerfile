# Gateway, CLI, embedded registry, adopted servers (openai-http) and the scripted engine: everything without torch.
#   docker build -f deploy/images/gateway.Dockerfile -t infermesh-gateway:0.1.0 .
#
# An index of your own, here as in the other two: --secret id=pip.conf,src=FILE --secret id=uv.toml,src=FILE, and where a
# certificate goes with it, --secret id=ca.crt,src=FILE. `make images` passes on what pip on this machine is set to.
ARG PYTHON=3.12
ARG BASE=python:${PYTHON}-slim-bookworm
FROM ${BASE} AS build
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
    && /build/bin/uv pip install --python /venv/bin/python --constraints constraints/main.txt \
      --overrides constraints/overrides.txt --overrides /tmp/ours.txt --requirements pyproject.toml
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache \
    /build/bin/uv pip install --python /venv/bin/python --no-deps --build-constraints constraints/main.txt \
      . ./packages/infermesh-client

FROM ${BASE}
COPY --from=build /venv /venv
# /state: decisions and bans. /models: weights and hub downloads. /cache: whatever libraries keep in a home.
RUN groupadd --gid 10001 infermesh \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin infermesh \
    && install -d -o 10001 -g 10001 /state /models /cache
ENV PATH=/venv/bin:$PATH HOME=/cache PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
WORKDIR /state
USER 10001:10001
ENTRYPOINT ["infermesh"]
CMD ["gateway"]
