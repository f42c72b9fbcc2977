"""GPTQ by llm-compressor, as the contestant of `bench_gptq_peer`: a script for an environment of its own.

    PYTHON llmcompressor_gptq.py MODEL TOKENS BITS GROUP BATCH THREADS

For every number on stdin it quantizes a fresh copy of MODEL (a Hugging Face folder) on that many rows of TOKENS (a .npy
file of int64) and prints [seconds, CPU seconds] as JSON; `versions` answers with the versions instead.
"""

import copy
import json
import sys
import time
from importlib.metadata import version

import numpy
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main(folder: str, tokens: str, bits: str, group: str, batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.from_numpy(numpy.load(tokens))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    data = data.with_format("torch")
    weights = QuantizationArgs(num_bits=int(bits), symmetric=True, strategy="group", group_size=int(group))
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # it asks for one beside any data
    for line in sys.stdin:
        if line.strip() == "versions":
            found = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
            print(json.dumps(found), flush=True)
            continue
        count, changed = int(line), copy.deepcopy(model)
        loader = DataLoader(data.select(range(count)), batch_size=int(batch))
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe = GPTQModifier(
            config_groups=groups, ignore=["lm_head"], block_size=128, dampening_frac=0.01, actorder="static"
        )
        began, used = time.perf_counter(), time.process_time()
        oneshot(
            model=changed,
            processor=unused,
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=count,
            pipeline="sequential",
        )
        print(json.dumps([time.perf_counter() - began, time.process_time() - used]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
