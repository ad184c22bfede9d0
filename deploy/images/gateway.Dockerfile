# Gateway, CLI, embedded registry, adopted servers (openai-http) and the scripted engine: everything without torch.
#   docker build -f deploy/images/gateway.Dockerfile -t infermesh-gateway:0.1.0 .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /src
COPY . .
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN PIP_CONSTRAINT=constraints/main.txt pip wheel --no-deps --wheel-dir /wheels . ./packages/infermesh-client \
    && python -m venv /venv \
    && /venv/bin/pip install --constraint constraints/main.txt /wheels/*.whl

FROM python:${PYTHON}-slim-bookworm
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
