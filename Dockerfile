# tokenyard with all that training needs, for CPUs or for CUDA:
#
#     docker build -t tokenyard .
#     docker build -t tokenyard:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#     docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/work/runs" tokenyard:cuda train model=tiny
#
# The wheels of CUDA hold its libraries, so the base needs only the driver of the host. Triton compiles kernels with gcc.
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tokenyard
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN grep '^torch==' constraints.txt > /tmp/torch.txt && pip install --no-cache-dir --index-url "$TORCH_INDEX" -r /tmp/torch.txt
COPY . .
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt && \
    pip install --no-cache-dir -c /tmp/constraints.txt ".[report,hf]" && rm -rf /opt/tokenyard

# Nobody's files in mounted folders belong to root, and runs are where the user's folder is mounted.
RUN useradd --create-home --uid 1000 tokenyard && mkdir -p /work/runs && chown -R tokenyard /work
USER tokenyard
WORKDIR /work
ENTRYPOINT ["tokenyard"]
CMD ["--help"]
