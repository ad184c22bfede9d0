# Embedding and rerank services.
#   docker build -f deploy/images/encoder.Dockerfile -t infermesh-encoder:0.1.0 .
#
# Today's torch wheels have no kernels for Pascal and Volta (sm_60, sm_70). For such cards name a torch that still has them
# and the index of its CUDA build; OpenVINO, which is for CPUs, is left out then:
#   docker build -f deploy/images/encoder.Dockerfile -t infermesh-encoder:0.1.0-cu126 \
#     --build-arg TORCH=torch==2.8.0 --build-arg TORCH_INDEX=URL_OF_THE_CU126_WHEELS .
# and `image: infermesh-encoder:0.1.0-cu126` in the fleet file, for the instances on those nodes.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH=
ARG TORCH_INDEX=
WORKDIR /src
COPY . .
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN PIP_CONSTRAINT=constraints/main.txt pip wheel --no-deps --wheel-dir /wheels . ./packages/infermesh-client \
    && python -m venv /venv
RUN if [ -z "$TORCH" ]; then \
      /venv/bin/pip install --constraint constraints/main.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        /wheels/infermesh_client-*.whl "$(echo /wheels/infermesh-*.whl)[embedding,rerank]"; \
    else \
      grep -v '^torch==' constraints/main.txt > /tmp/constraints.txt \
      && /venv/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
      && /venv/bin/pip install --constraint /tmp/constraints.txt "$TORCH" sentence-transformers transformers /wheels/*.whl; \
    fi

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /venv /venv
RUN groupadd --gid 10001 infermesh \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin infermesh \
    && install -d -o 10001 -g 10001 /state /models /cache
ENV PATH=/venv/bin:$PATH HOME=/cache HF_HOME=/models/huggingface PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
WORKDIR /state
USER 10001:10001
ENTRYPOINT ["infermesh"]
CMD ["embedding"]
