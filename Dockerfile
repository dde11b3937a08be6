# docker build -t hf-fip . && docker run --rm hf-fip
# More arguments for pip, for example an index with a smaller build of torch: --build-arg PIP_ARGS="--index-url …"
FROM python:3.11-slim

RUN useradd --create-home fip
WORKDIR /home/fip/hf_fip

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY hf_fip hf_fip
ARG PIP_ARGS=""
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt . && chown fip:fip .

COPY recipes recipes
USER fip
CMD ["python", "recipes/purify_vit.py", "--overwrite_output_dir"]
