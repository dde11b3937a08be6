# The demo, on CPU:  docker build -t hf-fip . && docker run --rm hf-fip
# With CUDA:         docker build --target cuda -t hf-fip:cuda . && docker run --rm --gpus all hf-fip:cuda
#
# The package index has PyTorch with its CUDA libraries, gigabytes of them. Give the index of its CPU builds (its
# installation page names it) for a small image: docker build --build-arg TORCH_INDEX=https://… -t hf-fip .

FROM python:3.11.13-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 fip
WORKDIR /home/fip/hf_fip
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY hf_fip hf_fip
COPY recipes recipes
RUN chown fip:fip .
CMD ["sh", "-c", "python recipes/purify_vit.py --output_dir outputs/fip --overwrite_output_dir && python recipes/purify_vit.py --adapter singular --output_dir outputs/fast_fip --overwrite_output_dir && python recipes/compare_runs.py outputs/fip outputs/fast_fip"]

FROM base AS cuda
RUN pip install -c constraints.txt .
USER 1000

FROM base AS cpu
ARG TORCH_INDEX=""
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install -c constraints.txt .
USER 1000
