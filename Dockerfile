# The server on the CPU, with the built-in model at hand:
#
#     docker build -t kvserve .
#     docker run --rm -p 50051:50051 kvserve
#
# A build for CUDA, or from a package mirror of your own, is a matter of pip's arguments:
#
#     docker build --build-arg PIP_ARGS="--extra-index-url ..." -t kvserve .

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG PIP_ARGS=""
WORKDIR /src
RUN python -m venv /opt/kvserve
ENV PATH="/opt/kvserve/bin:${PATH}"
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY client/ client/
COPY kvcore/ kvcore/
COPY loadgen/ loadgen/
COPY server/ server/
RUN pip install --no-cache-dir --disable-pip-version-check ${PIP_ARGS} -c constraints.txt ./client '.[mlflow,otlp,redis,zstd]'

FROM python:${PYTHON_VERSION}-slim-bookworm
# The CPU kernels are compiled at the first start, for the very processor they run on (a build machine cannot know it):
# hence a compiler in the image. Without one the server starts all the same, on torch's own operations, and says so.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 kvserve
COPY --from=build /opt/kvserve /opt/kvserve
ENV PATH="/opt/kvserve/bin:${PATH}"
# Models and compiled kernels are kept here; mount a volume to keep them for longer.
WORKDIR /home/kvserve
USER 10001
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 CMD ["kvctl", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["kvserve"]
CMD ["serve", "--host", "0.0.0.0"]
