# Two images: `serve` answers for a model package, `steps` runs the notebooks as jobs. `make image` builds both.
#
# Nothing is installed or fetched when they start. There is no USER: SageMaker expects root. Both run as any user, on a
# read-only root with a writable /tmp, and without capabilities.
ARG BASE=public.ecr.aws/docker/library/python:3.11-slim-bookworm

FROM ${BASE} AS tools
ARG PIP_INDEX_URL PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY locks/build.txt locks/
RUN python3 -m venv /tools && /tools/bin/pip install --quiet --require-hashes -r locks/build.txt

FROM tools AS wheel
ARG PIP_INDEX_URL PIP_FIND_LINKS
COPY pyproject.toml README.md LICENSE ./
COPY intel_nb intel_nb
RUN /tools/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

# An environment without pip and setuptools, made with those of /tools.
FROM tools AS environment
RUN python3 -m venv --without-pip /opt/intel-nb
ENV PIP_PYTHON=/opt/intel-nb/bin/python

FROM environment AS serve-environment
ARG PIP_INDEX_URL PIP_FIND_LINKS
COPY locks/serve.txt locks/
RUN /tools/bin/pip install --quiet --require-hashes --only-binary :all: -r locks/serve.txt
COPY --from=wheel /wheels /wheels
RUN /tools/bin/pip install --quiet --no-deps /wheels/*.whl
COPY --chmod=755 docker/serve /opt/intel-nb/bin/

FROM environment AS steps-environment
ARG PIP_INDEX_URL PIP_FIND_LINKS
# TORCH=cuda takes torch's public wheel with CUDA, which makes the image six gigabytes larger
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY locks/steps.txt locks/cpu.txt locks/cuda.txt locks/
RUN case "$TORCH" in cpu|cuda) ;; *) echo "TORCH is cpu or cuda, not $TORCH" >&2; exit 2;; esac
RUN test "$TORCH" = cuda || /tools/bin/pip install --quiet --require-hashes --no-deps --retries 0 \
    --extra-index-url "$TORCH_INDEX" -r locks/cpu.txt
RUN /tools/bin/pip install --quiet --require-hashes --only-binary :all: -r locks/steps.txt -c locks/cuda.txt
COPY --from=wheel /wheels /wheels
RUN /tools/bin/pip install --quiet --no-deps /wheels/*.whl
COPY --chmod=755 docker/train /opt/intel-nb/bin/
COPY nbs/0?_*.ipynb /opt/intel-nb/nbs/

FROM ${BASE} AS steps
COPY --from=steps-environment /opt/intel-nb /opt/intel-nb
ENV PATH=/opt/intel-nb/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 \
    INTEL_NB_NOTEBOOKS=/opt/intel-nb/nbs
CMD ["train"]

# The last one, which a build without --target makes.
FROM ${BASE} AS serve
COPY --from=serve-environment /opt/intel-nb /opt/intel-nb
ENV PATH=/opt/intel-nb/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
EXPOSE 8080
CMD ["serve"]
