# CPU:  docker build -t growkit .
# CUDA: docker build -t growkit --build-arg BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime .
ARG BASE=python:3.12-slim
FROM ${BASE}
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY growkit growkit
COPY recipes recipes
# An image that brings torch keeps its own.
RUN pip install --no-cache-dir ".[plots,data]"
WORKDIR /work
ENTRYPOINT ["growkit"]
CMD ["--help"]
