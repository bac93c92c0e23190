# trajsurgery on an NVIDIA GPU. torch's wheel brings the CUDA libraries, the host the driver.
#
#   docker build -t trajsurgery .
#   docker run --gpus all -v "$PWD/outputs:/runs/outputs" trajsurgery train leapalign-flux
#   docker run --gpus all -v "$HF_HOME:/hub" -v "$PWD:/runs" trajsurgery train leapalign-flux --preset lora-80gb \
#       --prompts train.txt --heldout test.txt
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/hub PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv && pip install --no-cache-dir torch torchvision

COPY pyproject.toml README.md LICENSE /src/
COPY trajsurgery /src/trajsurgery
COPY recipes /src/recipes
RUN pip install --no-cache-dir '/src[gpu,judges,parquet,remote,trackers]' && rm -r /src

RUN useradd --create-home runner && mkdir -p /runs /hub && chown runner /runs /hub
USER runner
WORKDIR /runs
ENTRYPOINT ["trajsurgery"]
CMD ["doctor"]
